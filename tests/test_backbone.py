"""A model that reads users gives what its parent gives when the vectors are put among the embeddings by hand."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    StaticCache,
    T5Config,
)

from prlhf.core.backbone import PLACES, is_personal, load_personal_state, personal_state, personalize, unwrapped
from prlhf.core.users import USER_MODELS, UserModel, make_user_model

pytestmark = pytest.mark.usefixtures("one_thread")

K, WIDTH, WORDS, WINDOW = 3, 32, 100, 6
# No end token, so that each generation has the length asked for.
SPECIAL = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
PLAIN = {
    **SPECIAL,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # weights at which a wrong position or a wrong mask shows
}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**PLAIN),
    "qwen2": Qwen2Config(**PLAIN, num_key_value_heads=2),
    "qwen3": Qwen3Config(**GROUPED),
    "gpt_neox": GPTNeoXConfig(**PLAIN),
    "gpt2": GPT2Config(**SPECIAL, n_embd=WIDTH, n_layer=2, n_head=4, initializer_range=0.2),
    "gemma": GemmaConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, sliding_window=WINDOW),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "mistral": MistralConfig(**GROUPED, sliding_window=WINDOW),
    "mistral_eager": MistralConfig(**GROUPED, sliding_window=WINDOW, attn_implementation="eager"),
}
AT = {"prepend": 0, "after_bos": 1}
TEXTS = [  # the first is longer than the window, the last shorter
    torch.cat([torch.tensor([1]), torch.randint(3, WORDS, (n - 1,), generator=torch.Generator().manual_seed(n))])
    for n in (12, 9, 4)
]
USERS = torch.tensor([1, 2, 0])
COLUMNS = 14

every_family = pytest.mark.parametrize("name", FAMILIES)
every_place = pytest.mark.parametrize("place", PLACES)


class Pair(NamedTuple):
    """A plain model and a personalized copy of it."""

    plain: Any
    personal: Any
    place: str

    def embeddings(self, ids: Tensor, user: int | Tensor) -> Tensor:
        """The user's vectors among the text's embeddings: (T,) -> (1, K + T, D)."""
        text = self.plain.get_input_embeddings()(ids)
        vectors = self.personal.base_model.user_model(torch.as_tensor(user).reshape(1))[0].to(text)
        return torch.cat([text[: AT[self.place]], vectors, text[AT[self.place] :]])[None]

    def cut(self, states: Tensor) -> Tensor:
        """(1, K + T, ...) -> (1, T, ...)."""
        return torch.cat([states[:, : AT[self.place]], states[:, AT[self.place] + K :]], dim=1)

    def expected(self, ids: Tensor, user: int | Tensor) -> Tensor:
        """The plain model's last states of one text: (T, D)."""
        return self.cut(self.plain.base_model(inputs_embeds=self.embeddings(ids, user)).last_hidden_state)[0]


def users(name: str = "individualized", count: int = 5, width: int = WIDTH, **options: Any) -> UserModel:
    random = torch.Generator().manual_seed(1)
    model = make_user_model(name, count, 0.5 * torch.randn(K, width, generator=random), **options)
    if name == "individualized":
        # Row 0 stays where it starts, at the embedding of the unknown user.
        model.offsets.weight.data[1:] = 0.5 * torch.randn(count - 1, K * width, generator=random)
    return model


def fresh(name: str, place: str, auto: Any = AutoModelForCausalLM, **options: Any) -> Pair:
    torch.manual_seed(0)
    plain = auto.from_config(FAMILIES[name], **options).eval()
    return Pair(plain, personalize(copy.deepcopy(plain), users(), place), place)


@cache
def pair(name: str, place: str) -> Pair:
    """For tests that change no model."""
    return fresh(name, place)


