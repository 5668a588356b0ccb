"""What an impl knows of each token: the sums of its softmax, and the gradients that its logits are to take."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fusedalign.problem import Problem, TokenLogps, TokenLoss


class HeadGrad(NamedTuple):
    """Where the gradient of a tensor of the head goes."""

    columns: slice
    """of hidden, that make it"""
    memory: Tensor
    """of the tensor's shape and dtype, contiguous"""
    adds: bool = False
    """to what is in there; else that is overwritten"""

    def write(self, vocab: slice, x: Tensor) -> None:
        """Some rows, in any wider dtype."""
        out = self.memory[vocab]
        out.add_(x) if self.adds else out.copy_(x)


def head_grads(problem: Problem) -> list[HeadGrad]:
    """For the tensors of the head that need a gradient."""
    sums = problem.head_sums or [None] * len(problem.head)
    grads = []
    for (columns, x), so_far in zip(problem.head, sums, strict=True):
        if x.requires_grad:
            memory = torch.empty_like(x, memory_format=torch.contiguous_format) if so_far is None else so_far
            grads.append(HeadGrad(columns, memory, adds=so_far is not None))
    return grads


def trained(problem: Problem) -> list[tuple[slice, Tensor]]:
    """What needs a gradient of `problem.head`."""
    return [(columns, x) for columns, x in problem.head if x.requires_grad]


def of_each_part(problem: Problem, grads: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of what needs one, in the order of the head's tensors: None for the others."""
    grads = iter(grads)
    return tuple(next(grads) if x.requires_grad else None for _, x in problem.head)


class RowSums:
    """Softmax sums of N tokens over the columns seen so far, [N] in the logit dtype; z the final logits.

    `max` is the largest z, e = exp(z - max). Fields of outputs that nobody asked for are None.
    """

    def __init__(self, problem: Problem) -> None:
        outputs = problem.outputs

        # All zeros at once: on a GPU these small launches come before the first large one.
        names = [name for name in ("entropy", "log_sum_sq_probs", "mean_logit") if name in outputs]
        zeros = problem.hidden.new_zeros((2 + len(names), len(problem.hidden)), dtype=problem.logit_dtype)
        self.e, self.target, *others = zeros.unbind()
        of = dict(zip(names, others, strict=True))
        self.max = torch.full_like(self.e, -torch.inf)
        self.e_log_e, self.e_sq = of.get("entropy"), of.get("log_sum_sq_probs")
        self.logit = of.get("mean_logit")
        self.top = torch.full_like(problem.targets, -1) if "is_top1" in outputs else None

    def log_e(self, tokens: slice = slice(None)) -> Tensor:
        """log sum e; with `max` the two halves of the log-sum-exp, kept apart because their sum rounds more."""
        return self.e[tokens].log()

    def logps(self, tokens: slice = slice(None)) -> Tensor:
        """(target - max) <= 0 and log sum e >= 0, so never above 0."""
        return self.target[tokens] - self.max[tokens] - self.log_e(tokens)

    def lse(self, tokens: slice = slice(None)) -> Tensor:
        """Log-sum-exp of z."""
        return self.max[tokens] + self.log_e(tokens)

    def entropy(self) -> Tensor:
        """Nats."""
        assert self.e_log_e is not None
        return (self.log_e() - self.e_log_e / self.e).clamp_(min=0)

    def results(self, problem: Problem) -> TokenLogps:
        """What the caller asked for, once every column has been seen."""
        outputs, dtype = problem.outputs, problem.result_dtype
        logps = self.logps()
        return TokenLogps(
            logps=logps.to(dtype),
            entropy=self.entropy().to(dtype) if "entropy" in outputs else None,
            lse=self.lse().to(dtype) if "lse" in outputs else None,
            mean_logit=None if self.logit is None else (self.logit / problem.weight.shape[0]).to(dtype),
            log_sum_sq_probs=None if self.e_sq is None else (self.e_sq.log() - 2 * self.log_e()).to(dtype),
            is_top1=None if self.top is None else (self.top == problem.targets).logical_and_(~logps.isnan()),
        )


@dataclass(frozen=True)
class TokenGrads:
    """What the gradient of a tile needs of each token, [N] in the logit dtype; a None gradient is zero."""

    max: Tensor
    log_e: Tensor
    logps: Tensor
    """d loss / d logps"""
    lse: Tensor | None = None
    """d loss / d lse"""
    entropy: tuple[Tensor, Tensor] | None = None
    """d loss / d entropy, and the entropy"""

    def rows(self, tokens: slice) -> TokenGrads:
        """Those of some tokens."""
        entropy = None if self.entropy is None else (self.entropy[0][tokens], self.entropy[1][tokens])
        lse = None if self.lse is None else self.lse[tokens]
        return TokenGrads(self.max[tokens], self.log_e[tokens], self.logps[tokens], lse, entropy)

    def scaled(self, factor: Tensor) -> TokenGrads:
        """With every upstream gradient times `factor`."""
        entropy = None if self.entropy is None else (self.entropy[0] * factor, self.entropy[1])
        lse = None if self.lse is None else self.lse * factor
        return replace(self, logps=self.logps * factor, lse=lse, entropy=entropy)

    def of_target(self, logps: Tensor) -> Tensor:
        """d loss / d (final logit of the target), [N], for a loss of logps and lse alone; `logps` are the tokens' own.

        Sums over tiles that take rounded probabilities leave the target out and take this instead: where p is near 1,
        the rounding of p would be larger than 1 - p.
        """
        grad = -self.logps * logps.expm1()
        return grad if self.lse is None else grad + self.lse * logps.exp()

    def of_others(self) -> Tensor:
        """What p is multiplied with at all other columns, [N], for such a loss."""
        return -self.logps if self.lse is None else self.lse - self.logps

    def largest(self) -> Tensor:
        """The largest upstream gradient, a scalar."""
        upstream = [self.logps, *([] if self.lse is None else [self.lse]), *(self.entropy or ())[:1]]
        return functools.reduce(torch.maximum, (g.abs().amax() for g in upstream))


def grads_of_token_loss(
    sums: RowSums, tokens: slice, token_loss: TokenLoss, dtype: torch.dtype
) -> tuple[Tensor, TokenGrads]:
    """The summed loss of some tokens and its gradients by their logps and lse."""
    losses, d_logps, d_lse = token_loss(sums.logps(tokens).to(dtype), sums.lse(tokens).to(dtype))
    inner = sums.max.dtype
    d_lse = None if d_lse is None else d_lse.to(inner)
    return losses.sum(), TokenGrads(sums.max[tokens], sums.log_e(tokens), d_logps.to(inner).contiguous(), d_lse)


def fit_half(problem: Problem, grads: TokenGrads) -> tuple[TokenGrads, Tensor | None]:
    """For fp16 products: upstream gradients brought to where fp16 neither overflows nor loses the small ones.

    |d loss / d logit| <= |scale / temperature| * (1 + 1 + log V + 1) * the largest upstream gradient, so with that
    product at 2**10 the tile stays below fp16's 65504 and probabilities down to 6e-11 are kept.

    Returns:
        The gradients and the factor by which every product of them must be multiplied (None: by nothing).
    """
    if problem.operand_dtype != torch.float16 or not len(grads.logps):
        return grads, None
    tiny = torch.finfo(grads.logps.dtype).tiny
    undo = (grads.largest() * max(1.0, abs(problem.scale / problem.temperature)) / 2**10).clamp(min=tiny)
    return grads.scaled(1 / undo), undo


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """`x`, multiplied in place where there is a factor."""
    return x if factor is None else x.mul_(factor)
