"""What the text of a data set holds: rows without text, misspelt roles, messages written as text.

Some such rows train, but hardly as they were meant to: they are warned of. A column of nothing else is an error.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fusedalign.trl.lengths import STREAM_ROWS
from fusedalign.trl.shapes import SHAREGPT_ROLES

#: Columns of text that is trained on.
_TRAINED = ("completion", "chosen", "rejected", "messages", "text")
_ROLES = ("system", "user", "assistant", "tool", "developer")
_SYNONYMS = {**SHAREGPT_ROLES, **dict.fromkeys(("bot", "chatbot", "ai"), "assistant")}
#: The beginning of messages that were written as text: JSON, or a Python list in a CSV file.
_LIST = r"""^\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:"""
_LEAVE_OUT = "remove such rows, from which a model learns nothing, or to stop at once"
#: Most rows that are rendered.
RENDERED_ROWS = 16


class _Fault(NamedTuple):
    """What is wrong with a column."""

    phrase: str
    remedy: str
    rows: np.ndarray
    """[N] bool"""
    may_train: bool = False
    """whether a column of nothing else can be trained on"""


def survey(dataset: Any, source: str, text_field: str = "text") -> list[str]:
    """What is unusual in the text of a data set, as sentences.

    Args:
        dataset: in the shape that a trainer takes; of a stream the first `STREAM_ROWS` rows.
        source: its name in messages.
        text_field: the column of plain text for SFT.

    Raises:
        ValueError: in all rows a column that is trained on has no text, or a column has messages written as text.
    """
    scope, found = "" if hasattr(dataset, "__len__") else "the first ", []
    for name, column in _columns(dataset, ("prompt", *_TRAINED, text_field)):
        count = len(column)
        for fault in _faults(column, is_trained=name != "prompt"):
            numbers = np.flatnonzero(fault.rows)
            if not len(numbers):
                continue
            is_all = len(numbers) == count
            share = "all" if is_all else f"{len(numbers):,} of"
            first = "" if is_all else f" (the first is row {numbers[0] + 1:,})"
            text = f"{source}: {name} {fault.phrase} in {share} {scope}{count:,} rows{first}: {fault.remedy}"
            if is_all and not fault.may_train:
                raise ValueError(text)
            found.append(text)
    return found


def _columns(dataset: Any, names: Sequence[str]) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """The columns of these names; of a stream their first rows, if these are of one type."""
    if hasattr(dataset, "__len__"):
        table = dataset.with_format("arrow")
        for name in [x for x in dataset.column_names if x in names]:
            yield name, table.select_columns(name)[:][name]
        return
    rows = list(itertools.islice(dataset, STREAM_ROWS))
    for name in [x for x in (rows[0] if rows else ()) if x in names]:
        try:
            column = pa.chunked_array([[row[name] for row in rows]])
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            continue
        yield name, column


def left_out(dataset: Any, processing_class: Any) -> dict[str, str]:
    """Role -> an example of its messages that the chat template leaves out, in the first rows of a data set.

    Thoughts before `</think>` are not looked for, since templates leave out those of earlier turns. A row that the
    template refuses is passed over.
    """
    found: dict[str, str] = {}
    for row in itertools.islice(dataset, RENDERED_ROWS):
        for messages in conversations(row):
            try:
                text = render(processing_class, messages, row)
            except Exception:  # a template may raise anything
                continue
            for message in messages:
                lines = _lines(message)
                if lines and not any(line in text for line in lines):
                    found.setdefault(str(message.get("role")), lines[0])
    return found


def _lines(message: dict[str, Any]) -> list[str]:
    """The lines of a message's text or, without any, the names of the functions that it calls."""
    content = message.get("content")
    spoken = content.rpartition("</think>")[2] if isinstance(content, str) else ""
    lines = [line.strip() for line in spoken.splitlines() if line.strip()]
    calls = [call.get("function") for call in message.get("tool_calls") or () if isinstance(call, dict)]
    return lines or [str(function["name"]) for function in calls if isinstance(function, dict) and "name" in function]


def conversations(row: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """The conversations in a row of a trainer's shape, each with its prompt."""
    prompt = row.get("prompt")
    for name in ("messages", "completion", "chosen", "rejected"):
        answer = row.get(name)
        if isinstance(answer, list) and answer and isinstance(answer[0], dict):
            yield [*(prompt if isinstance(prompt, list) else ()), *answer]


def render(processing_class: Any, messages: list[dict[str, Any]], row: dict[str, Any]) -> str:
    """A conversation of a row as its chat template writes it. Raises what the template raises."""
    options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
    text: str = processing_class.apply_chat_template(messages, tokenize=False, **options)
    return text


def _faults(column: pa.ChunkedArray, is_trained: bool) -> Iterator[_Fault]:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        remedy = "write the list itself, which .jsonl and .parquet files can hold"
        yield _Fault("has messages written as text", remedy, _filled(pc.match_substring_regex(column, _LIST)))
        if is_trained:
            yield _Fault("is empty", _LEAVE_OUT, ~_has_text(column))
    elif _is_list(column.type) and {"role", "content"} <= {*_field_names(column.type.value_type)}:
        messages, rows, count = pc.list_flatten(column), pc.list_parent_indices(column).to_numpy(), len(column)
        roles = pc.struct_field(messages, "role")
        yield from _role_faults(roles, rows, count)
        if is_trained:
            answers, filled = _filled(pc.equal(roles, "assistant")), _says_something(messages)
            is_silent = _rows_with(rows[answers], count) & ~_rows_with(rows[answers & filled], count)
            yield _Fault("has an empty answer", _LEAVE_OUT, is_silent | ~_rows_with(rows[filled], count))


def _says_something(messages: pa.ChunkedArray) -> np.ndarray:
    """[N] bool: messages with text, or with calls of tools; parts are taken for text."""
    content = pc.struct_field(messages, "content")
    filled = _has_text(content) if pa.types.is_string(content.type) else np.ones(len(content), bool)
    if "tool_calls" in _field_names(messages.type):
        filled |= pc.is_valid(pc.struct_field(messages, "tool_calls")).to_numpy(zero_copy_only=False)
    return filled


def _role_faults(roles: pa.ChunkedArray, rows: np.ndarray, count: int) -> Iterator[_Fault]:
    """Roles that are nearly one of the usual ones. Others may be a chat template's own."""
    if not pa.types.is_string(roles.type):
        return
    for role in filter(None, pc.unique(roles).to_pylist()):
        usual = _usual(role)
        if usual is not None:
            holds = _filled(pc.equal(roles, role))
            yield _Fault(
                f"has the role {role!r}", f"did you mean {usual}?", _rows_with(rows[holds], count), may_train=True
            )


def _usual(role: str) -> str | None:
    """The role that a misspelt or another word for it stands for; None: it is not nearly one of them."""
    word = role.strip().lower()
    close = difflib.get_close_matches(_SYNONYMS.get(word, word), _ROLES, n=1, cutoff=0.8)
    return close[0] if close and close[0] != role else None


def _has_text(column: pa.ChunkedArray) -> np.ndarray:
    return _filled(pc.match_substring_regex(column, r"\S"))


def _filled(condition: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(condition, False).to_numpy(zero_copy_only=False)


def _rows_with(rows: np.ndarray, count: int) -> np.ndarray:
    found = np.zeros(count, bool)
    found[rows] = True
    return found


def _field_names(kind: pa.DataType) -> list[str]:
    return [field.name for field in kind] if pa.types.is_struct(kind) else []


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)
