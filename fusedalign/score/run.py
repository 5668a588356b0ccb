"""Scores a data set shard by shard, in any number of processes, and merges the shards into one file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fusedalign.score import columns
from fusedalign.score.records import Answer, Example, RefusedRow, Score, Source
from fusedalign.score.scorer import Scorer
from fusedalign.score.shards import (
    ScoredRow,
    Shard,
    ShardStore,
    check_settings,
    shard_order,
    synchronise,
    temporary_name,
    write_file,
)

#: The two models of a run; only one of them is in memory at a time.
POLICY, REFERENCE = "policy", "reference"

#: Seconds between progress lines in a log.
_LOG_SECONDS = 30

#: The key of the settings in the metadata of the finished file.
_METADATA = b"fusedalign.score"


@dataclass(frozen=True)
class Run:
    """A data set to score, its models, and the output file."""

    source: Source
    out: Path
    """the finished file; until then the shards are in a folder of the same name with `.shards`"""
    settings: dict[str, Any]
    """everything that changes results, as JSON types; a file with other settings is not overwritten"""
    models: Mapping[str, Callable[[], Scorer]]
    """functions that load POLICY and, optionally, REFERENCE; called only if one of its shards is missing"""
    beta: float | None = None
    """of implicit rewards, if there is a reference"""
    rank: int = 0
    ranks: int = 1

    @property
    def store(self) -> ShardStore:
        """The store of the shards."""
        return ShardStore(self.out.with_name(f"{self.out.name}.shards"), len(self.source), self.settings)


@dataclass(frozen=True)
class Finished:
    """A finished file and its numbers of rows."""

    out: Path
    rows: int
    scored: int
    refused: list[RefusedRow]


def refused_path(out: Path) -> Path:
    """The file of refused rows that belongs to a finished file."""
    return out.with_suffix(".refused.jsonl")


class Ranks(NamedTuple):
    """The position of this process among those of `torchrun` or `accelerate launch`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """The ranks that the launcher has set in the environment."""
        return cls(*(int(os.environ.get(name.upper(), f"{cls._field_defaults[name]}")) for name in cls._fields))


def score_run(run: Run) -> Finished | None:
    """Score the missing shards; rank 0 then writes the file.

    Returns:
        The finished file; None on the other ranks.

    Raises:
        SettingsMismatchError: `out`, or its shards, have other settings.
        ValueError: `out` is not a file of scores.
        OSError: the disk is full; finished shards stay, and the next run continues from there.
    """
    store, was_finished = run.store, run.out.exists()
    if not was_finished:
        try:
            store.check()
            if all(_fill(run, store, name, load) for name, load in run.models.items()) and run.rank == 0:
                _finish(run, store)
        except (OSError, ValueError):
            if not run.out.exists():  # else another process has finished the file and removed the shards
                raise
    if run.rank == 0 and not run.out.exists():
        raise ValueError(f"{store.folder} must stay until the run is finished, got it removed: start the run again")
    finished = read_finished(run.out, run.settings) if run.rank == 0 else None
    if run.out.exists() and (run.rank == 0 or not was_finished):  # a rank may have created the folder again
        store.remove()
    return finished


def check_beta(beta: float) -> None:
    """Raise ValueError unless `beta` is a finite number above 0."""
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a number above 0, got {beta}")


