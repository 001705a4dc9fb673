"""Best-of-n per user: among recorded or sampled responses, the one that this user likes."""
