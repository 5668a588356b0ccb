"""Which change of a step saves most memory: each is planned like the step itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from fusedalign.plan.shape import OPTIMISERS, Step

LORA_R = 16
EIGHT_BITS = "adamw_bnb_8bit"


@dataclass(frozen=True)
class Change:
    """Another way to train, and what its step takes."""

    about: str
    step: Step
    bytes: int
    saved: int


def changes(step: Step) -> Iterator[tuple[str, Step]]:
    """What a user can turn, where the step has not turned it."""
    if not step.lora_r:
        yield f"LoRA, --lora_r {LORA_R}", replace(step, lora_r=LORA_R)
    if not step.checkpointing:
        yield "gradient checkpointing", replace(step, checkpointing=True)
    if step.live_reference and not step.lora_r:
        yield "reference precomputed, --precompute_ref_log_probs", replace(step, precomputed=True)
    if step.batch > 1:
        parts = next(n for n in range(2, step.batch + 1) if step.batch % n == 0)  # so that a step has as many rows
        tokens = None if step.tokens is None else -(-step.tokens // parts)
        less = replace(step, batch=step.batch // parts, tokens=tokens, accumulation=parts * step.accumulation)
        yield f"--batch {less.batch} --accumulation {less.accumulation}", less
    if step.dtype != "bfloat16":
        yield "weights in bf16, --dtype bfloat16", replace(step, dtype="bfloat16")
    if OPTIMISERS[step.optimiser].state_bytes is None and not step.lora_r:
        yield f"optimiser of 8 bits, --optim {EIGHT_BITS}", replace(step, optimiser=EIGHT_BITS)


def ranked(step: Step, peak: Callable[[Step], int]) -> list[Change]:
    """Single changes that save memory, those that save most first; `peak` plans a step."""
    now = peak(step)
    found = [Change(about, other, size, now - size) for about, other in changes(step) for size in [peak(other)]]
    return sorted((change for change in found if change.saved > 0), key=lambda change: -change.saved)


def together(step: Step, peak: Callable[[Step], int], room: int) -> list[Change]:
    """Changes one after another, the largest gain first, until the step takes no more than `room` bytes.

    Returns:
        As many as are needed, each with what it leaves; all that there are where they are not enough.
    """
    taken: list[Change] = []
    while peak(step) > room and (further := ranked(step, peak)):
        taken.append(further[0])
        step = further[0].step
    return taken
