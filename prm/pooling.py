"""Token rows as a backbone's inputs, and its states as one vector per response: of frozen and of trained backbones."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.tokenize import TokenRow

POOLINGS = ("last", "mean")


def row_inputs(rows: Sequence[TokenRow], device: Any) -> dict[str, Tensor]:
    """Right-padded inputs (R, T) of token rows, with the mask of their responses."""
    ids = [torch.tensor(row.prompt_ids + row.response_ids) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    starts = torch.tensor([len(row.prompt_ids) for row in rows])[:, None]
    padded = pad_sequence(ids, batch_first=True)  # (R, T)
    places = torch.arange(padded.shape[1])
    masks = {"attention_mask": places < lengths, "completion_mask": (places >= starts) & (places < lengths)}
    return {"input_ids": padded.to(device), **{name: mask.long().to(device) for name, mask in masks.items()}}


def last_state(states: Tensor, mask: Tensor) -> Tensor:
    """State at each row's last token that is not padding, (R, D) fp32; (R, T, D), (R, T).

    By the mask and not by the padding token, which in many models is also what closes a response.
    """
    places = torch.arange(mask.shape[1], device=mask.device)  # (T,)
    last = (places * mask.to(places.dtype)).argmax(1)  # (R,)
    return states[torch.arange(len(states), device=states.device), last].float()


def mean_state(states: Tensor, inside: Tensor) -> Tensor:
    """Mean over the tokens of each row's response, (R, D) fp32; (R, T, D), (R, T)."""
    # In fp32 before summing: a bf16 sum over hundreds of tokens loses the third digit.
    with torch.autocast(states.device.type, enabled=False):
        summed = torch.einsum("rtd,rt->rd", states.float(), inside.float())
    return summed / inside.sum(1, keepdim=True)
