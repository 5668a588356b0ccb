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

    One wait for the device of `hidden`, or none with targets on the CPU.

    Raises:
        ValueError: a target out of range.
    """
    index = _those_that_count(targets.reshape(-1).cpu(), weight.shape[0], ignore_index)
    places = Places(targets.shape, None if index is None else send(index, hidden.device))
    targets = targets if targets.device == hidden.device else send(targets, hidden.device)
    return Problem(places.gather(hidden), weight, places.gather(targets).contiguous(), **options), places


def _those_that_count(targets: Tensor, vocab: int, ignore_index: int) -> Tensor | None:
    """Where the [N] targets are not ignored, [n] int64; None where none is. ValueError where one is out of range.

    On the CPU: on a GPU it would take eight launches and, where tokens are ignored, two waits.
    """
    if not len(targets):
        return None
    least, most = (x.item() for x in targets.aminmax())
    if least >= 0 and most < vocab and not least <= ignore_index <= most:
        return None
    counts = targets != ignore_index
    wrong = counts & ((targets < 0) | (targets >= vocab))
    if wrong.any():
        came = targets[wrong][0].item()
        raise ValueError(f"targets must be in [0, {vocab}) or ignore_index={ignore_index}, got {came}")
    return None if counts.all() else counts.nonzero().squeeze(-1)


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x`, which is on the CPU, on `device`, without a wait for that; the caller may write into `x` meanwhile."""
    if device.type != "cuda":
        return x.to(device)
    return torch.empty_like(x, pin_memory=True).copy_(x).to(device, non_blocking=True)  # others can have the CPU wait
