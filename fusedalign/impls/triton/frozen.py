"""A frozen head: the forward sweep sums softmax @ weight, with weights p / p_target, so logits are computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedalign.impls.logits import slope, transform_
from fusedalign.impls.softmax import SoftmaxStats, TokenGrads
from fusedalign.impls.triton.launch import BlockStats, ExpTiles, Tile, TokenBatch, far_rows, target_logits, target_rows
from fusedalign.impls.triton.plan import copy_bytes, plan_tiles, stats_bytes
from fusedalign.impls.triton.products import add_product, as_operand
from fusedalign.problem import Problem

#: Below this log p_target, weights p / p_target might leave the range of bf16 and fp32. These rows are summed again,
#: slowly and relative to the largest logit; so are rows whose log p_target rounding puts as far above 0.
_MIN_LOGP = -60.0


@dataclass(frozen=True)
class HeadRows:
    """The terms of the gradient of hidden for some tokens: weight[target], and softmax @ weight of other columns."""

    problem: Problem
    tokens: slice
    slope: Tensor | None
    """of the softcap at the target, [n]"""
    total: Tensor
    """[n, D] fp32: rows of the head, summed with weights p / p_reference * slope"""
    p_reference: Tensor
    """p of the target, [n]; of the largest logit where the target's is far below that"""
    logps: Tensor
    lost: Tensor | None
    """a bool: whether any row of `total` is wrong; None where `far_rows` has replaced these rows"""

    def combine(self, grads: TokenGrads, out: Tensor, scale: Tensor | None = None) -> None:
        """`out` = the gradient of hidden, [n, D], for a loss of logps and lse alone.

        `scale` [n], if given, receives the power of 2 by which each row of `out` has been divided.
        """
        problem = self.problem
        factor = problem.scale / problem.temperature
        d_target = grads.d_target(self.logps) * factor
        d_target = d_target if self.slope is None else d_target * self.slope
        total_scale = grads.p_scale() * self.p_reference * factor
        weight, targets = _target_weight(problem, self.tokens)
        target_rows(self.total, weight, targets, d_target, total_scale, out, scale, problem.operand_dtype)


def sweep_head_rows(problem: Problem, stats: SoftmaxStats) -> Iterator[HeadRows]:
    """Sweep one chunk of tokens after another; their `stats` are complete when their rows are yielded."""
    d, v = problem.hidden.shape[1], problem.weight.shape[0]
    itemsize = problem.operand_dtype.itemsize
    target_bytes = 0 if isinstance(problem.weight, Tensor) else d * itemsize
    token_bytes = 4 * d + target_bytes + copy_bytes(problem) + stats_bytes(problem, v)
    plan = plan_tiles(problem, token_bytes=token_bytes, logit_bytes=itemsize)
    for tokens in plan.token_slices(problem):
        hidden, targets = as_operand(problem.hidden[tokens], problem), problem.targets[tokens]
        batch = TokenBatch(problem, tokens, hidden)
        bias = None if problem.bias is None else problem.bias[targets]
        reference = transform_(problem, target_logits(hidden, *_target_weight(problem, tokens)), bias)
        total = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        memory = hidden.new_empty((len(hidden), plan.vocab))
        partials = BlockStats(stats, len(hidden), v)
        for vocab in plan.vocab_slices(problem):
            weight = as_operand(problem.weight[vocab], problem)
            exps = memory[:, : len(weight)]
            keep = ExpTiles(exps[None], reference=reference)
            partials.add(Tile(batch, weight, vocab), start=vocab.start, keep=keep)
            add_product(total, exps, weight)
        partials.fold(tokens)
        del partials, memory, exps, keep  # before the next chunk allocates its own
        lost = None
        if isinstance(problem.weight, Tensor):
            far_rows(batch, stats, reference, total, _MIN_LOGP)
        else:  # `far_rows` reads heads of one tensor only
            lost = ((reference - stats.max[tokens] - stats.log_e(tokens)).abs() > -_MIN_LOGP).any()
        p_reference = (reference - stats.max[tokens]).exp() / stats.e[tokens]
        cap_slope = slope(problem, stats.target[tokens])
        yield HeadRows(problem, tokens, cap_slope, total, p_reference, stats.logps(tokens), lost)
        del total  # before the next chunk allocates its own


def any_lost(flags: Iterable[Tensor | None]) -> bool:
    """Whether any sum of `sweep_head_rows` is wrong; synchronises where the head is split."""
    known = [x for x in flags if x is not None and not x.is_meta]
    return bool(known) and bool(torch.stack(known).any())


def _target_weight(problem: Problem, tokens: slice) -> tuple[Tensor, Tensor]:
    """Rows of the head, and the index [n] of each token's target among them."""
    targets = problem.targets[tokens]
    if isinstance(problem.weight, Tensor):
        return problem.weight, targets
    return problem.weight.index_select(0, targets), torch.arange(len(targets), device=targets.device)