def padded(side: str, word: int = 7) -> tuple[Tensor, Tensor, list[int]]:
    """The texts in one batch: ids and mask (3, COLUMNS), and where each text begins. Pads are words like others."""
    ids = torch.full((len(TEXTS), COLUMNS), word)
    mask = torch.zeros_like(ids)
    starts = []
    for row, text in enumerate(TEXTS):
        pads = COLUMNS - len(text)
        start = {"left": pads, "right": 0, "mixed": pads * (row % 2), "both": pads // 2}[side]
        ids[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
        starts.append(start)
    return ids, mask, starts


def close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)


def stepwise(two: Pair, ids: Tensor, user: int | Tensor, tokens: int) -> list[int]:
    """Greedy generation by the plain model: all embeddings again for each token, no cache."""
    embeddings, chosen = two.embeddings(ids, user), []
    for _ in range(tokens):
        token = two.plain(inputs_embeds=embeddings, use_cache=False).logits[:, -1].argmax(-1)
        chosen.append(int(token))
        embeddings = torch.cat([embeddings, two.plain.get_input_embeddings()(token)[:, None]], dim=1)
    return chosen


@every_family
@every_place
@torch.no_grad()
def test_forward_reads_vectors_among_the_embeddings(name: str, place: str) -> None:
    two = pair(name, place)
    text = TEXTS[0]
    wanted = two.plain(inputs_embeds=two.embeddings(text, 1), output_hidden_states=True)
    for mask in (None, torch.ones(1, len(text), dtype=torch.int64), torch.ones(1, len(text), dtype=torch.bool)):
        inputs = {"input_ids": text[None], "attention_mask": mask, "user_ids": USERS[:1]}
        found = two.personal(**inputs, output_hidden_states=True)
        assert found.logits.shape == (1, len(text), WORDS)
        assert close(found.logits, two.cut(wanted.logits))
        assert len(found.hidden_states) == len(wanted.hidden_states) == 3
        assert all(close(a, two.cut(b)) for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True))
        assert close(two.personal.base_model(**inputs).last_hidden_state[0], two.expected(text, 1))
    other = two.personal(input_ids=text[None], user_ids=USERS[1:2]).logits
    assert (other - found.logits)[:, AT[place] :].abs().max() > 0.01
    assert place == "prepend" or torch.allclose(other[:, 0], found.logits[:, 0], atol=1e-5)


@every_family
@every_place
@pytest.mark.parametrize("side", ["left", "right", "mixed", "both"])
@torch.no_grad()
def test_padding_changes_nothing(name: str, place: str, side: str) -> None:
    two = pair(name, place)
    ids, mask, starts = padded(side)
    out = two.personal(input_ids=ids, attention_mask=mask, user_ids=USERS, output_hidden_states=True)
    assert out.logits.shape == (len(TEXTS), COLUMNS, WORDS)
    states = out.hidden_states[-1]
    assert states.shape == (len(TEXTS), COLUMNS, WIDTH)
    for row, (text, start) in enumerate(zip(TEXTS, starts, strict=True)):
        assert close(states[row, start : start + len(text)], two.expected(text, USERS[row]))


@every_place
@torch.no_grad()
def test_embeddings_may_be_given(place: str) -> None:
    two = pair("gpt2", place)
    ids, mask, _ = padded("mixed")
    embeddings = two.plain.get_input_embeddings()(ids)
    found = two.personal(inputs_embeds=embeddings, attention_mask=mask, user_ids=USERS).logits
    assert torch.equal(found, two.personal(input_ids=ids, attention_mask=mask, user_ids=USERS).logits)


