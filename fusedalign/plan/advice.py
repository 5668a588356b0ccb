"""Ranks changes of a step by the memory that they save; each changed step is planned too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from fusedalign.plan.shape import OPTIMISERS, Step

LORA_R = 16
EIGHT_BITS = "adamw_bnb_8bit"


@dataclass(frozen=True)
class Change:
    """A change of a step, the memory of the changed step and the saved memory."""

    about: str
    step: Step
    bytes: int
    saved: int


def changes(step: Step) -> Iterator[tuple[str, Step]]:
    """Yield the changes that a user can still make to a step."""
    if not step.lora_r:
        yield f"LoRA, --lora_r {LORA_R}", replace(step, lora_r=LORA_R)
    if not step.checkpointing:
        yield "gradient checkpointing", replace(step, checkpointing=True)
    if step.live_reference and not step.lora_r:
        yield "reference precomputed, --precompute_ref_log_probs", replace(step, precomputed=True)
    if step.batch > 1:
        parts = next(n for n in range(2, step.batch + 1) if step.batch % n == 0)  # keeps the rows of a step
        tokens = None if step.tokens is None else -(-step.tokens // parts)
        smaller = replace(step, batch=step.batch // parts, tokens=tokens, accumulation=parts * step.accumulation)
        yield f"--batch {smaller.batch} --accumulation {smaller.accumulation}", smaller
    if step.dtype != "bfloat16":
        yield "weights in bf16, --dtype bfloat16", replace(step, dtype="bfloat16")
    if OPTIMISERS[step.optimiser].state_bytes is None and not step.lora_r:
        yield f"optimiser of 8 bits, --optim {EIGHT_BITS}", replace(step, optimiser=EIGHT_BITS)


def ranked(step: Step, peak: Callable[[Step], int]) -> list[Change]:
    """Single changes that save memory, largest saving first; `peak` returns the bytes of a step."""
    current = peak(step)
    found = [Change(about, other, size, current - size) for about, other in changes(step) for size in [peak(other)]]
    return sorted((change for change in found if change.saved > 0), key=lambda change: -change.saved)


def together(step: Step, peak: Callable[[Step], int], room: int) -> list[Change]:
    """The changes, largest saving first, until the step needs at most `room` bytes; all if they are not enough."""
    applied: list[Change] = []
    while peak(step) > room and (candidates := ranked(step, peak)):
        applied.append(candidates[0])
        step = candidates[0].step
    return applied
