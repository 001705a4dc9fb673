"""Comparisons from plain files: JSONL, CSV, Parquet, a saved `datasets` folder, or a data set of the hub."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..comparisons import FIELDS, Comparisons, DataError, Problem, RowPolicy, check

Row = tuple[str, Mapping[str, Any] | Problem]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def load_comparisons(
    source: str | Path, columns: Mapping[str, str] | None = None, policy: RowPolicy | None = None
) -> Comparisons:
    """Reads and checks comparisons.

    Args:
        source: a file by its suffix, a folder written by `datasets`, or `owner/name` on the hub; folder and hub name
            may end in `:split` where there are several.
        columns: field -> the column that holds it, for fields whose column has another name.
        policy: what to do with rows that are not plain good comparisons.

    Raises:
        DataError: the source can't be read, or its rows can't be used; names file, line and field.
    """
    return check(read_rows(source, columns), str(source), policy or RowPolicy())


def read_rows(source: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Raw rows with their places, columns renamed to fields."""
    for place, row in _raw_rows(str(source)):
        yield place, row if isinstance(row, Problem) else _rename(row, columns or {}, place)


def _raw_rows(source: str) -> Iterator[Row]:
    path = Path(source)
    if path.suffix not in SUFFIXES and path.is_file():
        raise DataError(f"{source}: a file of this kind can't be read; give one of {', '.join(SUFFIXES)}")
    if path.suffix not in SUFFIXES:
        return _dataset_rows(source)
    if not path.is_file():
        raise DataError(f"{source}: no such file")
    readers = {".csv": _csv_rows, ".parquet": _parquet_rows}
    return readers.get(path.suffix, jsonl_objects)(path)


def _rename(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Mapping[str, Any] | Problem:
    for field, column in columns.items():
        if field not in FIELDS:
            raise DataError(f"--columns {field}={column}: no field {field!r}; fields are {', '.join(FIELDS)}")
        if column not in row:
            return Problem(place, field, f"no column {column!r}; columns are {', '.join(map(str, row))}")
    taken = {column: field for field, column in columns.items()}
    kept = {key: value for key, value in row.items() if key not in taken and key not in columns}
    return {**kept, **{field: row[column] for field, column in columns.items()}}


def jsonl_objects(path: Path) -> Iterator[Row]:
    """Objects of a JSONL file with their places; a line that holds none becomes a problem that says why."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            data = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not data.strip():
                continue
            try:
                row = json.loads(data.decode())
            except UnicodeDecodeError as error:
                yield place, Problem(place, "line", f"not UTF-8 at byte {error.start}")
            except (ValueError, RecursionError) as error:
                yield place, Problem(place, "line", f"not JSON: {error}")
            else:
                whole = isinstance(row, dict)
                yield place, row if whole else Problem(place, "line", f"must be an object, found {type(row).__name__}")


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        csv.field_size_limit(2**31 - 1)
        reader = csv.DictReader(file, strict=True)  # cells beyond the header are kept under None
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or any(value is None for value in row.values()):
                    cells = len(reader.fieldnames or [])
                    yield place, Problem(place, "line", f"has another number of cells than the header's {cells}")
                else:
                    yield place, row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: line: not CSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def _dataset_rows(source: str) -> Iterator[Row]:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    name, _, split = source.partition(":")
    try:
        data = load_from_disk(name) if Path(name).is_dir() else load_dataset(name)
    except Exception as error:  # the hub's client raises a dozen kinds
        kinds = ", ".join(SUFFIXES)
        reason = (str(error).splitlines() or [""])[0][:200]
        raise DataError(
            f"{source}: neither a file ({kinds}), nor a folder saved by datasets, nor given by the hub: {reason}"
        ) from None
    if isinstance(data, DatasetDict):
        if split not in data and (split or len(data) > 1):
            raise DataError(f"{source}: has the splits {', '.join(data)}; name one, as in {name}:{next(iter(data))}")
        data = data[split] if split in data else next(iter(data.values()))
    if not isinstance(data, Dataset):
        raise DataError(f"{source}: a streamed data set can't be read")
    for number, row in enumerate(data, start=1):
        yield f"{source}:row {number}", row
