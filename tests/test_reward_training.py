"""Users, head and backbone trained together, from comparisons to rankings; what is saved, and who comes later."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, checkerboard, tiny_config
from torch import Tensor
from training import lora, small_config
from transformers import LlamaForCausalLM

from prlhf.core import token_rows
from prlhf.core.artefact import MANIFEST, ArtefactError
from prlhf.core.comparisons import Comparison, Comparisons, User
from prlhf.core.pretrained import find_model, load_backbone
from prlhf.core.scoring import ScoreRequest
from prlhf.core.tokenize import TextLayout
from prlhf.core.users import USER_MODELS
from prlhf.prm import features, soft_prompt
from prlhf.prm.joint import train_reward_model
from prlhf.prm.module import AGGREGATORS
from prlhf.prm.reward_model import PersonalizedRewardModel

pytestmark = pytest.mark.usefixtures("one_thread")

Trained = Callable[..., tuple[PersonalizedRewardModel, Path]]

ALWAYS = ["README.md", "head.safetensors", "metrics.jsonl", "user_model.safetensors", "users.json"]
WEIGHTS = {
    "lora": ["adapter_config.json", "adapter_model.safetensors"],
    "full": ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"],
}
REQUESTS = [
    ScoreRequest(User(user), f"Say {i}", [f"well, {i} it is.", f"WOW!!! {i}!!!", "", "x" * i])
    for i in (3, 70)
    for user in ("u0", "u1", "u2", "stranger", None)
]

both = pytest.mark.parametrize("aggregator", AGGREGATORS)
tunings = pytest.mark.parametrize("tuning", ["lora", "full"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with weights large enough to tell texts apart."""
    return rough_model(tmp_path_factory.mktemp("rough"), 0)


def rough_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config(initializer_range=0.2)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def fit(base: Path, run: Path, tuning: str, layout: TextLayout | None = None, **config: Any) -> PersonalizedRewardModel:
    soft, clusters = config.get("aggregator") == "soft_prompt", config.get("user_model") == "cluster"
    options = {
        "user_clusters": 3,
        "pooling": "mean",  # a random model's last state says too little to carry over to other prompts
        "learning_rate": 3e-3,
        "user_learning_rate": 0.3 if clusters else 0.1,
        "num_train_epochs": 7 if soft else 4,
        "eval_steps": 0.25,
        "save_steps": 0.25,
        **config,
    }
    return train_reward_model(
        checkerboard(20),
        checkerboard(6, first=40),
        load_backbone(find_model(str(base)), "float32", "cpu"),
        layout or TextLayout(),
        small_config(run, **options),
        tuning,
        lora() if tuning == "lora" else None,
    )


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A trained model and the run it was saved to, each kind trained once."""
    made: dict[tuple[str, ...], tuple[PersonalizedRewardModel, Path]] = {}

    def get(aggregator: str, tuning: str = "lora", user_model: str = "individualized") -> Any:
        kind = aggregator, tuning, user_model
        if kind not in made:
            run = tmp_path_factory.mktemp("runs") / "-".join(kind)
            model = fit(base, run, tuning, aggregator=aggregator, user_model=user_model)
            model.save_pretrained(run)
            made[kind] = model, run
        return made[kind]

    return get


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def accuracy(model: PersonalizedRewardModel, rows: Sequence[Comparison], user: str | None = "own") -> float:
    asked = [ScoreRequest(r.user if user == "own" else User(user), r.prompt, [r.chosen, r.rejected]) for r in rows]
    return float(np.mean([0.5 + 0.5 * np.sign(float(s[0] - s[1])) for s in model.score(asked)]))


def newcomer(like: str, prompts: int = 12, first: int = 80) -> list[Comparison]:
    """Rows of a new user with the taste of a known one."""
    rows = [row for row in checkerboard(prompts, first=first) if row.user.id == like]
    return [replace(row, user=User("new")) for row in rows]


def digests(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Of every file: its hash, its inode, and when it was written."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            of = path.stat()
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest(), of.st_ino, of.st_mtime_ns
    return found


def state(model: PersonalizedRewardModel) -> dict[str, Tensor]:
    """All tensors of a model: backbone, adapter, users, head."""
    own = {f"own.{name}": tensor for name, tensor in model.head.tensors().items()}
    return {name: tensor.clone() for name, tensor in {**model.module.state_dict(), **own}.items()}


@both
@tunings
@pytest.mark.parametrize("user_model", ["individualized", "cluster"])
def test_checkerboard(trained: Trained, aggregator: str, tuning: str, user_model: str) -> None:
    model, _ = trained(aggregator, tuning, user_model)
    figures = {name: figure["value"] for name, figure in model.figures["validation_accuracy"].items()}
    assert figures == {"personal": 1.0, "row0": 0.5}
    assert accuracy(model, checkerboard(6, first=200)) == 1.0
    for user in (None, "stranger"):
        assert accuracy(model, checkerboard(6, first=200), user) == 0.5
    assert model.tuning == tuning
    assert model.users.facts["u0"]["validation"] == {"n": 6, "personal": 1.0, "row0": pytest.approx(0.5, abs=0.5)}


@both
def test_the_backbone_was_trained_too(trained: Trained, base: Path, aggregator: str) -> None:
    before = load_backbone(find_model(str(base)), "float32", "cpu").model.state_dict()
    full = trained(aggregator, "full")[0].backbone.model.state_dict()
    assert not any(torch.equal(full[name], tensor) for name, tensor in before.items() if "layers" in name)
    adapted = trained(aggregator, "lora")[0].module.state_dict()
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in adapted.items()}
    for name, tensor in before.items():
        assert torch.equal(weights[f"base_model.model.model.{name}"], tensor), name
    assert all(tensor.any() for name, tensor in adapted.items() if "lora_B" in name)


SCORE = """
import json, sys
import torch
torch.set_num_threads(1)
from prlhf import PersonalizedRewardModel, ScoreRequest, User

