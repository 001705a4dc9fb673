"""Evaluation: how well scores agree with people's choices, per user, and against what costs nothing."""
