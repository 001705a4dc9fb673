"""A personalized policy as what ranks: from comparisons to implicit rewards; what is saved, and who comes later."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
    stacked,
    vectors_of,
)
from tiny import checkerboard
from torch import Tensor
from training import small_config

from prlhf.core.artefact import MANIFEST, ArtefactError
from prlhf.core.comparisons import User
from prlhf.core.pretrained import find_model, load_backbone
from prlhf.core.scoring import ScoreRequest
from prlhf.core.tokenize import TextLayout
from prlhf.policy import implicit_reward, log_probs
from prlhf.policy.policy import PersonalizedPolicy
from prlhf.prm.joint import train_reward_model
from prlhf.prm.reward_model import PersonalizedRewardModel
from prlhf.runs import load_run

pytestmark = pytest.mark.usefixtures("one_thread")

ALWAYS = ["README.md", "metrics.jsonl", "user_model.safetensors", "users.json"]
WEIGHTS: dict[str, list[str]] = {
    "frozen": [],
    "lora": ["adapter_config.json", "adapter_model.safetensors"],
    "full": [
        *("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ],
}
tunings = pytest.mark.parametrize("tuning", TUNINGS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(base, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@tunings
@pytest.mark.parametrize("user_model", ["individualized", "cluster"])
def test_checkerboard(trained: Trained, tuning: str, user_model: str) -> None:
    policy, _ = trained(tuning, user_model)
    figures = {name: figure["value"] for name, figure in policy.figures["validation_accuracy"].items()}
    assert figures == {"personal": 1.0, "row0": 0.5}
    assert accuracy(policy, checkerboard(6, first=200)) == 1.0
    for user in (None, "stranger"):
        assert accuracy(policy, checkerboard(6, first=200), user) == 0.5
    ranked = policy.rank("Say 9", ["well, 9 it is.", "WOW!!! 9!!!"], ["u0", "u1", "stranger"])
    assert [(r.order[0], r.user_known) for r in ranked[:2]] == [(0, True), (1, True)]
    assert not ranked[2].user_known


@tunings
@pytest.mark.parametrize("user_model", ["individualized", "cluster"])
def test_scores_are_the_implicit_reward(
    trained: Trained, base: Path, empty_cache: Path, tuning: str, user_model: str
) -> None:
    """Computed again by plain forward passes, text by text, the user's vectors in front of the embedded text."""
    policy, run = trained(tuning, user_model)
    own = plain_log_probs(plain_model(base, run, tuning), policy, vectors_of(policy))
    reference = plain_log_probs(plain_model(base, run, "frozen"), policy, nobody)
    wanted = 0.1 * (own - reference)
    assert wanted.std() > 0.1
    assert torch.allclose(stacked(policy), wanted, atol=1e-4)
    shutil.rmtree(empty_cache)
    assert torch.allclose(stacked(PersonalizedPolicy.from_pretrained(run)), wanted, atol=1e-4)


@tunings
def test_scores_are_those_of_the_trainers_last_evaluation(base: Path, tmp_path: Path, tuning: str) -> None:
    """Also where the reference is computed while training runs, and where row 0 has other losses."""
    for name, options in (("before", {}), ("meanwhile", {"precompute_ref_log_probs": False, "beta": 0.3})):
        policy = fit_policy(base, tmp_path / name, tuning, num_train_epochs=2, **options)
        for side, user in (("personal", "own"), ("row0", None)):
            found = margins(policy, checkerboard(3, first=40), user)
            wanted = policy.figures["validation_log_loss"][side]
            assert np.logaddexp(0, -found).mean() == pytest.approx(wanted, abs=1e-5)
            right = policy.figures["validation_accuracy"][side]["value"]
            assert np.mean(0.5 + 0.5 * np.sign(found)) == right


