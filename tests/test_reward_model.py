"""PersonalizedRewardModel from comparisons to rankings, its artefact, and users who come later."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, checkerboard, tiny_config
from transformers import LlamaForSequenceClassification

from prlhf.core.artefact import ArtefactError
from prlhf.core.comparisons import Comparison, Comparisons, DataError, User
from prlhf.core.pretrained import Backbone, find_model, load_backbone
from prlhf.core.scoring import ScoreRequest, each, ranking
from prlhf.core.tokenize import RowTokenizer, TextLayout
from prlhf.prm import features
from prlhf.prm.fit import fit_reward_model
from prlhf.prm.head_config import HeadConfig
from prlhf.prm.reward_model import PersonalizedRewardModel


def fit(backbone: Backbone, **config: object) -> PersonalizedRewardModel:
    layout, pooling = TextLayout(), config.pop("pooling", None)
    return fit_reward_model(
        checkerboard(40), checkerboard(10, first=40), backbone, layout, pooling, HeadConfig(**config)
    )


@pytest.fixture(scope="module")
def model(tiny_backbone: Backbone) -> PersonalizedRewardModel:
    return fit(tiny_backbone)


@pytest.fixture(scope="module")
def run(model: PersonalizedRewardModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "board"
    model.save_pretrained(folder)
    return folder


def accuracy(model: PersonalizedRewardModel, rows: Comparisons, user: str | None = "own") -> float:
    requests = [
        ScoreRequest(row.user if user == "own" else User(user), row.prompt, [row.chosen, row.rejected]) for row in rows
    ]
    return float(np.mean([0.5 + 0.5 * np.sign(float(s[0] - s[1])) for s in model.score(requests)]))


@pytest.mark.parametrize("name", ["individualized", "cluster"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_checkerboard(tiny_backbone: Backbone, name: str, pooling: str) -> None:
    fitted = fit(tiny_backbone, user_model=name, pooling=pooling)
    test = checkerboard(20, first=100)
    assert accuracy(fitted, test) == 1.0
    assert accuracy(fitted, test, None) == 0.5


def test_best_pooling_is_the_better_one_on_validation_rows(tiny_backbone: Backbone) -> None:
    config = {"max_epochs": 1, "base_strengths": (1.0,), "user_strengths": (300.0,)}
    each_one = {name: fit(tiny_backbone, pooling=name, **config) for name in features.POOLINGS}
    losses = {name: one.figures["validation_log_loss"]["personal"] for name, one in each_one.items()}
    best = fit(tiny_backbone, pooling="best", **config)
    assert len(set(losses.values())) == 2
    assert best.settings["pooling"] == min(losses, key=lambda name: losses[name])
    assert best.figures["tried"]["pooling"] == losses
    assert torch.equal(best.user_model(torch.arange(3)), each_one[best.settings["pooling"]].user_model(torch.arange(3)))


def test_uniform_run_ignores_the_user(tiny_backbone: Backbone) -> None:
    fitted = fit(tiny_backbone, user_model="uniform")
    assert accuracy(fitted, checkerboard(20, first=100)) == 0.5
    with pytest.raises(ValueError, match="no user can be added"):
        fitted.add_user("new", list(checkerboard(2)))


def test_scores_after_reload_in_a_fresh_process(model: PersonalizedRewardModel, run: Path) -> None:
    code = (
        "import sys, json; from prlhf import PersonalizedRewardModel; "
        f"m = PersonalizedRewardModel.from_pretrained({str(run)!r}); "
        "print(json.dumps([list(r.scores) for r in m.rank('Say 7', ['a', 'WOW!', ''], ['u0', 'u1', 'stranger'])]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [list(r.scores) for r in model.rank("Say 7", ["a", "WOW!", ""], ["u0", "u1", "stranger"])]
    assert np.allclose(json.loads(done.stdout.splitlines()[-1]), here, atol=1e-5)


@pytest.mark.parametrize("name", ["users.json", "user_model.safetensors", "head.safetensors", "prlhf.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_damaged_run_is_refused_by_name(run: Path, tmp_path: Path, name: str, how: str) -> None:
    broken = tmp_path / "run"
    broken.mkdir()
    for path in run.iterdir():
        data = path.read_bytes()
        if path.name != name or how == "cut":
            (broken / path.name).write_bytes(data[: len(data) // 2] if path.name == name else data)
    with pytest.raises(ArtefactError, match=name.replace(".", r"\.")):
        PersonalizedRewardModel.from_pretrained(broken)


def test_other_weights_are_refused(run: Path, tmp_path: Path, tiny_model: Path) -> None:
    from transformers import LlamaForCausalLM

    manifest = json.loads((run / "prlhf.json").read_text())
    other = tmp_path / "other"
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config()).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    moved = PersonalizedRewardModel.from_pretrained(run)
    moved.settings["model"]["path"] = str(other)
    with pytest.raises(ArtefactError, match=manifest["settings"]["model"]["fingerprint"]):
        moved.rank("p", ["a", "b"], ["u0"])


def test_ranking_for_many_users_runs_each_response_once(
    model: PersonalizedRewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    real = features.hidden_states
    monkeypatch.setattr(features, "hidden_states", lambda b, rows: counted.append(len(rows)) or real(b, rows))
    responses = [f"never seen {i}" for i in range(4)]
    ranked = model.rank("a new prompt", [*responses, responses[0]], ["u0", "u1", "stranger", None])
    assert sum(counted) == 4
    assert [r.user_known for r in ranked] == [True, True, False, False]
    assert list(ranked[2].scores) == list(ranked[3].scores)
    assert ranked[0].scores[0] == ranked[0].scores[4]


def test_score_is_the_inner_product_whatever_the_batch(model: PersonalizedRewardModel) -> None:
    requests = [ScoreRequest(User(f"u{i % 5}"), f"prompt {i}", [f"r{i}", "x" * i]) for i in range(12)]
    together = model.score(requests)
    vectors = model.user_model(model.users.rows([r.user.id for r in requests])).detach()
    for request, scores, vector in zip(requests, together, vectors, strict=True):
        assert torch.allclose(scores, model.score([request])[0], atol=1e-4)
        texts = [(request.prompt, "", response) for response in request.responses]
        states = model.reader.gather(model.reader.positions(texts), model.settings["pooling"])
        assert torch.allclose(scores, states @ vector, atol=1e-4)


def test_user_text_is_part_of_the_input_unless_ignored(tiny_backbone: Backbone) -> None:
    rows = [Comparison(User(r.user.id, f"I am {r.user.id}"), r.prompt, r.chosen, r.rejected) for r in checkerboard(20)]
    data = Comparisons(rows, "texts")
    for policy, same in (("input", False), ("ignore", True)):
        fitted = fit_reward_model(
            data, data, tiny_backbone, TextLayout(user_text=policy), None, HeadConfig(max_epochs=2)
        )
        scores = fitted.score([ScoreRequest(User("u0", text), "p", ["a"]) for text in ("I am calm", "I am loud")])
        assert torch.equal(scores[0], scores[1]) is same


def test_new_user_is_added_without_touching_the_others(tiny_backbone: Backbone, tmp_path: Path) -> None:
    fitted = fit(tiny_backbone)
    before = fitted.user_model(torch.arange(len(fitted.users))).detach().clone()
    theirs = [row for row in checkerboard(10, first=200) if row.user.id == "u1"]
    added = fitted.add_user("../../newcomer", theirs)
    assert added.comparisons == 10
    assert (added.margins > 0).all()
    assert torch.equal(fitted.user_model(torch.arange(len(before))).detach(), before)
    fitted.save_pretrained(tmp_path / "run")
    again = PersonalizedRewardModel.from_pretrained(tmp_path / "run")
    assert again.rank("Say 300", ["well, 300 it is.", "WOW!!! 300!!!"], ["../../newcomer"])[0].best.startswith("WOW")
    assert again.figures == fitted.figures
    assert {p.name for p in tmp_path.iterdir()} == {"run"}
    with pytest.raises(ValueError, match="--replace"):
        again.add_user("../../newcomer", theirs)
    flipped = [Comparison(r.user, r.prompt, r.rejected, r.chosen) for r in theirs]
    again.add_user("../../newcomer", flipped, replace=True)
    assert again.rank("Say 300", ["well, 300 it is.", "WOW!!! 300!!!"], ["../../newcomer"])[0].best.startswith("well")


@pytest.mark.parametrize("options", [{"user_model": "cluster"}, {"user_options": {"shared": False}}])
def test_new_user_of_other_user_models(tiny_backbone: Backbone, options: dict, tmp_path: Path) -> None:
    fitted = fit(tiny_backbone, **options)
    fitted.add_user("new", [row for row in checkerboard(20, first=200) if row.user.id == "u1"])
    fitted.save_pretrained(tmp_path / "run")
    again = PersonalizedRewardModel.from_pretrained(tmp_path / "run")
    assert again.rank("Say 300", ["well, 300 it is.", "WOW!!! 300!!!"], ["new"])[0].best.startswith("WOW")


def test_a_stock_reward_models_head_is_e0(tmp_path: Path) -> None:
    """Before any training, row 0 scores as the stock model does on the same tokens."""
    torch.manual_seed(0)
    stock = LlamaForSequenceClassification(tiny_config(num_labels=1, vocab_size=260)).eval()
    stock.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    backbone = load_backbone(find_model(str(tmp_path)), "float32", "cpu")
    config = HeadConfig(max_epochs=0, base_strengths=(1.0,), user_strengths=(1.0,))
    fitted = fit_reward_model(checkerboard(5), checkerboard(5), backbone, TextLayout(), None, config)
    assert fitted.settings["pooling"] == "last"
    ids = RowTokenizer(backbone.tokenizer).rows(["Say 3"], ["three"], [""])[0]
    with torch.no_grad():
        states = stock.model(torch.tensor([ids.prompt_ids + ids.response_ids])).last_hidden_state
        expected = float(stock.score(states)[0, -1, 0])
    found = fitted.score([ScoreRequest(User(None), "Say 3", ["three"])])[0]
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_a_classifier_with_more_labels_is_refused(tmp_path: Path) -> None:
    LlamaForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_labels=3"):
        load_backbone(find_model(str(tmp_path)), "float32", "cpu")


def test_a_pickled_checkpoint_is_never_read(tmp_path: Path) -> None:
    """R25: a payload that would leave a canary file is not executed."""
    import pickle

    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (canary,))

    tiny_config(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(OSError, match="safetensors"):
        load_backbone(find_model(str(tmp_path)), "float32", "cpu")
    assert not canary.exists()


@pytest.mark.parametrize(("policy", "rows"), [("truncate", 160), ("drop", 156)])
def test_over_long_rows_are_counted_per_user(tiny_backbone: Backbone, policy: str, rows: int) -> None:
    data = checkerboard(40)
    data.rows[:4] = [replace(row, chosen=row.chosen * 40) for row in data.rows[:4]]
    layout = TextLayout(max_length=128, over_long=policy)
    fitted = fit_reward_model(data, checkerboard(5), tiny_backbone, layout, None, HeadConfig(max_epochs=1))
    assert fitted.figures["over_long"]["train"] == 4
    assert fitted.figures["rows"]["train"] == rows
    assert fitted.users.facts["u0"]["over_long"] == 1
    with pytest.raises(DataError, match=r"board:1: \d+ tokens"):
        fit_reward_model(data, data, tiny_backbone, TextLayout(max_length=128, over_long="refuse"), None, HeadConfig())


def test_nan_is_never_picked_and_ties_keep_their_order() -> None:
    request = ScoreRequest(User("u"), "p", ["a", "b", "c", "d"])
    assert list(ranking(request, torch.tensor([float("nan"), 1.0, 2.0, 2.0]), True).order) == [2, 3, 1, 0]
    with pytest.raises(ValueError, match="none can be picked"):
        ranking(request, torch.full((4,), float("nan")), True)


def test_plain_function_as_scorer() -> None:
    score = each(lambda user, prompt, response: len(response))
    assert score([ScoreRequest(User(None), "p", ["a", "bcd"])])[0].tolist() == [1.0, 3.0]


def test_configuration_is_part_of_the_fingerprint(tiny_model: Path, tmp_path: Path) -> None:
    """Equal weights under another configuration give other hidden states, so they must not share a cache."""
    import shutil

    other = shutil.copytree(tiny_model, tmp_path / "other")
    saved = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**saved, "rms_norm_eps": 0.1}))
    found = [load_backbone(find_model(str(folder)), "float32", "cpu").fingerprint for folder in (tiny_model, other)]
    assert found[0] != found[1]


def test_held_out_margins_of_a_new_user_see_no_copy_of_their_row(tiny_backbone: Backbone) -> None:
    """Ten copies of a few coin flips teach nothing about themselves."""
    fitted = fit(tiny_backbone)
    random = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in random.integers(0, 26, 12)) for _ in range(24)]
    flips = [Comparison(User("x"), f"p{i}", words[2 * i], words[2 * i + 1]) for i in range(12)]
    once, often = fitted.add_user("once", flips), fitted.add_user("often", flips * 10)
    assert (often.margins > 0).mean() == pytest.approx((once.margins > 0).mean(), abs=0.35)
    assert (often.margins > 0).mean() < 0.95
