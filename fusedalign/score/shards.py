"""Results in shards that survive interruptions: written atomically, with checksums, in any order, by any process.

A shard holds the scores of `SHARD_ROWS` consecutive rows by one model. Its data are written first, then a note with
their checksum, each to a temporary file that is renamed: a shard is complete when its note exists and the checksum is
right. The checksum covers the settings, the model and the number too, so a shard is valid only in its own place. No
locks are needed: a process that dies leaves a file that the next one overwrites, and two processes that score the same
shard write the same data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusedalign.score.records import RefusedRow, Score

SHARD_ROWS = 512

_SETTINGS = "settings.json"


class ScoredRow(NamedTuple):
    """A row of the data set with the scores of its answers."""

    row: int
    names: tuple[str, ...]
    """of the answers"""
    text_bytes: tuple[int | None, ...]
    scores: tuple[Score, ...]


class Shard(NamedTuple):
    """Consecutive rows, each scored or refused by one model."""

    scored: list[ScoredRow]
    refused: list[RefusedRow]


class SettingsMismatchError(ValueError):
    """The output already holds results with other settings."""


class ShardStore:
    """The shards of a run, in one folder per model.

    Args:
        folder: created when the folder of a model is claimed.
        rows: number of rows of the data set.
        settings: everything that changes results, as JSON types.
        shard_rows: number of rows per shard.
    """

    def __init__(self, folder: Path, rows: int, settings: dict[str, Any], shard_rows: int = SHARD_ROWS) -> None:
        self.folder, self.rows, self.settings, self.shard_rows = folder, rows, settings, shard_rows

    @property
    def shards(self) -> int:
        """The number of shards of the data set."""
        return -(-self.rows // self.shard_rows)

    def bounds(self, shard: int) -> tuple[int, int]:
        """The first row of a shard, and the row after its last."""
        return shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows)

    def check(self) -> None:
        """Raise SettingsMismatchError if the folder holds results with other settings."""
        for path in self.folder.glob(f"*/{_SETTINGS}"):
            claim = _read_claim(path)
            if claim is not None:
                check_settings(claim["settings"], self.settings, self.folder)

    def claim(self, model: str, chosen: dict[str, Any]) -> dict[str, Any]:
        """Create the folder of a model for this run; the first of several processes writes the settings.

        Returns:
            `chosen` of the first process: choices that change results only within rounding.

        Raises:
            SettingsMismatchError: as `check`.
        """
        path = self.folder / model / _SETTINGS
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and _read_claim(path) is None:  # damaged
            path.unlink()
        temporary = temporary_name(path)
        try:
            write_file(temporary, json.dumps({"settings": self.settings, "chosen": chosen}, indent=1).encode())
            _link_if_missing(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self.check()
        claim = _read_claim(path)
        return chosen if claim is None else claim["chosen"]

    def retract(self, model: str) -> None:
        """Undo `claim` if there are no shards, so that a run with invalid settings does not block later ones."""
        folder = self.folder / model
        if folder.is_dir() and [path.name for path in folder.iterdir()] == [_SETTINGS]:
            shutil.rmtree(folder)
            with contextlib.suppress(OSError):  # it holds the shards of another model
                self.folder.rmdir()

    def is_claimed(self, model: str) -> bool:
        """Whether the folder of a model exists; the process that finishes the run removes it."""
        return (self.folder / model).is_dir()

    def is_complete(self, model: str, shard: int) -> bool:
        """Whether a shard exists and is undamaged."""
        return self._read_checked(model, shard) is not None

    def write(self, model: str, number: int, shard: Shard) -> None:
        """Write a shard; OSError, and no partial shard, on a full disk or without the folder of the model."""
        data, note = self._paths(model, number)
        content = _encode(shard)
        write_file(data, content)
        write_file(note, json.dumps({"sha256": self._checksum(model, number, content)}).encode())

    def read(self, model: str, number: int) -> Shard:
        """Read a shard. Raises ValueError if it is missing or damaged."""
        content = self._read_checked(model, number)
        if content is None:
            raise ValueError(
                f"shard {number} of {self.folder / model} must be there and undamaged: start the run again"
            )
        return _decode(content)

    def missing(self, model: str) -> list[int]:
        """The numbers of the shards that are missing or damaged."""
        return [shard for shard in range(self.shards) if not self.is_complete(model, shard)]

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self, model: str, shard: int) -> tuple[Path, Path]:
        stem = self.folder / model / f"{shard:06d}"
        return stem.with_suffix(".jsonl"), stem.with_suffix(".json")

    def _read_checked(self, model: str, shard: int) -> bytes | None:
        """The data of a shard; None if it is missing or damaged."""
        data, note = self._paths(model, shard)
        try:
            content, checksum = data.read_bytes(), json.loads(note.read_text(encoding="utf-8"))["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return content if self._checksum(model, shard, content) == checksum else None

    def _checksum(self, model: str, shard: int, content: bytes) -> str:
        identity = json.dumps([self.settings, model, shard], sort_keys=True).encode()
        return hashlib.sha256(identity + b"\n" + content).hexdigest()


def shard_order(count: int, rank: int, ranks: int) -> Iterator[int]:
    """The order in which a rank visits the shards: its own, then those of the other ranks, from the end.

    A rank that has finished its own shards takes over those of others, so a rank that dies costs only its current one.
    """
    yield from range(rank, count, ranks)
    yield from (shard for shard in reversed(range(count)) if shard % ranks != rank)


def check_settings(actual: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Raise SettingsMismatchError if the results at `path` have other settings; names the first ones that differ."""
    names = [name for name in {**actual, **expected} if actual.get(name) != expected.get(name)]
    if names:
        shown = ", ".join(f"{name} {_short(actual.get(name))}, not {_short(expected.get(name))}" for name in names[:3])
        raise SettingsMismatchError(f"--out must be new or of the same settings, got {path} with {shown}")


def _link_if_missing(temporary: Path, path: Path) -> None:
    """Rename a file, unless another process has created `path`."""
    try:
        os.link(temporary, path)  # unlike a rename, this fails if the path exists
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            os.replace(temporary, path)


def _read_claim(path: Path) -> dict[str, Any] | None:
    """The content written by `ShardStore.claim`; None if it is missing or damaged."""
    try:
        claim = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return claim if isinstance(claim, dict) and {"settings", "chosen"} <= claim.keys() else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def temporary_name(path: Path) -> Path:
    """A name in the folder of `path` that no other process uses."""
    return path.with_name(f"{path.name}.{os.urandom(6).hex()}.tmp")


def synchronise(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically; it is on the disk when this returns. Raises OSError if it cannot be written."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _encode(shard: Shard) -> bytes:
    """One line of JSON per row; floats survive the round trip exactly."""
    lines: list[Sequence[Any]] = [
        (x.row, x.names, x.text_bytes, [(s.logps, s.tokens, s.is_greedy, s.per_token) for s in x.scores])
        for x in shard.scored
    ]
    lines += [(refused.row, refused.reason) for refused in shard.refused]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _decode(content: bytes) -> Shard:
    shard = Shard([], [])
    for line in map(json.loads, content.splitlines()):
        if len(line) == 2:
            shard.refused.append(RefusedRow(*line))
        else:
            row, names, text_bytes, scores = line
            scored = tuple(Score(*fields) for fields in scores)
            shard.scored.append(ScoredRow(row, tuple(names), tuple(text_bytes), scored))
    return shard
