"""Checks of what there is to train on: no token in any row is an error, in some rows a warning."""

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


def check_lengths(
    prepared: Any,
    args: Any,
    name: str,
    rows: int | None = None,
    max_length: int | None = None,
    whole: Callable[[], Any] | None = None,
) -> Any:
    """Return a tokenised data set if it has a token to train on; warn of rows without one, and say why.

    Args:
        prepared: as a trainer has tokenised it: a `datasets.Dataset`, or an `IterableDataset`, with only its first
            `STREAM_ROWS` rows checked.
        args: the trainer's configuration.
        name: of the split: "train", "eval", or another name.
        rows: their number before the trainer dropped rows without a token to train on; default: none was dropped.
        max_length: in tokens; default: of `args`.
        whole: returns SFT's rows, which are truncated already, as they were before.

    Raises:
        ValueError: no row has a token to train on.
    """
    max_length = max_length or getattr(args, "max_length", None)
    split = {"train": "training", "eval": "evaluation"}.get(name, name)
    if not hasattr(prepared, "__len__"):
        first, has_target = _first(prepared, args, max_length)
        if not has_target.any():
            count = f"the first {len(first)}" if first else "any of the"
            empty = _empty(first[0] if first else (), _counter(first), len(first), args, max_length, whole)
            raise ValueError(_reason(f"{count} {split} rows", len(first), empty, max_length))
        return prepared
    table = prepared.with_format("arrow")

    def lengths(column: str) -> np.ndarray:
        return pc.list_value_length(table.select_columns(column)[:][column]).to_numpy()

    has_target = _has_target(prepared.column_names, lengths, prepared, args, max_length)
    rows, is_any = len(prepared) if rows is None else rows, bool(has_target.any())
    lost = max(rows - len(prepared), 0) + int((~has_target).sum()) if is_any else rows
    is_packed = "seq_lengths" in prepared.column_names  # its rows hold several
    if is_any and (not lost or is_packed or args.process_index != 0):
        return prepared
    empty = _empty(prepared.column_names, lengths, lost, args, max_length, whole)
    if not is_any:
        raise ValueError(_reason(f"any of the {rows} {split} rows", lost, empty, max_length))
    where = f"{lost} of the {rows} {split} rows"
    _logger.warning("%s", _reason(where, lost, empty, max_length, " to train on them too"))
    return prepared


def _reason(where: str, lost: int, empty: int, max_length: int | None, purpose: str = "") -> str:
    """Why `lost` rows have no token to train on, `empty` of them before truncation."""
    if max_length is None or (empty and empty >= lost):
        return (
            f"there is no completion token to train on in {where}, also before truncation: leave out rows with an "
            "empty completion, or with labels that mask it"
        )
    also = f"; {empty} of them have none before truncation either" if empty else ""
    return f"max_length={max_length} leaves no completion token to train on in {where}: raise max_length{purpose}{also}"


def _empty(
    columns: Iterable[str],
    lengths: Callable[[str], np.ndarray],
    lost: int,
    args: Any,
    max_length: int | None,
    whole: Callable[[], Any] | None,
) -> int:
    """The number of rows without a token to train on before truncation, among `lost` ones."""
    columns = list(columns)
    if max_length is None:
        return lost
    if "prompt_ids" in columns:  # rows that TRL dropped have a prompt that fills max_length
        return int((~_has_target(columns, lengths, (), args, None)).sum())
    if "prompt_input_ids" in columns and "chosen_input_ids" in columns:
        has_room = lengths("prompt_input_ids") < max_length
        return int((has_room & ~_has_target(columns, lengths, (), args, max_length)).sum())
    if whole is None:
        return 0
    rows = whole()
    rows = rows if hasattr(rows, "__len__") else itertools.islice(rows, STREAM_ROWS)
    return sum(not any(x != -100 for x in row.get("labels", [0, 0])[1:]) for row in rows)


def _first(prepared: Any, args: Any, max_length: int | None) -> tuple[list[Any], np.ndarray]:
    """The first rows of a stream, and which of them have a token to train on."""
    first = list(itertools.islice(prepared, STREAM_ROWS))
    return first, _has_target(first[0] if first else (), _counter(first), first, args, max_length)


def _counter(rows: list[Any]) -> Callable[[str], np.ndarray]:
    return lambda column: np.array([len(row[column]) for row in rows])


def _has_target(
    columns: Iterable[str],
    lengths: Callable[[str], np.ndarray],
    rows: Iterable[dict[str, Any]],
    args: Any,
    max_length: int | None,
) -> np.ndarray:
    """[rows] bool: whether a token is left to train on. The first token of a sequence is never a target.

    Computed from lengths. SFT's rows are masked and truncated already: of their labels only one row's is looked for,
    since TRL drops rows that truncation has left without any.
    """
    columns = list(columns)
    if "prompt_ids" in columns:  # truncated later, batch by batch
        prompt, answers = lengths("prompt_ids"), [name for name in columns if name in _ANSWERS]
        return np.any([_answer_has_target(prompt, lengths(name), args, max_length) for name in answers], axis=0)
    if "prompt_input_ids" in columns and "chosen_input_ids" in columns:  # CPO and ORPO truncate only the answers
        prompt = np.maximum(lengths("prompt_input_ids"), 1)
        return (lengths("chosen_input_ids") > prompt) | (lengths("rejected_input_ids") > prompt)
    if "labels" in columns:
        is_any = any(any(x != -100 for x in row["labels"][1:]) for row in rows)
        return (lengths("labels") > 1) & is_any
    return np.array([any(True for _ in rows)])


_ANSWERS = ("chosen_ids", "rejected_ids", "reference_ids", "completion_ids")


def _answer_has_target(prompt: np.ndarray, answer: np.ndarray, args: Any, max_length: int | None) -> np.ndarray:
    length = prompt + answer if max_length is None else np.minimum(prompt + answer, max_length)
    if getattr(args, "truncation_mode", "keep_start") == "keep_end":
        prompt = length - np.minimum(answer, length)
    return length > np.maximum(np.minimum(prompt, length), 1)
