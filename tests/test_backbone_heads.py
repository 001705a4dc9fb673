"""A personalized model looks like its parent to whoever calls, trains or saves it; what it can't read is refused."""

import copy
import functools
import inspect
import io
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from test_backbone import (
    GROUPED,
    SPECIAL,
    TEXTS,
    USERS,
    WIDTH,
    Pair,
    adapted,
    close,
    every_family,
    every_place,
    fresh,
    padded,
    pair,
    users,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CodeGenConfig,
    FalconConfig,
    GPTJConfig,
    Llama4TextConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils.generic import find_labels

from prlhf.core.backbone import is_personal, personalize
from prlhf.core.users import make_user_model

pytestmark = pytest.mark.usefixtures("one_thread")

DEAF: dict[str, PretrainedConfig] = {  # their heads call something else than the backbone, or hand nothing down
    "OPT": OPTConfig(
        **SPECIAL,
        hidden_size=WIDTH,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=WIDTH,
    ),
    "Falcon": FalconConfig(**SPECIAL, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4),
    "GPTJ": GPTJConfig(**SPECIAL, n_embd=WIDTH, n_layer=2, n_head=4, rotary_dim=4),
    "CodeGen": CodeGenConfig(**SPECIAL, n_embd=WIDTH, n_layer=2, n_head=4, rotary_dim=4),
}
TEXT = TEXTS[0][None]  # (1, 12)
ONE = {"input_ids": TEXT, "user_ids": USERS[:1]}


def same_types(model: Any, wanted: tuple[type, type]) -> bool:
    return (type(model), type(model.base_model)) == wanted


@pytest.mark.parametrize("name", DEAF)
def test_a_head_that_drops_user_ids_is_refused(name: str) -> None:
    model = AutoModelForCausalLM.from_config(DEAF[name]).eval()
    before = type(model), type(model.base_model)
    message = f"{name}ForCausalLM can't read user vectors: it hands no user_ids down to its {name}Model"
    with pytest.raises(ValueError, match=message):
        personalize(model, users())
    assert same_types(model, before)
    assert not any(is_personal(parameter) for parameter in model.state_dict())
    assert model(TEXT).logits.shape[:2] == TEXT.shape


@pytest.mark.parametrize("name", DEAF)
@every_place
@torch.no_grad()
def test_the_backbone_of_such_a_head_reads_users(name: str, place: Any) -> None:
    torch.manual_seed(0)
    plain = AutoModel.from_config(DEAF[name]).eval()
    two = Pair(plain, personalize(copy.deepcopy(plain), users(), place), place)
    ids, mask, starts = padded("left")
    found = two.personal(input_ids=ids, attention_mask=mask, user_ids=USERS).last_hidden_state
    for row, (text, start) in enumerate(zip(TEXTS, starts, strict=True)):
        assert close(found[row, start : start + len(text)], two.expected(text, USERS[row]))


def test_the_trial_call_of_a_head_runs_no_layer_and_leaves_no_trace() -> None:
    model = fresh("llama", "prepend").plain
    ran = []
    for layer in model.base_model.layers:
        layer.register_forward_hook(lambda *_: ran.append(1))
    personalize(model, users())
    assert not ran
    assert not model.base_model._forward_pre_hooks
    model(**ONE)
    assert len(ran) == 2


def test_a_backbone_with_a_forward_of_its_own_is_refused() -> None:
    for auto in (AutoModel, AutoModelForCausalLM):
        model = fresh("llama", "prepend", auto).plain
        model.base_model.forward = functools.partial(type(model.base_model).forward, model.base_model)
        with pytest.raises(ValueError, match="LlamaModel can't read user vectors: its forward was replaced"):
            personalize(model, users())


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_signature_is_the_parents_and_user_ids(name: str, auto: Any) -> None:
    two = fresh(name, "prepend", auto)
    for plain, personal in ((two.plain, two.personal), (two.plain.base_model, two.personal.base_model)):
        wanted = dict(inspect.signature(plain.forward).parameters)
        found = dict(inspect.signature(personal.forward).parameters)
        assert found.pop("user_ids").kind is inspect.Parameter.KEYWORD_ONLY
        assert found == wanted
        assert next(iter(inspect.signature(type(personal).forward).parameters)) == "self"
    assert find_labels(type(two.personal)) == find_labels(type(two.plain))


@every_place
@torch.no_grad()
def test_a_forward_wrapped_by_a_trainer_still_takes_users(place: str) -> None:
    model = fresh("llama", place).personal
    wanted = model.generate(**ONE, max_new_tokens=3, do_sample=False)
    plain = model.forward

    @functools.wraps(type(model).forward)
    def wrapped(self: Any, *args: Any, **inputs: Any) -> Any:
        return plain(*args, **inputs)

    model.forward = types.MethodType(wrapped, model)
    assert "user_ids" in inspect.signature(model.forward).parameters
    assert torch.equal(model.generate(**ONE, max_new_tokens=3, do_sample=False), wanted)


@every_family
@torch.no_grad()
def test_positional_arguments_stand_as_in_the_parent(name: str) -> None:
    two = pair(name, "prepend")
    ids, mask, _ = padded("right")
    for plain, personal in ((two.plain, two.personal), (two.plain.base_model, two.personal.base_model)):
        names = list(inspect.signature(plain.forward).parameters)
        args = [{"input_ids": ids, "attention_mask": mask}.get(name) for name in names[: names.index("position_ids")]]
        wanted = personal(input_ids=ids, attention_mask=mask, user_ids=USERS)[0]
        assert torch.equal(personal(*args, user_ids=USERS)[0], wanted)
        assert torch.equal(personal(*args)[0], plain(*args)[0])
        with pytest.raises(TypeError, match="multiple values"):
            personal(ids, input_ids=ids)
        with pytest.raises(ValueError, match="argument"):
            personal(*[None] * 30)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("empty", [True, False])
@torch.no_grad()
def test_padded_generation_without_users_is_the_plain_models(name: str, empty: bool) -> None:
    two = pair(name, "prepend")
    ids, mask, _ = padded("left")
    inputs = {"input_ids": ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": 6}
    wanted = two.plain.generate(**inputs)
    if empty:
        model = personalize(copy.deepcopy(two.plain), make_user_model("uniform", 5, torch.zeros(0, WIDTH)))
        assert torch.equal(model.generate(**inputs, user_ids=USERS), wanted)
    else:
        assert torch.equal(two.personal.generate(**inputs), wanted)


@every_place
@torch.no_grad()
def test_generation_computes_the_last_logits_only(place: str) -> None:
    model = fresh("llama", place).personal
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    model.generate(**ONE, max_new_tokens=2)
    assert seen == [1, 1]


def test_a_plain_trainer_trains_and_evaluates(tmp_path: Path) -> None:
    model = fresh("llama", "prepend").personal
    row = {"input_ids": TEXTS[0].tolist(), "labels": TEXTS[0].tolist(), "user_ids": 1}
    rows = Dataset.from_list([row, row])
    before = model.base_model.user_model.offsets.weight.detach().clone()
    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), max_steps=1, **options), None, rows, rows)
    trainer.train()
    changed = (model.base_model.user_model.offsets.weight - before).abs().amax(dim=1) > 0
    assert changed.tolist() == [False, True, False, False, False]
    assert "eval_loss" in trainer.evaluate()


