"""The order in which training reads rows, where that is more than chance; the same one in a resumed run."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainerCallback

BATCHES_SORTED = 50  # whose rows are sorted together, as in transformers


class RowSampler(Sampler[int]):
    """Row numbers in an order that depends on the seed and the epoch alone."""

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __len__(self) -> int:
        return self.rows

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, random: np.random.Generator) -> np.ndarray:
        """All row numbers, (B,)."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(np.random.default_rng((self.seed, self.epoch))).tolist())


class PromptSampler(RowSampler):
    """Rows in random order, those of a prompt together.

    Args:
        prompts: (B,) number of each row's prompt.
    """

    def __init__(self, prompts: Sequence[int], seed: int):
        super().__init__(len(prompts), seed)
        self.prompts = np.asarray(prompts)

    def order(self, random: np.random.Generator) -> np.ndarray:
        place = random.permutation(self.prompts.max() + 1)[self.prompts]
        return np.lexsort((random.random(len(place)), place))


class LengthSampler(RowSampler):
    """Batches of rows of like length, so that little is padding; the batches in random order.

    Transformers' own goes from long to short again and again. What is learned of long responses is then partly
    unlearned on short ones, and what an evaluation finds depends on where it falls.

    Args:
        lengths: (B,) of each row, in tokens.
        batch: rows of an optimizer step in one process.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int):
        super().__init__(len(lengths), seed)
        self.lengths, self.batch = np.asarray(lengths), batch

    def order(self, random: np.random.Generator) -> np.ndarray:
        rows, many = random.permutation(self.rows), self.batch * BATCHES_SORTED
        sets = [rows[start : start + many] for start in range(0, self.rows, many)]
        batches = [
            part[np.argsort(-self.lengths[part], kind="stable")][start : start + self.batch]
            for part in sets
            for start in range(0, len(part), self.batch)
        ]
        whole = [batch for batch in batches if len(batch) == self.batch]
        rest = [batch for batch in batches if len(batch) < self.batch]  # last, or it would shift those after it
        return np.concatenate([*(whole[i] for i in random.permutation(len(whole))), *rest])


class TellsSampler(TrainerCallback):
    """Tells the sampler which epoch it is: accelerate does not where processes share it and batches are skipped."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))
