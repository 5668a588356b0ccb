"""The reference cache: a file with the log-probabilities of a reference model and a record of how they were computed.

A Parquet file with the columns `key`, a digest of one sequence's tokens, and `logps`, the sum over its completion in
nats. A record in the file's metadata, `About`, has digests of weights, tokenizer and template, the truncation, and a
checksum. A trainer that differs in any of them is refused, or that has a row which the file lacks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import trl

from fusedalign.commandline import one_line
from fusedalign.reports import replacement
from fusedalign.trl.digests import config_digest, template_digest, tokenizer_digest, weights_digest
from fusedalign.trl.reference import package_versions

#: Version of the file's contents and of the functions that make its keys and digests.
FORMAT = 1
_METADATA = b"fusedalign.ref_cache"
_AGAIN = "score these data again with fusedalign score --ref_cache"


@dataclass(frozen=True)
class About:
    """The record of a cache. All fields but the last two must match those of the trainer that reads it."""

    max_length: int | None
    truncation_mode: str
    kl_batch_size: int | None
    """rows among which KTO exchanges completions for its KL term; None without that term"""
    tokenizer: str
    chat_template: str
    dtype: str
    """of the weights"""
    config: str
    weights: str
    model: str = ""
    """folder or name, for messages"""
    packages: dict[str, str | None] = field(default_factory=dict)
    """versions, for information"""


_REFERENCE = "of the model as it is given, which is the reference"
_MODEL, _TOKENIZER = "pass the model {model}, or ", "pass the tokenizer of {model}, or "
#: In the order of comparison: a field of `About` -> words for what is expected, what the cache has, and the remedy.
_MISMATCHES = {
    "max_length": ("max_length={ours}", "max_length={theirs}", "set max_length={theirs}, or "),
    "truncation_mode": (
        "truncation_mode={ours!r}",
        "truncation_mode={theirs!r}",
        "set truncation_mode={theirs!r}, or ",
    ),
    "kl_batch_size": (
        "per_device_train_batch_size={ours}, which says whose completions KTO's KL term exchanges",
        "per_device_train_batch_size={theirs}",
        "set per_device_train_batch_size={theirs}, or ",
    ),
    "tokenizer": ("the tokenizer of this training", "another one", _TOKENIZER),
    "chat_template": ("the chat template of this training", "another one", _TOKENIZER),
    "dtype": ("weights in {ours}, as the model is loaded here", "weights in {theirs}", "set dtype={theirs!r}, or "),
    "config": (f"the configuration {_REFERENCE}", "another one", _MODEL),
    "weights": (f"the weights {_REFERENCE}", "others", _MODEL),
}


def settings(processing_class: Any, args: Any) -> dict[str, Any]:
    """The fields of `About` that depend on the tokenizer and the configuration of a DPO or KTO trainer."""
    return {
        "max_length": args.max_length,
        "truncation_mode": getattr(args, "truncation_mode", "keep_start"),
        "kl_batch_size": args.per_device_train_batch_size if has_kl(args) else None,
        "tokenizer": tokenizer_digest(processing_class),
        "chat_template": template_digest(processing_class),
    }


def model_facts(model: Any) -> dict[str, Any]:
    """The fields of `About` that depend on the reference: a model, or a `PeftModel` with its active adapter."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": config_digest(model),
        "weights": weights_digest(model),
    }


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for constructor arguments of a DPO or KTO trainer that exclude `ref_logps`."""
    args = arguments.get("args")
    if arguments.get("ref_model") is not None:
        raise ValueError("ref_logps takes the place of ref_model, got both: leave one of them out")
    for name, why in (
        ("precompute_ref_log_probs", "takes the place of"),
        ("sync_ref_model", "is of a reference that stays as it is, which excludes"),
    ):
        if getattr(args, name, False):
            raise ValueError(f"ref_logps {why} {name}, got both: leave one of them out")
    ld_alpha = getattr(args, "ld_alpha", None)
    if ld_alpha is not None:
        raise ValueError(
            f"ref_logps has one sum for each answer, got ld_alpha={ld_alpha}, which weighs its tokens: leave one of "
            "them out, or set precompute_ref_log_probs in the place of ref_logps"
        )


def has_kl(args: Any) -> bool:
    """Whether a trainer with this configuration has a KL term and scores mismatched completions, as TRL decides it."""
    return isinstance(args, trl.KTOConfig) and args.loss_type != "apo_zero_unpaired"


def about(model: Any, processing_class: Any, args: Any, name: str) -> About:
    """The record of a cache of `model`'s log-probabilities.

    Args:
        model: the reference: of transformers, or a `PeftModel` with its active adapter.
        processing_class: its tokenizer, or a processor that holds one.
        args: the configuration of the trainer that the cache is for, a `DPOConfig` or `KTOConfig`.
        name: folder or Hub name of the model, for messages.

    Raises:
        ValueError: weights that are offloaded or not in plain tensors.
    """
    return About(**settings(processing_class, args), **model_facts(model), model=name, packages=package_versions())


def row_key(input_ids: Sequence[int] | np.ndarray, labels: Sequence[int] | np.ndarray) -> str:
    """The key of a sequence's [L] tokens, truncated and without padding, and unshifted labels, -100 on context."""
    stacked = np.stack([np.asarray(input_ids), np.asarray(labels)]).astype("<i8")
    return hashlib.blake2b(stacked.tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class RefCache:
    """A cache in memory."""

    path: str
    about: About
    logps: Mapping[str, float]

    def check(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError, with field and remedy, where the cache does not match `settings` or `model_facts`."""
        for name, (expected, got, remedy) in _MISMATCHES.items():
            if name not in facts or facts[name] == getattr(self.about, name):
                continue
            if name == "kl_batch_size" and facts[name] is None:  # without a KL term its rows are not read
                continue
            if name == "kl_batch_size" and self.about.kl_batch_size is None:
                raise ValueError(
                    f"ref_logps must be a cache made for KTO with its KL term, got {self.path} made without it: "
                    f"{_AGAIN} --method kto"
                )
            values = {"ours": facts[name], "theirs": getattr(self.about, name), "model": self.about.model}
            raise ValueError(
                f"ref_logps must be a cache made with {expected.format(**values)}, got {self.path} made with "
                f"{got.format(**values)}: {remedy.format(**values)}{_AGAIN}"
            )


def check_target(path: Path, option: str) -> None:
    """Raise ValueError, naming `option`, if a cache written to `path` would replace a folder, or a file that is none.

    An existing cache is compared later, once the weights are loaded.
    """
    if not path.exists() or (not path.is_dir() and _may_be_cache(path)):
        return
    kind = "a folder" if path.is_dir() else "another file than a reference cache"
    raise ValueError(f"{option} must name the file to write, got {path}, which is {kind}: give another name")


def _may_be_cache(path: Path) -> bool:
    """Whether a file is a cache, or a Parquet file too damaged to tell."""
    with path.open("rb") as file:
        if file.read(4) not in (b"PAR1", b""):
            return False
    try:
        return _METADATA in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return True


def write_cache(path: str | os.PathLike[str], about: About, keys: Iterable[str], logps: Iterable[float]) -> None:
    """Write a cache atomically: a full disk or an interrupted process leaves an earlier file as it was.

    Args:
        path: of the file.
        about: how the log-probabilities were computed.
        keys: of the sequences, from `row_key`; of equal keys the first counts.
        logps: the sum over each sequence's completion, nats.

    Raises:
        ValueError: not as many keys as log-probabilities, or one that is not finite.
        OSError: the file cannot be written.
    """
    rows: dict[str, float] = {}
    for key, value in zip(keys, map(float, logps), strict=True):
        if not math.isfinite(value):
            raise ValueError(f"expected finite log-probabilities, got {value} for the sequence {key}")
        rows.setdefault(key, value)
    table = pa.table({"key": pa.array(rows.keys(), pa.string()), "logps": pa.array(rows.values(), pa.float64())})
    record = {"format": FORMAT, "about": dataclasses.asdict(about)}
    record["checksum"] = _checksum(record, table)
    table = table.replace_schema_metadata({_METADATA: json.dumps(record).encode()})
    with replacement(Path(path)) as temporary:
        pq.write_table(table, temporary)


def read_cache(path: str | os.PathLike[str]) -> RefCache:
    """The cache in a file.

    Raises:
        TypeError: not a path.
        FileNotFoundError: no such file.
        ValueError: another file, or a damaged one.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"ref_logps must be the path of a file, got {type(path).__name__}")
    name = os.fspath(path)
    if not Path(name).is_file():
        kind = "a folder" if name and Path(name).is_dir() else "no such file"
        raise FileNotFoundError(
            f"ref_logps must name a file of fusedalign score --ref_cache, got {name or 'an empty name'} ({kind})"
        )
    try:
        table = pq.ParquetFile(name).read()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(name, "cannot be read as Parquet", error) from error
    metadata = (table.schema.metadata or {}).get(_METADATA)
    if metadata is None or table.column_names != ["key", "logps"]:
        raise _unreadable(name, "is another Parquet file")
    try:
        record = json.loads(metadata)
        checksum = record.pop("checksum")
        if record["format"] != FORMAT:
            raise ValueError(
                f"ref_logps must be a cache of format {FORMAT}, got {name} of format {record['format']}: {_AGAIN}"
            )
        made_with = About(**record["about"])
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _unreadable(name, "is damaged", error) from error
    if checksum != _checksum(record, table):
        raise _unreadable(name, "is damaged: its checksum is another one")
    return RefCache(name, made_with, dict(zip(table["key"].to_pylist(), table["logps"].to_pylist(), strict=True)))


def _checksum(record: Mapping[str, Any], table: pa.Table) -> str:
    content = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16)
    content.update("\n".join(map(str, table["key"].to_pylist())).encode())
    content.update(table["logps"].to_numpy().astype("<f8").tobytes())
    return content.hexdigest()


def _unreadable(name: str, problem: str, error: Exception | None = None) -> ValueError:
    reason = "" if error is None else f" ({one_line(error, 120)})"
    return ValueError(
        f"ref_logps must be a file that fusedalign score --ref_cache has written, got {name}, which {problem}{reason}: "
        f"{_AGAIN}"
    )
