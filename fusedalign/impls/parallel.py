"""A vocabulary sharded over ranks: each projects its own rows of the head, and only per-token numbers are exchanged.

Every rank has all tokens and consecutive rows of the head. The forward gathers the softmax statistics, [k, N] of each
rank for k numbers a token; the backward sums the gradient of hidden, [N, D] in the logit dtype. Neither weights nor
logits are exchanged. The same split as Megatron-LM's, Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedalign.impls.autograd import Grads, Jacobian, KeepMode, KeptExps, OwnGradients
from fusedalign.impls.head_grads import Accumulators, grad_targets, in_head_order
from fusedalign.impls.softmax import SoftmaxStats, TokenGrads
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

    The targets of its problems count from the first of these rows, and may be outside of them. A frozen head has no
    path of its own: the Jacobian of a softmax is known only once the statistics of all ranks are.
    """

    about = "another impl on each rank's rows of the head"

    def __init__(self, impl: OwnGradients, shard: VocabShard) -> None:
        self.impl, self.shard = impl, shard

    def supports(self, problem: Problem) -> str | None:
        """None, or why the impl cannot serve this rank's part of the problem."""
        return self.impl.supports(problem)

    def sweep(self, problem: Problem, keep: KeepMode) -> tuple[SoftmaxStats, Jacobian | KeptExps | None]:
        """The softmax statistics over all ranks' rows; exponentials of this rank's."""
        stats, kept = SoftmaxStats(problem), None
        if problem.weight.shape[0]:
            with torch.cuda.device_of(problem.hidden):
                stats, kept = self.impl.sweep(problem, "exps" if keep == "exps" else "nothing")
        if len(problem.targets):
            self._combine(stats)
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

    def one_pass(
        self, problem: Problem, token_loss: TokenLoss, needs: NeedsGrad
    ) -> tuple[SoftmaxStats, Tensor, Grads] | None:
        """None: gradients need the statistics of all ranks, so one pass over this rank's rows is not enough."""
        return None

    def scale_(self, x: Tensor, factor: Tensor) -> Tensor:
        """As the impl does."""
        return self.impl.scale_(x, factor)
