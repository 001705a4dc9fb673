"""What the README says is there, is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tree_names_every_module() -> None:
    tree = README.partition("## The tree")[2].partition("## Develop")[0]
    for folder in ("prlhf", "core", "core/sources", "prm", "policy", "bestofn", "eval", "benchmarks", "recipes"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.name.startswith("__") or path.name in tree, path
    for name in re.findall(r"\b([a-z_]+\.py)\b", tree):
        assert list(ROOT.rglob(name)), name


def test_commands_and_flags_exist() -> None:
    """Every `prlhf ...` line names a verb and flags that the command knows."""
    import typer

    from prlhf.cli import app
    from prlhf.policy.arguments import PolicyArguments
    from prlhf.policy.trainer import PersonalizedDPOConfig
    from prlhf.prm.arguments import RewardArguments
    from prlhf.prm.trainer import PersonalizedRewardConfig

    group = typer.main.get_command(app)
    pages = [README, *(path.read_text() for path in (ROOT / "docs").glob("*.md"))]
    lines = [
        line
        for page in pages
        for line in re.findall(r"^prlhf ((?:.|\\\n)+?)$", page.replace("\\\n", " "), re.MULTILINE)
    ]
    assert len(lines) > 8
    for line in lines:
        words = line.split("#")[0].split()
        command, rest = group, words
        while rest and hasattr(command, "commands"):
            if rest[0].startswith("--"):
                break
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        kinds = {
            "prm": (RewardArguments, PersonalizedRewardConfig),
            "policy": (PolicyArguments, PersonalizedDPOConfig),
        }.get(words[0] if "train" in words else "", ())
        known |= {f"--{name.replace('_', '-')}" for kind in kinds for name in kind.__dataclass_fields__}
        assert {word for word in rest if word.startswith("--")} <= known, line
