"""`prlhf policy generate`: what is drawn, what is kept, and what is said."""