@every_place
@torch.no_grad()
def test_positions_may_be_given(place: str) -> None:
    two = pair("gpt2", place)
    ids, mask, _ = padded("left")
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "user_ids": USERS}
    found, wanted = (two.personal(**inputs, **given).logits for given in ({"position_ids": counted}, {}))
    assert close(found[mask == 1], wanted[mask == 1])
    text = TEXTS[0]
    for columns in (torch.arange(4, 16), torch.tensor([0, *range(5, 16)])):
        # The users' positions begin where the text after them would have begun.
        own = int(columns[AT[place]]) + torch.arange(K)
        positions = torch.cat([columns[: AT[place]], own, columns[AT[place] :] + K])
        wanted = two.plain(inputs_embeds=two.embeddings(text, 1), position_ids=positions[None]).logits
        found = two.personal(input_ids=text[None], user_ids=USERS[:1], position_ids=columns[None]).logits
        assert close(found, two.cut(wanted))
    rows = torch.stack([text, text])
    found = two.personal(input_ids=rows, user_ids=USERS[:2], position_ids=columns[None]).logits  # (1, T) for two rows
    assert close(found[:1], two.cut(wanted))


@every_place
@torch.no_grad()
def test_a_text_in_pieces_is_the_whole_text(place: str) -> None:
    for name in ("gpt2", "mistral"):
        two = pair(name, place)
        text = TEXTS[0][None]
        whole = two.personal(input_ids=text, user_ids=USERS[:1]).logits
        ones, columns = torch.ones_like(text), torch.arange(text.shape[1])[None]
        for start in (1, 4):
            for first, rest in (
                ({}, {}),
                ({"attention_mask": ones[:, :start]}, {"attention_mask": ones}),
                ({"position_ids": columns[:, :start]}, {"position_ids": columns[:, start:]}),
            ):
                inputs = {"user_ids": USERS[:1], "use_cache": True}
                filled = two.personal(input_ids=text[:, :start], **inputs, **first).past_key_values
                out = two.personal(input_ids=text[:, start:], past_key_values=filled, **inputs, **rest)
                assert close(out.logits, whole[:, start:])


@every_family
@every_place
@torch.no_grad()
def test_greedy_generation_is_stepwise_argmax(name: str, place: str) -> None:
    two = pair(name, place)
    ids, mask, _ = padded("left")
    inputs = {"input_ids": ids, "attention_mask": mask, "user_ids": USERS, "do_sample": False, "max_new_tokens": 6}
    out = two.personal.generate(**inputs)
    assert out.shape == (len(TEXTS), COLUMNS + 6)
    assert torch.equal(out[:, :COLUMNS], ids)
    chosen = [stepwise(two, text, user, 6) for text, user in zip(TEXTS, USERS, strict=True)]
    assert out[:, COLUMNS:].tolist() == chosen
    assert two.personal.generate(**inputs, use_cache=False)[:, COLUMNS:].tolist() == chosen
    one = two.personal.generate(TEXTS[1][None], user_ids=USERS[1:2], do_sample=False, max_new_tokens=6)
    assert one[0, len(TEXTS[1]) :].tolist() == chosen[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral"])
@every_place
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "use_cache": False},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["beams", "two of the beams", "beams without a cache", "samples"],
)
@torch.no_grad()
def test_other_generation_is_the_plain_models(name: str, place: str, options: dict) -> None:
    two = pair(name, place)
    keep = {"do_sample": False, "max_new_tokens": 5, **options}
    wanted = []
    for text, user in zip(TEXTS, USERS, strict=True):
        embeddings = two.embeddings(text, user)
        ones = torch.ones(embeddings.shape[:2], dtype=torch.int64)
        torch.manual_seed(3)
        alone = two.plain.generate(inputs_embeds=embeddings, attention_mask=ones, **keep)
        torch.manual_seed(3)
        found = two.personal.generate(text[None], user_ids=user[None], **keep)
        assert found[:, len(text) :].tolist() == alone.tolist()
        wanted += alone.tolist()
    if not keep["do_sample"]:  # samples of a batch are other draws
        ids, mask, _ = padded("left")
        found = two.personal.generate(input_ids=ids, attention_mask=mask, user_ids=USERS, **keep)
        assert found[:, COLUMNS:].tolist() == wanted


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@every_place
@torch.no_grad()
def test_generation_takes_positions_and_embeddings(name: str, place: str) -> None:
    two = pair(name, place)
    ids, mask, _ = padded("left")
    inputs = {"attention_mask": mask, "user_ids": USERS, "do_sample": False, "max_new_tokens": 5}
    wanted = two.personal.generate(input_ids=ids, **inputs)[:, COLUMNS:]
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(two.personal.generate(input_ids=ids, position_ids=counted, **inputs)[:, COLUMNS:], wanted)
    embeddings = two.plain.get_input_embeddings()(ids)
    assert torch.equal(two.personal.generate(inputs_embeds=embeddings, **inputs), wanted)


