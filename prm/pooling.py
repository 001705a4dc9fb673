"""States of a response as one vector: of frozen and of trained backbones."""

import torch
from torch import Tensor

POOLINGS = ("last", "mean")


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
