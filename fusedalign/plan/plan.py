"""A plan: the memory of a step by component, and the changes that save most of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusedalign.plan import sizes
from fusedalign.plan.advice import Change, ranked, together
from fusedalign.plan.model import Shapes
from fusedalign.plan.shape import Model, Step, Trace
from fusedalign.plan.sizes import CONTEXT, OURS, STOCK, Component, Moment


@dataclass(frozen=True)
class Total:
    """The peak of a step."""

    who: str
    """the trainer: ours or stock TRL's"""
    bytes: int
    held: int
    moment: Moment
    """when the peak is reached"""


@dataclass(frozen=True)
class Plan:
    """Everything that the command prints."""

    model: Model
    step: Step
    layers: int
    held: list[Component]
    gradients: Component
    activations: list[Component]
    heads: list[Component]
    totals: list[Total]
    """ours, then stock TRL's, each with gradient checkpointing and without"""
    memory: int | None
    changes: list[Change]
    """single ones, the best first"""
    together: list[Change]
    """applied one after another until the step fits into the memory, or until no change saves any"""

    @property
    def ours(self) -> Total:
        """The peak of the requested step with our trainer."""
        return self.totals[0 if self.step.checkpointing else 1]

    @property
    def needed(self) -> int:
        """Memory of a GPU that our step needs, including the CUDA context."""
        return self.ours.bytes + CONTEXT


def plan(shapes: Shapes, step: Step, memory: int | None = None) -> Plan:
    """Plan a step on a GPU with `memory` bytes; None: unknown."""
    model, trace = shapes.model(step), shapes.trace(step)

    def peak(other: Step) -> int:
        m = shapes.model(other)
        return sizes.peak(m, other, shapes.trace(other), sizes.head_layer(OURS, m, other).bytes)

    return Plan(
        model=model,
        step=step,
        layers=len(trace.order),
        held=sizes.held(model, step),
        gradients=sizes.gradients(model),
        activations=sizes.activations(trace),
        heads=sizes.head_layers(model, step),
        totals=totals(shapes, step),
        memory=memory,
        changes=ranked(step, peak),
        together=[] if memory is None else together(step, peak, memory - CONTEXT),
    )


def totals(shapes: Shapes, step: Step) -> list[Total]:
    """The peaks of ours, then of stock TRL's, each with gradient checkpointing and without."""
    model = shapes.model(step)

    def total(who: str, layers: Trace, head: str, checkpointing: bool) -> Total:
        variant = replace(step, checkpointing=checkpointing)
        held = sum(part.bytes for part in sizes.held(model, variant))
        moment = sizes.largest(model, variant, layers, sizes.head_layer(head, model, step).bytes)
        return Total(who, held + moment.bytes, held, moment)

    ours = [total("fusedalign", shapes.trace(step), OURS, on) for on in (True, False)]
    return ours + [total(STOCK, shapes.trace(step, padded=True), STOCK, on) for on in (True, False)]
