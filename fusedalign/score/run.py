"""A whole data set, scored shard by shard, by any number of processes, and put together into one file."""

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
from typing import Any

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

#: The two models of a run, which are in memory one after the other.
POLICY, REFERENCE = "policy", "reference"

#: Seconds between two lines of progress in a log.
_LOG_SECONDS = 30

#: What stands in the metadata of the finished file.
_METADATA = b"fusedalign.score"


@dataclass(frozen=True)
class Run:
    """What is scored, and where it goes."""

    source: Source
    out: Path
    """the finished file; while it is made, the shards lie in a folder of its name with `.shards`"""
    settings: dict[str, Any]
    """all that changes results, of JSON types: a file of other settings is not touched"""
    models: Mapping[str, Callable[[], Scorer]]
    """POLICY and perhaps REFERENCE: loads it, when one of its shards is missing"""
    beta: float | None = None
    """of implicit rewards, where there is a reference"""
    rank: int = 0
    ranks: int = 1

    @property
    def store(self) -> ShardStore:
        """Where the shards lie."""
        return ShardStore(self.out.with_name(f"{self.out.name}.shards"), len(self.source), self.settings)

    @property
    def refused_path(self) -> Path:
        """The file of the rows that could not be scored."""
        return self.out.with_suffix(".refused.jsonl")


@dataclass(frozen=True)
class Finished:
    """A finished file."""

    out: Path
    rows: int
    scored: int
    refused: list[RefusedRow]


def ranks_here() -> tuple[int, int, int]:
    """Rank, number of ranks and rank on this machine, as `torchrun` and `accelerate launch` tell them."""
    return tuple(
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))  # type: ignore[return-value]
    )


def score_run(run: Run) -> Finished | None:
    """Score what is missing; rank 0 then writes the file.

    Returns:
        What the file holds; None on the other ranks.

    Raises:
        SettingsMismatchError: `out`, or the shards for it, are of other settings.
        ValueError: `out` is no file of this kind.
        OSError: the disk is full; what was finished stays, and the next run goes on from there.
    """
    store, is_there = run.store, run.out.exists()
    if not is_there:
        try:
            store.check()
            if all(_fill(run, store, name, load) for name, load in run.models.items()) and run.rank == 0:
                _finish(run, store)
        except (OSError, ValueError):
            if not run.out.exists():  # else another process has finished it and removed what this one was reading
                raise
    if run.rank == 0 and not run.out.exists():
        raise ValueError(f"{store.folder} must stay until the run is finished, got it removed: start the run again")
    finished = read_finished(run.out, run.settings) if run.rank == 0 else None
    if run.out.exists() and (run.rank == 0 or not is_there):  # a rank may have made a folder anew
        store.remove()
    return finished


def check_beta(beta: float) -> None:
    """Raises ValueError unless it is a number above 0."""
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a number above 0, got {beta}")