requests = [ScoreRequest(User(user), prompt, texts) for user, prompt, texts in json.loads(sys.argv[1])]
found = {}
for run in sys.argv[2:]:
    found[run] = [s.tolist() for s in PersonalizedRewardModel.from_pretrained(run).score(requests)]
print(json.dumps(found))
"""


def test_scores_in_a_fresh_process_are_the_same(trained: Trained, tmp_path: Path) -> None:
    kinds = [(a, t, u) for a in AGGREGATORS for t in ("lora", "full") for u in ("individualized", "cluster")]
    made = [trained(*kind) for kind in kinds]
    asked = json.dumps([(r.user.id, r.prompt, r.responses) for r in REQUESTS])
    environment = {**os.environ, "PRLHF_CACHE": str(tmp_path / "empty"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCORE, asked, *(str(run) for _, run in made)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
    found = json.loads(done.stdout.splitlines()[-1])
    for model, run in made:
        here = torch.stack(model.score(REQUESTS))
        assert here.std() > 0.1
        assert torch.allclose(torch.tensor(found[str(run)]), here, atol=1e-5), run.name


@both
@tunings
def test_a_run_can_be_copied_by_saving_it_elsewhere(
    trained: Trained, empty_cache: Path, tmp_path: Path, aggregator: str, tuning: str
) -> None:
    model, run = trained(aggregator, tuning)
    PersonalizedRewardModel.from_pretrained(run).save_pretrained(tmp_path / "copy")
    again = PersonalizedRewardModel.from_pretrained(tmp_path / "copy")
    assert torch.allclose(torch.stack(again.score(REQUESTS)), torch.stack(model.score(REQUESTS)), atol=1e-5)
    names = set(json.loads((tmp_path / "copy" / MANIFEST).read_text())["files"])
    assert names == {*ALWAYS, *WEIGHTS[tuning]}


@both
@tunings
def test_files_of_a_run(trained: Trained, aggregator: str, tuning: str) -> None:
    """All of them are listed, none holds a user's vector that should not, and none says where the base model lay."""
    _, run = trained(aggregator, tuning)
    listed = json.loads((run / MANIFEST).read_text())["files"]
    assert sorted(listed) == sorted([*ALWAYS, *WEIGHTS[tuning]])
    from safetensors import safe_open

    for name in listed:
        if name.endswith(".safetensors") and name != "user_model.safetensors":
            with safe_open(run / name, "pt") as file:
                assert not [key for key in file.keys() if "user_model" in key.split(".")]  # noqa: SIM118
        if name in ("adapter_config.json", "config.json"):
            assert str(run.parent.parent) not in (run / name).read_text()


