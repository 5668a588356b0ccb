"""From tokens in any shape, some of them ignored, to the `Problem` of those that count, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedalign.problem import Parts, Problem


@dataclass(frozen=True)
class Places:
    """Where the N tokens of a problem come from."""

    shape: torch.Size
    """of the targets"""
    index: Tensor | None
    """[N] int64 into the flattened targets; None: all of them"""

    def scatter(self, x: Tensor) -> Tensor:
        """[N, ...] to [*shape, ...], zeros at the ignored tokens."""
        if self.index is not None:
            x = x.new_zeros(self.shape.numel(), *x.shape[1:]).index_copy(0, self.index, x)
        return x.reshape((*self.shape, *x.shape[1:]))

    def gather(self, x: Tensor) -> Tensor:
        """[*shape, ...] to [N, ...]."""
        x = x.reshape(-1, *x.shape[len(self.shape) :])
        return x if self.index is None else x.index_select(0, self.index)


def compact(
    hidden: Tensor, weight: Tensor | Parts, targets: Tensor, *, ignore_index: int, **options: Any
) -> tuple[Problem, Places]:
    """The problem of the tokens that are not ignored, once their targets are known to be in range.

    Raises:
        ValueError: a target out of range.
    """
    flat = targets.reshape(-1)
    counts = flat != ignore_index
    index = None
    if _count(flat, counts, weight.shape[0], ignore_index) < len(flat):
        index = counts.nonzero().squeeze(-1)
    places = Places(targets.shape, index)
    return Problem(places.gather(hidden), weight, places.gather(targets), **options), places


def _count(targets: Tensor, counts: Tensor, vocab: int, ignore_index: int) -> int:
    """How many targets count, once none of these is out of range: one wait for the device."""
    wrong = counts & ((targets < 0) | (targets >= vocab))
    count, errors = torch.stack([counts.sum(), wrong.sum()]).tolist()
    if errors:
        came = targets[wrong][0].item()
        raise ValueError(f"targets must be in [0, {vocab}) or ignore_index={ignore_index}, got {came}")
    return count
