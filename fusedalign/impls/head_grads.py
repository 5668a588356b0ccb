"""Where the gradients of the head's tensors go, and in which order autograd wants them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fusedalign.problem import Problem

#: Of each tensor of the head: contiguous memory of its shape and dtype that its gradient is added to; None, or no entry
#: at all: new memory is written.
Accumulators = tuple[Tensor | None, ...]


class GradTarget(NamedTuple):
    """The destination of the gradient of one tensor of the head."""

    columns: slice
    """of hidden, that the tensor multiplies"""
    memory: Tensor
    """of the tensor's shape and dtype, contiguous"""
    adds: bool = False
    """to what `memory` holds; else that is overwritten"""

    def write(self, rows: slice, x: Tensor) -> None:
        """Some rows, in any wider dtype."""
        out = self.memory[rows]
        out.add_(x) if self.adds else out.copy_(x)


def grad_targets(problem: Problem, accumulators: Accumulators = ()) -> list[GradTarget]:
    """One for each tensor of the head that needs a gradient."""
    targets = []
    for (columns, x), total in zip(problem.head, accumulators or (None,) * len(problem.head), strict=True):
        if x.requires_grad:
            memory = torch.empty_like(x, memory_format=torch.contiguous_format) if total is None else total
            targets.append(GradTarget(columns, memory, adds=total is not None))
    return targets


def trainable_parts(problem: Problem) -> list[tuple[slice, Tensor]]:
    """The entries of `problem.head` that need a gradient."""
    return [(columns, x) for columns, x in problem.head if x.requires_grad]


def in_head_order(problem: Problem, grads: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of `trainable_parts` in the order of the head's tensors, None for the others."""
    grads = iter(grads)
    return tuple(next(grads) if x.requires_grad else None for _, x in problem.head)


class CompensatedSum:
    """A gradient accumulated in its final dtype, with an optional low-order companion (compensated summation).

    Rounding each partial sum to bf16 would add 1.1e-3 of relative error a chunk. High and low half together carry 16
    bits of mantissa, so that the number of chunks does not matter, at half the size of an fp32 sum.
    """

    def __init__(self, like: Tensor, compensate: bool) -> None:
        self.high = torch.zeros_like(like, memory_format=torch.contiguous_format)
        self.low = torch.zeros_like(self.high) if compensate else None

    def add(self, rows: slice, x: Tensor) -> None:
        """Add to some rows; `x` becomes scratch."""
        high = self.high[rows]
        if self.low is None:
            high += x
            return
        total = x.add_(high).add_(self.low[rows])
        high.copy_(total)
        self.low[rows] = total.sub_(high)
