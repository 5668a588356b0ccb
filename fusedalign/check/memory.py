"""The memory of a training step with the largest batch, planned for one GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fusedalign.check.batches import Slots
from fusedalign.check.weightless import Sample
from fusedalign.plan.model import Shapes, check_config
from fusedalign.plan.plan import Total, totals
from fusedalign.plan.shape import DEFAULT_OPTIMISER, ITEM, OPTIMISERS, Step
from fusedalign.plan.sizes import CONTEXT
from fusedalign.trl.refusals import unwrapped


class Memory(NamedTuple):
    """The plan of a step."""

    step: Step
    totals: list[Total]
    """as `fusedalign.plan.plan.totals` returns them"""
    notes: list[str]
    """where the plan differs from the run"""
    card: int | None
    """bytes of the GPU of this machine"""

    @property
    def needed(self) -> int:
        """Bytes of a card that our step needs, with the CUDA context."""
        return self.totals[0 if self.step.checkpointing else 1].bytes + CONTEXT


def plan_memory(sample: Sample, slots: list[Slots]) -> Memory:
    """The plan of the largest of some batches.

    Raises:
        ValueError: a model or a setting that cannot be planned, with the reason.
    """
    trainer, notes = sample.trainer, []
    model, args = unwrapped(trainer, trainer.model), trainer.args
    check_config(model.config, model.config.name_or_path)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if dtype not in ITEM:
        raise ValueError(f"weights in {dtype} are not planned, only those in {' and '.join(ITEM)}")
    if sample.arguments.model.load_in_4bit or sample.arguments.model.load_in_8bit:
        notes.append(f"the weights are planned in {dtype}, not quantised")
    optimiser = str(getattr(args.optim, "value", args.optim))
    if optimiser not in OPTIMISERS:
        notes.append(f"the optimiser is planned as {DEFAULT_OPTIMISER}, not {optimiser}")
        optimiser = DEFAULT_OPTIMISER
    rank, note = _lora(trainer)
    notes += [note] if note else []
    step = _step(sample, max(slots, key=lambda x: x.padded), dtype, rank, optimiser)
    card = torch.cuda.get_device_properties(args.device).total_memory if args.device.type == "cuda" else None
    return Memory(step, totals(Shapes(model.config, model.config.name_or_path), step), notes, card)


def _step(sample: Sample, largest: Slots, dtype: str, rank: int, optimiser: str) -> Step:
    args, fused = sample.trainer.args, sample.arguments.fused
    length = max(2, largest.width)
    step = Step(
        method=sample.method,
        batch=args.per_device_train_batch_size,
        length=length,
        prompt=min(length - 1, int(length * (1 - largest.trained))),
        dtype=dtype,
        lora_r=rank,
        checkpointing=args.gradient_checkpointing,
        precomputed=fused.ref_logps is not None or bool(getattr(args, "precompute_ref_log_probs", False)),
        optimiser=optimiser,
        accumulation=args.gradient_accumulation_steps,
    )
    unpacked = fused.packed is False or largest.packed is None
    return replace(step, tokens=step.padded if unpacked else min(step.padded, largest.packed or 0))


def _lora(trainer: Any) -> tuple[int, str | None]:
    """The rank of the trained LoRA, and a note where the plan's adapters are others; 0: all weights are trained."""
    adapters = getattr(trainer.model, "peft_config", None)
    if not adapters:
        return 0, None
    config = adapters[trainer.model.active_adapter]
    rank = getattr(config, "r", None)
    if not isinstance(rank, int):
        raise ValueError(f"adapters of {type(config).__name__} are not planned")
    return rank, "LoRA is planned on all linear layers" if config.target_modules != "all-linear" else None
