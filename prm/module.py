"""The transformers module behind a personalized reward model that is trained with its backbone (F.2 of the paper).

A sequence classifier with one output, so that trainers, peft and gradient checkpointing know it. Soft prompt: the
user's K vectors stand in front of the text and one head `score` reads the pooled state. Linear head: the text alone
goes through the backbone, and the user's vector is the head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from ..core.backbone import keep_apart, personalize
from ..core.pretrained import Backbone
from ..core.subclass import subclass
from ..core.token_rows import row_inputs
from ..core.tokenize import TokenRow
from ..core.users import UserModel
from .pooling import POOLINGS, last_state, mean_state

AGGREGATORS = ("linear_head", "soft_prompt")


def reward_module(
    model: Any, user_model: UserModel, aggregator: str, pooling: str = "last", place: str = "prepend"
) -> Any:
    """Personalizes a sequence classifier with one output, in place.

    Args:
        model: for instance `AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)`. Its `score` is the
            head of a soft-prompt model; with the linear head the user model is the head and `score` is not read.
        user_model: gives (R, K, D) for `soft_prompt`, (R, D) for `linear_head`.

    Raises:
        ValueError: an unknown aggregator or pooling, or a user model that does not fit.
    """
    if aggregator not in AGGREGATORS or pooling not in POOLINGS:
        raise ValueError(f"there is no aggregator {aggregator!r} with pooling {pooling!r}")
    model.score.float()  # rewards are fp32 whatever the backbone runs in
    if aggregator == "soft_prompt":
        personalize(model.base_model, user_model, place)  # type: ignore[arg-type]
    else:
        width = model.score.in_features
        if user_model.shape != (width,):
            raise ValueError(f"a linear head needs a user model of shape ({width},), found {user_model.shape}")
        model.user_model = user_model.to(model.score.weight.device)
        model.score.requires_grad_(False)
    model.aggregator, model.pooling = aggregator, pooling
    model.__class__ = subclass(type(model), PersonalizedRewards)  # type: ignore[arg-type]
    keep_apart(model)
    return model


class PersonalizedRewards:
    """Forward pass of a personalized reward model; see `reward_module`."""

    aggregator: str
    pooling: str
    base_model: Any
    score: nn.Linear
    user_model: UserModel

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        user_ids: Tensor | None = None,
        completion_mask: Tensor | None = None,
        **unused: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Rewards of R rows.

        Args:
            input_ids, attention_mask: (R, T).
            user_ids: (R,) rows of the user model. With the linear head also (n * R,): the states do not depend on the
                user, so n users of each row cost one pass.
            completion_mask: (R, T), the tokens of the response, which `mean` averages over.

        Returns:
            `logits` (R, 1) or (n * R, 1), fp32.
        """
        if user_ids is None:
            raise ValueError("a personalized reward model needs user_ids; row 0 is the unknown user")
        if self.aggregator == "soft_prompt":
            pooled = self._pooled(input_ids, attention_mask, completion_mask, user_ids=user_ids)  # (R, D)
            rewards = (pooled * self.score.weight[0]).sum(1)
        else:
            pooled = self._pooled_once(input_ids, attention_mask, completion_mask)  # (R, D)
            rewards = (pooled.repeat(len(user_ids) // len(pooled), 1) * self.user_model(user_ids)).sum(1)
        return SequenceClassifierOutputWithPast(logits=rewards[:, None])

    def _pooled_once(self, ids: Any, mask: Tensor | None, completion_mask: Tensor | None) -> Tensor:
        """Pooled states (R, D) of texts that no user is part of: equal rows, judged by many users, are run once."""
        rows = ids if mask is None else torch.cat([ids, mask.to(ids.dtype)], dim=1)
        if completion_mask is not None:
            rows = torch.cat([rows, completion_mask.to(ids.dtype)], dim=1)
        distinct, places = rows.unique(dim=0, return_inverse=True)  # (n, ...), (R,)
        if len(distinct) == len(rows):
            return self._pooled(ids, mask, completion_mask)
        first = torch.full((len(distinct),), len(rows), device=ids.device)
        first = first.scatter_reduce(0, places, torch.arange(len(rows), device=ids.device), "amin")
        once = [None if tensor is None else tensor[first] for tensor in (ids, mask, completion_mask)]
        return self._pooled(*once)[places]

    def _pooled(self, ids: Any, mask: Tensor | None, completion_mask: Tensor | None, **users: Any) -> Tensor:
        out = self.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **users)
        if self.pooling == "last":
            return last_state(out.last_hidden_state, torch.ones_like(ids) if mask is None else mask)
        if completion_mask is None:
            raise ValueError("mean pooling needs a completion_mask")
        return mean_state(out.last_hidden_state, completion_mask)


def classifier_of(backbone: Backbone, seed: int | None = None) -> Any:
    """A sequence classifier around an already loaded backbone; its head is the checkpoint's, or a new one.

    Args:
        seed: of a new head. Without one it is zeros, so that the first loss of linear heads is exactly log 2. Below
            a head of zeros nothing has a gradient, so soft prompts want random numbers, as transformers draws them.
    """
    config = backbone.model.config
    config.num_labels = 1
    with torch.device("meta"):
        model: Any = AutoModelForSequenceClassification.from_config(config)
    setattr(model, model.base_model_prefix, backbone.model)
    head = nn.Linear(backbone.hidden_size, 1, bias=False, device=next(backbone.model.parameters()).device)
    with torch.no_grad():
        if backbone.score is not None:
            head.weight.copy_(backbone.score)
        elif seed is None:
            head.weight.zero_()
        else:
            random = torch.Generator().manual_seed(seed)
            std = getattr(config, "initializer_range", 0.02)
            head.weight.copy_(std * torch.randn(head.weight.shape, generator=random))
    model.score = head
    return model


@torch.inference_mode()
def rewards(module: Any, rows: Sequence[TokenRow], user_ids: Tensor) -> Tensor:
    """Rewards (R,) fp32 of token rows for users (R,)."""
    device = module.score.weight.device
    return module(**row_inputs(rows, device), user_ids=user_ids.to(device)).logits[:, 0].float().cpu()
