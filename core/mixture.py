"""A new user of a cluster model: a convex fit of their mixture of the centres, under a prior around row 0's."""

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, softmax


def fit_mixture(per_centre: np.ndarray, prior_logits: np.ndarray, strength: float) -> np.ndarray:
    """Cluster logits of a new user.

    Minimises sum softplus(-<w, p_i>) + strength * KL(w_0 || w), which is convex in the weights w, over their logits.

    Args:
        per_centre: (k, C) margins of each comparison under each centre.
        prior_logits: (C,) row 0's.
    """
    prior = softmax(prior_logits)

    def loss(logits: np.ndarray) -> tuple[float, np.ndarray]:
        weights = softmax(logits)
        margins = per_centre @ weights
        value = np.logaddexp(0, -margins).sum() - strength * prior @ np.log(np.maximum(weights, 1e-300))
        slope = per_centre.T @ -expit(-margins)
        return value, weights * (slope - weights @ slope) + strength * (weights - prior)

    return minimize(loss, prior_logits.astype(np.float64), jac=True, method="L-BFGS-B").x
