"""The data set that a command names, in the shape that its trainer takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import trl

from fusedalign.methods import METHODS
from fusedalign.trl import shapes
from fusedalign.trl.arguments import Arguments
from fusedalign.trl.contents import survey
from fusedalign.trl.files import load_named

_logger = logging.getLogger(__name__)


def load_data(method: str, arguments: Arguments) -> tuple[Any, Any]:
    """Train and evaluation split; the latter is None without an evaluation.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no data named, a file that cannot be read, a missing split or column, a row with a field that is
            neither text nor messages, a column without any text.
    """
    script, training, _, mixture, _ = arguments
    name = "datasets" if mixture.datasets else script.dataset_name
    splits = trl.get_dataset(mixture) if mixture.datasets else named_splits(script)
    check_split("dataset_train_split", script.dataset_train_split, name, splits)
    names = [script.dataset_train_split]
    if training.eval_strategy != "no" and (script.dataset_test_split in splits or len(splits) > 1):
        check_split("dataset_test_split", script.dataset_test_split, name, splits)
        names.append(script.dataset_test_split)
    elif training.eval_strategy != "no":
        print(f"{name} has the one split {script.dataset_train_split!r}: training without evaluation")
        training.eval_strategy = "no"
    text_field = getattr(training, "dataset_text_field", "text")
    with training.main_process_first(desc="reading the data"):
        train_dataset, *eval_datasets = [
            served(splits[split], method, _source(name, split), text_field) for split in names
        ]
    for split, dataset in zip(names, (train_dataset, *eval_datasets), strict=True):
        source = _source(name, split)
        for text in (*_unread_prompts(splits[split], source), *survey(dataset, source, text_field)):
            if training.process_index == 0:
                _logger.warning("%s", text)
    return train_dataset, eval_datasets[0] if eval_datasets else None


def _source(name: str, split: str) -> str:
    """A split's name in messages."""
    return name if Path(name).is_file() else f"{name}, split {split!r}"


