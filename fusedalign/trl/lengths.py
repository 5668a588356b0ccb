"""What truncation leaves to train on: nothing is an error before the first step, less than all rows a warning."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow.compute as pc

_logger = logging.getLogger(__name__)

#: Rows of a stream that are looked at, because it cannot be counted.
STREAM_ROWS = 64


def check_lengths(prepared: Any, args: Any, name: str, rows: int | None = None, max_length: int | None = None) -> Any:
    """Returns a tokenised data set of which truncation leaves a token to train on; warns of rows that keep none.

    Args:
        prepared: as a trainer has tokenised it: a `datasets.Dataset`, or an `IterableDataset`, of which only the first
            `STREAM_ROWS` rows are looked at.
        args: the trainer's configuration.
        name: of the split: "train", "eval", or a name of its own.
        rows: how many there were before the trainer dropped those that keep nothing; default: none was dropped.
        max_length: tokens; default: that of `args`.

    Raises:
        ValueError: no row keeps a token that is trained on.
    """
    max_length = max_length or getattr(args, "max_length", None)
    split = {"train": "training", "eval": "evaluation"}.get(name, name)
    message = f"max_length={max_length} leaves no completion token to train on in"
    if not hasattr(prepared, "__len__"):
        first = list(itertools.islice(prepared, STREAM_ROWS))
        columns = first[0] if first else ()
        if not _kept(columns, lambda c: np.array([len(row[c]) for row in first]), first, args, max_length).any():
            which = f"the first {len(first)}" if first else "any of the"
            raise ValueError(f"{message} {which} {split} rows: raise max_length")
        return prepared
    table = prepared.with_format("arrow")
    kept = _kept(
        prepared.column_names,
        lambda c: pc.list_value_length(table.select_columns(c)[:][c]).to_numpy(),
        prepared,
        args,
        max_length,
    )
    rows = len(prepared) if rows is None else rows
    if not kept.any():
        raise ValueError(f"{message} any of the {rows} {split} rows: raise max_length")
    lost = max(rows - len(prepared), 0) + int((~kept).sum())
    if lost and "seq_lengths" not in prepared.column_names and args.process_index == 0:  # packed rows hold several
        _logger.warning("%s %d of the %d %s rows: raise max_length to train on them too", message, lost, rows, split)
    return prepared


def _kept(
    columns: Iterable[str],
    lengths: Callable[[str], np.ndarray],
    rows: Iterable[dict[str, Any]],
    args: Any,
    max_length: int | None,
) -> np.ndarray:
    """[rows] bool: whether a token is left that is trained on. The first token of a sequence is never one.

    Lengths tell, but for SFT, whose rows are masked and cut already: there one row that keeps a token speaks for all.
    """
    columns = list(columns)
    if "prompt_ids" in columns:  # cut later, batch by batch
        prompt, answers = lengths("prompt_ids"), [name for name in columns if name in _ANSWERS]
        kept = [_tokens_kept(prompt, lengths(name), args, max_length) for name in answers]
        return np.any(kept, axis=0)
    if "prompt_input_ids" in columns and "chosen_input_ids" in columns:  # CPO and ORPO cut the answers alone
        prompt = np.maximum(lengths("prompt_input_ids"), 1)
        return (lengths("chosen_input_ids") > prompt) | (lengths("rejected_input_ids") > prompt)
    if "labels" in columns:
        return np.array([any(any(x != -100 for x in row["labels"][1:]) for row in rows)])
    return np.array([any(True for _ in rows)])


_ANSWERS = ("chosen_ids", "rejected_ids", "reference_ids", "completion_ids")


def _tokens_kept(prompt: np.ndarray, answer: np.ndarray, args: Any, max_length: int | None) -> np.ndarray:
    kept = prompt + answer if max_length is None else np.minimum(prompt + answer, max_length)
    if getattr(args, "truncation_mode", "keep_start") == "keep_end":
        prompt = kept - np.minimum(answer, kept)
    return kept > np.maximum(np.minimum(prompt, kept), 1)
