"""Preference losses that TRL lacks: pure functions of log-ratios."""

from collections.abc import Callable

from torch import Tensor


def ipo_sum(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """IPO as the paper writes it (appendix F.3), `(Delta - 1 / (2 beta))^2`, with log-ratios summed over the response.

    TRL's `ipo` takes means over tokens, so beta means something else there: at .1 this loss wants the chosen response
    ahead by 5 nats, and TRL's by 5 nats per token.

    Args:
        chosen, rejected: (B,) log pi(y|x, u) - log pi_ref(y|x), sums over tokens.

    Returns:
        (B,) loss of each comparison.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


FURTHER_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"ipo_sum": ipo_sum}