@pytest.mark.parametrize("how", ["missing", "cut"])
@pytest.mark.parametrize(
    ("tuning", "name"), [(tuning, name) for tuning, files in WEIGHTS.items() for name in [*ALWAYS, *files, MANIFEST]]
)
def test_a_damaged_run_is_refused_by_name(trained: Trained, tmp_path: Path, tuning: str, name: str, how: str) -> None:
    _, run = trained("soft_prompt", tuning)
    broken = tmp_path / "run"
    broken.mkdir()
    for path in run.iterdir():
        if path.is_file() and (path.name != name or how == "cut"):
            shutil.copyfile(path, broken / path.name)
    if how == "cut":
        os.truncate(broken / name, (broken / name).stat().st_size // 2)
    with pytest.raises(ArtefactError, match=name.replace(".", r"\.")):
        PersonalizedRewardModel.from_pretrained(broken)


@both
def test_another_base_model_is_refused(trained: Trained, tmp_path: Path, aggregator: str) -> None:
    _, run = trained(aggregator, "lora")
    other = rough_model(tmp_path / "other", 1)
    wanted = json.loads((run / MANIFEST).read_text())["settings"]["model"]["fingerprint"]
    with pytest.raises(ArtefactError, match=f"weights and configuration have the hash .*{wanted}"):
        PersonalizedRewardModel.from_pretrained(run, model=str(other)).score(REQUESTS)


@both
def test_another_chat_template_is_refused(trained: Trained, base: Path, tmp_path: Path, aggregator: str) -> None:
    _, run = trained(aggregator, "lora")
    other = shutil.copytree(base, tmp_path / "other")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("assistant", "model")
    tokenizer.save_pretrained(other)
    with pytest.raises(ArtefactError, match="tokenizer and chat template"):
        PersonalizedRewardModel.from_pretrained(run, model=str(other)).score(REQUESTS)


@both
@tunings
def test_other_trained_weights_are_refused(trained: Trained, tmp_path: Path, aggregator: str, tuning: str) -> None:
    """Even where a manifest was made to fit them: scores in the cache belong to a hash of these weights."""
    _, run = trained(aggregator, tuning)
    _, other = trained(aggregator, tuning, "cluster")
    mixed = shutil.copytree(run, tmp_path / "mixed")
    name = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}[tuning]
    shutil.copyfile(other / name, mixed / name)
    manifest = json.loads((mixed / MANIFEST).read_text())
    manifest["files"][name] = json.loads((other / MANIFEST).read_text())["files"][name]
    (mixed / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match="trained weights"):
        PersonalizedRewardModel.from_pretrained(mixed).score(REQUESTS)


@both
def test_a_fully_trained_run_needs_no_base_model(
    trained: Trained, empty_cache: Path, tmp_path: Path, aggregator: str
) -> None:
    model, run = trained(aggregator, "full")
    moved = shutil.copytree(run, tmp_path / "moved")
    again = PersonalizedRewardModel.from_pretrained(moved)
    again.settings["model"] |= {"path": "/nowhere", "name": "/nowhere"}
    assert torch.allclose(torch.stack(again.score(REQUESTS)), torch.stack(model.score(REQUESTS)), atol=1e-5)


