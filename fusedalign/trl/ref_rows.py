"""The rows of a reference cache: the sequences that DPO and KTO trainers score, and the columns made from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets

from fusedalign.methods import WITH_REFERENCE
from fusedalign.trl.ref_cache import RefCache, has_kl, row_key
from fusedalign.trl.stock import DataCollatorForPreference, DataCollatorForUnpairedPreference, trainer_without_model

#: Rows collated together.
_BATCH = 64
_IGNORED = -100

#: Columns of a precomputed reference, for pairs and for KTO's single answers, in the collator's order.
_PAIR = ("ref_chosen_logps", "ref_rejected_logps")
_SINGLE = ("ref_logps", "ref_KL_logps")
#: The sequence that each column's log-probabilities belong to, for messages.
_SIDES = {
    "ref_chosen_logps": "the chosen answer",
    "ref_rejected_logps": "the rejected answer",
    "ref_logps": "the completion",
    "ref_KL_logps": "the mismatched completion",
}


class Sequence(NamedTuple):
    """One sequence to score."""

    key: str
    """from `fusedalign.trl.ref_cache.row_key`"""
    input_ids: list[int]
    """[L] after truncation"""
    labels: list[int]
    """[L] unshifted; -100 on context tokens"""


def reference_examples(
    method: str, dataset: Any, processing_class: Any, args: Any, name: str = "train"
) -> list[Sequence]:
    """The distinct sequences of a data set that a reference model scores, truncated as in the Fused trainer.

    A sequence without a completion token after truncation is left out: its sum is 0.

    Args:
        method: "dpo" or "kto".
        dataset: a `datasets.Dataset` as the trainer takes it.
        processing_class: the tokenizer, or a processor that holds one.
        args: `DPOConfig` or `KTOConfig` of the training; truncation and, for KTO, the batch size are used.
        name: of the split: "train", "eval", or a name of its own.

    Raises:
        ValueError: another method, a stream, data with images, or data that the trainer refuses.
    """
    if method not in WITH_REFERENCE:
        raise ValueError(
            f"a reference cache needs a method with a reference model, {' or '.join(WITH_REFERENCE)}, got {method}"
        )
    check_data(dataset, name)
    options: dict[str, Any] = {"pad_token_id": 0, "max_length": args.max_length}
    if method == "dpo":
        collator: Any = DataCollatorForPreference(**options, truncation_mode=args.truncation_mode)
    else:
        collator = DataCollatorForUnpairedPreference(**options)
    prepared = _prepare(method, dataset, processing_class, args, name)
    sequences: dict[str, Sequence] = {}
    for _, _, input_ids, labels in _sequences(prepared, collator):
        if _counts(labels):
            key = row_key(input_ids, labels)
            sequences.setdefault(key, Sequence(key, input_ids.tolist(), labels.tolist()))
    return list(sequences.values())


def _prepare(method: str, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
    """The data set tokenised by the trainer's own method, without a model."""
    from fusedalign.trl.trainers import FusedDPOTrainer, FusedKTOTrainer

    trainer = trainer_without_model(FusedDPOTrainer if method == "dpo" else FusedKTOTrainer, processing_class)
    trainer._ref_cache = None
    if method == "kto":
        trainer.calculate_KL = has_kl(args)
        trainer.desirable_weight, trainer.undesirable_weight = args.desirable_weight, args.undesirable_weight
    return trainer._prepare_dataset(dataset, processing_class, args, name)


def check_data(dataset: Any, name: str) -> None:
    """Raise ValueError for data that a cache does not support."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"ref_logps needs data sets with a length, got a stream as the {name} data set: leave ref_logps out, "
            "or load the data without streaming"
        )
    images = {"image", "images"} & set(getattr(dataset, "column_names", None) or ())
    if images:
        raise ValueError(
            f"ref_logps needs rows of text, got the {name} data set with the column {min(images)}: leave ref_logps out"
        )


def with_reference(dataset: Any, cache: RefCache, collator: Any, name: str) -> Any:
    """A tokenised data set with the columns of a precomputed reference, as TRL's own precomputation adds them.

    Args:
        dataset: from `_prepare_dataset` of a DPO or KTO trainer.
        cache: has passed its checks.
        collator: the trainer's, which truncates the rows.
        name: of the split, for messages.

    Raises:
        ValueError: a row that is not in the cache; a stream.
    """
    check_data(dataset, name)
    columns = {column: np.zeros(len(dataset), np.float32) for column in columns_of(dataset)}
    missing = []
    for row, column, input_ids, labels in _sequences(dataset, collator):
        if _counts(labels):
            value = cache.logps.get(row_key(input_ids, labels))
            if value is None:
                missing.append((row, column))
            else:
                columns[column][row] = value
    if missing:
        raise _missing(missing, cache, name, len(dataset))
    features = Features({column: Value("float32") for column in columns})
    others = dataset.remove_columns([column for column in columns if column in dataset.column_names])
    return concatenate_datasets([others, Dataset.from_dict(columns, features=features)], axis=1)


def _missing(missing: list[tuple[int, str]], cache: RefCache, name: str, rows: int) -> ValueError:
    row, column = min(missing)
    others = f" (and {len(missing) - 1} more sequences)" if len(missing) > 1 else ""
    return ValueError(
        f"ref_logps must have every row of the {name} data set, got {cache.path} without {_SIDES[column]} of row "
        f"{row + 1} of {rows} after tokenisation{others}: score these data with fusedalign score --ref_cache"
    )


def _counts(labels: np.ndarray) -> bool:
    """Whether any token counts; the first one has no log-probability."""
    return bool((labels[1:] != _IGNORED).any())


def _sequences(dataset: Any, collator: Any) -> Iterator[tuple[int, str, np.ndarray, np.ndarray]]:
    """Yield row, column of a precomputed reference, tokens and labels of each sequence, truncated by the collator.

    Raises:
        ValueError: batches that lack a tensor.
    """
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids", "label")
    table = dataset.select_columns([name for name in names if name in dataset.column_names])
    for start in range(0, len(table), _BATCH):
        columns = table[start : start + _BATCH]
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch = collator(examples)
        for number, (column, ids, labels) in enumerate(_answers(batch, columns_of(dataset))):
            yield start + number % len(examples), column, ids, labels


def _answers(batch: Any, columns: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield column, tokens and labels of each sequence of a batch, in the order of the columns."""
    is_paired = columns == _PAIR
    for prefix in ("",) if is_paired else ("", "KL_")[: len(columns)]:
        try:
            arrays = [batch[f"{prefix}{name}"].numpy() for name in ("input_ids", "attention_mask", "completion_mask")]
        except KeyError as error:
            raise ValueError(
                f"ref_logps needs a collator whose batches have input_ids, attention_mask and completion_mask, got one "
                f"without {error.args[0]}"
            ) from None
        for number, (ids, attention_mask, completion_mask) in enumerate(zip(*arrays, strict=True)):
            valid = attention_mask.astype(bool)
            column = columns[2 * number // len(arrays[0])] if is_paired else columns[prefix == "KL_"]
            yield column, ids[valid], np.where(completion_mask[valid], ids[valid], _IGNORED)


def columns_of(dataset: Any) -> tuple[str, ...]:
    """The columns of a precomputed reference that a tokenised data set needs."""
    if "chosen_ids" in dataset.column_names:
        return _PAIR
    return _SINGLE if "KL_completion_ids" in dataset.column_names else _SINGLE[:1]
