"""Per-token softmax statistics and upstream gradients, shared by the impls that make their own gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusedalign.impls.logits import locate
from fusedalign.problem import Problem, TokenLogps, TokenLoss

#: exp() of this is 0 in every dtype; standing in for -inf it keeps 0 * log 0 at 0. NaN passes a clamp unchanged.
LOG_ZERO = -1e4

#: The outputs that need a running sum of their own, which starts at 0.
SUMMED = ("entropy", "log_sum_sq_probs", "mean_logit")


class SoftmaxStats:
    """Running softmax statistics of N tokens over the columns seen so far, [N] in the logit dtype; z the final logits.

    `max` is the largest z, `e` the sum of exp(z - max), `target` the target's z. Fields of outputs that are not asked
    for are None.
    """

    #: Those with floating-point values.
    FLOATS = ("max", "e", "target", "e_log_e", "e_sq", "logit")

    def __init__(self, problem: Problem) -> None:
        outputs, self.vocab_size = problem.outputs, problem.weight.shape[0]
        # All zeros at once: on a GPU these small launches come before the first large one.
        names = [name for name in SUMMED if name in outputs]
        zeros = problem.hidden.new_zeros((2 + len(names), len(problem.hidden)), dtype=problem.logit_dtype)
        self.e, self.target, *sums = zeros.unbind()
        summed = dict(zip(names, sums, strict=True))
        self.max = torch.full_like(self.e, -torch.inf)
        self.e_log_e, self.e_sq = summed.get("entropy"), summed.get("log_sum_sq_probs")
        self.logit = summed.get("mean_logit")
        self.top = torch.full_like(problem.targets, -1) if "is_top1" in outputs else None

    def fold(self, tokens: slice, z: Tensor, targets: Tensor, vocab: slice, *, keep: bool) -> tuple[Tensor, Tensor]:
        """Add a tile of logits, in plain PyTorch; `keep` leaves `z` as it is, else it becomes scratch.

        Returns:
            `e` of this tile, [tokens, vocab], and the factor [tokens] by which all earlier sums have shrunk.
        """
        tile_max, tile_top = z.max(-1)
        old_max = self.max[tokens]
        if self.top is not None:
            self.top[tokens] = torch.where(tile_max > old_max, tile_top + vocab.start, self.top[tokens])
        if self.logit is not None:
            self.logit[tokens] += z.sum(-1)
        index, inside = locate(targets, vocab)
        self.target[tokens] = torch.where(inside, z.gather(-1, index[:, None]).squeeze(-1), self.target[tokens])

        new_max = torch.maximum(old_max, tile_max)
        # Only -inf so far: any finite reference gives e = 0 where the difference of two infinities would give NaN.
        reference = new_max.masked_fill(new_max == -torch.inf, 0.0)
        log_shrink = (old_max - reference).clamp_(min=LOG_ZERO)
        shrink = log_shrink.exp()
        log_e = z - reference[:, None] if keep else z.sub_(reference[:, None])
        needs_log_e = self.e_log_e is not None or self.e_sq is not None
        e = log_e.exp() if needs_log_e else log_e.exp_()
        if self.e_log_e is not None:
            # sum e log e moves to the new maximum before the old sum of e does
            moved = shrink * (self.e_log_e[tokens] + log_shrink * self.e[tokens])
            self.e_log_e[tokens] = moved + log_e.clamp_(min=LOG_ZERO).mul_(e).sum(-1)
        if self.e_sq is not None:
            self.e_sq[tokens] = shrink.square() * self.e_sq[tokens] + torch.mul(e, e, out=log_e).sum(-1)
        self.e[tokens] = shrink * self.e[tokens] + e.sum(-1)
        self.max[tokens] = new_max
        return e, shrink

    def merge(self, shards: dict[str, Tensor]) -> None:
        """Replace the statistics by those of several parts of the vocabulary, each [parts, N], by the names of FLOATS."""
        maxima = shards["max"]
        self.max = maxima.amax(0)
        log_shrink = (maxima - self.max.masked_fill(self.max == -torch.inf, 0.0)).clamp_(min=LOG_ZERO)
        shrink = log_shrink.exp()
        self.e, self.target = (shrink * shards["e"]).sum(0), shards["target"].sum(0)
        if "e_log_e" in shards:
            self.e_log_e = (shrink * (shards["e_log_e"] + log_shrink * shards["e"])).sum(0)
        if "e_sq" in shards:
            self.e_sq = (shrink.square() * shards["e_sq"]).sum(0)
        if "logit" in shards:
            self.logit = shards["logit"].sum(0)

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
        """The outputs asked for, once every column has been seen."""
        outputs, dtype = problem.outputs, problem.result_dtype
        logps = self.logps()
        return TokenLogps(
            logps=logps.to(dtype),
            entropy=self.entropy().to(dtype) if "entropy" in outputs else None,
            lse=self.lse().to(dtype) if "lse" in outputs else None,
            mean_logit=None if self.logit is None else (self.logit / self.vocab_size).to(dtype),
            log_sum_sq_probs=None if self.e_sq is None else (self.e_sq.log() - 2 * self.log_e()).to(dtype),
            is_top1=None if self.top is None else (self.top == problem.targets).logical_and_(~logps.isnan()),
        )


@dataclass(frozen=True)
class TokenGrads:
    """Upstream gradients of N tokens and the statistics that a tile's gradient needs, [N] in the logit dtype.

    A gradient that is None is zero.
    """

    max: Tensor
    log_e: Tensor
    logps: Tensor
    """d loss / d logps"""
    lse: Tensor | None = None
    """d loss / d lse"""
    entropy: tuple[Tensor, Tensor] | None = None
    """d loss / d entropy, and the entropy"""

    def __getitem__(self, tokens: slice) -> TokenGrads:
        entropy = None if self.entropy is None else (self.entropy[0][tokens], self.entropy[1][tokens])
        lse = None if self.lse is None else self.lse[tokens]
        return TokenGrads(self.max[tokens], self.log_e[tokens], self.logps[tokens], lse, entropy)

    def scaled(self, factor: Tensor) -> TokenGrads:
        """With every upstream gradient times `factor`."""
        entropy = None if self.entropy is None else (self.entropy[0] * factor, self.entropy[1])
        lse = None if self.lse is None else self.lse * factor
        return replace(self, logps=self.logps * factor, lse=lse, entropy=entropy)

    def d_target(self, logps: Tensor) -> Tensor:
        """d loss / d (final logit of the target), [N], for a loss of logps and lse alone; `logps` are log p(target).

        Sums over tiles of rounded probabilities leave the target out and add this instead: where p is near 1, the
        rounding of p would be larger than 1 - p.
        """
        grad = -self.logps * logps.expm1()
        return grad if self.lse is None else grad + self.lse * logps.exp()

    def p_scale(self) -> Tensor:
        """(d loss / d final logit) / p of every other column, [N], for a loss of logps and lse alone."""
        return -self.logps if self.lse is None else self.lse - self.logps

    def largest(self) -> Tensor:
        """The largest upstream gradient, a scalar."""
        upstream = [self.logps, *([] if self.lse is None else [self.lse]), *(self.entropy or ())[:1]]
        return functools.reduce(torch.maximum, (g.abs().amax() for g in upstream))


def ones_upstream(stats: SoftmaxStats, tokens: slice = slice(None)) -> TokenGrads:
    """An upstream gradient of 1 for every log p(target)."""
    return TokenGrads(stats.max[tokens], stats.log_e(tokens), torch.ones_like(stats.max[tokens]))


def token_loss_grads(
    stats: SoftmaxStats, tokens: slice, token_loss: TokenLoss, dtype: torch.dtype
) -> tuple[Tensor, TokenGrads]:
    """The summed loss of some tokens, in `dtype`, and its gradients by their logps and lse."""
    losses, d_logps, d_lse = token_loss(stats.logps(tokens).to(dtype), stats.lse(tokens).to(dtype))
    logit_dtype = stats.max.dtype
    d_lse = None if d_lse is None else d_lse.to(logit_dtype)
    d_logps = d_logps.to(logit_dtype).contiguous()
    return losses.sum(), TokenGrads(stats.max[tokens], stats.log_e(tokens), d_logps, d_lse)


def scale_for_fp16(problem: Problem, grads: TokenGrads) -> tuple[TokenGrads, Tensor | None]:
    """Scale upstream gradients for fp16 products, so that fp16 neither overflows nor loses the small ones.

    |d loss / d logit| <= |scale / temperature| * (1 + 1 + log V + 1) * the largest upstream gradient, so with that
    product at 2**10 the tile stays below fp16's 65504 and probabilities down to 6e-11 are kept.

    Returns:
        The gradients, and the factor that every product of them must be multiplied by (None: no factor).
    """
    if problem.operand_dtype != torch.float16 or not len(grads.logps):
        return grads, None
    tiny = torch.finfo(grads.logps.dtype).tiny
    undo = (grads.largest() * max(1.0, abs(problem.logit_scale)) / 2**10).clamp(min=tiny)
    return grads.scaled(1 / undo), undo


def scaled_(x: Tensor, factor: Tensor | None) -> Tensor:
    """`x`, multiplied in place by `factor` unless that is None."""
    return x if factor is None else x.mul_(factor)
