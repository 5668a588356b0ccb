"""`fusedalign score --ref_cache`: the reference log-probabilities of a DPO or KTO training, for its `ref_logps`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch

from fusedalign.commandline import OneLineParser
from fusedalign.methods import WITH_REFERENCE
from fusedalign.reports import check_writable
from fusedalign.score.models import load_for_scoring
from fusedalign.score.records import Answer, Example, RefusedRow, Window
from fusedalign.score.run import POLICY, Ranks, Run, score_run
from fusedalign.score.scorer import AUTO, Scorer
from fusedalign.score.shards import SettingsMismatchError

FLAG = "--ref_cache"


class SequenceSource:
    """Tokenized sequences, one per row."""

    def __init__(self, sequences: list[Any]) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def examples(self, start: int, stop: int) -> tuple[list[Example], list[RefusedRow]]:
        """See `records.Source`."""
        return [
            Example(row, (Answer("text", (Window(x.input_ids, x.labels),)),))
            for row, x in enumerate(self.sequences[start:stop], start)
        ], []


def reference_command(argv: list[str]) -> None:
    """Compute the reference log-probabilities of a training from its arguments, and write the cache.

    Raises:
        ValueError, FileNotFoundError: as the command of the training; a row that cannot be scored.
    """
    from fusedalign.trl import ref_cache, ref_rows
    from fusedalign.trl.arguments import parse
    from fusedalign.trl.data import load_data
    from fusedalign.trl.digests import digest
    from fusedalign.trl.options import mixed_precision
    from fusedalign.trl.train import find_model

    parser = OneLineParser(prog=f"fusedalign score {FLAG}", add_help=False, allow_abbrev=False)
    parser.add_argument(FLAG, type=Path, required=True)
    parser.add_argument("--method", default="dpo")
    parser.add_argument("--max_tokens_per_batch", default=AUTO)
    own, training_words = parser.parse_known_args(argv)
    if own.method not in WITH_REFERENCE:
        raise ValueError(f"--method must be {' or '.join(WITH_REFERENCE)} with {FLAG}, got {own.method!r}")
    max_tokens = _max_tokens(own.max_tokens_per_batch)
    check_writable(own.ref_cache.absolute().parent, FLAG)
    ref_cache.check_target(own.ref_cache, FLAG)
    arguments = parse(own.method, training_words)
    training = arguments.training
    splits = dict(zip(("train", "eval"), load_data(own.method, arguments), strict=True))
    reference = find_model(own.method, arguments)
    sequences = {
        sequence.key: sequence
        for split, data in splits.items()
        if data is not None
        for sequence in ref_rows.reference_examples(own.method, data, reference.processing_class, training, split)
    }
    ranks = Ranks.from_environment()
    gpu = ranks.local_rank if torch.cuda.is_available() and not training.use_cpu else None
    model = load_for_scoring(reference.path, reference.adapter, reference.options, arguments.model, gpu)
    about = ref_cache.about(model, reference.processing_class, training, reference.path)
    if _is_same_cache(own.ref_cache, about, sequences):
        if ranks.rank == 0:
            print(f"{own.ref_cache} is there already: train with --ref_logps {own.ref_cache}")
        return
    scorer: dict[str, Any] = {
        "packed": arguments.fused.packed,
        "impl": arguments.fused.fused_impl,
        "max_tokens": max_tokens,
        "autocast": mixed_precision(training),
    }
    facts = {key: value for key, value in dataclasses.asdict(about).items() if key not in ("model", "packages")}
    settings = json.loads(json.dumps({**facts, **scorer, "sequences": digest(list(sequences))}, default=str))
    out = own.ref_cache.with_name(f"{own.ref_cache.name}.scores.parquet")
    source = SequenceSource(list(sequences.values()))
    loaders = {POLICY: lambda: Scorer(model, **scorer)}
    run = Run(source, out, settings, loaders, rank=ranks.rank, ranks=ranks.world_size)
    try:
        finished = score_run(run)
    except SettingsMismatchError as error:
        leftover = out if out.exists() else run.store.folder
        raise ValueError(
            f"{FLAG} must be new or continue an interrupted run of the same settings, got {own.ref_cache} with a run "
            f"of others in {leftover}: give another name, or delete that"
        ) from error
    if finished is None:
        return
    if finished.refused:
        raise ValueError(
            f"expected sequences that can all be scored, got {len(finished.refused)} of {finished.rows} that cannot, "
            f"the first for: {finished.refused[0].reason}; to try again remove {out}"
        )
    logps = pyarrow.parquet.read_table(out, columns=["logps"])["logps"].to_pylist()
    ref_cache.write_cache(own.ref_cache, about, list(sequences), logps)
    out.unlink()
    print(f"wrote {own.ref_cache}: {len(sequences)} sequences under {reference.path}")
    print(f"train with --ref_logps {own.ref_cache}")


def _is_same_cache(path: Path, about: Any, keys: Collection[str]) -> bool:
    """Whether `path` is the cache of the same reference and rows. Raises ValueError if it is another file."""
    from fusedalign.trl.ref_cache import read_cache

    if not path.exists():
        return False
    try:
        cache = read_cache(path)
    except (ValueError, FileNotFoundError):
        raise ValueError(f"{FLAG} must be new or the same cache, got {path}, another file: remove it first") from None
    expected, actual = dataclasses.asdict(about), dataclasses.asdict(cache.about)
    names = [name for name in expected if name not in ("model", "packages") and expected[name] != actual[name]]
    names += ["rows"] if cache.logps.keys() != set(keys) else []
    if names:
        raise ValueError(
            f"{FLAG} must be new or the same cache, got {path} with another {', '.join(names)}: remove it first"
        )
    return True


def _max_tokens(word: str) -> int | str:
    if word == AUTO:
        return AUTO
    if not word.isdecimal() or int(word) < 1:
        raise ValueError(f"max_tokens_per_batch must be auto or a number of tokens above 0, got {word!r}")
    return int(word)
