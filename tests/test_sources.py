"""What every source of comparisons keeps to; a new file in core/sources is found by its name."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
from pools import small_pool, write_pool

import prlhf.core.sources
from prlhf.core.comparisons import Comparison, RowPolicy, comparison
from prlhf.core.splits import to_records

FOLDER = Path(prlhf.core.sources.__file__).parent
MODULES = {path.stem: import_module(f"prlhf.core.sources.{path.stem}") for path in sorted(FOLDER.glob("[!_]*.py"))}
LOADERS = {name: module.load for name, module in MODULES.items() if hasattr(module, "load")}
# A small input of each; a source that is missing here fails the test.
INPUTS: dict[str, Callable[[Path], Path]] = {
    "simulated": lambda folder: write_pool(folder / "pool.jsonl", small_pool(20)),
}


def rows_of(name: str, folder: Path) -> Iterator[Comparison]:
    return LOADERS[name](INPUTS[name](folder))


def test_sources_are_found() -> None:
    assert "simulated" in LOADERS


@pytest.mark.parametrize("name", LOADERS)
def test_a_source_gives_comparisons_that_can_be_written_and_read(name: str, tmp_path: Path) -> None:
    rows = list(rows_of(name, tmp_path))
    assert rows
    for row in rows:
        assert isinstance(row, Comparison)
        assert isinstance(row.user.id, str)
        assert row.user.id
        assert row.chosen.strip()
        assert row.rejected.strip()
        assert row.prompt
    again = [comparison(record, row.place, RowPolicy()) for record, row in zip(to_records(rows), rows, strict=True)]
    assert again == rows
    assert list(rows_of(name, tmp_path)) == rows
