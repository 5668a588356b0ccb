"""Results in shards that survive what interrupts a run: written at once, with checksums, in any order, by any process.

A shard holds the scores of `SHARD_ROWS` consecutive rows by one model. Its data are written first, then a note with
their checksum, each under another name and renamed: a shard is there when its note is there and the checksum is right.
The checksum covers the settings, the model and the number too, so that a shard counts in its own place alone. So
nothing needs a lock. A process that dies leaves a file that the next one overwrites; two that make the same shard write
the same.
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
        folder: is made when a model's folder is claimed.
        rows: of the data set.
        settings: of the run, of JSON types; all of them change results.
        shard_rows: of a shard.
    """

    def __init__(self, folder: Path, rows: int, settings: dict[str, Any], shard_rows: int = SHARD_ROWS) -> None:
        self.folder, self.rows, self.settings, self.shard_rows = folder, rows, settings, shard_rows

    @property
    def shards(self) -> int:
        """How many there are to be."""
        return -(-self.rows // self.shard_rows)

    def bounds(self, shard: int) -> tuple[int, int]:
        """The first row of a shard, and the one after its last."""
        return shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows)

    def check(self) -> None:
        """Raises SettingsMismatchError where the folder holds results of other settings; names them."""
        for path in self.folder.glob(f"*/{_SETTINGS}"):
            claim = _read_claim(path)
            if claim is not None:
                check_settings(claim["settings"], self.settings, self.folder)

    def claim(self, model: str, chosen: dict[str, Any]) -> dict[str, Any]:
        """Make the folder of a model this run's; of several processes the first one writes the settings.

        Args:
            model: its folder.
            chosen: what this process would choose and an earlier one may have chosen otherwise, within rounding.

        Returns:
            What was chosen by the process that came first.

        Raises:
            SettingsMismatchError: as `check`.
        """
        path = self.folder / model / _SETTINGS
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and _read_claim(path) is None:  # damaged
            path.unlink()
        own = temporary_name(path)
        try:
            write_file(own, json.dumps({"settings": self.settings, "chosen": chosen}, indent=1).encode())
            _put(own, path)
        finally:
            own.unlink(missing_ok=True)
        self.check()
        claim = _read_claim(path)
        return chosen if claim is None else claim["chosen"]

    def retract(self, model: str) -> None:
        """Undo `claim` where no shard has come of it, so that a run whose settings fail at once blocks no other."""
        folder = self.folder / model
        if folder.is_dir() and [path.name for path in folder.iterdir()] == [_SETTINGS]:
            shutil.rmtree(folder)
            with contextlib.suppress(OSError):  # another model's shards are there
                self.folder.rmdir()

    def is_claimed(self, model: str) -> bool:
        """Whether the folder of a model is there: it goes when the run is finished, perhaps by another process."""
        return (self.folder / model).is_dir()

    def is_complete(self, model: str, shard: int) -> bool:
        """Whether a shard is there and undamaged."""
        return self._checked(model, shard) is not None

    def write(self, model: str, number: int, shard: Shard) -> None:
        """Write a shard.

        Raises:
            OSError: the disk is full, or the model's folder is not there; no half shard is left.
        """
        data, note = self._paths(model, number)
        content = _encode(shard)
        write_file(data, content)
        write_file(note, json.dumps({"sha256": self._checksum(model, number, content)}).encode())

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
        return content if self._checksum(model, shard, content) == checksum else None

    def _checksum(self, model: str, shard: int, content: bytes) -> str:
        place = json.dumps([self.settings, model, shard], sort_keys=True).encode()
        return hashlib.sha256(place + b"\n" + content).hexdigest()


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


def _put(own: Path, path: Path) -> None:
    """Give a file another name, unless a process has put one there already."""
    try:
        os.link(own, path)  # unlike a renaming it fails where there is one
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            os.replace(own, path)


def _read_claim(path: Path) -> dict[str, Any] | None:
    """What `ShardStore.claim` wrote; None where it is not there, or damaged."""
    try:
        claim = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return claim if isinstance(claim, dict) and {"settings", "chosen"} <= claim.keys() else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def temporary_name(path: Path) -> Path:
    """A name in the folder of `path` that no other process takes."""
    return path.with_name(f"{path.name}.{os.urandom(6).hex()}.tmp")


def synchronise(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write all of a file or nothing; it is on the disk when this returns.

    Raises:
        OSError: it cannot be written.
    """
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
