"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedalign.checks import check_nonnegative, check_plain, check_positive, values_within
from fusedalign.losses.common import (
    as_float,
    check_label_smoothing,
    check_loss_type,
    check_shape,
    check_unused,
    nonzero,
)

#: loss_type -> the factor of each token's log p(target), which takes no gradient itself.
LOSS_TYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "nll": lambda logps: -logps.new_ones(()).expand_as(logps),
    "dft": lambda logps: -logps.exp(),
}


def sft_loss(
    logps: Tensor,
    mask: Tensor,
    *,
    num_items: float | Tensor | None = None,
    loss_type: str = "nll",
    label_smoothing: float = 0.0,
    mean_logps: Tensor | None = None,
    z_loss: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """The training loss of supervised fine-tuning::

        nll:  -sum over mask of logps / num_items
        dft:  -sum over mask of p * logps / num_items, with p = exp(logps) as a constant

    With label smoothing eps, the token's loss is (1 - eps) of that plus -eps * mean_logps; with a z-loss,
    z_loss * lse**2 is added to it.

    Args:
        logps: [...], log p(target) of each token, nats.
        mask: [...] bool (or 0/1), which tokens count; `logps` elsewhere has no influence, not even NaN.
        num_items: what the sum is divided by, a finite number >= 0 or a tensor of one; default: how many tokens count
            here. Under gradient accumulation or data parallelism pass the number of the whole window over all ranks, so
            that every token weighs the same. 0 divides by nothing. A tensor on a GPU or in a graph is not read:
            out of that range it makes the loss NaN.
        loss_type: "nll" or "dft".
        label_smoothing: in [0, 1), "nll" only; the share of the target's weight that is spread over the vocabulary.
        mean_logps: [...], mean over the vocabulary of log p, nats: mean logit minus lse. `TokenLogps.mean_logit`
            carries no gradient; without a softcap, scale * (hidden @ weight.mean(0) + bias.mean()) / temperature is
            the same and does.
        z_loss: >= 0, weight of the squared log-sum-exp.
        lse: [...], `TokenLogps.lse`, nats.

    Returns:
        A scalar in fp32 at least; 0, still connected to the graph, where no token counts.

    Raises:
        TypeError: `logps` is not floating-point.
        ValueError: a shape differs, a number is out of its range, an unknown loss_type, or one of mean_logps and lse
            is missing or has no use.

    Source:
        nll: cross-entropy of the next token, as in TRL's SFTTrainer and transformers' ForCausalLMLoss. dft: Wu et al.
        2025, arXiv:2508.05629, with TRL's normaliser. Label smoothing: Szegedy et al. 2015, arXiv:1512.00567, section
        7, as in PyTorch's cross_entropy. z-loss: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 5.

    Example:
        >>> import torch
        >>> sft_loss(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[True, True, False]])).item()
        1.5
    """
    if not isinstance(logps, Tensor) or not logps.is_floating_point():
        got = logps.dtype if isinstance(logps, Tensor) else type(logps).__name__
        raise TypeError(f"logps must be floating-point, got {got}")
    check_plain(logps=logps)
    check_shape("mask", mask, "logps", logps)
    mask = mask.bool()
    logps = as_float(logps).where(mask, 0.0)
    check_loss_type(loss_type, LOSS_TYPES)
    losses = LOSS_TYPES[loss_type](logps.detach()) * logps
    check_unused("label_smoothing", label_smoothing, 0.0, ["nll"], [loss_type])
    check_label_smoothing(label_smoothing, loss_type=loss_type)
    check_nonnegative(z_loss=z_loss)
    smoothing_logps = _companion("mean_logps", mean_logps, "label_smoothing", label_smoothing, mask)
    if smoothing_logps is not None:
        losses = (1 - label_smoothing) * losses - label_smoothing * smoothing_logps
    if (z_lse := _companion("lse", lse, "z_loss", z_loss, mask)) is not None:
        losses = losses + z_loss * z_lse.square()
    losses = losses.where(mask, 0.0)
    return mean_over(losses.sum(), mask.sum() if num_items is None else check_num_items(num_items))


def token_losses(
    logps: Tensor, lse: Tensor | None, *, loss_type: str, z_loss: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each token's loss before any division, and its derivatives by logps and lse (None: zero); all [N]."""
    weight = LOSS_TYPES[loss_type](logps.detach())
    if lse is None or not z_loss:
        return weight * logps, weight, None
    return weight * logps + z_loss * lse.square(), weight, 2 * z_loss * lse


@dataclass(frozen=True)
class SFTTokenLoss:
    """The `TokenLoss` of `linear_cross_entropy`: (logps, lse) -> the terms of the loss and their derivatives, all [N].

    lse is not read, and may be None, where z_loss is 0.
    """

    loss_type: str
    z_loss: float
    reduction: str
    num_items: float | Tensor

    def __post_init__(self) -> None:
        check_loss_type(self.loss_type, LOSS_TYPES)

    def __call__(self, logps: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The terms of the loss, and their derivatives by logps and lse (None: zero)."""
        losses, d_logps, d_lse = token_losses(logps, lse, loss_type=self.loss_type, z_loss=self.z_loss)
        # Divided here and not at the end, so that most backwards have nothing to scale.
        return self._reduce(losses), self._reduce(d_logps), None if d_lse is None else self._reduce(d_lse)

    @property
    def nll_weight(self) -> Tensor | None:
        """The factor of every token's NLL; None where tokens differ or the loss has other terms."""
        if self.loss_type != "nll" or self.z_loss:
            return None
        return self._reduce(torch.ones((), dtype=torch.float32, device=getattr(self.num_items, "device", None)))

    def _reduce(self, x: Tensor) -> Tensor:
        return x if self.reduction == "sum" else mean_over(x, self.num_items)


def check_num_items(num_items: float | Tensor) -> float | Tensor:
    """Check that `num_items` is one finite number >= 0; on a GPU and in a graph it becomes NaN if not.

    Raises:
        TypeError: no number, or no plain tensor.
        ValueError: out of range, or a tensor of several.
    """
    if not isinstance(num_items, Tensor):
        check_nonnegative(num_items=num_items)
        if num_items != 0:
            check_positive(num_items=num_items)
        return num_items
    check_plain(num_items=num_items)
    if num_items.numel() != 1:
        raise ValueError(f"num_items must be one number, got a tensor of shape {tuple(num_items.shape)}")
    dtype = torch.float32 if num_items.device.type == "mps" else torch.float64  # holds every count
    return values_within("num_items", num_items.detach().reshape(()).to(dtype), least=0.0)


def mean_over(total: Tensor, num_items: float | Tensor) -> Tensor:
    """`total / num_items`, which is checked already, and `total` where there are no items: nothing is divided by 0."""
    if isinstance(num_items, Tensor):
        return total / nonzero(num_items.to(total))
    return total / (num_items if num_items != 0 else 1)


def _companion(name: str, x: Tensor | None, option: str, value: float, mask: Tensor) -> Tensor | None:
    """The per-token tensor that `option` needs; each is refused without the other."""
    if x is None and value:
        raise ValueError(f"{name} is needed with {option}={value}, got None")
    if x is not None and not value:
        raise ValueError(f"{name} is for {option} > 0 only, got it with {option}={value}")
    if x is None:
        return None
    check_shape(name, x, "logps", mask)
    return as_float(x).where(mask, 0.0)
