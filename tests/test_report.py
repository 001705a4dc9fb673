"""The report page: what it shows, that it shows any text as text, and that it asks the network for nothing."""

import re
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import torch
from browser import Visit, visit

from prlhf.core.comparisons import Comparison, User
from prlhf.core.figures import NOTHING, figure
from prlhf.core.scoring import Ranking, ScoreRequest, each, ranking
from prlhf.core.sources.simulated import UTILITY_COLUMNS
from prlhf.eval import sections
from prlhf.eval.charts import NUMBER, POINTS, chart_text, shown, sign
from prlhf.eval.preference import Evaluation, evaluate
from prlhf.eval.report import Chart, Picks, Section, Table, visible, write_report

HOSTILE = [
    "<script>hx=1</script>",
    "</script><script>hx=1",
    "<img src=x onerror=hx=1>",
    '=HYPERLINK("http://x.de")',
    "\x1b[31mred\x1b[0m",
    "{{ 7*7 }}{% raw %}",
    "line\u2028separator",
    "<b>b</b><br>&lt;i&gt;%{x}",
    '<a href="http://x.de">a',
    '"><svg onload=hx=1>',
    "--c0",
    "\u202egnissim",
    "W" * 300,
]


def evaluated(ids: list[str], unseen: int = 2, rows: int = 8, groups: list[str] | None = None) -> Evaluation:
    """Users who like long or short responses by turns; row 0 and the uniform model say long."""
    taste = {user: 1.0 if i % 2 else -1.0 for i, user in enumerate(ids)}
    everybody = {**taste, **{f"new-{i}": -1.0 for i in range(unseen)}}
    comparisons = []
    for i, (user, way) in enumerate(everybody.items()):
        group = {"group": groups[i % len(groups)]} if groups else {}
        for row in range(rows):
            pair = ("a long response", "short") if (way > 0) == (row > 0) else ("short", "a long response")
            truth = dict(zip(UTILITY_COLUMNS, [way * len(text) for text in pair], strict=True))
            comparisons.append(Comparison(User(user), f"p{row}", *pair, f"x:{row}", {**group, **truth}))
    scorer = each(lambda user, prompt, response: taste.get(user.id or "", 1.0) * len(response))
    uniform = each(lambda user, prompt, response: float(len(response)))
    return evaluate(
        "individualized",
        scorer,
        comparisons,
        lambda user: user.id in taste,
        {"uniform": uniform},
        {None: 1},
        "group" if groups else None,
    )


def ranked(user: str, prompt: str, responses: list[str], scores: list[float], known: bool = True) -> Ranking:
    return ranking(ScoreRequest(User(user), prompt, responses), torch.tensor(scores), known)


def every_section(texts: list[str]) -> list[Section | None]:
    """All sections, with the texts wherever a text of somebody else can stand."""
    evaluation = evaluated(texts, groups=texts)
    first, last = texts[0], texts[-1]
    rankings = [ranked(user, text, texts, [float(i == j) for j in range(len(texts))], i > 0)
                for text in texts[:3] for i, user in enumerate(texts[:4])]  # fmt: skip
    vectors = np.random.default_rng(0).normal(size=(len(texts) + 1, 5))
    return [
        sections.accuracy_section(evaluation),
        sections.users_section(evaluation),
        sections.groups_section(evaluation),
        sections.bars_section(first, texts, {text: figure(0.5, 0.4, 0.6, 9) for text in texts}, last, NUMBER),
        sections.picks_section(rankings, {text: text for text in texts}),
        sections.map_section(vectors, texts, texts, first),
        sections.audit_section([(text, text, text) for text in texts]),
        sections.made_section("\n".join(texts), {text: text for text in texts}, dict.fromkeys(texts, 1.0)),
    ]


def plain_texts(count: int = 12) -> list[str]:
    return [f"user {i}" for i in range(count)]


def part(section: Section | None, kind: type) -> Any:
    assert section is not None
    return next(found for found in section.parts if isinstance(found, kind))


def looked_at(tmp_path: Path, made: list[Section | None], **how: Any) -> Visit:
    write_report(tmp_path / "page.html", "A title", ["A sentence."], made)
    return visit(tmp_path / "page.html", tmp_path, **how)


# The browser that the other tests rely on.


