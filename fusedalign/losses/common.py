"""Shared by the losses: their result, their checks, and terms that occur in several of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedalign.checks import check_finite, check_plain

#: Exponents are held at this value: e**40 is 2.4e17, and its square still fits fp32.
MAX_EXPONENT = 40.0


class PreferenceLoss(NamedTuple):
    """The result of a preference loss, in fp32 at least."""

    losses: Tensor
    """[B], one a pair (or, for KTO, a sequence), to be minimised; take its mean"""
    chosen_rewards: Tensor
    """[B] implicit rewards for logging; detached"""
    rejected_rewards: Tensor
    """[B] implicit rewards for logging; detached"""


def smoothed_logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - eps) log s(margin) - eps log s(-margin): the logistic loss if a share eps of the labels is flipped."""
    if label_smoothing == 0.0:
        return -F.logsigmoid(margin)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def check_logps(**logps: Tensor) -> list[Tensor]:
    """The named tensors in fp32 (fp64 stays), after a check that nothing would broadcast.

    Raises:
        TypeError: one is not a floating-point tensor, or no plain one.
        ValueError: one is not of the first one's shape [B].
    """
    check_plain(**logps)
    first_name, first = next(iter(logps.items()))
    for name, x in logps.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating-point tensor of shape [B], got {got}")
        if x.ndim != 1:
            raise ValueError(f"{name} must have shape [B], one value a sequence, got {tuple(x.shape)}")
        check_shape(name, x, first_name, first)
    return [as_float(x) for x in logps.values()]


def as_float(x: Tensor) -> Tensor:
    """`x` in fp32 at least: losses are never computed in a half precision."""
    return x if x.dtype == torch.float64 else x.float()


def nonzero(counts: Tensor) -> Tensor:
    """Counts as divisors: 0 becomes 1, so that the mean over no elements is 0."""
    return counts.where(counts != 0, 1)


def check_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raises TypeError unless `x` is a plain tensor, ValueError unless both have one shape and one device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    check_plain(**{name: x})
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {x.device}")
    if x.shape != other.shape:
        raise ValueError(f"{name} must have shape {tuple(other.shape)} to match {other_name}, got {tuple(x.shape)}")


def check_label_smoothing(value: float, *, below: float = 1.0, above_zero: bool = False, loss_type: str) -> None:
    """Raises ValueError, naming the range, unless `0 <= value < below`, 0 itself left out with `above_zero`."""
    check_finite(label_smoothing=value)
    if not 0 <= value < below or (above_zero and value == 0):
        span = f"{'(' if above_zero else '['}0, {below:g})"
        raise ValueError(f"label_smoothing must be in {span} with loss_type={loss_type!r}, got {value}")


def check_loss_type(loss_type: str, known: Iterable[str]) -> None:
    """Raises ValueError, listing the known names, for any other."""
    names = list(known)
    if loss_type not in names:
        raise ValueError(f"loss_type must be one of {', '.join(names)}, got {loss_type!r}")


def check_unused(name: str, value: object, default: object, users: Iterable[str], loss_types: Iterable[str]) -> None:
    """Raises ValueError where an option has been set that none of `loss_types` uses."""
    users = list(users)
    if not set(users) & set(loss_types) and value != default:
        chosen = ", ".join(loss_types)
        raise ValueError(
            f"{name} is for loss_type {', '.join(users)} only, with {chosen} it must be {default}, got {value}"
        )