@tunings
def test_scores_do_not_depend_on_their_company(
    trained: Trained, tuning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = trained(tuning)

    def found(name: str, requests: list[ScoreRequest], tokens: int) -> list[Tensor]:
        monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / name))
        monkeypatch.setattr(log_probs, "TOKENS_PER_BATCH", tokens)
        monkeypatch.setattr(implicit_reward, "TOKENS_PER_BATCH", tokens)
        return PersonalizedPolicy.from_pretrained(run).score(requests)

    wanted = found("alone", REQUESTS, 1)
    for tokens in (150, 400, 100_000):
        for scores, alone in zip(found(f"{tokens}", REQUESTS, tokens), wanted, strict=True):
            assert torch.allclose(scores, alone, atol=1e-4)
    backwards = [replace(r, responses=list(r.responses)[::-1]) for r in REQUESTS[::-1]]
    for scores, alone in zip(found("backwards", backwards, 400)[::-1], wanted, strict=True):
        assert torch.allclose(scores.flip(0), alone, atol=1e-4)
    for i in (1, 5, 9):
        assert torch.allclose(found(f"one-{i}", [REQUESTS[i]], 100_000)[0], wanted[i], atol=1e-4)


def counted(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> dict[str, list[int]]:
    """Numbers of rows that reach the policy and the reference, batch by batch; breaks off after some batches."""
    seen: dict[str, list[int]] = {"policy": [], "reference": []}
    real = log_probs.log_probs

    def count(model: Any, rows: Any, users: Any = None) -> Tensor:
        if sum(map(len, seen.values())) == stop_after:
            raise KeyboardInterrupt
        seen["reference" if users is None else "policy"].append(len(rows))
        return real(model, rows, users)

    monkeypatch.setattr(implicit_reward, "log_probs", count)
    return seen


@tunings
def test_scores_are_cached_and_a_stopped_run_goes_on(
    trained: Trained, tuning: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference computes every text once, whoever asks; row 0 answers for both strangers."""
    _, run = trained(tuning)
    monkeypatch.setattr(log_probs, "TOKENS_PER_BATCH", 200)
    monkeypatch.setattr(implicit_reward, "TOKENS_PER_BATCH", 200)
    with monkeypatch.context() as patch:
        stopped = counted(patch, stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            PersonalizedPolicy.from_pretrained(run).score(REQUESTS)
    with monkeypatch.context() as patch:
        rest = counted(patch)
        scores = PersonalizedPolicy.from_pretrained(run).score(REQUESTS)
    assert 0 < sum(stopped["policy"]) < 8 * 5
    assert sum(stopped["policy"]) + sum(rest["policy"]) == 8 * 5
    assert sum(rest["reference"]) == 8 * 2  # with the text about u3 and without
    nothing = counted(monkeypatch)
    again = PersonalizedPolicy.from_pretrained(run)
    assert all(map(torch.equal, again.score(REQUESTS), scores))
    again.prepare(REQUESTS)
    assert nothing == {"policy": [], "reference": []}
    again.score([ScoreRequest(User("u3"), "Say 3", ["well, 3 it is."])])
    assert nothing == {"policy": [1], "reference": []}


SCORE = """
import json, sys
import torch
torch.set_num_threads(1)
from prlhf import ScoreRequest, User
from prlhf.runs import load_run

requests = [ScoreRequest(User(*user), prompt, texts) for user, prompt, texts in json.loads(sys.argv[1])]
print(json.dumps({run: [s.tolist() for s in load_run(run).score(requests)] for run in sys.argv[2:]}))
"""


def test_scores_in_a_fresh_process_are_the_same(trained: Trained, tmp_path: Path) -> None:
    made = [trained(tuning, users) for tuning in TUNINGS for users in ("individualized", "cluster")]
    asked = json.dumps([((r.user.id, r.user.text), r.prompt, r.responses) for r in REQUESTS])
    environment = {**os.environ, "PRLHF_CACHE": str(tmp_path / "empty"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCORE, asked, *(str(run) for _, run in made)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    for policy, run in made:
        assert torch.allclose(torch.tensor(found[str(run)]), stacked(policy), atol=1e-5), run.name


@tunings
def test_files_of_a_run_and_of_its_copy(trained: Trained, empty_cache: Path, tmp_path: Path, tuning: str) -> None:
    policy, run = trained(tuning)
    PersonalizedPolicy.from_pretrained(run).save_pretrained(tmp_path / "copy")
    for folder in (run, tmp_path / "copy"):
        assert sorted(json.loads((folder / MANIFEST).read_text())["files"]) == sorted(ALWAYS + WEIGHTS[tuning])
        for name in {"config.json", "adapter_config.json"} & set(WEIGHTS[tuning]):
            assert str(run.parent.parent) not in (folder / name).read_text()
    again = PersonalizedPolicy.from_pretrained(tmp_path / "copy")
    assert torch.allclose(stacked(again), stacked(policy), atol=1e-5)


@pytest.mark.parametrize("how", ["missing", "cut"])
@pytest.mark.parametrize(("tuning", "name"), [(t, name) for t in TUNINGS for name in [*ALWAYS, *WEIGHTS[t], MANIFEST]])
def test_a_damaged_run_is_refused_by_name(trained: Trained, tmp_path: Path, tuning: str, name: str, how: str) -> None:
    _, run = trained(tuning)
    broken = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    if how == "missing":
        (broken / name).unlink()
    else:
        os.truncate(broken / name, (broken / name).stat().st_size // 2)
    for load in (PersonalizedPolicy.from_pretrained, load_run):
        with pytest.raises(ArtefactError, match=name.replace(".", r"\.")):
            load(broken)


@tunings
def test_another_base_model_is_refused(trained: Trained, empty_cache: Path, tmp_path: Path, tuning: str) -> None:
    """By a fully trained run where it is needed, for the reference."""
    _, run = trained(tuning)
    wanted = json.loads((run / MANIFEST).read_text())["settings"]["model"]["fingerprint"]
    other = language_model(tmp_path / "other", seed=1)
    with pytest.raises(ArtefactError, match=f"weights and configuration have the hash .*{wanted}"):
        PersonalizedPolicy.from_pretrained(run, model=str(other)).score(REQUESTS)


def test_other_trained_weights_are_refused(trained: Trained, tmp_path: Path) -> None:
    """Even where a manifest was made to fit them."""
    (_, run), (_, other) = trained("lora"), trained("lora", "cluster")
    mixed = shutil.copytree(run, tmp_path / "mixed")
    shutil.copyfile(other / "adapter_model.safetensors", mixed / "adapter_model.safetensors")
    manifest, theirs = (json.loads((folder / MANIFEST).read_text()) for folder in (mixed, other))
    manifest["files"]["adapter_model.safetensors"] = theirs["files"]["adapter_model.safetensors"]
    (mixed / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match="trained weights"):
        PersonalizedPolicy.from_pretrained(mixed).score(REQUESTS)


def test_a_run_of_either_kind_is_found(trained: Trained, base: Path, tmp_path: Path) -> None:
    policy = load_run(trained("lora")[1])
    assert isinstance(policy, PersonalizedPolicy)
    backbone = load_backbone(find_model(str(base)), "float32", "cpu")
    args = small_config(tmp_path / "reward", aggregator="linear_head", max_steps=1)
    reward = train_reward_model(checkerboard(2), checkerboard(2), backbone, TextLayout(), args, "full")
    reward.save_pretrained(tmp_path / "reward")
    assert isinstance(load_run(tmp_path / "reward"), PersonalizedRewardModel)
    with pytest.raises(ArtefactError, match="holds a reward_model of format 1, wanted a policy"):
        PersonalizedPolicy.from_pretrained(tmp_path / "reward")
    with pytest.raises(ArtefactError, match="holds a policy of format 1, wanted a reward_model"):
        PersonalizedRewardModel.from_pretrained(trained("lora")[1])
    with pytest.raises(ArtefactError, match=r"no prlhf\.json in it"):
        load_run(tmp_path)
