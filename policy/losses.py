"""Preference losses that TRL lacks, pure functions of log-ratios, and how its DPO trainer takes them beside its own."""

from collections.abc import Callable, Sequence
from typing import Any, cast

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


class FurtherLosses:
    """Goes in front of TRL's DPOTrainer: losses of `FURTHER_LOSSES` beside TRL's, on what the model gave for these."""

    further: Sequence[tuple[str, float]] = ()

    def take_further_losses(self) -> None:
        """Parts the losses of the configuration: TRL's stay with its trainer, which knows no others."""
        me: Any = self
        named = list(zip(me.loss_types, me.loss_weights, strict=True))
        self.further = [(name, weight) for name, weight in named if name in FURTHER_LOSSES]
        me.loss_types = [name for name, _ in named if name not in FURTHER_LOSSES]
        me.loss_weights = [weight for name, weight in named if name not in FURTHER_LOSSES]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        me: Any = self
        stock = cast(Any, super()).compute_loss
        if not self.further:
            return stock(model, inputs, return_outputs, num_items_in_batch)
        given: list[Any] = []

        def watched(**kwargs: Any) -> Any:
            given.append(model(**kwargs))
            return given[-1]

        loss = stock(watched, inputs, False, num_items_in_batch)
        chosen, rejected = me.log_ratios(given[0], inputs)
        beta = me.args.ipo_sum_beta or me.beta
        for name, weight in self.further:
            loss = loss + weight * FURTHER_LOSSES[name](chosen, rejected, beta).mean()
        return (loss, given[0]) if return_outputs else loss
