"""Subclasses of transformers models that take `user_ids`: under the parent's name and with the parent's signature."""

import inspect
from contextlib import suppress
from functools import cache
from typing import Any, cast

import torch


@cache
def subclass(base: type, mixin: type) -> type:
    """A subclass under its parent's name, by which transformers and peft know what it is.

    The class and not the instance is changed, because `deepcopy` of a patched instance would run the original's layers.
    """
    if issubclass(base, mixin):
        return base
    own: dict[str, Any] = {
        "__module__": base.__module__,
        # The name leads to the parent, so a pickle tells how the class was made.
        "__reduce_ex__": lambda model, protocol: (_blank, (base, mixin), model.__getstate__()),
    }
    users = inspect.signature(cast(Any, mixin).forward).parameters["user_ids"]
    if users.kind is users.KEYWORD_ONLY:
        own["forward"] = _forward_like(base, mixin, users)
    return type(base.__name__, (mixin, base), own)


def _blank(base: type, mixin: type) -> Any:
    made: Any = subclass(base, mixin)
    return made.__new__(made)


def _forward_like(base: Any, mixin: Any, users: inspect.Parameter) -> Any:
    """The mixin's forward with the parent's signature and `user_ids` at its end.

    In the signature of the class, because `generate`, trainers and peft look there for what a model takes.
    """
    parent = inspect.signature(base.forward)
    known = [parameter for parameter in parent.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    rest = [parameter for parameter in parent.parameters.values() if parameter.kind is parameter.VAR_KEYWORD]
    names = [parameter.name for parameter in known][1:]

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        return mixin.forward(self, **dict(zip(names[: len(args)], args, strict=True)), **inputs)

    cast(Any, forward).__signature__ = parent.replace(parameters=[*known, users, *rest])
    return forward


class _Arrived(Exception):
    """Ends a trial call at the backbone."""


def hands_down(model: Any) -> bool:
    """Whether a head gives its backbone arguments that it does not know: by a trial call, which ends on arrival."""
    found: dict[str, Any] = {}

    def arrive(backbone: Any, args: Any, inputs: dict[str, Any]) -> None:
        found.update(inputs)
        raise _Arrived

    hook = model.base_model.register_forward_pre_hook(arrive, prepend=True, with_kwargs=True)
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.base_model.parameters()).device)
    try:
        with torch.no_grad(), suppress(_Arrived, TypeError):
            model.forward(input_ids=token, user_ids=token[0])
    finally:
        hook.remove()
    return "user_ids" in found
