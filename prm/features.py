"""Hidden states of a frozen backbone: computed once per response, cached on disk, resumable.

All poolings of a response are cached side by side, so that another pooling costs no forward pass.
"""

import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.comparisons import Comparison
from ..core.pretrained import Backbone, cache_dir
from ..core.row_cache import LAYOUT, RowCache, fill
from ..core.texts import Text, TextReader, texts_of
from ..core.token_rows import row_inputs, row_key
from ..core.tokenize import TextLayout, TokenRow
from .pooling import POOLINGS, last_state, mean_state


def feature_cache(backbone: Backbone) -> RowCache:
    """The cache of a backbone's hidden states."""
    name = f"{LAYOUT}-{backbone.fingerprint}-{'+'.join(POOLINGS)}"
    return RowCache(cache_dir() / "features" / name, backbone.hidden_size, POOLINGS)


@torch.inference_mode()
def hidden_states(backbone: Backbone, rows: Sequence[TokenRow]) -> Tensor:
    """Last layer's hidden state of each row under every pooling, (R, P, D) fp32.

    `last` is the state at the row's last token (what the paper and stock reward models read), `mean` the mean over the
    response's tokens, what closes its turn included. Rows are padded on the right, which a causal model can't see.
    """
    given = row_inputs(rows, next(backbone.model.parameters()).device)
    inside, mask = given.pop("completion_mask"), given["attention_mask"]  # each (R, T)
    states = backbone.model(**given, use_cache=False).last_hidden_state
    return torch.stack([last_state(states, mask), mean_state(states, inside)], dim=1).cpu()


def extract(backbone: Backbone, rows: Sequence[TokenRow], store: RowCache, show: bool = True) -> np.ndarray:
    """Positions in the store of all rows' features, computing those that are missing."""
    keys = [row_key(row) for row in rows]
    missing = list({key: i for i, key in enumerate(keys) if key not in store}.values())
    todo = [rows[i] for i in missing]
    fill(
        store,
        [keys[i] for i in missing],
        todo,
        lambda batch: hidden_states(backbone, [todo[i] for i in batch]).numpy(),
        "features" if show else "",
    )
    return store.positions(keys)


class FeatureReader(TextReader):
    """Features of texts under one backbone and layout; a text is tokenized once, a response run once."""

    def __init__(self, backbone: Backbone, layout: TextLayout):
        super().__init__(backbone.tokenizer, layout)
        self.backbone, self.store = backbone, feature_cache(backbone)

    def positions(self, texts: Sequence[Text], show: bool = False) -> np.ndarray:
        """Positions of the texts' features in the store, (len(texts),); computes what is missing."""
        keys = self.keys(texts)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self.store}
        if missing:
            cached = len(set(keys)) - len(missing)
            if cached and show:
                print(f"features: {cached:,} of {len(set(keys)):,} responses are cached", file=sys.stderr)
            extract(self.backbone, self.tokenize(list(missing.values())), self.store, show)
        return self.store.positions(keys)

    def differences(self, rows: Sequence[Comparison], pooling: str, show: bool = False) -> Tensor:
        """h_chosen - h_rejected of comparisons, (B, D) fp32."""
        chosen, rejected = np.split(self.positions(texts_of(rows), show), 2)  # each (B,)
        return self.gather(chosen, pooling).sub_(self.gather(rejected, pooling))

    def gather(self, positions: np.ndarray, pooling: str) -> Tensor:
        """Features at positions, (len(positions), D) fp32."""
        return self.store.gather(positions, pooling)


def feature_reader(backbone: Backbone, layout: TextLayout) -> FeatureReader:
    """The reader of a backbone under a layout; the same one again for the same two, as long as the backbone lives."""
    if layout not in backbone.memo:
        backbone.memo[layout] = FeatureReader(backbone, layout)
    return backbone.memo[layout]
