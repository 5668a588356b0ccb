"""A plan: what a step takes, component by component, and which change helps most."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from fusedalign.plan import sizes
from fusedalign.plan.advice import Change, ranked, together
from fusedalign.plan.shape import Model, Step, Trace
from fusedalign.plan.sizes import CONTEXT, OURS, STOCK, Component, Moment


class Source(Protocol):
    """Where records come from: `model.Shapes`, or what a test makes up."""

    def model(self, step: Step) -> Model:
        """The model that a step trains."""

    def trace(self, step: Step, *, padded: bool = False) -> Trace:
        """What its layers take for a micro-batch."""


@dataclass(frozen=True)
class Total:
    """The peak of a step."""

    who: str
    bytes: int
    held: int
    moment: Moment
    """of the peak"""


@dataclass(frozen=True)
class Plan:
    """All that the command prints."""

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
    """one after another, until the step fits the memory or nothing is left to change"""

    @property
    def ours(self) -> Total:
        """The step as it was asked for."""
        return self.totals[0 if self.step.checkpointing else 1]

    @property
    def needed(self) -> int:
        """Of a card, for our step."""
        return self.ours.bytes + CONTEXT


def plan(source: Source, step: Step, memory: int | None = None) -> Plan:
    """Plan a step.

    Args:
        source: of the records of a model and its layers.
        step: how it is trained.
        memory: bytes of the card; None: unknown.
    """
    model, trace = source.model(step), source.trace(step)
    stock_trace = source.trace(step, padded=True)

    def peak(other: Step) -> int:
        m = source.model(other)
        return sizes.peak(m, other, source.trace(other), sizes.head_layer(OURS, m, other).bytes)

    def total(who: str, of: Trace, head: int, checkpointing: bool) -> Total:
        this = replace(step, checkpointing=checkpointing)
        held = sum(part.bytes for part in sizes.held(model, this))
        moment = sizes.largest(model, this, of, head)
        return Total(who, held + moment.bytes, held, moment)

    ours, stock = (sizes.head_layer(name, model, step).bytes for name in (OURS, STOCK))
    totals = [total("fusedalign", trace, ours, on) for on in (True, False)]
    totals += [total(STOCK, stock_trace, stock, on) for on in (True, False)]
    return Plan(
        model=model,
        step=step,
        layers=len(trace.order),
        held=sizes.held(model, step),
        gradients=sizes.gradients(model),
        activations=sizes.activations(trace),
        heads=sizes.head_layers(model, step),
        totals=totals,
        memory=memory,
        changes=ranked(step, peak),
        together=[] if memory is None else together(step, peak, memory - CONTEXT),
    )