def test_an_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    two = fresh("llama", "prepend")
    model = adapted(copy.deepcopy(two.personal))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(two.personal, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**ONE).logits, model(**ONE).logits)


MIXTRAL = MixtralConfig(**GROUPED, num_local_experts=4, output_router_logits=True)


@every_place
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_router_losses_are_over_the_text(place: Any, side: str) -> None:
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(MIXTRAL).eval()
    two = Pair(plain, personalize(copy.deepcopy(plain), users(), place), place)
    ids, mask, _ = padded(side)
    out = two.personal(input_ids=ids, attention_mask=mask, user_ids=USERS, labels=ids)
    assert [logits.shape for logits in out.router_logits] == [(ids.numel(), 4)] * 2
    alone = [plain(inputs_embeds=two.embeddings(text, user)) for text, user in zip(TEXTS, USERS, strict=True)]
    wanted = [torch.cat([two.cut(one.router_logits[at][None])[0] for one in alone]) for at in range(2)]
    text = torch.cat([logits[mask.flatten() == 1] for logits in out.router_logits])
    assert close(text, torch.cat(wanted))
    assert close(out.aux_loss, load_balancing_loss_func(tuple(wanted), 4, MIXTRAL.num_experts_per_tok))
    whole = two.personal(**ONE, labels=TEXT)
    assert close(whole.aux_loss, load_balancing_loss_func(whole.router_logits, 4, MIXTRAL.num_experts_per_tok))


