"""The rows of a training's data as the token sequences that its model reads, before and after truncation."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fusedalign.check.weightless import Sample
from fusedalign.methods import METHODS
from fusedalign.trl.arguments import trl_class
from fusedalign.trl.encoding import OneRow
from fusedalign.trl.preparation import prepared

#: More tokens than any row has.
_NO_LIMIT = 2**40


class Sequence(NamedTuple):
    """The tokens of a row, or of one answer of a pair with its prompt."""

    name: str
    ids: list[int]
    trained: list[bool]
    """for each token whether it has a label"""

    @property
    def targets(self) -> int:
        """Tokens that the model is trained to predict; the first one never is."""
        return sum(self.trained[1:])

    @property
    def prompt(self) -> int:
        """Tokens before the first trained one."""
        return self.trained.index(True) if True in self.trained else len(self.ids)


class Row(NamedTuple):
    """A row's sequences: one, or the chosen and the rejected one."""

    whole: list[Sequence]
    kept: list[Sequence]
    """what `max_length` leaves; without tokens where the trainer drops the row"""

    @property
    def is_cut(self) -> bool:
        """Whether truncation removes tokens."""
        return any(len(a.ids) > len(b.ids) for a, b in zip(self.whole, self.kept, strict=True))

    @property
    def is_lost(self) -> bool:
        """Whether truncation leaves an answer without a token to train on."""
        return any(a.targets and not b.targets for a, b in zip(self.whole, self.kept, strict=True))

    @property
    def is_shortened(self) -> bool:
        """Whether truncation removes a part of an answer's trained tokens, but not all."""
        return not self.is_lost and any(a.targets > b.targets for a, b in zip(self.whole, self.kept, strict=True))


def read_rows(sample: Sample) -> list[Row]:
    """The rows of a sample, in the order of the data set unless the trainer shuffles it."""
    trainer = sample.trainer
    collate = inner_collator(trainer)
    if sample.method == "sft":
        return [Row(_sequences(collate, row), _sequences(collate, kept)) for row, kept in _text_rows(sample)]
    if hasattr(trainer, "tokenize_row"):  # CPO and ORPO
        return [Row(_sequences(collate, row), _sequences(collate, kept)) for row, kept in _tokenised_pairs(sample)]
    return _collated_rows(sample, collate)


def inner_collator(trainer: Any) -> Any:
    """A trainer's collator without the layouts that it adds to batches."""
    return getattr(trainer.data_collator, "collator", trainer.data_collator)


def sequences(batch: Mapping[str, Any]) -> list[Sequence]:
    """The sequences of a collator's batch, all chosen ones before all rejected ones; padding is left out."""
    if "chosen_labels" in batch:  # CPO and ORPO
        return [x for side in ("chosen", "rejected") for x in _side(batch, side)]
    ids, masks = batch["input_ids"], batch.get("attention_mask")
    trained = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"] == 1
    if "label" in batch:
        names = ["good answer" if label else "bad answer" for label in batch["label"].tolist()]
    elif "completion_mask" in batch:
        names = [side for side in ("chosen", "rejected") for _ in range(len(ids) // 2)]
    else:
        names = ["row"] * len(ids)
    rows = []
    for i, name in enumerate(names):
        real = slice(None) if masks is None else masks[i].bool()
        rows.append(Sequence(name, ids[i][real].tolist(), trained[i][real].tolist()))
    return rows


def _side(batch: Mapping[str, Any], side: str) -> list[Sequence]:
    rows = []
    for i, labels in enumerate(batch[f"{side}_labels"]):
        if f"{side}_input_ids" in batch:
            real = batch[f"{side}_attention_mask"][i].bool()
            rows.append(Sequence(side, batch[f"{side}_input_ids"][i][real].tolist(), (labels != -100)[real].tolist()))
            continue
        # An encoder-decoder: the encoder reads the prompt, the decoder writes the answer.
        prompt = batch["prompt_input_ids"][i][batch["prompt_attention_mask"][i].bool()].tolist()
        answer = labels[labels != -100].tolist()
        rows.append(Sequence(side, prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return rows


def _sequences(collate: Any, row: Any) -> list[Sequence]:
    return [Sequence("row", [], [])] if row is None else sequences(collate([row]))


def _text_rows(sample: Sample) -> list[tuple[Any, Any]]:
    """SFT's rows as TRL tokenises them, before and after truncation; None: dropped."""
    trainer, args = sample.trainer, copy.copy(sample.trainer.args)
    if "labels" not in _columns(trainer.train_dataset):  # images, which are processed batch by batch
        return [(row, row) for row in trainer.train_dataset]
    limit = None if args.packing else args.max_length
    args.shuffle_dataset = False
    pairs = []
    for row in _prepared_whole(sample, False, None, "train"):
        kept = row
        if limit is not None and len(row["input_ids"]) > limit:
            one = OneRow([{name: row[name] for name in ("input_ids", "labels")}])
            kept = next(iter(_prepare(sample)(one, trainer.processing_class, args, False, None, "train")), None)
        pairs.append((row, kept))
    return pairs


def _prepared_whole(sample: Sample, *rest: Any) -> Any:
    """The data set as TRL prepares it without `max_length`; `rest` are its arguments after the configuration."""
    trainer, args = sample.trainer, copy.copy(sample.trainer.args)
    args.max_length = None
    if hasattr(args, "shuffle_dataset"):
        args.shuffle_dataset = False
    return prepared(_prepare(sample), sample.dataset, trainer.processing_class, args, *rest)


def _prepare(sample: Sample) -> Callable[..., Any]:
    """The function of TRL's trainer that tokenises a data set, without this package's checks."""
    return functools.partial(trl_class(METHODS[sample.method].trainer)._prepare_dataset, sample.trainer)


def _tokenised_pairs(sample: Sample) -> list[tuple[Any, Any]]:
    """The rows of CPO and ORPO, before and after truncation."""
    trainer, max_length = sample.trainer, sample.trainer.max_length
    kept = list(trainer.train_dataset)
    trainer.max_length = _NO_LIMIT
    try:
        return [(trainer.tokenize_row(row), cut) for row, cut in zip(sample.dataset, kept, strict=True)]
    finally:
        trainer.max_length = max_length


def _collated_rows(sample: Sample, collate: Any) -> list[Row]:
    """The rows of DPO and KTO, which their collator truncates."""
    trainer = sample.trainer
    rows = trainer.train_dataset
    if "prompt_ids" not in _columns(rows):  # images
        return [Row(_sequences(collate, row), _sequences(collate, row)) for row in rows]
    # TRL drops rows with a prompt that fills max_length.
    is_split = sample.method == "kto" and "chosen" in _columns(sample.dataset)
    if not hasattr(rows, "__len__") or len(rows) < len(sample.dataset) * (2 if is_split else 1):
        rows = _prepared_whole(sample, "train")
    collate_whole = dataclasses.replace(collate, max_length=None)
    return [Row(_sequences(collate_whole, row), _sequences(collate, row)) for row in rows]


def _columns(dataset: Any) -> list[str]:
    return list(dataset.column_names or next(iter(dataset), {}))
