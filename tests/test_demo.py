"""The demo, run as a person runs it, on a tiny random model: every file, figure and step is there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Done, prlhf
from pools import small_pool, write_pool
from tiny import byte_tokenizer, tiny_config
from transformers import LlamaForCausalLM

from prlhf import demo
from prlhf.core.sources.simulated import SimulationPlan, World

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = ("model", "users", "features", "heads", "evaluation", "new users", "candidates")


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random language model with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("writer")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(max_position_embeddings=2048)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small pool in place of the everyday one, and an end to every text that a random model writes."""
    pool = write_pool(tmp_path_factory.mktemp("pool") / "pool.jsonl", small_pool(60, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "POOL", pool)
        patch.setattr(demo, "SimulationPlan", lambda seed: SimulationPlan(users=20, comparisons=60, seed=seed))
        patch.setattr(demo, "whole_sentences", lambda text: f"{text[:20]}.")
        yield


@pytest.fixture(scope="module")
def ran(writer: Path, small: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    place = tmp_path_factory.mktemp("demo")
    return place, prlhf("demo", "--model", writer, cwd=place)


@pytest.fixture
def results(ran: tuple[Path, Done]) -> dict[str, Any]:
    return json.loads((ran[0] / "runs/demo/results.json").read_text())


def test_each_step_is_told_and_timed(ran: tuple[Path, Done], results: dict[str, Any]) -> None:
    for i, step in enumerate(STEPS):
        assert f"[{i + 1}/{len(STEPS)}] {step}: " in ran[1].stderr
        assert results["seconds"][step] >= 0
    assert results["seconds"]["total"] == pytest.approx(sum(results["seconds"][s] for s in STEPS), abs=0.1)


def test_it_ends_with_the_page_and_the_next_three_commands(ran: tuple[Path, Done]) -> None:
    *_, page, heading, check, split, train = ran[1].stdout.strip().splitlines()
    assert page == "report: runs/demo/report.html"
    assert (ran[0] / "runs/demo/report.html").stat().st_size > 1e6
    assert heading.endswith("prefs.jsonl:")
    assert [line.split()[1:3] for line in (check, split, train)] == [
        ["data", "check"],
        ["data", "split"],
        ["prm", "train"],
    ]


def test_results_hold_the_schema(results: dict[str, Any]) -> None:
    leaf = {"value", "low", "high", "n"}
    for model in ("individualized", "cluster", "uniform", "length_rule", "shuffled_users", "ceiling"):
        assert {"top", "top_row0", "generic", "average"} <= set(results["accuracy"][model])
        assert set(results["accuracy"][model]["average"]) == {"all", "majority", "minority"}
    assert results["ceiling"] == results["accuracy"]["ceiling"]["top"]
    assert results["length_rule"] == results["accuracy"]["length_rule"]["top"]
    for arm in ("random", "row0", "personal", "oracle"):
        assert set(results["regret"][arm]) == leaf
    assert results["regret"]["oracle"]["value"] == 0 < results["regret"]["random"]["value"]
    assert results["users"] == {"seen": 16, "unseen": 4}
    assert results["new_users"]["users"] == 4


def test_simulated_users_and_runs_are_left_for_the_other_verbs(ran: tuple[Path, Done]) -> None:
    out = ran[0] / "runs/demo"
    assert len(World.load(out / "data/world.json").users) == 20
    test = out / "data/test.parquet"
    shown = prlhf("eval", "preference", out / "cluster", "--data", test, "--group", "group", "--json", cwd=ran[0])
    figures = json.loads(shown.stdout)["accuracy"]
    with_baseline = json.loads((out / "results.json").read_text())["accuracy"]
    assert figures["cluster"]["top"] == with_baseline["cluster"]["top"]
    assert figures["ceiling"] == with_baseline["ceiling"]


def test_again_draws_nothing_and_gives_the_same_figures(ran: tuple[Path, Done], writer: Path) -> None:
    place = ran[0]
    store = place / "runs/demo/candidates.jsonl"
    before, drawn = json.loads((place / "runs/demo/results.json").read_text()), store.read_bytes()
    after = json.loads(prlhf("demo", "--model", writer, "--json", cwd=place).stdout)
    assert store.read_bytes() == drawn
    assert len(drawn.splitlines()) == 3 * 8 * demo.SAMPLES
    for figures in (before, after):
        del figures["seconds"]
    assert after == before


def test_interrupted_sampling_draws_what_is_missing(ran: tuple[Path, Done], writer: Path) -> None:
    store = ran[0] / "runs/demo/candidates.jsonl"
    whole = store.read_bytes()
    lines = whole.splitlines(keepends=True)
    store.write_bytes(b"".join(lines[:30]) + lines[30][:20])
    with pytest.warns(UserWarning, match="last line is torn"):
        prlhf("demo", "--model", writer, cwd=ran[0])
    assert sorted(store.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = prlhf("demo", "--model", "./nowhere", cwd=tmp_path, code=2)
    assert "./nowhere: no such folder" in done.stderr
