"""Data sets from files, folders and the Hub, with errors that name the file and line that cannot be read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusedalign.commandline import one_line
from fusedalign.embedded import data_directory

#: Ending of a data file -> the reader of `datasets` for it.
_READERS = {f".{name}": name for name in ("json", "parquet", "csv", "arrow")} | {".jsonl": "json", ".ndjson": "json"}
_ENDINGS = ".jsonl, .json, .parquet, .csv or .arrow"
#: In a folder of `Dataset.save_to_disk`, which holds one split.
_SAVED = "state.json"
_NO_ROWS = " must have at least one row, got none"


def is_local(name: str) -> bool:
    """Whether a data set's name is that of a file or folder, or of the recipes' own data."""
    path = Path(name).expanduser()
    return path.exists() or path.parts[:2] == ("recipes", "data")


def load_named(name: str, /, **options: Any) -> Any:
    """The splits of a data set: a file, a folder of them, or a name of the Hub.

    Args:
        name: as on the command line; the recipes' own data are found from any working directory.
        options: of `datasets.load_dataset`.

    Raises:
        FileNotFoundError: a file or folder that does not exist.
        ValueError: data that cannot be read, with the file and the line.
    """
    import datasets

    path = Path(name).expanduser()
    if not path.exists() and path.parts[:2] == ("recipes", "data"):
        path = data_directory().joinpath(*path.parts[2:])
    if "://" in name and not name.startswith("hf://"):
        raise ValueError(
            f"dataset_name must name a file, a folder or a data set of the Hub, got the URL {name}: download it"
        )
    if not path.exists() and (name.startswith((".", "/", "~")) or path.suffix.lower() in _READERS):
        raise FileNotFoundError(f"dataset_name must name a file or folder that exists, got {name}")
    if path.is_file() and path.suffix.lower() not in _READERS:
        raise ValueError(f"dataset_name must be a {_ENDINGS} file, got {name}")
    if path.is_dir() and not _data_files(path):
        content = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"dataset_name must be a folder with {_ENDINGS} files, got {name} with {content}")
    try:
        if path.is_file():
            splits = datasets.load_dataset(_READERS[path.suffix.lower()], data_files=str(path), **options)
        elif (path / _SAVED).is_file():
            saved = datasets.load_from_disk(str(path))
            splits = {"train": saved.to_iterable_dataset() if options.get("streaming") else saved}
        else:
            splits = datasets.load_dataset(str(path) if path.exists() else name, **options)
        for split in splits.values():
            next(iter(split), None)  # a stream is only read now
    except Exception as error:
        raise ValueError(_explanation(name, path, error)) from error
    for file in _data_files(path):
        # The reader accepts any bytes; a stream is too long to be checked first.
        is_checked = _READERS[file.suffix.lower()] == "json" and not options.get("streaming")
        if is_checked and (reason := _not_utf8(file)):
            raise ValueError(f"{file}{reason}")
    return splits


def _explanation(name: str, path: Path, error: Exception) -> str:
    for file in _data_files(path):
        if reason := problem(file):
            return f"{file}{reason}"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = one_line(cause, 200) or type(cause).__name__
    remote = "a file, a folder or a data set of the Hub that can be reached"
    expected = "data that can be read" if path.exists() else remote
    return f"dataset_name must be {expected}, got {name}: {reason}"


def _data_files(path: Path) -> list[Path]:
    """The file itself, or the files in a folder that `datasets` reads; none for a name of the Hub."""
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    return [file for file in files if file.is_file() and file.suffix.lower() in _READERS]


def problem(file: Path) -> str | None:
    """Why a file cannot be read, as words after its name; None if no reason is found."""
    kind = _READERS[file.suffix.lower()]
    if not file.stat().st_size:
        return _NO_ROWS
    if kind not in ("json", "csv"):
        return None
    if reason := _not_utf8(file):
        return reason
    content = file.read_text(encoding="utf-8-sig")
    return _problem_of_csv(content) if kind == "csv" else _problem_of_json(content, file.suffix.lower() == ".json")


def _not_utf8(file: Path) -> str | None:
    with file.open("rb") as lines:
        for i, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f", line {i}: text must be UTF-8, got byte 0x{line[error.start]:02x}"
    return None


def _problem_of_json(content: str, may_be_one: bool) -> str | None:
    """For a file with one object a line or, if it `may_be_one`, a single list or object over many lines."""
    lines = [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    try:
        return None if json.loads(content, object_pairs_hook=_object) else _NO_ROWS
    except ValueError as error:
        if len(lines) < 2 or _is_json(lines[0][1]) or not (may_be_one or content.startswith("[")):
            return _problem_of_lines(lines)
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        return f"{line}: must be JSON, got {error}"


def _is_json(content: str) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _problem_of_lines(lines: Iterable[tuple[int, str]]) -> str | None:
    is_empty = True
    for i, line in lines:
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            return f", line {i}: must be one JSON object, got {line.strip()[:60]!r}: {reason}"
        if not isinstance(row, dict):
            return f", line {i}: must be one JSON object, got {line.strip()[:60]!r}"
        is_empty = False
    return _NO_ROWS if is_empty else None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} twice")
    return entries


def _problem_of_csv(content: str) -> str | None:
    reader = csv.reader(content.splitlines(keepends=True))
    header = next(reader, [])
    row = None
    for row in reader:
        if len(row) > len(header):
            return f", line {reader.line_num}: must have {len(header)} fields as the first line has, got {len(row)}"
    return _NO_ROWS if row is None else None
