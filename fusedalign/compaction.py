"""From tokens in any shape, some of them ignored, to the `Problem` of the valid ones, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedalign.problem import Problem, Spec, SplitHead, with_tensors


@dataclass(frozen=True)
class TokenIndex:
    """The positions of a problem's N tokens in the caller's tensors."""

    shape: torch.Size
    """of the targets"""
    index: Tensor | None
    """[N] int64 into the flattened targets; None: all positions"""

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
    hidden: Tensor,
    weight: Tensor | SplitHead,
    targets: Tensor,
    bias: Tensor | None,
    spec: Spec,
    ignore_index: int,
    *,
    vocab_size: int | None = None,
) -> tuple[Problem, TokenIndex]:
    """The problem of the tokens that are not ignored, after a check that their targets are in range.

    `vocab_size` is the range where `weight` has only some of the rows.
    Waits once for the device of `hidden`, or not at all with targets on the CPU.

    Raises:
        ValueError: a target out of range.
    """
    index = _valid_positions(targets.reshape(-1).cpu(), vocab_size or weight.shape[0], ignore_index)
    token_index = TokenIndex(targets.shape, None if index is None else send(index, hidden.device))
    targets = targets if targets.device == hidden.device else send(targets, hidden.device)
    hidden, targets = token_index.gather(hidden), token_index.gather(targets).contiguous()
    return with_tensors(spec, hidden, weight, targets, bias), token_index


def _valid_positions(targets: Tensor, vocab: int, ignore_index: int) -> Tensor | None:
    """Where the [N] CPU targets are not ignored, [n] int64; None where none is ignored.

    On a GPU this would take eight launches and, with ignored tokens, two waits.

    Raises:
        ValueError: a target out of range.
    """
    if not len(targets):
        return None
    least, most = (x.item() for x in targets.aminmax())
    if least >= 0 and most < vocab and not least <= ignore_index <= most:
        return None
    valid = targets != ignore_index
    wrong = valid & ((targets < 0) | (targets >= vocab))
    if wrong.any():
        got = targets[wrong][0].item()
        raise ValueError(f"targets must be in [0, {vocab}) or ignore_index={ignore_index}, got {got}")
    return None if valid.all() else valid.nonzero().squeeze(-1)


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy CPU tensor `x` to `device` without waiting for it; the caller may reuse `x` at once."""
    if device.type != "cuda":
        return x.to(device)
    pinned = torch.empty_like(x, pin_memory=True).copy_(x)  # pageable memory would synchronise
    return pinned.to(device, non_blocking=True)
