"""Small trainers of personalized policies on a tiny Llama, in fp32 on the CPU."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from tiny import checkerboard, tiny_config
from torch import Tensor
from training import QUIET, lora, own_pad_tokenizer
from transformers import LlamaForCausalLM

from prlhf.core.backbone import unwrapped
from prlhf.core.comparisons import Comparison, Comparisons
from prlhf.core.pairs import token_pairs
from prlhf.core.tokenize import RowTokenizer, TextLayout
from prlhf.core.users import UserIndex, UserModel
from prlhf.policy.trainer import PersonalizedDPOConfig, PersonalizedDPOTrainer, dpo_dataset

EMPTY: dict[str, Any] = {"user_model": "uniform", "user_tokens": 0}
PATHS = ["model", "off", "ref"]  # a reference model, LoRA switched off, a copy of the adapter
UNSAVED: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


def language_model(seed: int = 0) -> Any:
    """A causal Llama whose random weights are large enough to tell texts apart."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(pad_token_id=258, initializer_range=0.1))


def small_config(folder: Path, **changes: Any) -> PersonalizedDPOConfig:
    return PersonalizedDPOConfig(output_dir=str(folder), **{**QUIET, **changes})


def columns(rows: Comparisons, users: UserIndex) -> Dataset:
    return dpo_dataset(token_pairs(rows, RowTokenizer(own_pad_tokenizer(), TextLayout())), users)


def small_trainer(
    folder: Path,
    train: Comparisons | None = None,
    validation: Comparisons | None = None,
    model: Any = None,
    given: dict[str, Any] | None = None,
    **config: Any,
) -> PersonalizedDPOTrainer:
    """A trainer on a checkerboard.

    Args:
        given: further arguments of the trainer.
        config: of its configuration.
    """
    train = train or checkerboard(4)
    validation = validation or checkerboard(2, first=40)
    users = UserIndex.seen_in(train.user_ids)
    return PersonalizedDPOTrainer(
        language_model() if model is None else model,
        small_config(folder, **config),
        columns(train, users),
        columns(validation, users),
        own_pad_tokenizer(),
        users=len(users),
        places=lambda row: train[row].place,
        **(given or {}),
    )


def uneven(rows: Comparisons) -> Comparisons:
    """Chosen and rejected responses of quite different lengths."""
    made = [Comparison(r.user, r.prompt, r.chosen + "." * (i % 5) * 3, r.rejected) for i, r in enumerate(rows)]
    return Comparisons(made, rows.source)


def users_of(trainer: Any) -> UserModel:
    return unwrapped(trainer.model).base_model.user_model


def randomize(module: Any, size: float = 0.3, seed: int = 1) -> None:
    """Moves every trained parameter, as training does; row 0 keeps no offset."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=random)
            if name.endswith("offsets.weight"):
                parameter[0] = 0


def adapted() -> Any:
    """A model with an adapter that has been trained."""
    model = get_peft_model(language_model(), lora())
    randomize(model, 0.05)
    return model


def on_path(path: str, folder: Path, train: Comparisons | None = None, **config: Any) -> tuple[Any, Any]:
    """A trainer whose reference comes by one of its paths, and the untouched plain model that this reference is."""
    model, plain = language_model(), language_model(1 if path == "model" else 0)
    given: dict[str, Any] = {}
    if path == "ref":
        model = adapted()
        plain = deepcopy(model)
    elif path == "model":
        given["ref_model"] = language_model(1)
    else:
        given["peft_config"] = lora()
    return small_trainer(folder, train, model=model, given=given, **config), plain


def token_log_probs(model: Any, ids: Tensor, user: Tensor | None = None) -> Tensor:
    """log-probabilities (T - 1,) of one text's tokens after its first, a user's vectors (K, D) joined by hand."""
    embeds = model.get_input_embeddings()(ids)
    joined = embeds if user is None else torch.cat([user, embeds])  # (K + T, D)
    logits = model(inputs_embeds=joined[None]).logits[0, -len(ids) : -1]  # (T - 1, V)
    return logits.log_softmax(1).gather(1, ids[1:, None])[:, 0]


def response_log_probs(model: Any, inputs: dict[str, Any], users: list[Tensor] | None = None) -> Tensor:
    """Log-probabilities (2B,) of responses that are run one at a time without padding, with plain forwards."""
    found = []
    for i, (ids, text, inside) in enumerate(
        zip(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["completion_mask"].bool(), strict=True)
    ):
        tokens = token_log_probs(model, ids[text], None if users is None else users[i])
        found.append(tokens[inside[text][1:]].sum())
    return torch.stack(found)
