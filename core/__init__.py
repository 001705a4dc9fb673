"""The user-model core that the reward model and the policy share.

Axes, used in every docstring and end-of-line shape comment of the project:

==  ==========================================================================
B   comparisons of a batch
R   rows of a forward pass (2B: chosen, then rejected)
T   text tokens of a row
K   user tokens (the paper's T_u)
D   hidden size of the backbone
V   vocabulary
U   users, row 0 being the unknown user
C   clusters of users (the paper's K)
N   candidate responses of a prompt
==  ==========================================================================

"The paper" is P-RLHF, arXiv 2402.05133.
"""
