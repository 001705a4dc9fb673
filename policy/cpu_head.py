"""TRL's fused LM head for CPUs: the same outputs, from completion tokens alone and by products in the model's dtype.

TRL's own runs every position and, off a GPU, multiplies in float32 in the backward pass; on a CPU that is a third of a
small model's step.
"""

import types
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

TOKENS_AT_ONCE = 1024  # logits of V numbers each
_CHANGES_LOGITS = (
    *("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"),
)


class _TokenLogProbs(torch.autograd.Function):
    """log p of targets under `hidden @ weight' + bias`, and what TRL logs of the distributions; no logits are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, ...]:
        """(n, D), (V, D), (V,), (n,) -> log p, entropy, mean logit, whether the target is the likeliest: (n,) each."""
        parts = [
            _measured(h, weight, bias, t)
            for h, t in zip(hidden.split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True)
        ]
        log_probs, normalisers, *noted = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.mark_non_differentiable(*noted)
        return log_probs, *noted

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] else None
        for start in range(0, len(hidden), TOKENS_AT_ONCE):
            some = slice(start, start + TOKENS_AT_ONCE)
            slope = (_logits(hidden[some], weight, bias) - normalisers[some, None]).exp_().mul_(-grads[0][some, None])
            slope[torch.arange(len(slope)), targets[some]] += grads[0][some]  # (n, V), g (1[target] - p)
            if of_bias is not None:
                of_bias += slope.sum(0)
            slope = slope.to(hidden.dtype)
            if of_hidden is not None:
                of_hidden[some] = slope @ weight.to(hidden.dtype)
            if of_weight is not None:
                of_weight += slope.t() @ hidden[some]
        cast = [g if g is None else g.to(x.dtype) for g, x in ((of_weight, weight), (of_bias, bias))]
        return of_hidden, *cast, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, D) -> (n, V) fp32."""
    own = None if bias is None else bias.to(hidden.dtype)
    return torch.nn.functional.linear(hidden, weight.to(hidden.dtype), own).float()


def _measured(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, ...]:
    logits = _logits(hidden, weight, bias)
    largest = logits.amax(1)
    normaliser = logits.logsumexp(1)
    own = logits.gather(1, targets[:, None])[:, 0]
    entropy = normaliser - ((logits - normaliser[:, None]).exp_() * logits).sum(1)
    # A tie with an earlier token does not count, as in an argmax.
    first = own.eq(largest) & logits.argmax(1).eq(targets)
    return own - normaliser, normaliser, entropy, logits.mean(1), first


def lean_head(model: Any) -> None:
    """Replaces the fused LM head that TRL has put on a causal language model, where the model is on a CPU.

    Models whose logits are scaled or capped, and outputs that TRL was asked for beyond these, keep TRL's.
    """
    config = model.config.get_text_config()
    if model.device.type != "cpu" or any(getattr(config, name, None) for name in _CHANGES_LOGITS):
        return
    fused = model.forward

    @wraps(fused)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        head = self.get_output_embeddings()
        other = kwargs.get("output_router_logits") or kwargs.get("shift_labels") is not None
        if not fused_lm_head or other or hasattr(head.weight, "full_tensor"):  # the last: a shard
            return fused(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        states = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]  # (R, T - 1, D)
        targets = labels[:, 1:]
        inside = targets != -100
        if torch.is_autocast_enabled("cpu"):
            states = states.to(torch.get_autocast_dtype("cpu"))
        found = _TokenLogProbs.apply(states[inside], head.weight, head.bias, targets[inside])
        # `masked_scatter` and not an assignment, so that a batch without a label has a gradient too.
        whole = [column.new_zeros(targets.shape).masked_scatter(inside, column) for column in found]
        log_probs, entropy, mean_logits, is_top1 = whole
        return FusedCausalLMOutput(
            log_probs=log_probs, entropy=entropy, mean_logits=mean_logits, is_top1=is_top1, label_mask=inside
        )

    model.forward = types.MethodType(forward, model)
