"""A vocabulary sharded over ranks: each projects its own rows of the head, and only per-token numbers are exchanged.

Every rank has all tokens and consecutive rows of the head. The forward gathers the softmax statistics, [k, N] of each
rank for k numbers a token; the backward sums the gradient of hidden, [N, D] in the logit dtype. Neither weights nor
logits are exchanged. The same split as Megatron-LM's, Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedalign.impls.autograd import Grads, Jacobian, KeepMode, KeptExps, OwnGradients
from fusedalign.impls.head_grads import Accumulators, grad_targets, in_head_order
from fusedalign.impls.logits import slope
from fusedalign.impls.softmax import SoftmaxStats, TokenGrads
from fusedalign.impls.tiles import slices
from fusedalign.problem import NeedsGrad, Problem, TokenLoss


class VocabShard(NamedTuple):
    """The rows of the head that this rank has."""

    group: dist.ProcessGroup
    start: int
    """the id of its first row"""
    vocab_size: int
    """rows of all ranks"""


class VocabParallel(OwnGradients):
    """The arithmetic of another impl on this rank's rows, with the exchange between ranks.

    The targets of its problems count from the first of these rows, and may be outside of them.
    """

    about = "another impl on each rank's rows of the head"

    def __init__(self, impl: OwnGradients, shard: VocabShard) -> None:
        self.impl, self.shard = impl, shard

    def supports(self, problem: Problem) -> str | None:
        """None, or why the impl cannot serve this rank's part of the problem."""
        return self.impl.supports(problem)

    def sweep(self, problem: Problem, keep: KeepMode) -> tuple[SoftmaxStats, Jacobian | KeptExps | None]:
        """The softmax statistics over all ranks' rows; exponentials, or the part of a Jacobian, of this rank's."""
        own, kept = SoftmaxStats(problem), None
        clamped = problem
        if problem.weight.shape[0]:
            if keep == "jacobian":  # an impl reads the head's row of the target
                clamped = replace(problem, targets=problem.targets.clamp(0, problem.weight.shape[0] - 1))
            with torch.cuda.device_of(problem.hidden):
                own, kept = self.impl.sweep(clamped, keep)
        elif keep == "jacobian":
            kept = Jacobian.empty(problem)
            kept.write(slice(None), torch.zeros_like(problem.hidden, dtype=problem.logit_dtype))
        stats = copy.copy(own)
        if len(problem.targets):
            stats.target = own.target.masked_fill(clamped.targets != problem.targets, 0)
            self._combine(stats)
            if isinstance(kept, Jacobian) and problem.weight.shape[0]:
                _make_partial(kept, clamped, clamped.targets == problem.targets, own, stats)
        stats.vocab_size = self.shard.vocab_size
        return stats, kept

    def _combine(self, stats: SoftmaxStats) -> None:
        """Replace the statistics of this rank by those of all, which are folded in the order of the vocabulary."""
        names = [name for name in SoftmaxStats.FLOATS if getattr(stats, name) is not None]
        own = torch.stack([getattr(stats, name) for name in names])
        ranks = own.new_empty(dist.get_world_size(self.shard.group), *own.shape)
        dist.all_gather(list(ranks), own, group=self.shard.group)
        if stats.top is not None:
            # Of equal maxima the first rank's is the first of the vocabulary.
            tops = stats.top.new_empty(len(ranks), len(stats.top))
            dist.all_gather(list(tops), stats.top + self.shard.start, group=self.shard.group)
            first = ranks[:, names.index("max")].argmax(0)
            stats.top = tops.gather(0, first[None]).squeeze(0) - self.shard.start
        stats.merge({name: ranks[:, i] for i, name in enumerate(names)})

    def two_pass_grads(
        self,
        problem: Problem,
        grads: TokenGrads,
        needs: NeedsGrad,
        *,
        kept: KeptExps | None = None,
        accumulators: Accumulators = (),
        round_hidden: bool = True,
    ) -> Grads:
        """The gradients of hidden, summed over all ranks, and of this rank's rows of weight and bias."""
        if problem.weight.shape[0]:
            d_hidden, d_weight, d_bias = self.impl.two_pass_grads(
                problem, grads, needs, kept=kept, accumulators=accumulators, round_hidden=False
            )
        else:
            dtype = problem.logit_dtype
            d_hidden = torch.zeros_like(problem.hidden, dtype=dtype) if needs.hidden else None
            targets = grad_targets(problem, accumulators) if needs.weight else None
            d_weight = None if targets is None else in_head_order(problem, (target.memory for target in targets))
            d_bias = torch.zeros_like(problem.bias) if needs.bias and problem.bias is not None else None
        if d_hidden is not None:
            dist.all_reduce(d_hidden, group=self.shard.group)
            d_hidden = d_hidden.to(problem.hidden.dtype) if round_hidden else d_hidden
        return d_hidden, d_weight, d_bias

    def jacobian_grad(self, jacobian: Jacobian, d_logps: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum over all ranks of the products with their parts of the Jacobian."""
        d_hidden = jacobian.times(d_logps, torch.promote_types(dtype, torch.float32))
        dist.all_reduce(d_hidden, group=self.shard.group)
        return d_hidden.to(dtype)

    def one_pass(
        self, problem: Problem, token_loss: TokenLoss, needs: NeedsGrad
    ) -> tuple[SoftmaxStats, Tensor, Grads] | None:
        """None: gradients need the statistics of all ranks, so one pass over this rank's rows is not enough."""
        return None

    def scale_(self, x: Tensor, factor: Tensor) -> Tensor:
        """As the impl does."""
        return self.impl.scale_(x, factor)


def _make_partial(jacobian: Jacobian, problem: Problem, owned: Tensor, own: SoftmaxStats, stats: SoftmaxStats) -> None:
    """Turn the Jacobian of the softmax over this rank's rows into this rank's part of that over all rows, in place.

    With w this rank's share of the probability, and W[t] the row of the target: J_own = W[t] - M_own for the mean row
    M_own of this rank, and J = W[t] - sum of w M_own over ranks. So this rank's part is w J_own + (1 - w) W[t] where it
    has the target, w J_own - w W[t] where t stands for a target of another rank.
    """
    log_share = own.max + own.log_e() - stats.max - stats.log_e()
    share = log_share.exp()
    row_scale = torch.where(owned, -log_share.expm1(), -share) * problem.logit_scale
    cap_slope = slope(problem, own.target)
    row_scale = row_scale if cap_slope is None else row_scale * cap_slope
    for tokens in slices(len(share), 4096):
        rows = problem.weight.index_select(0, problem.targets[tokens]).to(problem.operand_dtype)
        own_part = jacobian.select(tokens).times(share[tokens], problem.logit_dtype)
        x = own_part.where(share[tokens, None] > 0, 0)  # a share of 0 may stand for 0 times NaN
        jacobian.write(tokens, x.addcmul_(rows.to(x.dtype), row_scale[tokens, None]))
