"""The data set that a command names, in the shape that its trainer takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl

from fusedalign.embedded import data_directory
from fusedalign.trl.arguments import METHODS, Arguments


def load_data(method: str, arguments: Arguments) -> tuple[Any, Any]:
    """Train and evaluation split; the latter is None where none is wanted."""
    script, training, _, mixture, _ = arguments
    if mixture.datasets:
        name, splits = "datasets", trl.get_dataset(mixture)
    elif script.dataset_name:
        name, splits = script.dataset_name, _load_named(script)
    else:
        raise ValueError(
            "dataset_name must name a data set (Hub name, folder, .jsonl, .json, .parquet, .csv), got nothing"
        )
    if script.dataset_train_split not in splits:
        raise ValueError(
            f"dataset_train_split must be a split of {name} ({', '.join(splits)}), got {script.dataset_train_split!r}"
        )
    if method == "sft":
        splits = {split: _chosen_side(dataset) for split, dataset in splits.items()}
    train_dataset, eval_dataset = splits[script.dataset_train_split], None
    _check_columns(method, name, train_dataset.column_names)
    if training.eval_strategy != "no":
        eval_dataset = splits.get(script.dataset_test_split)
        if eval_dataset is None and len(splits) > 1:
            raise ValueError(
                f"dataset_test_split must be a split of {name} ({', '.join(splits)}), got {script.dataset_test_split!r}"
            )
        if eval_dataset is None:
            print(f"{name} has the one split {script.dataset_train_split!r}: training without evaluation")
            training.eval_strategy = "no"
    return train_dataset, eval_dataset


def _chosen_side(dataset: Any) -> Any:
    """Preference data as what SFT learns from: its chosen answers. Other data as it is."""
    columns = dataset.column_names or []
    if "chosen" not in columns or {"messages", "completion", "text", "input_ids"} & set(columns):
        return dataset
    if "rejected" in columns:
        dataset = dataset.remove_columns("rejected")
    if "prompt" in columns:
        return dataset.rename_column("chosen", "completion")
    conversational = not isinstance(next(iter(dataset))["chosen"], str)
    return dataset.rename_column("chosen", "messages" if conversational else "text")


def _load_named(script: Any) -> Any:
    from datasets import load_dataset

    name, options = script.dataset_name, {"name": script.dataset_config, "streaming": script.dataset_streaming}
    path = Path(name)
    if not path.exists() and path.parts[:2] == ("recipes", "data"):  # the recipes' own data, from any working directory
        path = data_directory().joinpath(*path.parts[2:])
    if path.is_file():
        kind = {".jsonl": "json", ".ndjson": "json"}.get(path.suffix.lower(), path.suffix.lower().lstrip("."))
        if kind not in ("json", "parquet", "csv", "arrow"):
            raise ValueError(f"dataset_name must be a .jsonl, .json, .parquet, .csv or .arrow file, got {name}")
        return load_dataset(kind, data_files=str(path), **options)
    if not path.exists() and (
        name.startswith((".", "/", "~")) or path.suffix in (".jsonl", ".json", ".parquet", ".csv")
    ):
        raise FileNotFoundError(f"dataset_name must name a file or folder that exists, got {name}")
    return load_dataset(str(path) if path.exists() else name, **options)


def _check_columns(method: str, name: str, columns: Sequence[str] | None) -> None:
    wanted = METHODS[method].columns
    if columns is not None and not any(set(columns) >= set(choice) for choice in wanted):
        expected = " or ".join("+".join(choice) for choice in wanted)
        raise ValueError(
            f"data set for {method} must have the columns {expected}, got {name} with {', '.join(columns)}"
        )