def named_splits(script: Any) -> Any:
    """The splits of the data set that TRL's `ScriptArguments` name; raises as `load_data`."""
    if not script.dataset_name:
        raise ValueError(
            "dataset_name must name a data set (Hub name, folder, .jsonl, .json, .parquet, .csv), got nothing"
        )
    return load_named(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def check_split(option: str, split: str, name: str, splits: Iterable[str]) -> None:
    """Raise ValueError unless `split`, which `option` names, is one of the splits of the data set `name`."""
    if split not in splits:
        names = list(splits)
        hint = f": add --{option} {names[0]}" if len(names) == 1 else ""
        raise ValueError(f"{option} must be a split of {name} ({', '.join(names)}), got {split!r}{hint}")


def served(dataset: Any, method: str, source: str, text_field: str = "text") -> Any:
    """A data set with the columns and rows that the trainer of a method takes.

    Args:
        dataset: the rows of a `datasets.Dataset` are checked now, those of an `IterableDataset` when they are read.
        method: one of `METHODS`.
        source: its name in errors.
        text_field: the column of plain text for SFT.

    Raises:
        ValueError: no row, columns that the method cannot use, a field that is neither text nor messages.
    """
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if not columns or _length(dataset) == 0:
        raise ValueError(f"{source} must have at least one row, got none")
    shape, needed = _shape(method, source, columns, text_field)
    if shape is None:
        _check_tokens(dataset, source)
        return dataset
    dataset = dataset.remove_columns([c for c in columns if c in {*shapes.TEXTS, "label"} and c not in needed])
    convert = partial(_converted, shape=shape, names=needed, source=source)
    convert = partial(convert, kinds=_kinds(convert(next(iter(dataset)), 0)))
    if _length(dataset) is None:
        return dataset.map(convert, with_indices=True, remove_columns=list(needed))
    if shape in _FOR_TEXT and all(_is_sound(dataset, name) for name in needed) and needed[0] != "chosen":
        return dataset
    unchanged = all(convert(row, i) == row for i, row in enumerate(_rows(dataset.select_columns(list(needed)))))
    if unchanged and ("label" not in needed or dataset.features["label"] == datasets.Value("bool")):  # 1 == True
        return dataset
    converted = dataset.map(convert, with_indices=True, remove_columns=list(needed), desc="Converting the rows")
    return converted.cast_column("label", datasets.Value("bool")) if "label" in needed else converted


#: The functions of rows that leave text with a prompt unchanged.
_FOR_TEXT = (shapes.preference, shapes.prompt_completion, shapes.unpaired, shapes.text)


def _shape(
    method: str, source: str, columns: Sequence[str], text_field: str
) -> tuple[Callable[[shapes.Row], shapes.Row] | None, tuple[str, ...]]:
    """The function of rows for the method's first set of columns that the data have, and the columns it reads.

    The function is None for tokens, which TRL takes unchanged.
    """
    choices = [tuple(text_field if name == "text" else name for name in choice) for choice in METHODS[method].columns]
    present = next((choice for choice in choices if set(choice) <= set(columns)), None)
    if present is None:
        expected = " or ".join("+".join(choice) for choice in choices)
        names = ", ".join(repr(name) if name != name.strip() else name for name in columns) + _hint(choices, columns)
        raise ValueError(f"data set for {method} must have the columns {expected}, got {source} with {names}")
    pair = ("prompt", "chosen", "rejected") if "prompt" in columns else ("chosen", "rejected")
    return {
        ("input_ids",): (None, present),
        ("prompt", "completion"): (shapes.prompt_completion, present),
        ("prompt", "completion", "label"): (shapes.unpaired, present),
        ("messages",): (shapes.conversation, present),
        ("conversations",): (shapes.conversation, present),
        (text_field,): (shapes.text, present),
        ("chosen",): (shapes.chosen_side, tuple(name for name in pair if name != "rejected")),
        ("chosen", "rejected"): (shapes.preference, pair),
    }[present]


#: Other names of columns -> the names that are read.
_SYNONYMS = {
    **dict.fromkeys(("question", "instruction", "query"), "prompt"),
    **dict.fromkeys(("answer", "response", "output"), "completion"),
    **dict.fromkeys(("good", "accepted", "preferred", "win"), "chosen"),
    **dict.fromkeys(("bad", "dispreferred", "lose"), "rejected"),
    **dict.fromkeys(("message", "conversation", "dialogue"), "messages"),
    "content": "text",
}


def _hint(choices: Iterable[tuple[str, ...]], columns: Sequence[str]) -> str:
    """What makes columns with other names readable, as the end of an error; empty if nothing obvious does."""
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t|"):
        return ": a .csv file must have commas between its fields"
    names = {name.strip().lower(): name for name in columns}
    renamed = {_SYNONYMS.get(word, word): name for word, name in names.items()} | names
    for choice in choices:
        if set(choice) <= renamed.keys():
            optional = ("prompt",) if choice[0] == "chosen" and "prompt" in renamed else ()
            pairs = [f"{renamed[name]!r} to {name!r}" for name in (*optional, *choice) if renamed[name] != name]
            return f": rename {', '.join(pairs)}"
    able = [name for name, method in METHODS.items() if any({*choice} <= {*columns} for choice in method.columns)]
    return f"; these columns are for {', '.join(able)}" if able else ""


def _unread_prompts(dataset: Any, source: str) -> list[str]:
    """At most one warning: pairs have their prompt in a column that is not called `prompt`."""
    row: dict[str, Any] = next(iter(dataset), {})
    if "prompt" in row or "chosen" not in row:
        return []
    names = [name for name in row if _SYNONYMS.get(name.strip().lower(), name.strip().lower()) == "prompt"]
    unread = [name for name in names if row[name] and str(row[name]) not in str(row["chosen"])]
    return [
        f"{source}: {name!r} is not read, so answers train without it: rename it to 'prompt'" for name in unread[:1]
    ]


def _check_tokens(dataset: Any, source: str) -> None:
    """Raise ValueError unless `input_ids` are lists of integers; the type of a stream is not known."""
    feature = (dataset.features or {}).get("input_ids")
    dtype = getattr(getattr(feature, "feature", None), "dtype", None)
    if feature is not None and not str(dtype).startswith(("int", "uint")):
        kind = getattr(feature, "dtype", None) or f"lists of {dtype}"
        raise ValueError(f"{source}: input_ids must be lists of integers, got {kind}")


def _converted(
    row: shapes.Row,
    index: int,
    *,
    shape: Callable[[shapes.Row], shapes.Row],
    names: Sequence[str],
    source: str,
    kinds: Mapping[str, str] | None = None,
) -> shapes.Row:
    """The row in its shape; `kinds` are those of the first row, which decides what the trainer does with all."""
    try:
        converted = shape({name: row[name] for name in names})
    except ValueError as error:
        raise ValueError(f"{source}, row {index + 1}: {error}") from None
    for name, kind in _kinds(converted).items():
        first = kinds.get(name, kind) if kinds else kind
        if kind != first:
            raise ValueError(f"{source}, row {index + 1}: {name} must be {first} as in row 1, got {kind}")
    return converted


def _kinds(row: shapes.Row) -> dict[str, str]:
    """Text or messages, by the names of a row's fields."""
    return {name: "text" if isinstance(x, str) else "messages" for name, x in row.items() if isinstance(x, (str, list))}


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _is_sound(dataset: Any, name: str) -> bool:
    """Whether a column is text (the label: bool) in all rows, by its type and count of nulls."""
    dtype = getattr(dataset.features[name], "dtype", None)
    dtypes = ("bool",) if name == "label" else ("string", "large_string")
    return dtype in dtypes and dataset.data.column(name).null_count == 0


def _rows(dataset: Any) -> Iterator[shapes.Row]:
    for batch in dataset.iter(batch_size=1000):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