@contextlib.contextmanager
def evaluating(models: Iterable[Any]) -> Iterator[None]:
    """Put models into eval mode; restores the mode of every module."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _fill(run: Run, store: ShardStore, name: str, load: Callable[[], Scorer]) -> bool:
    """Score the missing shards of one model; returns False if another process has finished the file meanwhile."""
    missing = store.missing(name)
    if not missing:
        return True
    scorer = load()
    scorer.max_tokens = store.claim(name, {"max_tokens": scorer.max_tokens})["max_tokens"]
    done = len(run.source) - sum(stop - start for start, stop in map(store.bounds, missing))
    with _progress(f"scoring, {name}", len(run.source), done, run.rank) as advance:
        for shard, prepared in _prefetched(run, store, name):
            examples, refused = prepared.result()
            if run.out.exists() or not store.is_claimed(name):
                return False
            if store.is_complete(name, shard):  # another rank has scored it meanwhile
                continue
            advance(len(refused), 0)
            try:
                scores = scorer.scores(examples, advance)
            except ValueError:
                store.retract(name)
                raise
            try:
                store.write(name, shard, _shard(examples, scores, refused))
            except FileNotFoundError:
                if store.is_claimed(name):
                    raise
                return False
    return True


def _prefetched(run: Run, store: ShardStore, name: str) -> Iterator[tuple[int, Future[Any]]]:
    """Yield the missing shards; a thread prepares the examples of a shard while the previous one is scored."""
    with ThreadPoolExecutor(1) as pool:
        current: tuple[int, Future[Any]] | None = None
        for shard in shard_order(store.shards, run.rank, run.ranks):
            if store.is_complete(name, shard):
                continue
            upcoming = shard, pool.submit(run.source.examples, *store.bounds(shard))
            if current is not None:
                yield current
            current = upcoming
        if current is not None:
            yield current


def _shard(examples: list[Example], scores: list[tuple[Score, ...] | str], refused: list[RefusedRow]) -> Shard:
    scored = []
    for example, result in zip(examples, scores, strict=True):
        if isinstance(result, str):
            refused = [*refused, RefusedRow(example.row, result)]
        else:
            names = tuple(answer.name for answer in example.answers)
            scored.append(ScoredRow(example.row, names, tuple(a.text_bytes for a in example.answers), result))
    return Shard(scored, sorted(refused))


def _finish(run: Run, store: ShardStore) -> None:
    """Merge the shards into the table and the file of refused rows."""
    import pyarrow.parquet

    refused: list[RefusedRow] = []
    temporary = temporary_name(store.folder / "finished")  # deleted with the folder at the latest
    writer = None
    try:
        for number in range(store.shards):
            shards = [store.read(name, number) for name in run.models]
            reasons = {row: reason for shard in reversed(shards) for row, reason in shard.refused}
            refused += sorted(RefusedRow(*item) for item in reasons.items())
            rows = [[x for x in shard.scored if x.row not in reasons] for shard in shards]
            is_last = number == store.shards - 1
            if not rows[0] and not (is_last and writer is None):  # without rows the other columns are unknown
                continue
            table = _table(rows, run.beta)
            if writer is None:
                metadata = {"settings": run.settings, "rows": len(run.source)}
                schema = table.schema.with_metadata({_METADATA: json.dumps(metadata).encode()})
                writer = pyarrow.parquet.ParquetWriter(temporary, schema, write_page_checksum=True)
            writer.write_table(table.cast(writer.schema))
        assert writer is not None
        writer.close()
        synchronise(temporary)
        lines = "".join(json.dumps({"row": row, "reason": reason}) + "\n" for row, reason in refused)
        if refused:
            refused_file = temporary_name(store.folder / "refused")
            write_file(refused_file, lines.encode())
            os.replace(refused_file, refused_path(run.out))
        else:
            refused_path(run.out).unlink(missing_ok=True)
        os.replace(temporary, run.out)
        synchronise(run.out.parent)  # the shards are removed next
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _table(rows: list[list[ScoredRow]], beta: float | None) -> Any:
    """The rows of one shard, with the scores of one or two models, as columns of the file."""
    policy, *reference = rows
    examples = [
        Example(x.row, tuple(Answer(name, (), size) for name, size in zip(x.names, x.text_bytes, strict=True)))
        for x in policy
    ]
    reference_scores = [x.scores for x in reference[0]] if reference else None
    return columns.table(examples, [x.scores for x in policy], reference_scores, beta)


def read_finished(out: Path, settings: dict[str, Any]) -> Finished:
    """Read the numbers of rows of a finished file, and its refused rows.

    Raises:
        SettingsMismatchError: the file has other settings.
        ValueError: it is damaged, or not a file of scores.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(out, page_checksum_verification=True)
        metadata = json.loads(file.schema_arrow.metadata[_METADATA])
        for i in range(file.num_row_groups):  # verifies the checksums
            file.read_row_group(i)
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"--out must be new or an undamaged file of `fusedalign score`, got {out}: remove it first"
        ) from None
    check_settings(metadata["settings"], settings, out)
    path, missing = refused_path(out), metadata["rows"] - file.metadata.num_rows
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if missing else []
        refused = [RefusedRow(line["row"], line["reason"]) for line in map(json.loads, lines)]
    except (OSError, KeyError, TypeError, ValueError):
        refused = []
    if len(refused) != missing:
        raise ValueError(
            f"{path} must hold the {missing} rows that could not be scored, got {len(refused)}: remove {out} to score "
            "again"
        )
    return Finished(out, metadata["rows"], file.metadata.num_rows, refused)


@contextlib.contextmanager
def _progress(title: str, rows: int, done: int, rank: int) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar with rows, tokens per second and the remaining time, on rank 0.

    If stderr is not a terminal, print a line now and then instead, and none in a short run.
    """
    from tqdm import tqdm

    size = shutil.get_terminal_size()
    log_options = {} if sys.stderr.isatty() else {"delay": _LOG_SECONDS, "mininterval": _LOG_SECONDS, "miniters": 1}
    with tqdm(
        total=rows,
        initial=done,
        desc=title,
        unit=" rows",
        disable=rank != 0,
        ncols=size.columns,  # tqdm shows nothing on a terminal without a known size
        nrows=size.lines,
        **log_options,
    ) as bar:
        tokens = 0

        def advance(rows: int, count: int) -> None:
            nonlocal tokens
            tokens += count
            bar.update(rows)
            if (elapsed := bar.format_dict["elapsed"]) > 0:
                bar.set_postfix_str(f"{tokens / elapsed:,.0f} tokens/s", refresh=False)

        yield advance