@both
@pytest.mark.parametrize("user_model", ["individualized", "cluster"])
def test_a_new_user_is_learned_and_nothing_else_changes(
    trained: Trained, tmp_path: Path, aggregator: str, user_model: str
) -> None:
    _, run = trained(aggregator, "lora", user_model)
    folder = shutil.copytree(run, tmp_path / "run")
    model = PersonalizedRewardModel.from_pretrained(folder)
    old = torch.stack(model.score(REQUESTS))
    tensors, count = state(model), len(model.users)
    before = model.user_model(torch.arange(count)).detach().clone()
    later = [replace(row, user=User("new")) for row in newcomer("u1", 6, first=300)]
    learns = (aggregator, user_model) != ("soft_prompt", "cluster")  # see the next test
    for like, right in (("u1", 1.0), ("u0", 0.0), ("u1", 1.0)):
        added = model.add_user("new", newcomer(like), replace="new" in model.users)
        assert added.comparisons == 12
        assert added.row0_margins.shape == (12,)
        if learns:
            assert (added.margins > 0).all()
            assert accuracy(model, later) == right
        assert len(model.users) == count + 1
        assert torch.equal(model.user_model(torch.arange(count)), before)
    changed = {n for n, t in state(model).items() if t.shape != tensors[n].shape or not torch.equal(t, tensors[n])}
    table = {"individualized": "offsets.weight", "cluster": "logits.weight"}[user_model]
    assert {name.rpartition("user_model.")[2] for name in changed} <= {table}
    assert torch.equal(torch.stack(model.score(REQUESTS)), old)
    files = digests(folder)
    model.save_pretrained(folder)
    seen = digests(folder)
    for name in WEIGHTS["lora"]:
        assert seen[name] == files[name]
    assert seen["user_model.safetensors"] != files["user_model.safetensors"]
    assert seen["head.safetensors"][0] == files["head.safetensors"][0]
    again = PersonalizedRewardModel.from_pretrained(folder)
    assert accuracy(again, later) == accuracy(model, later)
    assert torch.equal(torch.stack(again.score(REQUESTS)), old)
    with pytest.raises(ValueError, match="--replace"):
        again.add_user("new", newcomer("u0"))
    assert again.users.facts["new"]["origin"] == "added"


@both
@pytest.mark.parametrize("like", ["u0", "u1"])
def test_a_new_users_cluster_is_found(trained: Trained, aggregator: str, like: str) -> None:
    """Twelve comparisons of plain taste, of which each cluster's centre explains all or none."""
    model = PersonalizedRewardModel.from_pretrained(trained(aggregator, "lora", "cluster")[1])
    added = model.add_user("new", newcomer(like))
    assert (added.margins > 0).all()
    assert accuracy(model, [replace(row, user=User("new")) for row in newcomer(like, 6, first=300)]) == 1.0


def test_a_new_user_of_a_fully_trained_soft_prompt(trained: Trained, tmp_path: Path) -> None:
    _, run = trained("soft_prompt", "full")
    folder = shutil.copytree(run, tmp_path / "run")
    model = PersonalizedRewardModel.from_pretrained(folder)
    files = digests(folder)
    model.add_user("new", newcomer("u1"))
    model.save_pretrained(folder)
    assert all(digests(folder)[name] == files[name] for name in WEIGHTS["full"])
    assert accuracy(PersonalizedRewardModel.from_pretrained(folder), newcomer("u1", 6, first=300)) == 1.0


def test_a_new_user_of_one_comparison_stays_at_row_0(trained: Trained) -> None:
    """One comparison can't tell how far to go."""
    model = PersonalizedRewardModel.from_pretrained(trained("soft_prompt")[1])
    added = model.add_user("new", newcomer("u1")[:1])
    assert np.array_equal(added.margins, added.row0_margins)
    assert torch.equal(model.user_model(torch.tensor([len(model.users) - 1])), model.user_model(torch.tensor([0])))


@both
@pytest.mark.parametrize("policy", ["truncate", "drop"])
def test_over_long_rows_of_a_new_user(trained: Trained, empty_cache: Path, aggregator: str, policy: str) -> None:
    """The length policy was made for training; a new user's fit takes it, or cuts, but does not fall over it."""
    model = PersonalizedRewardModel.from_pretrained(trained(aggregator)[1])
    model.settings["layout"] |= {"max_length": 100, "over_long": policy}
    rows = newcomer("u1")
    rows[3] = replace(rows[3], chosen=rows[3].chosen * 20)
    added = model.add_user("new", rows)
    assert np.isfinite(added.margins).all()
    assert accuracy(model, newcomer("u1", 6, first=300)) == 1.0


