"""Data sets from files, folders and the Hub, and what is wrong with a file that cannot be read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fusedalign.embedded import data_directory

#: Endings of data files, and the readers of `datasets` for them.
_READERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_ENDINGS = ".jsonl, .json, .parquet, .csv or .arrow"


def load_named(name: str, /, **options: Any) -> Any:
    """The splits of a data set: a file, a folder of them, or a name of the Hub.

    Args:
        name: as on the command line; the recipes' own data is found from any working directory.
        options: of `datasets.load_dataset`.

    Raises:
        FileNotFoundError: a file or folder that does not exist.
        ValueError: what cannot be read, naming the file and the line.
    """
    import datasets

    path = Path(name).expanduser()
    if not path.exists() and path.parts[:2] == ("recipes", "data"):
        path = data_directory().joinpath(*path.parts[2:])
    if not path.exists() and (name.startswith((".", "/", "~")) or path.suffix.lower() in _READERS):
        raise FileNotFoundError(f"dataset_name must name a file or folder that exists, got {name}")
    if path.is_file() and path.suffix.lower() not in _READERS:
        raise ValueError(f"dataset_name must be a {_ENDINGS} file, got {name}")
    if path.is_dir() and not any(_data_files(path)):
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"dataset_name must be a folder with {_ENDINGS} files, got {name} with {inside}")
    try:
        if path.is_file():
            splits = datasets.load_dataset(_READERS[path.suffix.lower()], data_files=str(path), **options)
        else:
            splits = datasets.load_dataset(str(path) if path.exists() else name, **options)
        for split in splits.values():
            next(iter(split), None)  # a stream has not been read before
    except Exception as error:
        raise ValueError(_explanation(name, path, error)) from error
    return splits


def _explanation(name: str, path: Path, error: Exception) -> str:
    files = [path] if path.is_file() else _data_files(path) if path.is_dir() else []
    for file in files:
        found = problem(file)
        if found:
            return f"{file}{found}"
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__  # type: ignore[assignment]
    reason = " ".join(str(cause).split()) or type(cause).__name__
    if not path.exists():
        return f"dataset_name must be a file, a folder or a data set of the Hub that can be reached, got {name}: {reason[:200]}"
    return f"dataset_name must be data that can be read, got {name}: {reason[:200]}"


def _data_files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix.lower() in _READERS)


def problem(file: Path) -> str | None:
    """What is wrong with a file, to be read after its name; None where nothing is found."""
    kind = _READERS[file.suffix.lower()]
    if not file.stat().st_size:
        return " is empty: it must have at least one row"
    if kind not in ("json", "csv"):
        return None
    try:
        content = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        return f", line {line}: text must be UTF-8, got byte 0x{error.object[error.start]:02x}"
    return _problem_of_csv(content) if kind == "csv" else _problem_of_json(content)


def _problem_of_json(content: str) -> str | None:
    lines = [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    try:
        rows: Any = json.loads(content, object_pairs_hook=_object)
    except ValueError as whole:
        if _parses(lines[:1]) or len(lines) == 1:  # one object a line
            return _problem_of_lines(lines)
        where = f", line {whole.lineno}" if isinstance(whole, json.JSONDecodeError) else ""
        return f"{where}: must be JSON, got {whole}"
    rows = rows if isinstance(rows, list) else [rows]
    return None if any(rows) else " has no rows: it must have at least one"


def _parses(lines: Iterable[tuple[int, str]]) -> bool:
    return _problem_of_lines(lines) is None


def _problem_of_lines(lines: Iterable[tuple[int, str]]) -> str | None:
    empty = True
    for i, line in lines:
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            return f", line {i}: must be one JSON object, got {line.strip()[:60]!r}: {reason}"
        if not isinstance(row, dict):
            return f", line {i}: must be one JSON object, got {line.strip()[:60]!r}"
        empty = False
    return " has no rows: it must have at least one" if empty else None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} twice")
    return made


def _problem_of_csv(content: str) -> str | None:
    reader = csv.reader(content.splitlines(keepends=True))
    header = next(reader, [])
    row = None
    for row in reader:
        if len(row) > len(header):
            return f", line {reader.line_num}: must have {len(header)} fields as the first line has, got {len(row)}"
    return " has no rows: it must have at least one" if row is None else None
