"""TRL's preparation of a data set, for rows of every shape and with a check of what truncation leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from fusedalign.trl import shapes
from fusedalign.trl.lengths import check_lengths
from fusedalign.trl.tokens import one_end


def prepared(
    prepare: Callable[..., Any], dataset: Any, processing_class: Any, args: Any, *rest: Any, **options: Any
) -> Any:
    """The data set as TRL's `_prepare_dataset`, here `prepare`, returns it, with one EOS after each answer.

    Raises:
        ValueError: no token is left to train on; a first row in none of the shapes.
    """
    if not any(callable(x) for x in (*rest, *options.values())):  # SFT's formatting_func accepts rows of any shape
        dataset = reshaped(dataset)
    tokenised = prepare(dataset, one_end(processing_class), args, *rest, **options)
    rows = len(dataset) if hasattr(dataset, "__len__") else None
    if rows is not None and {"chosen", "completion_ids"} <= {*dataset.column_names, *tokenised.column_names}:
        rows = 2 * rows  # KTO splits pairs

    def whole() -> Any:
        uncut = copy.copy(args)
        uncut.max_length = None
        unpacked = options | {"packing": False} if "packing" in options else options
        return prepare(dataset, one_end(processing_class), uncut, *(x is not True and x for x in rest), **unpacked)

    name = options.get("dataset_name", rest[-1] if rest else "train")
    return check_lengths(tokenised, args, name, rows, whole=whole)


def reshaped(dataset: Any) -> Any:
    """The data set with pairs, and prompts with completions, in TRL's shape, unless the first row has it already."""
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("expected a data set with at least one row, got none")
    for names, shape in _SHAPES.items():
        present = {name: first[name] for name in (*names, "prompt") if name in first}
        tokenised = {"input_ids", "reference"} & set(first)  # or TPO's rows, with three answers
        if set(names) <= set(first) and not tokenised and shape(present) != present:
            return dataset.map(
                _apply, fn_kwargs={"shape": shape, "names": tuple(present)}, remove_columns=list(present)
            )
    return dataset


_SHAPES = {("chosen", "rejected"): shapes.preference, ("prompt", "completion"): shapes.prompt_completion}


def _apply(row: shapes.Row, shape: Callable[[shapes.Row], shapes.Row], names: tuple[str, ...]) -> shapes.Row:
    return shape({name: row[name] for name in names if name in row})
