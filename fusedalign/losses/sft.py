"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedalign.losses.preference import check_loss_type

#: loss_type -> the loss of each token by itself, from its log p(target).
LOSS_TYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "nll": lambda logps: -logps,
    "dft": lambda logps: -logps.detach().exp() * logps,
}


def token_loss(logps: Tensor, *, loss_type: str = "nll") -> Tensor:
    """The loss of each token by itself, before any sum: see `sft_loss`.

    Args:
        logps: any shape, log p(target), nats.
        loss_type: "nll" or "dft".

    Returns:
        The shape of `logps`.

    Raises:
        ValueError: unknown loss_type.
    """
    check_loss_type(loss_type, LOSS_TYPES)
    return LOSS_TYPES[loss_type](logps)


def sft_loss(logps: Tensor, mask: Tensor, *, num_items: int | Tensor | None = None, loss_type: str = "nll") -> Tensor:
    """The training loss of supervised fine-tuning::

        nll:  -sum over mask of logps / num_items
        dft:  -sum over mask of p * logps / num_items, with p = exp(logps) as a constant

    Args:
        logps: [...], log p(target) of each token, nats.
        mask: [...] bool (or 0/1), which tokens count; what stands elsewhere in `logps` has no influence, not even NaN.
        num_items: what the sum is divided by; default: how many tokens count here. Under gradient accumulation or data
            parallelism pass the number of the whole window over all ranks, so that every token weighs the same.
        loss_type: "nll" or "dft".

    Returns:
        A scalar in fp32 at least; 0, still connected to the graph, where no token counts.

    Raises:
        TypeError: `logps` is not floating-point.
        ValueError: `mask` has another shape, num_items is negative, or unknown loss_type.

    Source:
        nll: cross-entropy of the next token, as in TRL's SFTTrainer and transformers' ForCausalLMLoss. dft: Wu et al.
        2025, arXiv:2508.05629, equation 9, with TRL's normaliser.

    Example:
        >>> import torch
        >>> sft_loss(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[True, True, False]])).item()
        1.5
    """
    if not logps.is_floating_point():
        raise TypeError(f"logps must be floating-point, got {logps.dtype}")
    if mask.shape != logps.shape:
        raise ValueError(f"mask must have shape {tuple(logps.shape)} to match logps, got {tuple(mask.shape)}")
    if isinstance(num_items, (int, float)) and num_items < 0:
        raise ValueError(f"num_items must be >= 0, got {num_items}")
    mask = mask.bool()
    logps = (logps if logps.dtype == torch.float64 else logps.float()).where(mask, 0.0)
    losses = token_loss(logps, loss_type=loss_type).where(mask, 0.0)
    count = mask.sum() if num_items is None else torch.as_tensor(num_items, device=logps.device)
    return losses.sum() / count.clamp(min=1)