@both
def test_scores_do_not_depend_on_their_company(
    trained: Trained, aggregator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch size, padding, order and the other users of a batch: within 1e-4 in fp32."""
    _, run = trained(aggregator)

    def found(name: str, requests: list[ScoreRequest], tokens: int) -> list[Tensor]:
        monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / name))
        monkeypatch.setattr(token_rows, "TOKENS_PER_BATCH", tokens)
        return PersonalizedRewardModel.from_pretrained(run).score(requests)

    wanted = found("alone", REQUESTS, 1)
    assert torch.stack(wanted).std() > 0.1
    for tokens in (150, 400, 100_000):
        for scores, alone in zip(found(f"{tokens}", REQUESTS, tokens), wanted, strict=True):
            assert torch.allclose(scores, alone, atol=1e-4)
    backwards = [replace(r, responses=list(r.responses)[::-1]) for r in REQUESTS[::-1]]
    for scores, alone in zip(found("backwards", backwards, 400)[::-1], wanted, strict=True):
        assert torch.allclose(scores.flip(0), alone, atol=1e-4)
    for i in (0, 1, 9):
        assert torch.allclose(found(f"one-{i}", [REQUESTS[i]], 100_000)[0], wanted[i], atol=1e-4)
    long = ScoreRequest(User("u1"), "Say much", ["y" * 300])
    assert torch.allclose(found("long", [*REQUESTS, long], 100_000)[0], wanted[0], atol=1e-4)


def counted(aggregator: str, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Numbers of rows that reach the backbone, batch by batch; breaks off after some batches."""
    seen: list[int] = []
    module, name = {"soft_prompt": (soft_prompt, "rewards"), "linear_head": (features, "hidden_states")}[aggregator]
    real = getattr(module, name)

    def count(*given: Any) -> Tensor:
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(len(given[1]))
        return real(*given)

    monkeypatch.setattr(module, name, count)
    return seen


@both
def test_scores_are_cached_and_a_stopped_run_goes_on(
    trained: Trained, aggregator: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = trained(aggregator)
    # With soft prompts row 0 answers for both strangers; with linear heads texts are run once for all users.
    texts = {(r.prompt, text) for r in REQUESTS for text in r.responses}
    total = len(texts) * (4 if aggregator == "soft_prompt" else 1)
    monkeypatch.setattr(token_rows, "TOKENS_PER_BATCH", 200)
    with monkeypatch.context() as patch:
        stopped = counted(aggregator, patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            PersonalizedRewardModel.from_pretrained(run).score(REQUESTS)
    with monkeypatch.context() as patch:
        rest = counted(aggregator, patch)
        scores = PersonalizedRewardModel.from_pretrained(run).score(REQUESTS)
        assert 0 < sum(stopped) < total
        assert sum(stopped) + sum(rest) == total
    with monkeypatch.context() as patch:
        nothing = counted(aggregator, patch)
        again = PersonalizedRewardModel.from_pretrained(run)
        assert all(map(torch.equal, again.score(REQUESTS), scores))
        again.prepare(REQUESTS)
        assert nothing == []
        again.score([ScoreRequest(User("u3"), "Say 3", ["well, 3 it is."])])
        assert nothing == ([1] if aggregator == "soft_prompt" else [])
    monkeypatch.setenv("PRLHF_CACHE", str(empty_cache / "none"))
    for here, there in zip(PersonalizedRewardModel.from_pretrained(run).score(REQUESTS), scores, strict=True):
        assert torch.allclose(here, there, atol=1e-4)


def test_a_replaced_user_is_not_scored_from_the_cache(trained: Trained) -> None:
    model = PersonalizedRewardModel.from_pretrained(trained("soft_prompt")[1])
    request = [ScoreRequest(User("new"), "Say 5", ["well, 5 it is.", "WOW!!! 5!!!"])]
    model.add_user("new", newcomer("u1"))
    first = model.score(request)[0]
    model.add_user("new", newcomer("u0"), replace=True)
    second = model.score(request)[0]
    assert first[1] > first[0]
    assert second[0] > second[1]


@pytest.mark.parametrize("pooling", ["last", "mean"])
@both
def test_scores_are_those_of_the_trainers_last_evaluation(
    base: Path, tmp_path: Path, aggregator: str, pooling: str
) -> None:
    """What is scored afterwards is what validation measured."""
    model = fit(base, tmp_path, "full", aggregator=aggregator, pooling=pooling, num_train_epochs=1)
    rows = checkerboard(6, first=40)
    scores = model.score([ScoreRequest(row.user, row.prompt, [row.chosen, row.rejected]) for row in rows])
    loss = float(np.logaddexp(0, [float(s[1] - s[0]) for s in scores]).mean())
    assert loss == pytest.approx(model.figures["validation_log_loss"]["personal"], abs=1e-5)
    scores = model.score([ScoreRequest(User(None), row.prompt, [row.chosen, row.rejected]) for row in rows])
    loss = float(np.logaddexp(0, [float(s[1] - s[0]) for s in scores]).mean())
    assert loss == pytest.approx(model.figures["validation_log_loss"]["row0"], abs=1e-5)


@both
def test_only_the_layout_limits_length(base: Path, tmp_path: Path, aggregator: str) -> None:
    """No row is lost on the way because TRL's own limit is lower than the layout's."""
    rows = checkerboard(3)
    rows.rows[0] = replace(rows[0], chosen=rows[0].chosen * 5)
    backbone = load_backbone(find_model(str(base)), "float32", "cpu")
    args = small_config(tmp_path, aggregator=aggregator, max_length=70, max_steps=2)
    model = train_reward_model(rows, rows, backbone, TextLayout(), args, "full")
    counts = {name: figure["n"] for name, figure in model.figures["validation_accuracy"].items()}
    assert counts == {"personal": 12, "row0": 12}
    assert model.figures["rows"] == {"train": 12, "validation": 12}


@pytest.mark.parametrize(
    ("tuning", "options"),
    [
        ("lora", {"user_model": "uniform", "user_tokens": 0}),
        ("full", {"user_model": "uniform", "user_tokens": 3}),
        ("lora", {"user_shared": False}),
        ("frozen", {"user_tokens": 2}),
    ],
)
def test_other_soft_prompts_are_saved_and_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuning: str, options: dict[str, Any]
) -> None:
    model = fit(base, tmp_path / "run", tuning, aggregator="soft_prompt", max_steps=4, **options)
    model.save_pretrained(tmp_path / "run")
    here = torch.stack(model.score(REQUESTS))
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / "cache"))
    again = PersonalizedRewardModel.from_pretrained(tmp_path / "run")
    assert torch.allclose(torch.stack(again.score(REQUESTS)), here, atol=1e-5)
    if again.settings["user_model"] == "uniform":
        assert torch.equal(here[0], here[1])
        with pytest.raises(ValueError, match="no user can be added"):
            again.add_user("new", newcomer("u1"))
    else:
        again.add_user("new", newcomer("u1"))
        again.save_pretrained(tmp_path / "run")
        assert "new" in PersonalizedRewardModel.from_pretrained(tmp_path / "run").users


def test_users_who_are_nobody_need_a_uniform_model(base: Path, tmp_path: Path) -> None:
    rows = Comparisons([replace(row, user=User(None)) for row in checkerboard(3)], "nobody")
    backbone = load_backbone(find_model(str(base)), "float32", "cpu")
    with pytest.raises(ValueError, match="--user-model uniform"):
        train_reward_model(rows, rows, backbone, TextLayout(), small_config(tmp_path), "full")
    assert set(USER_MODELS) == {"uniform", "individualized", "cluster"}


@pytest.mark.parametrize(("tuning", "peft_config"), [("lora", None), ("full", lora()), ("some", None)])
def test_tunings_that_make_no_sense_are_refused(base: Path, tmp_path: Path, tuning: str, peft_config: Any) -> None:
    rows, backbone = checkerboard(2), load_backbone(find_model(str(base)), "float32", "cpu")
    with pytest.raises(ValueError, match=f"tuning '{tuning}'"):
        train_reward_model(rows, rows, backbone, TextLayout(), small_config(tmp_path), tuning, peft_config)
