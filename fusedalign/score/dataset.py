"""The columns of a data set: which kind of rows they make, and reading them as Python values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fusedalign.score.records import IGNORED

#: Optional columns that say which tokens of `input_ids` are scored.
_MASKS = ("labels", "completion_mask", "assistant_masks")


def find_kind(columns: Sequence[str], text_field: str) -> tuple[str, tuple[str, ...]]:
    """The kind of a data set, the first that its columns allow, and the columns that are read."""
    choices: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("preference", ("chosen", "rejected")),
        ("text", ("input_ids",)),
        ("completion", ("prompt", "completion")),
        ("conversation", ("messages",)),
        ("conversation", ("conversations",)),
        ("text", (text_field,)),
    )
    for kind, fields in choices:
        if set(fields) <= set(columns):
            if kind == "preference" and "prompt" in columns:
                fields = ("prompt", *fields)
            if fields == ("input_ids",):
                fields += tuple(name for name in _MASKS if name in columns)
            if "image" in columns or "images" in columns:
                raise ValueError("the data set must be of text alone, got a column of images")
            return kind, fields
    expected = " or ".join("+".join(fields) for _, fields in choices)
    raise ValueError(f"the data set must have the columns {expected}, got {', '.join(columns) or 'none'}")


def column_names(dataset: Any) -> list[str]:
    """The columns of a data set, or the keys of all its rows.

    Raises:
        TypeError: it has no length.
        ValueError: it has no rows.
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"the data set must have a length (datasets.Dataset, or a sequence of rows), got {type(dataset).__name__}"
        )
    if not len(dataset):
        raise ValueError("the data set must have at least one row, got none")
    if hasattr(dataset, "column_names"):
        return list(dataset.column_names)
    return list({name: None for row in dataset if isinstance(row, Mapping) for name in row})


def select_columns(dataset: Any, names: list[str]) -> Any:
    """The data set reduced to some columns, as Python values."""
    if not hasattr(dataset, "select_columns"):
        return dataset
    if dataset.format["type"] == "custom":
        raise ValueError("the data set must be one without a transform, which could differ each time, got one with")
    return dataset.select_columns(names).with_format(None)


def read_rows(dataset: Any, start: int, stop: int) -> Iterator[Any]:
    """Yield the rows from `start` up to, but not including, `stop` as mappings."""
    part = dataset[start:stop]
    if not isinstance(part, Mapping):
        yield from part
        return
    yield from (dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True))


def read_tokens(row: Mapping[str, Any], fields: Sequence[str], vocabulary: int) -> dict[str, list[int]]:
    """The token ids and masks of a row as lists of ints.

    Raises:
        ValueError: values of another type, tokens out of the vocabulary, lengths that differ.
    """
    tokens = {}
    for name in fields:
        values = row[name].tolist() if hasattr(row[name], "tolist") else row[name]
        if not isinstance(values, (list, tuple)) or not all(type(x) is int for x in values):
            raise ValueError(f"{name} must be a list of integers, got {shorten(values)}")
        if len(values) != len(row["input_ids"]):
            raise ValueError(f"{name} must be as long as input_ids ({len(row['input_ids'])}), got {len(values)}")
        invalid = [x for x in values if not 0 <= x < vocabulary and not (name == "labels" and x == IGNORED)]
        if invalid:
            raise ValueError(f"{name} must be tokens from 0 to {vocabulary - 1}, got {invalid[0]}")
        tokens[name] = list(values)
    return tokens


def shorten(value: Any) -> str:
    """The representation of a value, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
