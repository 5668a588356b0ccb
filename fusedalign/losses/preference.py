"""What every preference loss shares: its result and its checks of what comes in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PreferenceLoss(NamedTuple):
    """What a preference loss returns; all [B], fp32 at least."""

    losses: Tensor
    """one a pair, to be minimised; take its mean"""
    chosen_rewards: Tensor
    """implicit rewards for logging, nats times beta; detached"""
    rejected_rewards: Tensor
    """likewise"""


def check_logps(**logps: Tensor) -> list[Tensor]:
    """The named tensors in fp32 (fp64 stays), after a check that nothing would broadcast.

    Raises:
        TypeError: one is not a floating-point tensor.
        ValueError: they are not all of the first one's shape [B].
    """
    first_name, first = next(iter(logps.items()))
    for name, x in logps.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            came = f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating-point tensor of shape [B], got {came}")
        if x.ndim != 1:
            raise ValueError(f"{name} must have shape [B], one value a sequence, got {tuple(x.shape)}")
        if x.shape != first.shape:
            raise ValueError(f"{name} must have shape {tuple(first.shape)} to match {first_name}, got {tuple(x.shape)}")
    return [x if x.dtype == torch.float64 else x.float() for x in logps.values()]


def check_positive(**values: float) -> None:
    """Raises ValueError unless every named number is above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")


def check_loss_type(loss_type: str, known: object) -> None:
    """Raises ValueError, listing the known names, for any other."""
    names = list(known)  # type: ignore[call-overload]
    if loss_type not in names:
        raise ValueError(f"loss_type must be one of {', '.join(names)}, got {loss_type!r}")