@every_place
@torch.no_grad()
def test_states_of_chosen_layers(place: str) -> None:
    two = pair("llama", place)
    whole = two.personal(**ONE, output_hidden_states=True).hidden_states
    found = two.personal(**ONE, output_hidden_states=[1]).hidden_states
    assert [states is None for states in found] == [True, False, True]
    assert torch.equal(found[1], whole[1])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_backbone_may_give_a_tuple(name: str) -> None:
    two = fresh(name, "prepend")
    backbone = two.personal.base_model
    wanted = backbone(**ONE).last_hidden_state
    filled = backbone(input_ids=TEXT[:, :5], user_ids=USERS[:1], use_cache=True).past_key_values
    rest = {"input_ids": TEXT[:, 5:], "user_ids": USERS[:1], "past_key_values": filled}
    outputs = [backbone(**ONE, return_dict=False), backbone(**rest, return_dict=False)]
    backbone.config.return_dict = False
    outputs.append(backbone(**ONE))
    assert all(isinstance(out, tuple) for out in outputs)
    assert close(outputs[0][0], wanted)
    assert close(outputs[1][0], wanted[:, 5:])
    assert close(outputs[2][0], wanted)
    assert close(backbone(**ONE, return_dict=True).last_hidden_state, wanted)


def test_a_static_cache_is_refused_without_padding() -> None:
    model = pair("llama", "prepend").personal
    caches = (
        {"cache_implementation": "static"},
        {"past_key_values": StaticCache(config=model.config, max_cache_len=64)},
    )
    for options in caches:
        with pytest.raises(ValueError, match="static cache has no room for user vectors"):
            model.generate(**ONE, max_new_tokens=3, **options)
    assert model.generate(TEXT, max_new_tokens=3, cache_implementation="static").shape == (1, 15)


@every_place
@torch.no_grad()
def test_packed_texts_are_refused(place: str) -> None:
    two = pair("llama", place)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])
    for given in ({}, {"attention_mask": torch.ones_like(TEXT)}):
        with pytest.raises(ValueError, match="position_ids go back within a row"):
            two.personal(**ONE, **given, position_ids=packed, use_cache=False)
    assert torch.equal(two.personal(TEXT, position_ids=packed).logits, two.plain(TEXT, position_ids=packed).logits)
    # Positions of padding say nothing, wherever they are.
    ids, mask, _ = padded("both")
    inputs = {"input_ids": ids, "attention_mask": mask, "user_ids": USERS}
    counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    found = two.personal(**inputs, position_ids=counted).logits
    assert close(found[mask == 1], two.personal(**inputs).logits[mask == 1])


@every_place
@torch.no_grad()
def test_a_gap_in_the_positions_starts_no_new_text(place: str) -> None:
    model = pair("llama", place).personal
    gaps = torch.tensor([[0, *range(5, 16)]])
    wanted = model(**ONE, position_ids=gaps, use_cache=True).logits
    assert close(model(**ONE, position_ids=gaps, use_cache=False).logits, wanted)


def test_user_ids_that_are_no_tensor_are_refused() -> None:
    with pytest.raises(ValueError, match=r"user_ids must be of shape \(1,\), one for each row, found a list"):
        pair("llama", "prepend").personal(TEXT, user_ids=[1])


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_a_saved_backbone_holds_no_users(tmp_path: Path, auto: Any) -> None:
    two = fresh("llama", "prepend", auto)
    personalize(two.personal, users("cluster"))
    two.personal.base_model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(two.plain.base_model.state_dict())


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
@every_place
@torch.no_grad()
def test_a_pickle_is_the_model(place: str, auto: Any) -> None:
    model = fresh("llama", place, auto).personal
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    assert same_types(again, (type(model), type(model.base_model)))
    assert torch.equal(again(**ONE)[0], model(**ONE)[0])
    assert again.base_model.user_place == place


def test_what_llama4_lacks_is_told() -> None:
    options = {**GROUPED, "intermediate_size_mlp": 64, "num_local_experts": 2}
    model = AutoModelForCausalLM.from_config(Llama4TextConfig(**options))
    with pytest.raises(ValueError, match=r"it has layers of a type that is not supported \(chunked_attention\)"):
        personalize(model.model, users())
    model = AutoModelForCausalLM.from_config(Llama4TextConfig(**options, layer_types=["full_attention"] * 2))
    with pytest.raises(ValueError, match=r"Llama4ForCausalLM can't .*: its head and its backbone are one module"):
        personalize(model, users())


def test_a_compiled_model_is_compiled_once() -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = fresh("llama", "prepend").personal
    compiled = torch.compile(model, backend=count, fullgraph=True)
    ids, mask, _ = padded("left")
    for shift in range(3):
        inputs = {"input_ids": (ids + shift) % 90, "attention_mask": mask, "user_ids": (USERS + shift) % 5}
        with torch.no_grad():
            assert close(compiled(**inputs).logits, model(**inputs).logits)
    assert len(graphs) == 1


def test_data_parallel_replicas_read_users(tmp_path: Path) -> None:
    model = fresh("llama", "prepend").personal
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        replica = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        replica(**ONE, labels=TEXT).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    seen = model.base_model.user_model.offsets.weight.grad.abs().amax(dim=1) > 0
    assert seen.tolist() == [False, True, False, False, False]
