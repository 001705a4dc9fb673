"""The personalized reward model (P-RM, appendix F.2 of the paper). Not TRL's PRM, which is a *process* reward model."""