@every_place
@torch.no_grad()
def test_generation_from_the_first_token_alone(place: str) -> None:
    two = pair("gpt2", place)
    ids = torch.tensor([[7, 7, 1], [1, 5, 6]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    wanted = [stepwise(two, ids[0, 2:], 1, 5), stepwise(two, ids[1], 2, 5)]
    if place == "after_bos":  # a lone BOS stands before the vectors, so what follows it directly reads no user
        first = two.plain(input_ids=ids[:1, 2:]).logits[0, -1].argmax()
        wanted[0] = [int(first), *stepwise(two, torch.stack([ids[0, 2], first]), 1, 4)]
    for given in ({}, {"position_ids": torch.tensor([[0, 0, 0], [0, 1, 2]])}):
        inputs = {"attention_mask": mask, "user_ids": USERS[:2], "do_sample": False, "max_new_tokens": 5, **given}
        assert two.personal.generate(input_ids=ids, **inputs)[:, 3:].tolist() == wanted


@every_family
@every_place
@torch.no_grad()
def test_without_users_it_is_the_plain_model(name: str, place: str) -> None:
    two = pair(name, place)
    empty = personalize(copy.deepcopy(two.plain), make_user_model("uniform", 5, torch.zeros(0, WIDTH)), place)
    ids, mask, _ = padded("mixed")
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        wanted = two.plain(**inputs, output_hidden_states=True)
        for found in (
            two.personal(**inputs, output_hidden_states=True),
            empty(**inputs, output_hidden_states=True, user_ids=USERS),
        ):
            assert torch.equal(found.logits, wanted.logits)
            assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True))
    wanted = two.plain.generate(TEXTS[0][None], do_sample=False, max_new_tokens=4)
    assert torch.equal(two.personal.generate(TEXTS[0][None], do_sample=False, max_new_tokens=4), wanted)
    assert torch.equal(
        empty.generate(TEXTS[0][None], do_sample=False, max_new_tokens=4, user_ids=USERS[:1]),
        wanted,
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gpt2", "gemma3"])
@every_place
@torch.no_grad()
def test_a_score_head_pools_the_last_token(name: str, place: str) -> None:
    two = fresh(name, place, AutoModelForSequenceClassification)
    for side in ("left", "right"):
        ids, mask, _ = padded(side, word=0)
        found = two.personal(input_ids=ids, attention_mask=mask, user_ids=USERS).logits
        wanted = torch.stack([two.expected(text, user)[-1] for text, user in zip(TEXTS, USERS, strict=True)])
        assert close(found, two.plain.score(wanted))


@every_place
@torch.no_grad()
def test_a_model_without_a_head(place: str) -> None:
    two = fresh("qwen2", place, AutoModel)
    assert type(two.personal).__name__ == "Qwen2Model"
    found = two.personal(input_ids=TEXTS[0][None], user_ids=USERS[:1]).last_hidden_state[0]
    assert close(found, two.expected(TEXTS[0], 1))


@every_place
@torch.no_grad()
def test_loss_is_over_the_text(place: str) -> None:
    two = pair("llama", place)
    text = TEXTS[0]
    found = two.personal(input_ids=text[None], user_ids=USERS[:1], labels=text[None]).loss
    logits = two.cut(two.plain(inputs_embeds=two.embeddings(text, 1)).logits)[0]
    assert close(found, nn.functional.cross_entropy(logits[:-1], text[1:]))


@every_place
def test_gradients_are_those_of_the_embeddings(place: str) -> None:
    two = fresh("mistral", place)
    ids, mask, starts = padded("mixed")
    out = two.personal(input_ids=ids, attention_mask=mask, user_ids=USERS).logits
    sum(out[r, s : s + len(TEXTS[r])].square().mean() for r, s in enumerate(starts)).backward()
    model = two.personal.base_model.user_model
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for text, user in zip(TEXTS, USERS, strict=True):
        two.cut(two.plain(inputs_embeds=two.embeddings(text, user)).logits).square().mean().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        assert gradient.abs().max() > 1e-3
        assert torch.allclose(gradient, parameter.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("shared", [True, False])
@every_place
def test_absent_users_get_no_gradient(place: str, shared: bool) -> None:
    model = personalize(fresh("llama", place).plain, users(shared=shared), place)
    ids, mask, _ = padded("left")
    model(input_ids=ids, attention_mask=mask, user_ids=torch.tensor([1, 3, 0]), labels=ids).loss.backward()
    gradient = model.base_model.user_model.offsets.weight.grad
    seen = gradient.abs().amax(dim=1) > 0
    # With e_0, the offset of row 0 stays zero although the unknown user is there.
    assert seen.tolist() == [not shared, True, False, True, False]
    assert not shared or model.base_model.user_model.base.grad.abs().max() > 0


def test_absent_users_of_clusters_get_no_gradient() -> None:
    model = personalize(fresh("llama", "prepend").plain, users("cluster", clusters=3))
    model(input_ids=TEXTS[0][None], user_ids=torch.tensor([3]), labels=TEXTS[0][None]).loss.backward()
    gradient = model.base_model.user_model.logits.weight.grad
    assert (gradient.abs().amax(dim=1) > 0).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("name", USER_MODELS)
@torch.no_grad()
def test_every_user_model(name: str) -> None:
    plain = pair("llama", "prepend").plain
    two = Pair(plain, personalize(copy.deepcopy(plain), users(name)), "prepend")
    found = two.personal.base_model(input_ids=TEXTS[0][None], user_ids=torch.tensor([2])).last_hidden_state[0]
    assert close(found, two.expected(TEXTS[0], 2))


@every_place
@torch.no_grad()
def test_one_cluster_is_uniform(place: str) -> None:
    plain = pair("qwen2", place).plain
    one, same = (
        personalize(copy.deepcopy(plain), model, place)
        for model in (users("cluster", clusters=1, noise=0.0), users("uniform"))
    )
    ids, mask, _ = padded("mixed")
    inputs = {"input_ids": ids, "attention_mask": mask, "user_ids": USERS}
    assert torch.equal(one(**inputs).logits, same(**inputs).logits)


@every_family
@every_place
@torch.no_grad()
def test_text_about_a_user_joins_the_vectors(name: str, place: str) -> None:
    """A user's text may stand in the input beside the vectors, or be the vectors."""
    two = pair(name, place)
    about, text = torch.tensor([40, 41, 42]), TEXTS[1]
    at = AT[place]
    joined = torch.cat([text[:at], about, text[at:]])
    table = two.plain.get_input_embeddings()
    vectors = two.personal.base_model.user_model(USERS[:1])
    parts = [table(text[None, :at]), vectors, table(about[None]), table(text[None, at:])]
    wanted = two.plain.base_model(inputs_embeds=torch.cat(parts, dim=1)).last_hidden_state
    found = two.personal.base_model(input_ids=joined[None], user_ids=USERS[:1]).last_hidden_state
    assert close(found, two.cut(wanted))
    as_vectors = personalize(copy.deepcopy(two.plain), make_user_model("uniform", 2, table(about)), place)
    found = as_vectors.base_model(input_ids=text[None], user_ids=torch.tensor([1])).last_hidden_state
    assert close(found, two.cut(two.plain.base_model(input_ids=joined[None]).last_hidden_state))


@every_place
@torch.no_grad()
def test_a_deep_copy_is_independent(place: str) -> None:
    original = fresh("llama", place).personal
    inputs = {"input_ids": TEXTS[0][None], "user_ids": USERS[:1]}
    before = original(**inputs).logits
    copied = copy.deepcopy(original)
    assert torch.equal(copied(**inputs).logits, before)
    copied.base_model.user_model.offsets.weight += 1
    assert (copied(**inputs).logits - before).abs().max() > 0.01
    assert torch.equal(original(**inputs).logits, before)
    copied = copy.deepcopy(original)
    copied.get_input_embeddings().weight.zero_()
    assert (copied(**inputs).logits - before).abs().max() > 0.01
    assert torch.equal(original(**inputs).logits, before)


def test_what_is_saved_is_the_plain_model(tmp_path: Path) -> None:
    two = fresh("qwen3", "prepend")
    assert type(two.personal).__name__ == "Qwen3ForCausalLM"
    assert type(two.personal.base_model).__name__ == "Qwen3Model"
    assert isinstance(two.personal, type(two.plain))
    two.personal.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert not [name for name in load_file(tmp_path / "model.safetensors") if is_personal(name)]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = {"input_ids": TEXTS[0][None]}
    assert type(again) is type(two.plain)
    assert torch.equal(again(**inputs).logits, two.plain(**inputs).logits)


@torch.no_grad()
def test_personalizing_twice_is_the_second() -> None:
    two = fresh("llama", "prepend")
    first = type(two.personal), type(two.personal.base_model)
    second = users(count=7)
    again = personalize(two.personal, second, "after_bos")
    assert again is two.personal
    assert (type(again), type(again.base_model)) == first
    assert [name for name, _ in again.named_modules() if name.endswith("user_model")] == ["model.user_model"]
    after = Pair(two.plain, again, "after_bos")
    assert close(again.base_model(TEXTS[0][None], user_ids=USERS[:1]).last_hidden_state[0], after.expected(TEXTS[0], 1))


def adapted(model: Any) -> Any:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, lora)


@every_place
@torch.no_grad()
def test_an_adapted_model_reads_users(place: str) -> None:
    two = fresh("llama", place)
    model = adapted(two.personal)
    inputs = {"input_ids": TEXTS[0][None], "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
    wanted = two.cut(two.plain(inputs_embeds=two.embeddings(TEXTS[0], 1)).logits)
    with model.disable_adapter():
        assert close(model(**inputs, user_ids=USERS[:1]).logits, wanted)
        assert torch.equal(model(**inputs).logits, two.plain(**inputs).logits)
    found = model(**inputs, user_ids=USERS[:1]).logits
    assert not close(found, wanted)
    assert not close(found, model(**inputs, user_ids=USERS[1:2]).logits)
    out = model.generate(**inputs, user_ids=USERS[:1], do_sample=False, max_new_tokens=4)
    again = unwrapped(model).generate(**inputs, user_ids=USERS[:1], do_sample=False, max_new_tokens=4)
    assert torch.equal(out, again)
    assert unwrapped(model) is two.personal


def test_gradients_reach_users_of_an_adapted_model() -> None:
    model = adapted(fresh("llama", "prepend").personal)
    own = [parameter for name, parameter in model.named_parameters() if is_personal(name)]
    assert len(own) == 2
    for parameter in own:
        parameter.requires_grad_(True)
    model(input_ids=TEXTS[0][None], user_ids=USERS[:1], labels=TEXTS[0][None]).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in own)
    trained = {name.split(".")[-3] for name, p in model.named_parameters() if p.grad is not None and "lora" in name}
    assert trained == {"lora_A", "lora_B"}


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
@torch.no_grad()
def test_personal_state_round_trip(auto: Any) -> None:
    first = adapted(fresh("llama", "prepend", auto).personal)
    state = personal_state(first)
    names = {"model.user_model.base", "model.user_model.offsets.weight"}
    assert set(state) == names | ({"score.weight"} if auto is AutoModelForSequenceClassification else set())
    second = fresh("llama", "prepend", auto).personal
    for name, parameter in second.named_parameters():
        if is_personal(name):
            parameter.zero_()
    inputs = {"input_ids": TEXTS[0][None], "user_ids": USERS[:1]}
    with first.disable_adapter():
        wanted = first(**inputs).logits
    assert not torch.equal(second(**inputs).logits, wanted)
    second = adapted(second)
    load_personal_state(second, state)
    assert all(torch.equal(found, state[name]) for name, found in personal_state(second).items())
    with second.disable_adapter():
        assert torch.equal(second(**inputs).logits, wanted)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module.base_model.model."])
def test_personal_state_of_a_gathered_state(prefix: str) -> None:
    model = fresh("llama", "prepend").personal
    gathered = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    found = personal_state(adapted(copy.deepcopy(model)), gathered)
    assert set(found) == {"model.user_model.base", "model.user_model.offsets.weight"}
    load_personal_state(model, found)


def test_a_personal_state_that_does_not_fit_is_refused() -> None:
    model = adapted(fresh("llama", "prepend").personal)
    state = personal_state(model)
    name = "model.user_model.offsets.weight"
    missing = {other: tensor for other, tensor in state.items() if other != name}
    for wrong in (missing, {**state, name: state[name][:-1]}, {**state, "score.weight": state[name]}, {}):
        with pytest.raises(
            ValueError, match=r"user parameters do not fit the model: found .*, wanted .*offsets\.weight"
        ):
            load_personal_state(model, wrong)
    assert all(torch.equal(state[other], tensor) for other, tensor in personal_state(model).items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@every_place
def test_gradient_checkpointing_changes_nothing(place: str, reentrant: bool, frozen: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = fresh("llama", place).personal.train()
        if frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(is_personal(name))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ids, mask, _ = padded("mixed")
        model(input_ids=ids, attention_mask=mask, user_ids=USERS, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    without, with_it = gradients
    assert set(without) == set(with_it)
    assert "model.user_model.base" in without
    assert all(torch.allclose(without[name], with_it[name], atol=1e-6) for name in without)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@every_place
def test_half_precision_with_full_users(name: str, place: str) -> None:
    two = fresh(name, place)
    model = personalize(copy.deepcopy(two.plain).to(torch.bfloat16), users(), place)
    ids, mask, _ = padded("mixed")
    out = model(input_ids=ids, attention_mask=mask, user_ids=USERS, labels=ids, output_hidden_states=True)
    assert out.logits.dtype == out.hidden_states[-1].dtype == torch.bfloat16
    assert out.logits.isfinite().all()
    out.loss.backward()
    for parameter in model.base_model.user_model.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0
    wanted = two.personal(input_ids=ids, attention_mask=mask, user_ids=USERS).logits[mask == 1]
    error = (out.logits[mask == 1].float() - wanted).norm() / wanted.norm()
    assert error < 0.1


LLAMA = FAMILIES["llama"]
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
REFUSED: dict[str, tuple[Any, PretrainedConfig, str]] = {
    "encoder-decoder": (
        AutoModelForSeq2SeqLM,
        T5Config(vocab_size=WORDS, d_model=WIDTH, d_ff=32, num_layers=1, num_heads=1, decoder_start_token_id=0),
        "T5.* can't read user vectors: it is an encoder-decoder",
    ),
    "mamba": (
        AutoModelForCausalLM,
        MambaConfig(vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=1),
        "MambaModel can't read user vectors: its forward takes no position_ids",
    ),
    "alibi": (
        AutoModelForCausalLM,
        BloomConfig(vocab_size=WORDS, hidden_size=WIDTH, n_layer=1, n_head=4),
        "BloomModel can't read user vectors: its forward takes no position_ids",
    ),
    "hybrid": (
        AutoModelForCausalLM,
        Qwen3NextConfig(**GROUPED, num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8),
        r"Qwen3NextModel can't read user vectors: it has layers of a type that is not supported \(linear_attention\)",
    ),
    "composite": (
        AutoModelForImageTextToText,
        LlavaConfig(text_config=LLAMA, vision_config=CLIPVisionConfig(**VISION, image_size=8, patch_size=4)),
        "LlavaModel can't read user vectors: it is a composite; give its language model alone",
    ),
    "per-layer embeddings": (
        AutoModelForCausalLM,
        Gemma3nTextConfig(
            **GROUPED,
            vocab_size_per_layer_input=WORDS,
            hidden_size_per_layer_input=4,
            laurel_rank=2,
            num_kv_shared_layers=0,
            layer_types=["full_attention"] * 2,
            activation_sparsity_pattern=[0.0, 0.0],
        ),
        "Gemma3nTextModel can't read user vectors: its layers have token embeddings of their own",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_read_vectors_are_refused(kind: str) -> None:
    auto, config, message = REFUSED[kind]
    model = auto.from_config(config)
    before = type(model)
    with pytest.raises(ValueError, match=message):
        personalize(model, users())
    assert type(model) is before
    assert not any(is_personal(name) for name in model.state_dict())


def test_the_language_model_of_a_composite_is_taken() -> None:
    auto, config, _ = REFUSED["composite"]
    model = personalize(auto.from_config(config).eval().model.language_model, users())
    out = model(input_ids=TEXTS[0][None], user_ids=USERS[:1])
    assert out.last_hidden_state.shape == (1, len(TEXTS[0]), WIDTH)


def test_user_models_that_do_not_fit_are_refused() -> None:
    model = fresh("llama", "prepend").plain
    with pytest.raises(ValueError, match=r"shape \(K, 32\), found a user model of \(3, 16\)"):
        personalize(model, users(width=16))
    with pytest.raises(ValueError, match=r"shape \(K, 32\), found a user model of \(32,\)"):
        personalize(model, make_user_model("uniform", 2, torch.zeros(WIDTH)))
    with pytest.raises(ValueError, match="user_place 'append': must be one of prepend, after_bos"):
        personalize(model, users(), "append")  # type: ignore[arg-type]


def test_after_bos_needs_a_bos_token() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**PLAIN, "bos_token_id": None}))
    with pytest.raises(ValueError, match="LlamaModel can't read user vectors: after_bos needs a BOS token"):
        personalize(model, users(), "after_bos")
    assert personalize(model, users()) is model
    zero = AutoModelForCausalLM.from_config(LlamaConfig(**{**PLAIN, "bos_token_id": 0}))
    assert personalize(zero, users(), "after_bos") is zero


@pytest.mark.parametrize("user_ids", [torch.tensor([1, 2]), torch.tensor([[1], [2], [0]]), torch.tensor(1)])
def test_user_ids_of_another_shape_are_refused(user_ids: Tensor) -> None:
    ids, mask, _ = padded("left")
    with pytest.raises(ValueError, match=r"user_ids must be of shape \(3,\), one for each row, found"):
        pair("llama", "prepend").personal(input_ids=ids, attention_mask=mask, user_ids=user_ids)


def test_masks_of_four_axes_and_static_caches_are_refused() -> None:
    model = pair("llama", "prepend").personal
    ids, mask, _ = padded("left")
    message = "reads a two-dimensional attention mask"
    square = torch.ones(3, 1, COLUMNS, COLUMNS, dtype=torch.bool).tril()
    inputs = {"input_ids": ids, "user_ids": USERS}
    with pytest.raises(ValueError, match=message):
        model(**inputs, attention_mask=square)
    with pytest.raises(ValueError, match=message):
        model(**inputs, attention_mask={"full_attention": square})
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, attention_mask=mask, max_new_tokens=3, cache_implementation="static")
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, attention_mask=mask, max_new_tokens=3, past_key_values=cache)
