"""From the head's raw product to final logits, and the derivative of that, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from fusedalign.problem import Problem


def transform_(problem: Problem, z: Tensor, bias: Tensor | None) -> Tensor:
    """Final logits, written over raw products `z`; `bias` is that of their columns, [] or broadcast to `z`."""
    if bias is not None:
        z += bias.to(z.dtype)
    if problem.scale != 1.0:
        z *= problem.scale
    if problem.softcap is not None:
        z.div_(problem.softcap).tanh_().mul_(problem.softcap)
    if problem.temperature != 1.0:
        z /= problem.temperature
    return z


def slope(problem: Problem, z: Tensor) -> Tensor | None:
    """(d final logit / d raw logit) / `problem.logit_scale` = 1 - tanh**2, from final logits; None where it is 1."""
    if problem.softcap is None:
        return None
    return (z * (problem.temperature / problem.softcap)).square_().neg_().add_(1)


def locate(targets: Tensor, vocab: slice) -> tuple[Tensor, Tensor]:
    """Each target's column in a tile, clamped into it, and whether the tile has it; both [n]."""
    local = targets - vocab.start
    return local.clamp(0, vocab.stop - vocab.start - 1), (local >= 0) & (local < vocab.stop - vocab.start)