@contextlib.contextmanager
def evaluating(models: Iterable[Any]) -> Iterator[None]:
    """Models in eval mode, afterwards as they were."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _fill(run: Run, store: ShardStore, name: str, load: Callable[[], Scorer]) -> bool:
    """Make the shards of one model that are missing; False where another process has finished the file meanwhile."""
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
            if store.is_complete(name, shard):  # made by another rank since
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
    """The missing shards, each prepared by a thread while the one before it is scored."""
    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[int, Future[Any]] | None = None
        for shard in shard_order(store.shards, run.rank, run.ranks):
            if store.is_complete(name, shard):
                continue
            following = shard, pool.submit(run.source.examples, *store.bounds(shard))
            if waiting is not None:
                yield waiting
            waiting = following
        if waiting is not None:
            yield waiting


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
    """Put the shards together: the table, and the rows that were refused."""
    import pyarrow.parquet

    refused: list[RefusedRow] = []
    temporary = temporary_name(store.folder / "finished")  # which goes with the folder, whatever happens
    writer = None
    try:
        for number in range(store.shards):
            shards = [store.read(name, number) for name in run.models]
            reasons = {row: reason for shard in reversed(shards) for row, reason in shard.refused}
            refused += sorted(RefusedRow(*item) for item in reasons.items())
            rows = [[x for x in shard.scored if x.row not in reasons] for shard in shards]
            is_last = number == store.shards - 1
            if not rows[0] and not (is_last and writer is None):  # one without a row has no columns but the first
                continue
            table = _table(rows, run.beta)
            if writer is None:
                about = {"settings": run.settings, "rows": len(run.source)}
                schema = table.schema.with_metadata({_METADATA: json.dumps(about).encode()})
                writer = pyarrow.parquet.ParquetWriter(temporary, schema, write_page_checksum=True)
            writer.write_table(table.cast(writer.schema))
        assert writer is not None
        writer.close()
        synchronise(temporary)
        lines = "".join(json.dumps({"row": row, "reason": reason}) + "\n" for row, reason in refused)
        if refused:
            side = temporary_name(store.folder / "refused")
            write_file(side, lines.encode())
            os.replace(side, run.refused_path)
        else:
            run.refused_path.unlink(missing_ok=True)
        os.replace(temporary, run.out)
        synchronise(run.out.parent)  # before the shards are removed
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _table(rows: list[list[ScoredRow]], beta: float | None) -> Any:
    """The rows of one shard, by one model or two, as the file has them."""
    policy, *reference = rows
    examples = [
        Example(x.row, tuple(Answer(name, (), size) for name, size in zip(x.names, x.text_bytes, strict=True)))
        for x in policy
    ]
    other = [x.scores for x in reference[0]] if reference else None
    return columns.table(examples, [x.scores for x in policy], other, beta)


def read_finished(out: Path, settings: dict[str, Any]) -> Finished:
    """A file that is there already.

    Raises:
        SettingsMismatchError: of other settings.
        ValueError: something else.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(out, page_checksum_verification=True)
        about = json.loads(file.schema_arrow.metadata[_METADATA])
        for i in range(file.num_row_groups):  # which finds damage
            file.read_row_group(i)
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"--out must be new or an undamaged file of `fusedalign score`, got {out}: remove it first"
        ) from None
    check_settings(about["settings"], settings, out)
    side, missing = out.with_suffix(".refused.jsonl"), about["rows"] - file.metadata.num_rows
    try:
        lines = side.read_text(encoding="utf-8").splitlines() if missing else []
        refused = [RefusedRow(line["row"], line["reason"]) for line in map(json.loads, lines)]
    except (OSError, KeyError, TypeError, ValueError):
        refused = []
    if len(refused) != missing:
        raise ValueError(
            f"{side} must hold the {missing} rows that could not be scored, got {len(refused)}: remove {out} to score "
            "again"
        )
    return Finished(out, about["rows"], file.metadata.num_rows, refused)


@contextlib.contextmanager
def _progress(title: str, rows: int, done: int, rank: int) -> Iterator[Callable[[int, int], None]]:
    """A bar with rows, tokens a second and the time left; silent on other ranks.

    Where stderr is no terminal it is a line from time to time, and none of a short run.
    """
    from tqdm import tqdm

    size = shutil.get_terminal_size()
    pause = {} if sys.stderr.isatty() else {"delay": _LOG_SECONDS, "mininterval": _LOG_SECONDS, "miniters": 1}
    with tqdm(
        total=rows,
        initial=done,
        desc=title,
        unit=" rows",
        disable=rank != 0,
        ncols=size.columns,  # tqdm itself shows nothing on a terminal that does not know its size
        nrows=size.lines,
        **pause,
    ) as bar:
        tokens = 0

        def advance(rows: int, count: int) -> None:
            nonlocal tokens
            tokens += count
            bar.update(rows)
            if (elapsed := bar.format_dict["elapsed"]) > 0:
                bar.set_postfix_str(f"{tokens / elapsed:,.0f} tokens/s", refresh=False)

        yield advance
