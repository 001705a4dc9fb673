"""`personalize(model, user_model)`: a Hugging Face decoder whose rows read a user's vectors.

The K vectors of a row's user stand in front of its text inside the backbone's forward, and the states at their
positions are cut away again, so labels, masks, pooling, losses and generation see T text tokens and need no offset.
A trainer of another library works on such a model unchanged.
"""

import inspect
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from .subclass import hands_down, subclass
from .users import UserModel

Place = Literal["prepend", "after_bos"]
PLACES: tuple[str, ...] = get_args(Place)


def personalize(model: Any, user_model: UserModel, place: Place = "prepend") -> Any:
    """Makes a model read `user_ids` (R,), the users' rows, beside `input_ids`; the model is changed in place.

    Without `user_ids` a forward pass is the plain model's, which is what a reference model computes.

    Args:
        model: any decoder of transformers, with or without a head.
        user_model: gives (R, K, D) soft prompts; K = 0 is the plain model.
        place: where a row's K vectors go: before its first token, or after it. The first token, BOS, then reads no
            user, and so neither does the prediction of the token after it.

    Returns:
        the same model; `model.generate(**inputs, user_ids=...)` works where the plain one does.

    Raises:
        ValueError: the architecture can't take vectors in front of its text, its head does not hand `user_ids` down,
            or the user model is not a soft prompt.
    """
    backbone = model.base_model
    _refuse(model, user_model, place)
    first = next(backbone.parameters())
    backbone.user_model = user_model.to(first.device)
    backbone.user_place = place
    backbone.__class__ = subclass(type(backbone), PersonalizedBackbone)  # type: ignore[arg-type]
    if backbone is not model:
        model.__class__ = subclass(type(model), TakesUserIds)  # type: ignore[arg-type]
    keep_apart(backbone)
    keep_apart(model)
    return model


def keep_apart(model: Any) -> None:
    """Makes `save_pretrained` leave user vectors out, which are personal data."""
    own = {name for name in model.state_dict() if is_user(name)}
    model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) | own


def _refuse(model: Any, user_model: UserModel, place: str) -> None:
    backbone = model.base_model
    config, name = backbone.config, type(backbone).__name__
    if place not in PLACES:
        raise ValueError(f"user_place {place!r}: must be one of {', '.join(PLACES)}")
    width = backbone.get_input_embeddings().weight.shape[1]
    if len(user_model.shape) != 2 or user_model.shape[1] != width:
        raise ValueError(f"{name} reads soft prompts of shape (K, {width}), found a user model of {user_model.shape}")
    takes = inspect.signature(type(backbone).forward).parameters
    lacking = [key for key in ("inputs_embeds", "attention_mask", "position_ids") if key not in takes]
    hybrid = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    for is_so, why in (
        (config.is_encoder_decoder, "it is an encoder-decoder"),
        (lacking, f"its forward takes no {', '.join(lacking)}"),
        (hybrid, f"it has layers of a type that is not supported ({', '.join(sorted(hybrid))})"),
        (getattr(config, "hidden_size_per_layer_input", 0), "its layers have token embeddings of their own"),
        (backbone.get_output_embeddings() is not None, "its head and its backbone are one module"),
        ("forward" in vars(backbone), "its forward was replaced on the instance, as by a device map"),
        (config.get_text_config() is not config, "it is a composite; give its language model alone"),
        (
            place == "after_bos" and getattr(config, "bos_token_id", None) is None,
            "after_bos needs a BOS token, and it has none",
        ),
    ):
        if is_so:
            raise ValueError(f"{name} can't read user vectors: {why}")
    if backbone is not model and not hands_down(model):
        raise ValueError(f"{type(model).__name__} can't read user vectors: it hands no user_ids down to its {name}")


class TakesUserIds:
    """A model with a head over a personalized backbone: has `user_ids` in its signature and hands it down."""

    def forward(self, *, user_ids: Tensor | None = None, **inputs: Any) -> Any:
        if user_ids is not None:
            inputs["user_ids"] = user_ids
        return cast(Any, super()).forward(**inputs)