def test_the_browser_tells_of_errors_and_requests(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<title>t</title><img src="https://x.test/a.png"><script>console.error("planted"); no_such()</script>'
    )
    found = visit(
        page, tmp_path, width=390, dark=True, probe="[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]"
    )
    assert found.requests == ["https://x.test/a.png"]
    assert any("planted" in error for error in found.errors)
    assert any("no_such is not defined" in error for error in found.errors)
    assert found.answer == [390, True]
    assert found.screenshot.startswith(b"\x89PNG")


def test_without_a_browser_tests_are_skipped_unless_one_is_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    monkeypatch.delenv("PRLHF_TEST_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="chromium"):
        browser.chromium()
    monkeypatch.setenv("PRLHF_TEST_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="PRLHF_TEST_BROWSER"):
        browser.chromium()


# The page in the browser.

PROBE = """(() => {
  const style = getComputedStyle(document.documentElement), text = document.querySelector(".chart text");
  const ink = document.createElement("i"); ink.style.color = style.getPropertyValue("--ink");
  document.body.append(ink);
  return {
    wide: document.documentElement.scrollWidth, window: innerWidth, ink: getComputedStyle(ink).color,
    text: getComputedStyle(text).fill, charts: document.querySelectorAll(".chart").length,
    drawn: document.querySelectorAll(".chart .plot-container").length,
    headings: [...document.querySelectorAll("h1, h2, h3")].map(h => h.tagName).join(""),
    unnamed: document.querySelectorAll(".chart:not([aria-label]), table:not(:has(caption)), th:not([scope])").length,
  };
})()"""


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_page_is_whole_at_any_width_and_in_any_light(tmp_path: Path, width: int, dark: bool) -> None:
    found = looked_at(tmp_path, every_section(plain_texts()), width=width, dark=dark, probe=PROBE)
    assert found.errors == []
    assert found.requests == []
    assert found.answer["wide"] <= found.answer["window"] == width
    assert found.answer["drawn"] == found.answer["charts"] == 6
    assert found.answer["ink"] == found.answer["text"] == ("rgb(233, 231, 226)" if dark else "rgb(30, 33, 38)")
    assert re.fullmatch(r"H1(H2(H3)*)+", found.answer["headings"])
    assert found.answer["unnamed"] == 0


def test_hostile_texts_are_shown_as_text(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_report(path, HOSTILE[0], HOSTILE, every_section(HOSTILE))
    probe = """({
      wide: document.documentElement.scrollWidth, hacked: typeof hx, title: document.title,
      body: document.body.textContent,
      labels: [...document.querySelectorAll(".chart text")].map(text => text.textContent),
      foreign: document.querySelectorAll("img, iframe, link, [onerror], [onload], svg a, b, a[href^=http]").length,
      scripts: document.querySelectorAll("script:not([type])").length,
    })"""
    found = visit(path, tmp_path, width=390, probe=probe)
    assert found.errors == []
    assert found.requests == []
    assert found.answer["wide"] <= 390
    assert found.answer["hacked"] == "undefined"
    assert found.answer["title"] == HOSTILE[0]
    assert found.answer["scripts"] == 2
    chips = found.dom.count("</b></li>")  # the only bold words are those of the chips
    assert found.answer["foreign"] == chips
    for text in HOSTILE:
        assert found.answer["body"].count(visible(text)) >= 10
        label = " ".join(visible(text).split())
        assert (label if len(label) <= 26 else label[:25] + "…") in found.answer["labels"]


def test_no_other_script_runs_and_nothing_is_fetched_whatever_gets_into_the_page(tmp_path: Path) -> None:
    probe = """(async () => {
      const script = document.createElement("script"); script.textContent = "window.hacked = 1";
      const image = new Image(); image.src = "https://x.test/a.png";
      document.body.append(script, image);
      const fetched = await fetch("https://x.test/b").then(() => true, () => false);
      return [typeof hacked, fetched];
    })()"""
    found = looked_at(tmp_path, [sections.audit_section([("a", "b", "c")])], probe=probe)
    assert found.answer == ["undefined", False]
    assert found.requests == []
    assert any("Content Security Policy" in error for error in found.errors)


def test_five_thousand_users(tmp_path: Path) -> None:
    evaluation = evaluated([f"user-{i:04d}" for i in range(5000)], rows=1)
    vectors = np.random.default_rng(0).normal(size=(5001, 4))
    names = [f"user-{i:04d}" for i in range(5000)]
    made = [sections.users_section(evaluation), sections.map_section(vectors, names, None, "")]
    found = looked_at(tmp_path, made, probe="document.querySelectorAll('tbody tr').length")
    assert (found.errors, found.requests) == ([], [])
    assert found.answer == 10_000
    assert (tmp_path / "page.html").stat().st_size < 8e6
    label = "The 30 users with the lowest accuracy, of 5,000 seen in training"
    assert made[0] is not None
    assert [p.label for p in made[0].parts if isinstance(p, Chart)] == [
        "Gain over row 0, all users seen in training",
        label,
    ]
    assert part(made[0], Table).folded == "Figures of 5,000 of 5,002 users"


# What the builders make of figures.


def test_accuracy_is_that_of_the_evaluation_row_0_beside_it_and_the_ceiling_across() -> None:
    evaluation = evaluated(plain_texts(4))
    made = sections.accuracy_section(evaluation)
    table, chart = part(made, Table), part(made, Chart)
    assert [row[0] for row in table.rows[:2]] == ["individualized", "row 0: user unknown"]
    accuracy = evaluation.figures["accuracy"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["individualized"] == [shown(accuracy["individualized"][k]) for k in ("top", "generic")]
    assert rows["row 0: user unknown"][0] == shown(accuracy["individualized"]["top_row0"])
    assert rows["ceiling: true utility"][0] == shown(accuracy["ceiling"]["top"])
    assert "ceiling: true utility" not in chart.layout["yaxis"]["ticktext"]
    assert [note["text"] for note in chart.layout["annotations"]] == ["coin", "ceiling"]
    assert chart.data[-1]["x"][0] == pytest.approx(100 * accuracy["individualized"]["top"]["value"])
    differences = [p for p in made.parts if isinstance(p, Table)][-1]
    assert {row[0]: row[1] for row in differences.rows}["uniform model"] == shown(
        evaluation.figures["difference"]["uniform"], POINTS
    )


def test_unknown_users_are_marked_and_come_last() -> None:
    made = sections.users_section(evaluated(["ann", "bob"]))
    table = part(made, Table)
    assert [(row[0], row[1]) for row in table.rows[2:]] == [(f"new-{i}", "user unknown (row 0)") for i in (0, 1)]
    assert table.rows[2][table.head.index("gain over row 0")] == "-"
    assert "above row 0 for 1 of 2 users and below for 0" in made.text[0]
    row0 = part(made, Chart).data[[name for _, _, name in part(made, Chart).key][::-1].index("row 0: user unknown")]
    assert row0["y"] == [0, 1]


def test_a_model_without_users_is_its_own_row_0_and_what_was_not_measured_is_a_dash() -> None:
    score = each(lambda user, prompt, response: float(len(response)))
    rows = [Comparison(User("ann"), "p", "long one", "short", "x:1")]
    found = evaluate("uniform", score, rows, lambda user: True, {}, {None: 1})
    table = part(sections.accuracy_section(found), Table)
    assert "row 0: user unknown" not in [row[0] for row in table.rows]
    assert {row[2] for row in table.rows} == {"-"}
    bars = sections.bars_section("t", [], {"a": NOTHING, "b": figure(0.25, 0.2, 0.3, 4)}, "accuracy")
    assert part(bars, Table).rows == [["a", "-", "0"], ["b", "25.0 % (20.0 to 30.0)", "4"]]
    assert part(bars, Chart).data[0]["y"] == [1]


def test_groups_have_row_0_beside_them() -> None:
    made = sections.groups_section(evaluated(plain_texts(4), unseen=0, groups=["majority", "minority"]))
    table = part(made, Table)
    assert [row[0] for row in table.rows] == ["all (4 users)", "majority (2 users)", "minority (2 users)"]
    # The minority likes long responses, as row 0 does, in seven rows of eight.
    assert table.rows[2][table.head.index("row 0: user unknown")].startswith("87.5 %")
    assert table.rows[1][table.head.index("row 0: user unknown")].startswith("12.5 %")


def test_builders_give_none_where_there_is_nothing(tmp_path: Path) -> None:
    none = [
        sections.groups_section(evaluated(["ann", "bob"])),
        sections.bars_section("t", [], {"a": NOTHING}, "accuracy"),
        sections.bars_section("t", [], {}, "accuracy"),
        sections.picks_section([], {}),
        sections.map_section(np.ones((3, 2)), ["ann", "bob"], None, ""),
        sections.map_section(np.ones((2, 2)), ["ann"], None, ""),
        sections.audit_section([]),
    ]
    assert none == [None] * len(none)
    write_report(tmp_path / "page.html", "t", [], none)
    assert "<section" not in (tmp_path / "page.html").read_text()


def test_picks_say_what_differs_and_for_whom() -> None:
    brief, loud = "Sure.", "Sure! Shall we begin with the long explanation?"
    rankings = [
        ranked("ann", "Say it.", [brief, loud], [1.0, 0.0]),
        ranked("bob", "Say it.", [brief, loud], [0.0, 1.0]),
        ranked("zed", "Say it.", [brief, loud], [0.0, 1.0], known=False),
        ranked("ann", "Another.", [brief], [1.0]),
    ]
    made = sections.picks_section(rankings, {"ann": "likes brief answers"})
    assert made is not None
    first, second = (p for p in made.parts if isinstance(p, Picks))
    assert (first.open, second.open) == (True, False)
    ann, bob, zed = first.picks
    assert (ann.user, ann.about, ann.known, ann.text) == ("ann", "likes brief answers", True, brief)
    assert (bob.about, zed.known) == ("", False)
    assert dict(ann.chips)["1 words"] == "least"
    assert dict(bob.chips)["8 words"] == dict(zed.chips)["8 words"] == "most"
    assert "0 % list lines" in first.alike
    assert ann.others == "Rank 2 for bob, 2 for zed."
    assert [row[2:] for row in first.candidates.rows] == [["1", "2", "2"], ["2", "1", "1"]]


def test_most_is_marked_where_one_response_has_it_alone() -> None:
    texts = ["One two!", "Three four!", "Five six seven."]
    rankings = [ranked(u, "p", texts, [float(i == j) for j in range(3)]) for i, u in enumerate("abc")]
    picks = part(sections.picks_section(rankings, {}), Picks)
    assert [dict(pick.chips).get("100 % end in !") for pick in picks.picks] == ["", "", None]
    assert dict(picks.picks[2].chips)["0 % end in !"] == "least"


def test_map_has_row_0_in_the_middle_and_says_how_much_it_shows() -> None:
    offsets = np.array([[3.0, 0, 0], [-3, 0, 0], [0, 0, 1], [0, 0, -1]])
    vectors = np.vstack([[5.0, 6, 7], offsets + np.array([5, 6, 7])])
    made = sections.map_section(vectors, list("abcd"), ["x", "x", "y", "y"], "personal data")
    chart = part(made, Chart)
    assert made.text == ["personal data"]
    assert chart.layout["xaxis"]["title"]["text"] == "direction 1: 90 % of the difference"
    assert (chart.data[0]["x"], chart.data[1]["y"]) == ([3, -3], [1, -1])
    assert (chart.data[-1]["x"], chart.data[-1]["y"]) == ([0], [0])
    assert len({(glyph, colour) for glyph, colour, _ in chart.key}) == 3
    with pytest.raises(ValueError, match="4 users after row 0, but 1 names"):
        sections.map_section(vectors, ["a"], None, "")


def test_made_section_adds_versions_and_a_total() -> None:
    made = sections.made_section("prlhf report", {"run": "r"}, {"scores": 1.25, "page": 0.5})
    facts, seconds = (p for p in made.parts if isinstance(p, Table))
    assert {"run", "prlhf", "torch", "python", "platform"} <= {row[0] for row in facts.rows}
    assert seconds.rows[-1] == ["total", "1.8"]


def test_text_of_a_chart_is_cut_and_escaped() -> None:
    assert chart_text("<b>&amp;\n x") == "&lt;b&gt;&amp;amp; x"
    assert chart_text("x" * 100, 10) == "x" * 9 + "…"
    assert chart_text("") == "(no name)"
    assert visible("a\x00\x7f\x9b\ud800\r\nb\tc") == "a����\nb\tc"
    assert len({sign(i) for i in range(49)}) == 49
