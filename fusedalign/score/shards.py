"""Results in shards that survive what interrupts a run: written at once, with checksums, in any order, by any process.

A shard holds the scores of `SHARD_ROWS` consecutive rows by one model. Its data are written first, then a note with
their checksum, each under another name and renamed: a shard is there when its note is there and the checksum is right.
So nothing needs a lock. A process that dies leaves a file that the next one overwrites; two that make the same shard
write the same.
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
    """What one model says of some consecutive rows: each is scored or refused."""

    scored: list[ScoredRow]
    refused: list[RefusedRow]


class SettingsMismatchError(ValueError):
    """Results of other settings are where these would go."""


class ShardStore:
    """The shards of a run, one folder a model.

    Args:
        folder: is made.
        rows: of the data set.
        shard_rows: of a shard.
    """

    def __init__(self, folder: Path, rows: int, shard_rows: int = SHARD_ROWS) -> None:
        self.folder, self.rows, self.shard_rows = folder, rows, shard_rows

    @property
    def shards(self) -> int:
        """How many there are to be."""
        return -(-self.rows // self.shard_rows)

    def bounds(self, shard: int) -> tuple[int, int]:
        """The first row of a shard, and the one after its last."""
        return shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows)

    def check(self, settings: dict[str, Any]) -> None:
        """Raises SettingsMismatchError where the folder holds results of other settings; names them."""
        for path in self.folder.glob(f"*/{_SETTINGS}"):
            check_settings(json.loads(path.read_text(encoding="utf-8"))["settings"], settings, self.folder)

    def claim(self, model: str, settings: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
        """Make the folder of a model this run's; of several processes the first one writes the settings.

        Args:
            model: its folder.
            settings: of this run, of JSON types; all of them change results.
            chosen: what this process would choose and an earlier one may have chosen otherwise, within rounding.

        Returns:
            What was chosen by the process that came first.

        Raises:
            SettingsMismatchError: as `check`.
        """
        path = self.folder / model / _SETTINGS
        path.parent.mkdir(parents=True, exist_ok=True)
        own = _temporary(path)
        try:
            write_file(own, json.dumps({"settings": settings, "chosen": chosen}, indent=1).encode())
            with contextlib.suppress(FileExistsError):
                os.link(own, path)  # unlike a renaming it fails where another process was first
        finally:
            own.unlink(missing_ok=True)
        self.check(settings)
        first: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["chosen"]
        return first

    def is_complete(self, model: str, shard: int) -> bool:
        """Whether a shard is there and undamaged."""
        return self._checked(model, shard) is not None

    def write(self, model: str, number: int, shard: Shard) -> None:
        """Write a shard.

        Raises:
            OSError: the disk is full, or the folder is gone; no half shard is left.
        """
        data, note = self._paths(model, number)
        data.parent.mkdir(parents=True, exist_ok=True)
        content = _encode(shard)
        write_file(data, content)
        checksum = {"sha256": hashlib.sha256(content).hexdigest(), "scored": len(shard.scored)}
        write_file(note, json.dumps(checksum).encode())

    def read(self, model: str, number: int) -> Shard:
        """A shard.

        Raises:
            ValueError: it is not there or damaged.
        """
        content = self._checked(model, number)
        if content is None:
            raise ValueError(
                f"shard {number} of {self.folder / model} must be there and undamaged: start the run again"
            )
        return _decode(content)

    def missing(self, model: str) -> list[int]:
        """The shards that are not there, or are damaged."""
        return [shard for shard in range(self.shards) if not self.is_complete(model, shard)]

    def remove(self) -> None:
        """Delete all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self, model: str, shard: int) -> tuple[Path, Path]:
        stem = self.folder / model / f"{shard:06d}"
        return stem.with_suffix(".jsonl"), stem.with_suffix(".json")

    def _checked(self, model: str, shard: int) -> bytes | None:
        data, note = self._paths(model, shard)
        try:
            content, checksum = data.read_bytes(), json.loads(note.read_text(encoding="utf-8"))["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return content if hashlib.sha256(content).hexdigest() == checksum else None


def shard_order(count: int, rank: int, ranks: int) -> Iterator[int]:
    """The shards in the order in which a rank looks at them: its own, then, from the end, those of the others.

    A rank that has done its own makes what others have not made yet, so that one that dies costs what it was at.
    """
    yield from range(rank, count, ranks)
    yield from (shard for shard in reversed(range(count)) if shard % ranks != rank)


def check_settings(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Raises SettingsMismatchError where results are of other settings; names the first ones that differ."""
    differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if differing:
        shown = ", ".join(f"{name} {_short(found.get(name))}, not {_short(wanted.get(name))}" for name in differing[:3])
        raise SettingsMismatchError(f"--out must be new or of the same settings, got {where} with {shown}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other process takes."""
    return path.with_name(f"{path.name}.{os.urandom(6).hex()}.tmp")


def write_file(path: Path, content: bytes) -> None:
    """Write all of a file or nothing; it is on the disk when this returns.

    Raises:
        OSError: it cannot be written.
    """
    temporary = _temporary(path)
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
    """One line a row; the text of a float in Python is the float."""
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