class PersonalizedBackbone:
    """A backbone that puts each row's user vectors in front of its text; see `personalize`.

    Attributes:
        user_model: gives (R, K, D).
        user_place: `prepend` or `after_bos`.
    """

    user_model: UserModel
    user_place: str

    def forward(
        self,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        user_ids: Tensor | None = None,
        **rest: Any,
    ) -> Any:
        """Plain forward over T text tokens for the given users.

        Args:
            input_ids: (R, T), padded on either side; with a filled cache, the tokens that are not in it.
            attention_mask: (R, T), or (R, past + T) with a filled cache; text only, the users' columns are added here.
            position_ids: (R, T) or (1, T) positions of the text without users, one text in a row; by default counted
                along the mask.
            user_ids: (R,) rows of the user model; None for the plain model.

        Returns:
            what the plain model returns, with T states per row; attentions are over all K + T.
        """
        plain: Any = super()
        width = self.user_model.shape[0]
        if user_ids is None or not width:
            keep = {"position_ids": position_ids, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
            return plain.forward(input_ids=input_ids, attention_mask=attention_mask, **keep, **rest)
        if inputs_embeds is None:
            inputs_embeds = cast(Any, self).get_input_embeddings()(input_ids)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        _check_inputs(inputs_embeds, attention_mask, user_ids, past_key_values)
        if position_ids is not None and not past:
            attention_mask = _mask_of_one_text(position_ids, attention_mask, inputs_embeds)
        before = self._text_before(attention_mask, inputs_embeds)
        mask = _with_users(attention_mask, before, width, None)
        positions = _positions(position_ids, mask, before, width, inputs_embeds.shape[1], past)
        if not past:
            users = self.user_model(user_ids).to(inputs_embeds.dtype)  # (R, K, D)
            inputs_embeds = _with_users(inputs_embeds, before, width, users)
        keep = {"position_ids": positions, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        named = rest.pop("return_dict", None)
        out = plain.forward(attention_mask=mask, **keep, **rest, return_dict=True)
        out = out if past else _cut(out, before, width)
        return out if (cast(Any, self).config.return_dict if named is None else named) else out.to_tuple()

    def _text_before(self, mask: Tensor | None, embeds: Tensor) -> Tensor:
        """How many text columns of each row stand before its user vectors, padding on the left included: (R,).

        Directly at the text and not in front of its padding, so that a sliding window counts the same distances.
        """
        rows = len(embeds)
        first = torch.zeros(rows, dtype=torch.int64, device=embeds.device)
        if mask is not None:
            first = mask.to(torch.int32).argmax(1).to(embeds.device)
        return first + 1 if self.user_place == "after_bos" else first


def _check_inputs(embeds: Tensor, mask: Tensor | None, user_ids: Tensor, cache: Any) -> None:
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise ValueError("a personalized model reads a two-dimensional attention mask (no static cache, no packing)")
    if getattr(cache, "is_compileable", False):
        raise ValueError("a static cache has no room for user vectors: leave cache_implementation out")
    found = tuple(user_ids.shape) if isinstance(user_ids, Tensor) else f"a {type(user_ids).__name__}, not a tensor"
    if found != embeds.shape[:1]:
        raise ValueError(f"user_ids must be of shape ({len(embeds)},), one for each row, found {found}")


def _mask_of_one_text(positions: Tensor, mask: Tensor | None, embeds: Tensor) -> Tensor:
    """The text's mask (R, T), ones if there is none: without it, transformers reads a gap as the start of a next text.

    Raises:
        ValueError: the positions go back within a row, which then is several texts, packed.
    """
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device) if mask is None else mask
    text = mask.bool().to(positions.device)
    if ((positions.diff(dim=1) < 0) & text[:, 1:] & text[:, :-1]).any():
        raise ValueError("position_ids go back within a row: a personalized model reads one text in a row, not packed")
    return mask


def _with_users(text: Tensor | None, before: Tensor, width: int, users: Tensor | None) -> Tensor | None:
    """(R, T, ...) -> (R, K + T, ...): users' columns (ones, for a mask) after each row's first `before` columns."""
    if text is None:
        return None
    own = text.new_ones(len(text), width) if users is None else users
    joined = torch.cat([own, text], dim=1)  # (R, K + T, ...), users first
    places = torch.arange(joined.shape[1], device=text.device).expand(len(text), -1)  # (R, K + T)
    edge = before[:, None].to(text.device)
    source = torch.where(places < edge, places + width, torch.where(places < edge + width, places - edge, places))
    return joined[torch.arange(len(text), device=text.device)[:, None], source]


def _positions(
    given: Tensor | None, mask: Tensor | None, before: Tensor, width: int, tokens: int, past: int
) -> Tensor | None:
    """Positions with the users' counted in: (R, K + T), or (R, T) with a filled cache; None: the model's own do."""
    if given is not None and past:
        return given + width
    if given is not None:
        text = given.expand(len(before), -1)  # (R, T)
        columns = torch.arange(tokens, device=text.device)
        edge = before[:, None].to(text.device)
        start = text.gather(1, edge.clamp(max=tokens - 1)) + (edge >= tokens)  # (R, 1)
        users = start + torch.arange(width, device=text.device)  # (R, K)
        return _with_users(torch.where(columns < edge, text, text + width), before, width, users)
    if mask is None:
        return None
    counted = (mask.long().cumsum(1) - 1).clamp(min=0)  # (R, K + past text + T)
    return counted[:, -tokens:] if past else counted


def _cut(out: Any, before: Tensor, width: int) -> Any:
    """Takes the users' positions out of the states that a backbone returns."""
    out.last_hidden_state = _without_users(out.last_hidden_state, before, width)
    if out.get("hidden_states") is not None:
        kept = (None if states is None else _without_users(states, before, width) for states in out.hidden_states)
        out.hidden_states = tuple(kept)
    if out.get("router_logits") is not None:
        # (R * (K + T), E) each, flat, as a head's balancing loss takes them beside the text's mask.
        apart = (logits.unflatten(0, (len(before), -1)) for logits in out.router_logits)
        out.router_logits = tuple(_without_users(logits, before, width).flatten(0, 1) for logits in apart)
    return out


def _without_users(states: Tensor, before: Tensor, width: int) -> Tensor:
    """(R, K + T, D) -> (R, T, D)."""
    places = torch.arange(states.shape[1] - width, device=states.device)  # (T,)
    source = places + width * (places >= before[:, None].to(states.device))  # (R, T)
    return states[torch.arange(len(states), device=states.device)[:, None], source]


def unwrapped(model: Any) -> Any:
    """The transformers model inside what peft, accelerate and torch put around it."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return getattr(model, "_orig_mod", model)


def is_user(name: str) -> bool:
    """Whether a parameter belongs to a user model."""
    return "user_model" in name.split(".")


def is_personal(name: str) -> bool:
    """Whether a parameter belongs to a user model or to a reward head and not to the language model."""
    return is_user(name) or "score" in name.split(".")


def personal_state(model: Any, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Parameters of the user model and the reward head, on the CPU, named as in the transformers model.

    Args:
        state: a state dict that was gathered already (sharded training); else the model's own.
    """
    found = {}
    for name, tensor in (unwrapped(model).state_dict() if state is None else state).items():
        if is_personal(name):
            # Names of a gathered state carry what is wrapped around the model.
            plain = name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("base_model.model.")
            found[plain] = tensor.detach().cpu().contiguous()
    return found


def load_personal_state(model: Any, state: dict[str, Tensor]) -> None:
    """Puts back what `personal_state` gave.

    Raises:
        ValueError: a parameter is missing, unknown, or of another shape.
    """
    inner = unwrapped(model)
    wanted = {name: tuple(t.shape) for name, t in inner.state_dict().items() if is_personal(name)}
    found = {name: tuple(t.shape) for name, t in state.items()}
    if wanted != found:
        raise ValueError(f"user parameters do not fit the model: found {found}, wanted {wanted}")
    inner.load_state_dict(state, strict=False)
