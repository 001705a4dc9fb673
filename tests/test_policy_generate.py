"""`prlhf policy generate`: what is drawn and what is kept, for whom, and what is said."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from command import Done, prlhf
from policies import fit_policy, language_model
from tiny import byte_tokenizer, checkerboard, write_jsonl

from prlhf.core.comparisons import Comparison, Comparisons, User
from prlhf.core.generation import Candidate, GenerateRequest, LocalGenerator

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ("--max-new-tokens", 6)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a policy's run, and comparisons on three prompts."""
    folder = tmp_path_factory.mktemp("work")
    language_model(folder / "model", initializer_range=0.3, tie_word_embeddings=False)
    run = folder / "run"
    fit_policy(folder / "model", run, max_steps=8, user_learning_rate=0.3).save_pretrained(run)
    write_jsonl(folder / "P.jsonl", checkerboard(3, first=40))
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, int]]:
    """Prompt, user and index of every text that is drawn."""
    seen: list[tuple[str, str | None, int]] = []
    real = LocalGenerator.generate

    def generate(self: LocalGenerator, requests: Sequence[GenerateRequest]) -> Iterator[Candidate]:
        for candidate in real(self, requests):
            seen.append((str(candidate.request.prompt), candidate.request.user.id, candidate.index))
            yield candidate

    monkeypatch.setattr(LocalGenerator, "generate", generate)
    return seen


def generate(work: Path, out: Path, *args: object, model: str = "run", prompts: str = "P.jsonl", code: int = 0) -> Done:
    return prlhf(
        "policy", "generate", model, "--prompts", prompts, "--out", out, *SHORT, *args, cwd=work, code=code
    )  # fmt: skip


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def texts(out: Path) -> dict[str, str]:
    return {record["key"]: record["text"] for record in records(out)}


def test_prompts_times_users_times_n(work: Path, tmp_path: Path) -> None:
    done = generate(work, tmp_path / "o.jsonl", "--users", "u0,u1,zed", "--n", 2, "--limit", 2)
    assert "not in this run, answered as the unknown user (row 0): zed" in done.stderr
    assert "12 lines, 12 of them new" in done.stderr
    found = records(tmp_path / "o.jsonl")
    assert {(r["prompt"], r["user_id"], r["index"]) for r in found} == {
        (prompt, user, i) for prompt in ("Say 40", "Say 41") for user in ("u0", "u1", "zed") for i in (0, 1)
    }
    assert {(r["user_id"], r["user_known"]) for r in found} == {("u0", True), ("u1", True), ("zed", False)}
    assert {r["sampling"]["max_new_tokens"] for r in found} == {6}
    assert "median tokens" in " ".join(done.stdout.split())
    assert all(user in done.stdout for user in ("u0", "u1", "zed"))


def test_everybody_is_asked_for_unless_somebody_is_named(
    work: Path, tmp_path: Path, drawn: list[tuple[str, str | None, int]]
) -> None:
    done = generate(work, tmp_path / "o.jsonl", "--limit", 1)
    assert [user for _, user, _ in sorted(drawn, key=str)] == ["u0", "u1", "u2", "u3"]
    assert "answered as the unknown user" not in done.stderr
    again = generate(work, tmp_path / "o.jsonl", "--limit", 1, "--users", "all")
    assert len(drawn) == 4
    assert "4 lines, 0 of them new" in again.stderr


