"""Personalized policies (P-DPO, P-IPO and other preference losses)."""
