"""Who may import whom, what `import prlhf` costs, and that no module is a drawer for everything."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "core": {"core"},
    "prm": {"core", "prm"},
    "policy": {"core", "policy"},
    "bestofn": {"core", "bestofn"},
    "eval": {"core", "eval"},
    "prlhf": {"core", "prm", "policy", "bestofn", "eval", "prlhf"},
}
FILES = [path for folder in ALLOWED for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_folders(path: Path) -> set[str]:
    """Top-level folders of the project that a module imports, whether relatively or under `prlhf`."""
    here = path.relative_to(ROOT).parts[:-1]
    package = list(here) if here[0] == "prlhf" else ["prlhf", *here]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names.append(base + (node.module.split(".") if node.module else []))
    own = [name[1] if len(name) > 1 and name[1] in ALLOWED else "prlhf" for name in names if name[0] == "prlhf"]
    return set(own)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_direction_and_size(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert imported_folders(path) <= ALLOWED[folder]
    assert len(path.read_text().splitlines()) <= 320
    assert path.name != "utils.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            text = ast.get_docstring(node, clean=False) or ""
            assert node.end_lineno - node.lineno - len(text.splitlines()) < 40, node.name


def test_import_is_light_and_public_names_resolve(tmp_path: Path) -> None:
    code = (
        "import sys, prlhf; assert prlhf.__version__; "
        "heavy = {'torch', 'transformers', 'trl', 'pandas', 'datasets'} & set(sys.modules); assert not heavy, heavy; "
        "[getattr(prlhf, name) for name in prlhf.__all__]"
    )
    # Not from the folder above: a checkout that is called prlhf, as the README has it, would be taken for the package.
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from prlhf.cli import app; from typer.testing import CliRunner; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "heavy = {'torch', 'transformers', 'trl', 'pandas', 'scipy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
