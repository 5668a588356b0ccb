"""Token positions that a model computes for the batches of an epoch."""

from __future__ import annotations

from typing import Any, NamedTuple

import trl

from fusedalign.packing.batch import GPU_MULTIPLE
from fusedalign.trl.layouts import PACKED, Layouts


class EpochSlots(NamedTuple):
    """Token positions of one epoch of training batches."""

    padded: int
    """of the trainer's own batches"""
    packed: int
    """of the same batches packed as on a GPU, with the filler at the end of each"""

    @property
    def change(self) -> float:
        """The positions that packing adds, as a share of the padded ones; negative where it leaves some out."""
        return self.packed / self.padded - 1


def count_slots(trainer: Any) -> EpochSlots:
    """Collate one epoch of training batches, and pack each as a Fused trainer would on a GPU."""
    # TRL's DPO collates all chosen answers, then all rejected ones.
    groups = 2 if isinstance(trainer, trl.DPOTrainer) else 1
    layouts = Layouts(groups, PACKED, must_pack=True, multiple=GPU_MULTIPLE)
    counts = [(batch["input_ids"].numel(), layouts.of(batch).tokens) for batch in trainer.get_train_dataloader()]
    return EpochSlots(*map(sum, zip(*counts, strict=True)))
