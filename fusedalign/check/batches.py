"""The slots of batches, padded and packed, by the trainer's own batching and packing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from fusedalign.check.rows import inner_collator, sequences
from fusedalign.check.weightless import layout_refusal
from fusedalign.packing import PackedBatch
from fusedalign.packing.batch import GPU_MULTIPLE
from fusedalign.trl.layouts import PACKED, Layouts
from fusedalign.trl.matched import KTOLayouts

#: Most batches that are laid out.
BATCHES = 100


class Slots(NamedTuple):
    """Token positions of a batch that the model computes."""

    padded: int
    packed: int | None
    """with the filler of a GPU; None: the batch cannot be packed"""
    tokens: int
    """without padding; a token that several rows share counts for each"""
    shared: int
    """tokens among them that packing computes once less, for each row after the first that has them"""
    width: int
    """of the padded rows"""
    trained: float
    """share of the tokens that have a label"""


def read_batches(trainer: Any) -> list[Slots]:
    """The slots of an epoch's first batches, in the order that the trainer's seed gives."""
    collator, workers = trainer.data_collator, trainer.args.dataloader_num_workers
    trainer.data_collator, trainer.args.dataloader_num_workers = inner_collator(trainer), 0
    try:
        batches = itertools.islice(trainer.get_train_dataloader(), BATCHES)
        can_pack = layout_refusal(trainer) is None
        layouts = Layouts(trainer.layouts.groups, PACKED, "on a GPU", multiple=GPU_MULTIPLE) if can_pack else None
        return [_slots(trainer, layouts, batch) for batch in batches]
    finally:
        trainer.data_collator, trainer.args.dataloader_num_workers = collator, workers


def _slots(trainer: Any, layouts: Layouts | None, batch: Mapping[str, Any]) -> Slots:
    rows = sequences(batch)
    tokens = sum(len(row.ids) for row in rows)
    trained = sum(sum(row.trained) for row in rows) / max(1, tokens)
    parts = [] if layouts is None else _packed_parts(trainer._lay_out()(layouts, batch))
    width = max((len(row.ids) for row in rows), default=0)
    if not parts:
        return Slots(len(rows) * width, None, tokens, 0, width, trained)
    valid = sum(int(part.valid.sum()) for part in parts)
    unique = sum(int((part.row_counts > 0).sum()) for part in parts)
    padded, packed = sum(part.valid.numel() for part in parts), sum(part.tokens for part in parts)
    return Slots(padded, packed, valid, valid - unique, max(part.valid.shape[1] for part in parts), trained)


def _packed_parts(layout: Any) -> list[PackedBatch]:
    """The packed batches of the forwards of a step; none: the batch cannot be packed."""
    if isinstance(layout, KTOLayouts):
        both = layout.joined(with_gradient=True)
        layouts = [layout.matched, layout.mismatched] if both is None else [both]
    else:
        layouts = [layout]
    parts = [part for part in layouts if isinstance(part, PackedBatch)]
    return parts if len(parts) == len([part for part in layouts if part is not None]) else []
