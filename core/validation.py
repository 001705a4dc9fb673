"""The margin of every validation row, with its user and with row 0: what a trainer keeps of an evaluation."""

from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor


def correct(margins: Any) -> Any:
    """1 where the chosen response scores higher, .5 for a tie."""
    return 0.5 + 0.5 * np.sign(margins)


class KeepsMargins:
    """Goes in front of a trainer of TRL, behind `AlphaMix`, whose evaluation batches it sees."""

    _margins: dict[int, tuple[int, float, float]]

    def margins_of(self, out: Any, inputs: dict[str, Any]) -> Tensor:
        """score(chosen) - score(rejected) of a batch, (B,), from the model's output for its 2B rows."""
        raise NotImplementedError

    def record(self, rows: Tensor, inputs: dict[str, Any], halves: list[Any]) -> None:
        """Keeps the margin of every validation row, with its user and with row 0."""
        me: Any = self
        margins = [self.margins_of(out, inputs).float() for out in halves]  # two of (B,)
        numbers = torch.stack([rows, inputs["user_ids"][: len(rows)]], dim=1)  # (B, 2)
        numbers, values = me.accelerator.gather((numbers, torch.stack(margins, dim=1)))  # of all processes
        for (row, user), (own, row0) in zip(numbers.tolist(), values.tolist(), strict=True):
            self._margins[row] = (user, own, row0)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._margins = {}
        out = cast(Any, super()).evaluation_loop(*args, **kwargs)
        if out.metrics is not None and self._margins:
            table = self.margins()
            right = correct(table["margin"])
            prefix = kwargs.get("metric_key_prefix", "eval")
            out.metrics[f"{prefix}_accuracy_average"] = float(right.groupby(table["user"]).mean().mean())
        return out

    def margins(self) -> pd.DataFrame:
        """Of the last evaluation: row, user (its number), margin and margin under row 0, in order of rows."""
        found = [(row, *self._margins[row]) for row in sorted(self._margins)]
        return pd.DataFrame(found, columns=["row", "user", "margin", "margin_row0"])
