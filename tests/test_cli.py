"""The commands as a person calls them, on a tiny model: what they write, what they say, and their exit codes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import prlhf
from tiny import checkerboard, write_jsonl


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with split data, a trained run and candidates, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("work")
    write_jsonl(folder / "prefs.jsonl", checkerboard(80, users=5))
    prlhf("data", "split", "prefs.jsonl", "--out", "D", "--unseen-users", 0.2, cwd=folder)
    train = ("prm", "train", "--data", "D/train.parquet", "--eval-data", "D/validation.parquet")
    prlhf(*train, "--model", tiny_model, "--output-dir", "runs/board", "--aggregator", "linear_head", cwd=folder)
    prlhf(*train, "--model", tiny_model, "--output-dir", "runs/flat", "--user-model", "uniform", cwd=folder)
    lines = [{"prompt": f"Say {i}", "responses": [f"well, {i} it is.", f"WOW!!! {i}!!!", "hm"]} for i in (500, 501)]
    (folder / "C.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def users_of(work: Path) -> tuple[list[str], str]:
    """Users of the run, and the one that it never saw."""
    listed = json.loads(prlhf("users", "list", "--run", "runs/board", "--json", cwd=work).stdout)["users"]
    known = [user["user_id"] for user in listed if user["origin"] == "trained"]
    return known, next(f"u{i}" for i in range(5) if f"u{i}" not in known)


def test_split_tells_its_parts(work: Path) -> None:
    made = json.loads((work / "D" / "split.json").read_text())
    assert set(made["parts"]) == {"train", "validation", "test", "onboarding"}
    assert sum(part["rows"] for part in made["parts"].values()) == 400
    assert (made["parts"]["train"]["users"], made["parts"]["test"]["users"]) == (4, 5)


def test_eval_preference_prints_one_object(work: Path) -> None:
    done = prlhf("eval", "preference", "runs/board", "--data", "D/test.parquet", "--json", "--out", "e.json", cwd=work)
    figures = json.loads(done.stdout)
    assert figures == json.loads((work / "e.json").read_text())
    own = figures["accuracy"]["individualized"]
    assert own["top"]["value"] == 1.0
    assert set(own["top"]) == {"value", "low", "high", "n"}
    assert set(own) == {"top", "top_row0", "generic", "average", "average_row0"}
    assert figures["accuracy"]["uniform"]["top"]["value"] <= 0.8
    assert figures["users"] == {"seen": 4, "unseen": 1}
    assert own["generic"]["n"] == figures["rows"] / 5


def test_eval_preference_compares_two_runs_and_shows_a_table(work: Path) -> None:
    args = ("eval", "preference", "runs/board", "--data", "D/test.parquet", "--against", "runs/flat")
    figures = json.loads(prlhf(*args, "--json", "--per-user", "u.jsonl", cwd=work).stdout)
    assert figures["against"]["difference"]["low"] > 0
    assert len((work / "u.jsonl").read_text().splitlines()) == 5
    shown = prlhf(*args, cwd=work).stdout
    assert "runs/flat" in shown
    assert "somebody else" in shown


def test_eval_on_training_rows_is_told(work: Path) -> None:
    trained = prlhf("eval", "preference", "runs/board", "--data", "D/train.parquet", cwd=work)
    assert "warning: D/train.parquet holds the rows that runs/board was trained on" in trained.stderr
    assert "warning" not in prlhf("eval", "preference", "runs/board", "--data", "D/test.parquet", cwd=work).stderr


def test_a_split_never_replaces_parts_of_others(work: Path) -> None:
    """Not even those that it reads."""
    (work / "mine").mkdir()
    shutil.copy(work / "D/train.parquet", work / "mine/train.parquet")
    before = (work / "mine/train.parquet").read_bytes()
    for verb in (("data", "split", "mine/train.parquet"), ("data", "simulate")):
        done = prlhf(*verb, "--out", "mine", cwd=work, code=2)
        assert "mine/train.parquet: is there already and not from this command" in done.stderr
    assert [path.name for path in (work / "mine").iterdir()] == ["train.parquet"]
    assert (work / "mine/train.parquet").read_bytes() == before


def test_the_file_that_is_read_is_not_written(work: Path) -> None:
    shutil.copy(work / "C.jsonl", work / "mine.jsonl")
    rerank = (
        "bestofn",
        "rerank",
        "runs/board",
        "--candidates",
        "mine.jsonl",
        "--users",
        "all",
        "--out",
        "./mine.jsonl",
    )
    assert "--out mine.jsonl: is the file that is read" in prlhf(*rerank, cwd=work, code=2).stderr
    assert (work / "mine.jsonl").read_bytes() == (work / "C.jsonl").read_bytes()
    evaluate = ("eval", "preference", "runs/board", "--data", "D/test.parquet", "--per-user", "D/test.parquet")
    assert "--per-user D/test.parquet: is the file" in prlhf(*evaluate, cwd=work, code=2).stderr


def test_eval_preference_writes_a_page(work: Path) -> None:
    """With every row that was left out, in training as in evaluation."""
    rows = (work / "prefs.jsonl").read_text().splitlines()[:40]
    row = json.loads(rows[0])
    identical = json.dumps({**row, "rejected": row["chosen"]})
    (work / "some.jsonl").write_text("\n".join([*rows, identical, '{"user_id": "u1"}']) + "\n")
    args = ("eval", "preference", "runs/board", "--data", "some.jsonl", "--max-bad-rows", 1, "--report")
    done = prlhf(*args, "page.html", cwd=work)
    assert "report: page.html" in done.stderr
    text = re.sub(r"<[^>]+>|\s+", " ", (work / "page.html").read_text().rpartition("</script>")[0])
    assert "prlhf eval preference runs/board --data some.jsonl" in text
    assert re.search(r"evaluated: comparisons +41 ", text)
    assert re.search(r"evaluated: rows left out +1 bad ", text)
    assert "train: rows left out" in text
    assert "--report page.txt: must end in .html" in prlhf(*args, "page.txt", cwd=work, code=2).stderr


def page_text(path: Path) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", path.read_text().rpartition("</script>")[0]).split())


def test_page_of_a_uniform_run_and_of_a_comparison_of_runs(work: Path) -> None:
    args = ("eval", "preference", "runs/flat", "--data", "D/test.parquet", "--report")
    prlhf(*args, "flat.html", cwd=work)
    flat = page_text(work / "flat.html")
    assert "One model for everybody, it predicts" in flat
    assert "Knowing the user" not in flat
    assert "Against another run" not in flat
    prlhf(*args, "both.html", "--against", "runs/board", cwd=work)
    assert "this run minus runs/board" in page_text(work / "both.html")


def test_score_writes_one_line_per_prompt_and_user_and_resumes(work: Path) -> None:
    known, stranger = users_of(work)
    args = ("bestofn", "score", "runs/board", "--candidates", "C.jsonl", "--users", f"{known[0]},{known[1]},{stranger}")
    done = prlhf(*args, "--out", "S.jsonl", cwd=work)
    assert f"ranked as the unknown user (row 0): {stranger}" in done.stderr
    lines = [json.loads(line) for line in (work / "S.jsonl").read_text().splitlines()]
    assert [(line["user_id"], line["user_known"]) for line in lines[:3]] == [
        (known[0], True),
        (known[1], True),
        (stranger, False),
    ]
    assert len(lines) == 6
    assert all(len(line["scores"]) == 3 for line in lines)
    text = (work / "S.jsonl").read_text()
    (work / "S.jsonl").write_text(text[: int(len(text) * 0.7)])  # a kill in the middle of a line
    prlhf(*args, "--out", "S.jsonl", cwd=work)
    assert sorted((work / "S.jsonl").read_text().splitlines()) == sorted(text.splitlines())
    other = prlhf("bestofn", "score", "runs/flat", *args[3:], "--out", "S.jsonl", cwd=work, code=2)
    assert "holds 6 lines of another run" in other.stderr


def test_rerank_follows_each_users_taste(work: Path) -> None:
    known, _ = users_of(work)
    done = prlhf("bestofn", "rerank", "runs/board", "--candidates", "C.jsonl", "--users", "all", "--json", cwd=work)
    rankings = json.loads(done.stdout)["rankings"]
    assert len(rankings) == 2 * len(known)
    for ranking in rankings:
        likes_loud = int(ranking["user_id"][1:]) % 2 == 1
        order = ranking["order"]
        assert (order.index(1) < order.index(0)) is likes_loud
    assert (
        known[0]
        in prlhf("bestofn", "rerank", "runs/board", "--candidates", "C.jsonl", "--users", "all", cwd=work).stdout
    )


def test_a_user_is_added_listed_ranked_and_exported(work: Path) -> None:
    _, stranger = users_of(work)
    added = json.loads(
        prlhf(
            "users", "add", stranger, "--run", "runs/board", "--data", "D/onboarding.parquet", "--json", cwd=work
        ).stdout
    )
    assert added["comparisons"] > 20
    assert added["gain"]["low"] > 0
    assert set(added["accuracy"]) == {"value", "low", "high", "n"}
    again = prlhf("users", "add", stranger, "--run", "runs/board", "--data", "D/onboarding.parquet", cwd=work, code=2)
    assert "--replace" in again.stderr
    prlhf("users", "export", "--run", "runs/board", "--out", "v.jsonl", cwd=work)
    rows = [json.loads(line) for line in (work / "v.jsonl").read_text().splitlines()]
    assert rows[0]["user_id"] is None
    assert stranger in [row["user_id"] for row in rows]
    assert len(rows[1]["vector"]) == 32
    # Later tests see the run as it was trained.
    prlhf("prm", "train", "--data", "D/train.parquet", "--eval-data", "D/validation.parquet", "--model",
          json.loads((work / "runs/board/prlhf.json").read_text())["settings"]["model"]["path"],
          "--output-dir", "runs/board", "--overwrite", cwd=work)  # fmt: skip


def test_config_file_and_command_line(work: Path, tiny_model: Path) -> None:
    (work / "c.yaml").write_text(f"model: {tiny_model}\ndata: D/train.parquet\nuser_model: cluster\nuser_clusters: 3\n")
    prlhf("prm", "train", "--config", "c.yaml", "--output-dir", "runs/yaml", "--user-clusters", 2, cwd=work)
    settings = json.loads((work / "runs/yaml/prlhf.json").read_text())["settings"]
    assert settings["user_options"]["clusters"] == 2
    card = (work / "runs/yaml/README.md").read_text()
    assert "`cluster`" in card


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["prm", "train", "--modle", "x"], 2, "--model"),
        (["prm", "train", "--config", "bad.yaml"], 2, "--user-clusters"),
        (["prm", "train", "--config", "empty.yaml"], 2, "empty.yaml"),
        (["prm", "train", "--config", "none.yaml"], 2, "no such file"),
        (["prm", "train", "--data", "D/train.parquet", "--model", "x", "--output-dir", "runs/board"], 2, "--overwrite"),
        (
            ["prm", "train", "--data", "broken.jsonl", "--model", "x", "--output-dir", "r"],
            5,
            "broken.jsonl:2: chosen: missing",
        ),
        (["prm", "train", "--data", "D/train.parquet", "--model", "./none", "--output-dir", "r"], 2, "no such folder"),
        (["data", "check", "broken.jsonl"], 5, "2 rows can't be used"),
        (["data", "split", "implicit.jsonl", "--out", "x"], 2, "has no prompt of its own"),
        (["prm", "train", "--config", "torn.yaml"], 2, "not YAML"),
        (["bestofn", "rerank", "runs/board", "--candidates", "C.jsonl", "--users", ","], 2, "names nobody"),
        (
            ["bestofn", "rerank", "runs/board", "--candidates", "C.jsonl", "--users", "odd.jsonl"],
            2,
            "odd.jsonl:1: user_id",
        ),
        (
            ["bestofn", "score", "runs/board", "--candidates", "C.jsonl", "--users", "u0", "--out", "mine.txt"],
            2,
            "not a record",
        ),
        (
            ["eval", "preference", "runs/board", "--data", "D/test.parquet", "--per-user", "u.csv"],
            2,
            "--per-user u.csv",
        ),
        (["eval", "preference", "runs/board", "--data", "D/test.parquet", "--model", "./gone"], 2, "no such folder"),
        (["data", "check", "nowhere.jsonl"], 2, "no such file"),
        (["data", "check", "prefs.jsonl", "--columns", "user_id=who"], 5, "400 rows can't be used"),
        (["data", "split", "prefs.jsonl", "--out", "x", "--by", "topic"], 2, "--by topic"),
        (["data", "split", "prefs.jsonl", "--out", "x", "--fold", "6/5"], 2, "between 1 and 5"),
        (["eval", "preference", "runs/none", "--data", "D/test.parquet"], 3, "runs/none"),
        (["eval", "preference", "runs/board", "--data", "D/test.parquet", "--group", "age"], 2, "--group age"),
        (
            ["bestofn", "rerank", "runs/board", "--candidates", "bad.jsonl", "--users", "all"],
            2,
            "bad.jsonl:1: responses",
        ),
        (["users", "add", "nobody", "--run", "runs/board", "--data", "D/test.parquet"], 2, "no row of user 'nobody'"),
        (["users", "add", "x", "--run", "runs/flat", "--data", "one.jsonl"], 2, "no user can be added"),
    ],
)
def test_bad_input_is_named(work: Path, args: list[str], code: int, said: str) -> None:
    (work / "bad.yaml").write_text("user_cluster: 3\nmodel: x\ndata: y\noutput_dir: z\n")
    (work / "empty.yaml").write_text("")
    (work / "torn.yaml").write_text("model: [x\n")
    (work / "odd.jsonl").write_text('{"user_id": true}\n')
    (work / "mine.txt").write_text("notes without an end of line")
    (work / "implicit.jsonl").write_text('{"user_id": "a", "chosen": "Q? yes", "rejected": "Q? no"}\n')
    good = '{"user_id": "a", "prompt": "p", "chosen": "x", "rejected": "y"}\n'
    (work / "broken.jsonl").write_text(good + '{"user_id": "a", "prompt": "p", "rejected": "y"}\n{"user\n')
    (work / "bad.jsonl").write_text('{"prompt": "p", "responses": "one"}\n')
    (work / "one.jsonl").write_text('{"prompt": "p", "chosen": "x", "rejected": "y"}\n')
    done = prlhf(*args, cwd=work, code=code)
    assert said in done.stderr
    assert (work / "mine.txt").read_text() == "notes without an end of line"


def test_check_lists_every_bad_row(work: Path) -> None:
    (work / "many.jsonl").write_text('{"user_id": "a", "prompt": "p", "rejected": "y"}\n' * 15)
    done = prlhf("data", "check", "many.jsonl", cwd=work, code=5)
    assert [f"many.jsonl:{i}: chosen: missing" in done.stdout for i in range(1, 16)] == [True] * 15
    listed = json.loads(prlhf("data", "check", "many.jsonl", "--json", cwd=work, code=5).stdout)["left_out"]
    assert len(listed) == 15


def test_a_run_whose_model_moved_is_told_where_it_is(work: Path, tiny_model: Path) -> None:
    copy = shutil.copytree(tiny_model, work / "base")
    args = ("--data", "D/train.parquet", "--eval-data", "D/validation.parquet", "--output-dir", "runs/moved")
    prlhf("prm", "train", *args, "--model", "base", cwd=work)
    copy.rename(work / "elsewhere")
    (work / "new.jsonl").write_text('{"prompt": "never", "responses": ["seen", "before"]}\n')
    rerank = ("bestofn", "rerank", "runs/moved", "--candidates", "new.jsonl", "--users", "all", "--json")
    assert "no such folder" in prlhf(*rerank, cwd=work, code=2).stderr
    assert json.loads(prlhf(*rerank, "--model", "elsewhere", cwd=work).stdout)["rankings"]
    template = json.loads((work / "elsewhere/tokenizer_config.json").read_text())
    (work / "elsewhere/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (work / "elsewhere/tokenizer_config.json").write_text(json.dumps({**template, "chat_template": None}))
    assert "tokenizer and chat template" in prlhf(*rerank, "--model", "elsewhere", cwd=work, code=3).stderr


def test_a_run_never_replaces_files_of_others(work: Path, tiny_model: Path) -> None:
    (work / "project").mkdir()
    (work / "project/README.md").write_text("mine")
    args = ("prm", "train", "--data", "D/train.parquet", "--model", tiny_model, "--output-dir", "project")
    assert "belongs to no run" in prlhf(*args, cwd=work, code=3).stderr
    assert (work / "project/README.md").read_text() == "mine"


def test_two_writers_of_a_run_are_refused(work: Path) -> None:
    code = "import sys, time; from pathlib import Path; from prlhf.core.artefact import writing\n"
    code += "with writing(Path('runs/board')): print('held', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=work, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    done = prlhf("users", "add", "x", "--run", "runs/board", "--data", "one.jsonl", cwd=work, code=3)
    child.kill()
    child.wait()
    assert "another process is writing" in done.stderr


def test_bad_rows_may_be_left_out_and_are_counted(work: Path) -> None:
    rows = (work / "prefs.jsonl").read_text() + '{"user_id": "u0", "prompt": "p", "chosen": "", "rejected": "y"}\n'
    (work / "dirty.jsonl").write_text(rows)
    found = json.loads(prlhf("data", "check", "dirty.jsonl", "--max-bad-rows", 1, "--json", cwd=work).stdout)
    assert found["rows"] == 400
    assert found["left_out"] == [{"place": "dirty.jsonl:401", "field": "chosen", "what": "empty", "kind": "bad"}]


def test_identical_responses_are_a_tie_in_evaluation(work: Path) -> None:
    line = {"user_id": "u0", "prompt": "p", "chosen": "same", "rejected": "same"}
    (work / "tie.jsonl").write_text(json.dumps(line) + "\n")
    figures = json.loads(prlhf("eval", "preference", "runs/board", "--data", "tie.jsonl", "--json", cwd=work).stdout)
    assert figures["ties"] == 1
    values = [figures["accuracy"][model] for model in ("individualized", "uniform", "longer")]
    assert {f["top"]["value"] if f["top"]["n"] else f["generic"]["value"] for f in values} == {0.5}


def test_text_of_rows_can_not_take_over_the_terminal(work: Path) -> None:
    nasty = "\x1b[31mred [bold]bold[/bold] \x1b]0;title\x07"
    (work / "nasty.jsonl").write_text(json.dumps({"prompt": nasty, "responses": [nasty, "b"]}) + "\n")
    done = prlhf("bestofn", "rerank", "runs/board", "--candidates", "nasty.jsonl", "--users", nasty, cwd=work)
    assert "\x1b" not in done.stdout + done.stderr
    assert "[bold]" in done.stdout


def test_no_secret_reaches_a_run(work: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sentinel-1234")
    monkeypatch.setenv("HF_TOKEN", "hf_sentinel1234")
    prlhf("prm", "train", "--data", "D/train.parquet", "--model", tiny_model, "--output-dir", "runs/secret", cwd=work)
    for path in (work / "runs/secret").iterdir():
        assert b"sentinel" not in path.read_bytes()


def test_help_of_every_verb_answers(work: Path) -> None:
    for verb in (
        [],
        ["data", "split"],
        ["prm", "train"],
        ["bestofn", "score"],
        ["eval", "preference"],
        ["users", "add"],
    ):
        assert "--" in prlhf(*verb, "--help", cwd=work).stdout


def test_module_runs_as_a_process(work: Path) -> None:
    for module in ("prlhf", "prlhf.cli"):
        done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == prlhf("--version", cwd=work).stdout.strip()
    command = [sys.executable, "-m", "prlhf", "eval", "preference", "runs/none", "--data", "D/test.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, check=False)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