def test_a_run_that_was_stopped_goes_on(
    work: Path, tmp_path: Path, drawn: list[tuple[str, str | None, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(work, tmp_path / "whole.jsonl", "--n", 2)
    whole = set(drawn)
    drawn.clear()
    with monkeypatch.context() as patch:
        counting = LocalGenerator.generate

        def stopping(self: LocalGenerator, requests: Sequence[GenerateRequest]) -> Iterator[Candidate]:
            for i, candidate in enumerate(counting(self, requests)):
                if i == 5:
                    raise KeyboardInterrupt
                yield candidate

        patch.setattr(LocalGenerator, "generate", stopping)
        done = generate(work, tmp_path / "o.jsonl", "--n", 2, code=130)
    assert "run the same command again to go on" in done.stderr
    kept = {(r["prompt"], r["user_id"], r["index"]) for r in records(tmp_path / "o.jsonl")}
    assert len(kept) == 5
    drawn.clear()
    assert "24 lines, 19 of them new" in generate(work, tmp_path / "o.jsonl", "--n", 2).stderr
    assert set(drawn) == whole - kept
    assert texts(tmp_path / "o.jsonl") == texts(tmp_path / "whole.jsonl")
    drawn.clear()
    assert "24 lines, 0 of them new" in generate(work, tmp_path / "o.jsonl", "--n", 2).stderr
    assert drawn == []


def test_more_of_them_are_added_to_what_is_there(
    work: Path, tmp_path: Path, drawn: list[tuple[str, str | None, int]]
) -> None:
    generate(work, tmp_path / "o.jsonl", "--users", "u1", "--limit", 1)
    generate(work, tmp_path / "o.jsonl", "--users", "u1,u2", "--n", 2, "--limit", 2)
    wanted = {(prompt, user, i) for prompt in ("Say 40", "Say 41") for user in ("u1", "u2") for i in (0, 1)}
    assert set(drawn) == wanted
    assert len(drawn) == len(wanted)


def test_texts_are_the_same_for_any_batch(work: Path, tmp_path: Path) -> None:
    for size in (1, 64):
        for strength in (1, 2):
            args = ("--n", 2, "--batch-size", size, "--strength", strength)
            generate(work, tmp_path / f"{size}-{strength}.jsonl", *args)
    assert texts(tmp_path / "1-1.jsonl") == texts(tmp_path / "64-1.jsonl")
    assert texts(tmp_path / "1-2.jsonl") == texts(tmp_path / "64-2.jsonl")
    assert len(set(texts(tmp_path / "1-1.jsonl").values())) > 15


@pytest.mark.parametrize("flags", [("--strength", 2), ("--seed", 1), ("--temperature", 0.5), ("--top-k", 3)])
def test_what_changes_a_text_draws_anew(
    work: Path, tmp_path: Path, drawn: list[tuple[str, str | None, int]], flags: tuple[object, ...]
) -> None:
    generate(work, tmp_path / "o.jsonl", "--users", "u0,u1")
    before = texts(tmp_path / "o.jsonl")
    drawn.clear()
    generate(work, tmp_path / "o.jsonl", "--users", "u0,u1", *flags)
    assert len(drawn) == 6
    after = texts(tmp_path / "o.jsonl")
    assert len(after) == 12
    assert before.items() < after.items()


def test_a_replaced_user_is_drawn_anew(work: Path, tmp_path: Path, drawn: list[tuple[str, str | None, int]]) -> None:
    """And nobody else is."""
    run = shutil.copytree(work / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    ask = ("--users", "u0,new")
    for i, taste in enumerate(("u0", "u1")):
        rows = [r for r in checkerboard(12, first=80) if r.user.id == taste]
        own = [Comparison(User("new"), r.prompt, r.chosen, r.rejected) for r in rows]
        write_jsonl(tmp_path / f"{i}.jsonl", Comparisons(own, "new"))
        add = ("users", "add", "new", "--run", run, "--data", tmp_path / f"{i}.jsonl")
        prlhf(*add, *["--replace"][:i], cwd=work)
        drawn.clear()
        generate(work, tmp_path / "o.jsonl", *ask, model=str(run))
        assert sorted({str(user) for _, user, _ in drawn}) == (["new"] if i else ["new", "u0"])
    assert len(records(tmp_path / "o.jsonl")) == 9


def test_a_plain_model_writes_too(work: Path, tmp_path: Path) -> None:
    done = generate(work, tmp_path / "o.jsonl", model="model")
    assert "3 lines, 3 of them new" in done.stderr
    assert "local folder" in done.stderr
    assert [r["user_id"] for r in records(tmp_path / "o.jsonl")] == [None] * 3
    assert not [r for r in records(tmp_path / "o.jsonl") if "user_known" in r]
    assert "(no user)" in done.stdout
    refused = generate(work, tmp_path / "o.jsonl", "--strength", 2, model="model", code=2)
    assert "strength 2: this model knows no users" in refused.stderr
    assert (
        "this run knows no user" in generate(work, tmp_path / "x.jsonl", "--users", "all", model="model", code=2).stderr
    )


def test_another_chat_template_draws_anew(work: Path, tmp_path: Path, drawn: list[tuple[str, str | None, int]]) -> None:
    model = shutil.copytree(work / "model", tmp_path / "model")
    generate(work, tmp_path / "o.jsonl", model=str(model))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("assistant", "model")
    tokenizer.save_pretrained(model)
    drawn.clear()
    generate(work, tmp_path / "o.jsonl", model=str(model))
    assert len(drawn) == 3


def test_texts_about_users_are_read(work: Path, tmp_path: Path) -> None:
    """From a file of users; who has another text gets another answer."""
    for name, about in (("a", "Likes it calm."), ("b", "Likes it loud.")):
        line = json.dumps({"user_id": "u0", "user_text": about})
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
        generate(work, tmp_path / "o.jsonl", "--users", tmp_path / f"{name}.jsonl", "--temperature", 0)
    found = records(tmp_path / "o.jsonl")
    assert len(found) == 6
    assert len({(r["prompt"], r["text"]) for r in found}) > 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "a"}\n{"user_id": "u0"}\n', "bad.jsonl:2: prompt: missing"),
        ('{"prompt": "a"}\n{"prompt"\n', "bad.jsonl:2"),
        ('{"prompt": 3}\n', "bad.jsonl:1: prompt"),
        ("", "no prompts in it"),
        (json.dumps({"prompt": "x" * 600}) + "\n", "more than the model's 508"),
    ],
)
def test_bad_prompts_are_named(work: Path, tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    done = generate(work, tmp_path / "o.jsonl", prompts=str(tmp_path / "bad.jsonl"), code=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--strength", -1), "--strength"),
        (("--strength", "inf"), "strength must be at least 0"),
        (("--n", 0), "--n"),
        (("--limit", 0), "--limit"),
        (("--batch-size", 0), "--batch-size"),
        (("--top-p", 0), "top_p"),
        (("--users", ","), "names nobody"),
        (("--prompts", "nowhere.jsonl"), "no such file"),
        (("--out", "mine.txt"), "not a record"),
    ],
)
def test_flags_that_make_no_sense_are_refused(work: Path, tmp_path: Path, flags: tuple[object, ...], said: str) -> None:
    (work / "mine.txt").write_text("notes without an end of line")
    done = generate(work, tmp_path / "o.jsonl", *flags, code=2)
    assert said in " ".join(done.stderr.split())
    assert (work / "mine.txt").read_text() == "notes without an end of line"
    missing = generate(work, tmp_path / "o.jsonl", model="nowhere/at/all", code=2)
    assert "nowhere/at/all" in missing.stderr


def test_a_reward_models_run_writes_nothing(work: Path, tmp_path: Path) -> None:
    run = shutil.copytree(work / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    manifest = json.loads((run / "prlhf.json").read_text())
    (run / "prlhf.json").write_text(json.dumps({**manifest, "kind": "reward_model"}))
    assert "holds a reward_model" in generate(work, tmp_path / "o.jsonl", model=str(run), code=3).stderr
