"""Who comes to a policy later, what it is held to, what leaves its run, and the commands that take any run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import prlhf
from peft import PeftModel
from policies import (
    REQUESTS,
    TUNINGS,
    Trained,
    accuracy,
    fit_policy,
    language_model,
    margins,
    nobody,
    plain_log_probs,
    plain_model,
    requests_of,
    stacked,
    vectors_of,
)
from safetensors.torch import load_file
from tiny import checkerboard, write_jsonl
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from prlhf.core.artefact import MANIFEST, ArtefactError
from prlhf.core.comparisons import Comparison, Comparisons, User
from prlhf.core.publish import push_to_hub
from prlhf.policy.policy import PersonalizedPolicy
from prlhf.policy.publish import export

pytestmark = pytest.mark.usefixtures("one_thread")
tunings = pytest.mark.parametrize("tuning", TUNINGS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference that training does not start from."""
    return language_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(base, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forgets all that was computed, as often as it is called."""
    count = iter(range(100))

    def forget() -> None:
        monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / f"cache-{next(count)}"))

    forget()
    return forget


def newcomer(like: str, prompts: int = 12, first: int = 80) -> list[Comparison]:
    """Rows of a new user with the taste of a known one."""
    rows = [row for row in checkerboard(prompts, first=first) if row.user.id == like]
    return [replace(row, user=User("new")) for row in rows]


def copied(run: Path, folder: Path) -> Path:
    return shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoint-*"))


def tensors(policy: PersonalizedPolicy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.module.state_dict().items()}


@pytest.mark.parametrize(
    ("tuning", "user_model"), [*((tuning, "individualized") for tuning in TUNINGS), ("lora", "cluster")]
)
def test_a_new_user_is_learned_and_nothing_else_changes(
    trained: Trained, tmp_path: Path, empty_cache: Callable[[], None], tuning: str, user_model: str
) -> None:
    """A user of the even taste, then of the odd one; a run of clusters finds the mixture."""
    folder = copied(trained(tuning, user_model)[1], tmp_path / "run")
    policy, later = PersonalizedPolicy.from_pretrained(folder), newcomer("u0", 6, first=300)
    old, before, table = stacked(policy), tensors(policy), policy.user_model.vectors()
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for like, right in (("u1", 0.0), ("u0", 1.0)):
        added = policy.add_user("new", newcomer(like), replace="new" in policy.users)
        assert (added.margins > 0).all()
        assert added.row0_margins == pytest.approx(margins(policy, newcomer(like), None), abs=1e-5)
        assert accuracy(policy, later) == right
        assert torch.equal(policy.user_model.vectors()[:-1], table)
    changed = {n for n, t in tensors(policy).items() if t.shape != before[n].shape or not torch.equal(t, before[n])}
    grown = {"individualized": "offsets.weight", "cluster": "logits.weight"}[user_model]
    assert {name.rpartition("user_model.")[2] for name in changed} == {grown}
    policy.save_pretrained(folder)
    own = {"README.md", "user_model.safetensors", "users.json", MANIFEST}
    assert {name for name, content in files.items() if (folder / name).read_bytes() != content} == own
    empty_cache()  # so that others' scores are computed again
    again = PersonalizedPolicy.from_pretrained(folder)
    assert torch.equal(stacked(again), old)
    assert accuracy(again, later) == 1.0
    with pytest.raises(ValueError, match="--replace"):
        again.add_user("new", newcomer("u0"))


def test_a_new_user_of_one_comparison_stays_at_row_0(trained: Trained) -> None:
    policy = PersonalizedPolicy.from_pretrained(trained("lora")[1])
    added = policy.add_user("new", newcomer("u1")[:1])
    assert np.array_equal(added.margins, added.row0_margins)
    assert torch.equal(policy.user_model.vectors()[-1], policy.user_model.vectors()[0])


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_uniform_run_takes_no_user(base: Path, tmp_path: Path, tokens: int) -> None:
    policy = fit_policy(base, tmp_path, user_model="uniform", user_tokens=tokens, max_steps=4)
    policy.save_pretrained(tmp_path)
    again = PersonalizedPolicy.from_pretrained(tmp_path)
    scores = again.score([replace(REQUESTS[0], user=User(user)) for user in ("u0", "u1", None)])
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
    with pytest.raises(ValueError, match="no user can be added"):
        again.add_user("new", newcomer("u1"))


@tunings
def test_scores_are_relative_to_the_reference_that_was_given(
    base: Path, other: Path, tmp_path: Path, empty_cache: Callable[[], None], tuning: str
) -> None:
    policy = fit_policy(base, tmp_path, tuning, other)
    policy.save_pretrained(tmp_path)
    own = plain_log_probs(plain_model(base, tmp_path, tuning), policy, vectors_of(policy))
    wanted = policy.beta * (own - plain_log_probs(plain_model(other, tmp_path, "frozen"), policy, nobody))
    assert torch.allclose(stacked(policy), wanted, atol=1e-4)
    empty_cache()
    again = PersonalizedPolicy.from_pretrained(tmp_path)
    assert torch.allclose(stacked(again), wanted, atol=1e-4)
    again.settings["reference"]["fingerprint"] = "another"
    with pytest.raises(ArtefactError, match="reference's weights"):
        PersonalizedPolicy.score(replace(again, _reference=None), REQUESTS)


@pytest.mark.parametrize(
    "given",
    [False, True],
)
def test_the_reference_is_computed_in_its_own_dtype(
    base: Path, other: Path, tmp_path: Path, empty_cache: Callable[[], None], given: bool
) -> None:
    """Training in bfloat16 moves no log-probability of the reference, which other runs find in the cache."""
    policy = fit_policy(base, tmp_path, "frozen", other if given else None, bf16=True, max_steps=2)
    policy.save_pretrained(tmp_path)
    cached_and_new = requests_of([*checkerboard(3, first=40), *checkerboard(2, first=300)])
    found = torch.stack(policy.score(cached_and_new))
    empty_cache()
    again = PersonalizedPolicy.from_pretrained(tmp_path)
    assert torch.allclose(torch.stack(again.score(cached_and_new)), found, atol=1e-5)


@pytest.mark.parametrize("tuning", ["frozen", "full"])
def test_a_reference_that_follows_is_not_scored_with(
    base: Path, other: Path, tmp_path: Path, empty_cache: Callable[[], None], tuning: str
) -> None:
    """Scores are relative to what was given, before a reload as after it, and so is what the cache keeps."""
    follow = {"sync_ref_model": True, "ref_model_sync_steps": 1, "precompute_ref_log_probs": False}
    policy = fit_policy(base, tmp_path, tuning, other, max_steps=4, **follow)
    policy.save_pretrained(tmp_path)
    found = stacked(policy)
    empty_cache()
    assert torch.allclose(stacked(PersonalizedPolicy.from_pretrained(tmp_path)), found, atol=1e-4)


@tunings
@pytest.mark.parametrize("merged", [True, False])
def test_exported_weights_and_vectors_are_the_policy(
    trained: Trained, tmp_path: Path, tuning: str, merged: bool
) -> None:
    policy, _ = trained(tuning)
    export(policy, tmp_path / "plain", merged)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    adapter = tmp_path / "plain" / "adapter"
    assert adapter.exists() == (tuning == "lora" and not merged)
    if adapter.exists():
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    table = load_file(tmp_path / "plain" / "user_model.safetensors")["vectors"]
    ids = json.loads((tmp_path / "plain" / "users.json").read_text())["ids"]
    assert (table.shape, ids) == ((5, 4, 32), ["u0", "u1", "u2", "u3"])
    found = plain_log_probs(model, policy, lambda user: table[ids.index(user.id) + 1 if user.id in ids else 0])
    reference = plain_log_probs(plain_model(trained.base, tmp_path, "frozen"), policy, nobody)
    assert torch.allclose(policy.beta * (found - reference), stacked(policy), atol=1e-4)
    assert not [name for name in load_file(tmp_path / "plain" / "model.safetensors") if "user_model" in name]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer.chat_template == policy.backbone.tokenizer.chat_template
    with pytest.raises(ArtefactError, match="is there already"):
        export(policy, tmp_path / "plain")


class Hub:
    """Keeps what would be uploaded."""

    seen: dict[str, bytes]

    def __init__(self, token: str | None = None):
        pass

    def create_repo(self, repo_id: str, **_: object) -> str:
        return f"https://hub/{repo_id}"

    def upload_folder(self, folder_path: str, **_: object) -> None:
        Hub.seen = {p.name: p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return Hub


@tunings
def test_nothing_of_users_is_published(trained: Trained, tmp_path: Path, hub: type[Hub], tuning: str) -> None:
    policy, _ = trained(tuning)
    push_to_hub(policy, "me/run", token="secret-token")
    whole = b"".join(hub.seen.values())
    for word in (b'"u0"', b'"u3"', b"longer_chosen", b"secret-token"):
        assert word not in whole, word
    for vector in policy.user_model.vectors()[1:]:
        assert vector.numpy().tobytes() not in whole
    (tmp_path / "got").mkdir()
    for name, content in hub.seen.items():
        (tmp_path / "got" / name).write_bytes(content)
    got = PersonalizedPolicy.from_pretrained(tmp_path / "got", model=str(trained.base))
    assert len(got.users) == 1
    row0 = stacked(policy)[3]  # of a stranger
    assert torch.allclose(got.score([replace(REQUESTS[3], user=User("u1"))])[0], row0, atol=1e-5)
    assert len(policy.users) == 5  # and the policy itself keeps them
    push_to_hub(policy, "me/run", with_users=True)
    assert json.loads(hub.seen["users.json"])["ids"] == ["u0", "u1", "u2", "u3"]


@tunings
def test_no_path_of_this_machine_is_published(trained: Trained, hub: type[Hub], tuning: str) -> None:
    policy, run = trained(tuning)
    push_to_hub(policy, "me/run")
    told = {name for name, content in hub.seen.items() if str(run.parent.parent).encode() in content}
    assert told == set()


def test_commands_take_a_policys_run(trained: Trained, tmp_path: Path) -> None:
    copied(trained("lora")[1], tmp_path / "run")
    write_jsonl(tmp_path / "test.jsonl", checkerboard(3, first=200))
    write_jsonl(tmp_path / "new.jsonl", Comparisons(newcomer("u1"), "new"))
    lines = [{"prompt": f"Say {i}", "responses": [f"well, {i} it is.", f"WOW!!! {i}!!!"]} for i in (500, 501)]
    (tmp_path / "C.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def found(*args: object) -> Any:
        return json.loads(prlhf(*args, "--json", cwd=tmp_path).stdout)

    figures = found("eval", "preference", "run", "--data", "test.jsonl")
    accuracies = figures["accuracy"]["individualized"]
    assert (accuracies["top"]["value"], accuracies["top_row0"]["value"]) == (1.0, 0.5)
    assert found("users", "add", "new", "--run", "run", "--data", "new.jsonl")["accuracy"]["value"] == 1.0
    listed = found("users", "list", "--run", "run")["users"]
    assert [user["origin"] for user in listed] == [*["trained"] * 4, "added"]
    rankings = found("bestofn", "rerank", "run", "--candidates", "C.jsonl", "--users", "all")["rankings"]
    assert [ranking["order"][0] for ranking in rankings] == [0, 1, 0, 1, 1] * 2
    score = ("bestofn", "score", "run", "--candidates", "C.jsonl", "--users", "u0,zed", "--out", "S.jsonl")
    assert "ranked as the unknown user (row 0): zed" in prlhf(*score, cwd=tmp_path).stderr
    told = [json.loads(line) for line in (tmp_path / "S.jsonl").read_text().splitlines()]
    assert [(line["user_id"], line["user_known"]) for line in told[:2]] == [("u0", True), ("zed", False)]
    assert "4 lines, 0 of them new" in prlhf(*score, cwd=tmp_path).stderr
    prlhf("users", "export", "--run", "run", "--out", "v.jsonl", cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [row["user_id"] for row in rows] == [None, "u0", "u1", "u2", "u3", "new"]
    assert {len(row["vector"]) for row in rows} == {4 * 32}
