"""Checks of what truncation leaves to train on: no token in any row is an error, in some rows a warning."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow.compute as pc

_logger = logging.getLogger(__name__)

#: Number of first rows of a stream to check, since it has no length.
STREAM_ROWS = 64


def check_lengths(prepared: Any, args: Any, name: str, rows: int | None = None, max_length: int | None = None) -> Any:
    """Return a tokenised data set if truncation leaves a token to train on; warn of rows without one.

    Args:
        prepared: as a trainer has tokenised it: a `datasets.Dataset`, or an `IterableDataset`, with only its first
            `STREAM_ROWS` rows checked.
        args: the trainer's configuration.
        name: of the split: "train", "eval", or another name.
        rows: their number before the trainer dropped rows without a token to train on; default: none was dropped.
        max_length: in tokens; default: of `args`.

    Raises:
        ValueError: no row has a token to train on.
    """
    max_length = max_length or getattr(args, "max_length", None)
    split = {"train": "training", "eval": "evaluation"}.get(name, name)
    message = f"max_length={max_length} leaves no completion token to train on in"
    if not hasattr(prepared, "__len__"):
        first = list(itertools.islice(prepared, STREAM_ROWS))
        columns = first[0] if first else ()
        if not _has_target(columns, lambda c: np.array([len(row[c]) for row in first]), first, args, max_length).any():
            count = f"the first {len(first)}" if first else "any of the"
            raise ValueError(f"{message} {count} {split} rows: raise max_length")
        return prepared
    table = prepared.with_format("arrow")

    def lengths(column: str) -> np.ndarray:
        return pc.list_value_length(table.select_columns(column)[:][column]).to_numpy()

    has_target = _has_target(prepared.column_names, lengths, prepared, args, max_length)
    rows = len(prepared) if rows is None else rows
    if not has_target.any():
        raise ValueError(f"{message} any of the {rows} {split} rows: raise max_length")
    lost = max(rows - len(prepared), 0) + int((~has_target).sum())
    if lost and "seq_lengths" not in prepared.column_names and args.process_index == 0:  # packed rows hold several
        _logger.warning("%s %d of the %d %s rows: raise max_length to train on them too", message, lost, rows, split)
    return prepared


def _has_target(
    columns: Iterable[str],
    lengths: Callable[[str], np.ndarray],
    rows: Iterable[dict[str, Any]],
    args: Any,
    max_length: int | None,
) -> np.ndarray:
    """[rows] bool: whether a token is left to train on. The first token of a sequence is never a target.

    Computed from lengths. SFT's rows are masked and truncated already: for them a single bool, [1], tells of any row.
    """
    columns = list(columns)
    if "prompt_ids" in columns:  # truncated later, batch by batch
        prompt, answers = lengths("prompt_ids"), [name for name in columns if name in _ANSWERS]
        return np.any([_answer_has_target(prompt, lengths(name), args, max_length) for name in answers], axis=0)
    if "prompt_input_ids" in columns and "chosen_input_ids" in columns:  # CPO and ORPO truncate only the answers
        prompt = np.maximum(lengths("prompt_input_ids"), 1)
        return (lengths("chosen_input_ids") > prompt) | (lengths("rejected_input_ids") > prompt)
    if "labels" in columns:
        return np.array([any(any(x != -100 for x in row["labels"][1:]) for row in rows)])
    return np.array([any(True for _ in rows)])


_ANSWERS = ("chosen_ids", "rejected_ids", "reference_ids", "completion_ids")


def _answer_has_target(prompt: np.ndarray, answer: np.ndarray, args: Any, max_length: int | None) -> np.ndarray:
    length = prompt + answer if max_length is None else np.minimum(prompt + answer, max_length)
    if getattr(args, "truncation_mode", "keep_start") == "keep_end":
        prompt = length - np.minimum(answer, length)
    return length > np.maximum(np.minimum(prompt, length), 1)
