"""Tiles of logits in plain PyTorch: any device, no Triton, never the `[N, V]` logits.

Costs in units of U = 2*N*D*V FLOPs, one product of all hidden states with the head:

* no gradient: one sweep folds every tile into running softmax sums, 1U;
* frozen head: the same sweep keeps J = d logps / d hidden, `[N, D]`; the backward is `grad[:, None] * J`, 2U in all;
* a sum over tokens (`token_loss_sum`), or tokens of which that is expected: the logits of a few at a time become
  gradients at once, 3U;
* anything else: the backward recomputes the tiles vocabulary-major and writes each tile of dW once, 4U.

Logits, their sums and the accumulated products are fp32 (fp64 for fp64 operands). What enters a product: on CUDA the
half-precision operands themselves, with an fp32 result; on other devices, whose half-precision products round their
result, a tile's operands are widened to fp32 first.

The workspace holds at most three tiles of `[tokens, vocab]` (logits, exponentials, the derivative of the softcap), a
half-precision copy of one, and `[vocab, D]` and `[tokens, D]` slices of the operands and gradients.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fusedalign.impls import autograd
from fusedalign.impls.autograd import Grads, Jacobian, Keep, KeptHead, Needs, OwnGradients
from fusedalign.impls.rows import (
    RowSums,
    TokenGrads,
    fit_half,
    grads_of_token_loss,
    head_grads,
    of_each_part,
    times,
    trained,
)
from fusedalign.impls.tiles import Tiles
from fusedalign.problem import DEFAULT_WORKSPACE, Problem, TokenLoss

#: exp() of this is 0 in every dtype; standing in for -inf it keeps 0 * log 0 at 0. NaN passes a clamp unchanged.
_LOG_ZERO = -1e4


# ---------------------------------------------------------------------------------------------------------------- tiles


def _plan(problem: Problem) -> Tiles:
    """Tiles that fit the workspace, and small problems cut too: what runs in a test is what runs at full size."""
    (n, d), v = problem.hidden.shape, problem.weight.shape[0]
    wish, item = problem.tiling, problem.logit_dtype.itemsize
    budget = wish.workspace or DEFAULT_WORKSPACE
    vocab = wish.vocab_chunk or min(8192, -(-v // 4), budget // (8 * item * d))
    vocab = max(1, min(vocab, v))
    tokens = wish.token_chunk or (budget - 2 * item * vocab * d) // (_bytes_per_logit(problem) * vocab + 2 * item * d)
    return Tiles(max(1, min(tokens, n if wish.token_chunk else -(-n // 2))), vocab)


def _plan_one_pass(problem: Problem) -> Tiles | None:
    """Tiles of whole rows of logits for a few tokens, or None where the workspace has no room for enough of them."""
    plan = _plan(problem)
    if problem.tiling.token_chunk:
        return plan
    (n, d), v = problem.hidden.shape, problem.weight.shape[0]
    wanted = max(1, -(-n // 4))  # never all rows at once, which would be the logits after all
    item = problem.logit_dtype.itemsize
    budget = (problem.tiling.workspace or DEFAULT_WORKSPACE) - 3 * item * plan.vocab * d
    budget -= sum(x.numel() * x.dtype.itemsize for _, x in trained(problem) if _needs_compensation(x, problem))
    rows = budget // (item * v + _bytes_per_logit(problem) * plan.vocab + 2 * item * d)
    return replace(plan, tokens=min(rows, wanted)) if rows >= min(wanted, 256) else None


def _bytes_per_logit(problem: Problem) -> int:
    return 3 * problem.logit_dtype.itemsize + 2


def _needs_compensation(weight: Tensor, problem: Problem) -> bool:
    return weight.dtype.itemsize < problem.logit_dtype.itemsize


def _operand(x: Tensor, problem: Problem) -> Tensor:
    """A tile as it enters a product."""
    x = x.to(problem.operand_dtype)
    return x if _half_products(problem) else x.to(problem.logit_dtype)


def _half_products(problem: Problem) -> bool:
    """Whether products take half-precision operands: only CUDA gives their result in fp32."""
    return problem.hidden.is_cuda and problem.operand_dtype.itemsize == 2


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in the logit dtype."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype.itemsize == 2 else torch.mm(a, b)


def _logits(problem: Problem, hidden: Tensor, weight: Tensor, vocab: slice) -> Tensor:
    """A tile of final logits, [tokens, vocab] in the logit dtype, from operands; a new tensor."""
    z = _product(hidden, weight.t())
    if problem.bias is not None:
        z += problem.bias[vocab].to(z.dtype)
    if problem.scale != 1.0:
        z *= problem.scale
    if problem.softcap is not None:
        z.div_(problem.softcap).tanh_().mul_(problem.softcap)
    if problem.temperature != 1.0:
        z /= problem.temperature
    return z


def _logit_slope(problem: Problem, z: Tensor) -> Tensor | None:
    """(d final logit / d raw logit) / (scale / temperature) = 1 - tanh**2, from final logits; None where it is 1."""
    if problem.softcap is None:
        return None
    return (z * (problem.temperature / problem.softcap)).square_().neg_().add_(1)


# --------------------------------------------------------------------------------------------------------- forward sums


class _Sums(RowSums):
    """Running sums, tile after tile."""

    def fold(self, tokens: slice, z: Tensor, targets: Tensor, vocab: slice, *, keep: bool) -> tuple[Tensor, Tensor]:
        """Add a tile of logits; `keep` leaves `z` as it is, else it becomes scratch.

        Returns:
            `e` of this tile, [tokens, vocab], and the factor [tokens] by which everything summed before has shrunk.
        """
        tile_max, tile_top = z.max(-1)
        old_max = self.max[tokens]
        if self.top is not None:
            self.top[tokens] = torch.where(tile_max > old_max, tile_top + vocab.start, self.top[tokens])
        if self.logit is not None:
            self.logit[tokens] += z.sum(-1)
        index, inside = _locate(targets, vocab)
        self.target[tokens] = torch.where(inside, z.gather(-1, index[:, None]).squeeze(-1), self.target[tokens])

        new_max = torch.maximum(old_max, tile_max)
        # Only -inf so far: any finite reference gives e = 0 where the difference of two infinities would give NaN.
        reference = new_max.masked_fill(new_max == -torch.inf, 0.0)
        log_shrink = (old_max - reference).clamp_(min=_LOG_ZERO)
        shrink = log_shrink.exp()
        log_e = z - reference[:, None] if keep else z.sub_(reference[:, None])
        second = self.e_log_e is not None or self.e_sq is not None
        e = log_e.exp() if second else log_e.exp_()
        if self.e_log_e is not None:
            # sum e log e moves to the new maximum before the old sum of e does
            moved = shrink * (self.e_log_e[tokens] + log_shrink * self.e[tokens])
            self.e_log_e[tokens] = moved + log_e.clamp_(min=_LOG_ZERO).mul_(e).sum(-1)
        if self.e_sq is not None:
            self.e_sq[tokens] = shrink.square() * self.e_sq[tokens] + torch.mul(e, e, out=log_e).sum(-1)
        self.e[tokens] = shrink * self.e[tokens] + e.sum(-1)
        self.max[tokens] = new_max
        return e, shrink


def _locate(targets: Tensor, vocab: slice) -> tuple[Tensor, Tensor]:
    """Each target's column in this tile (clamped into it) and whether it truly lies there; both [tokens]."""
    local = targets - vocab.start
    return local.clamp(0, vocab.stop - vocab.start - 1), (local >= 0) & (local < vocab.stop - vocab.start)


# ------------------------------------------------------------------------------------------------------------ gradients


def _logit_grad_(problem: Problem, z: Tensor, grads: TokenGrads, targets: Tensor, vocab: slice) -> Tensor:
    """d loss / d raw logits of a tile, [tokens, vocab], written over its final logits `z`.

    With p the softmax: d logps = onehot - p, d lse = p, d entropy = -p (log p + entropy); times the logits' slope.
    """
    slope = _logit_slope(problem, z)
    log_p = z.sub_(grads.max[:, None]).sub_(grads.log_e[:, None])
    of_p = -grads.logps if grads.lse is None else grads.lse - grads.logps
    if grads.entropy is None:
        grad = log_p.exp_().mul_(of_p[:, None])
    else:
        upstream, entropy = grads.entropy
        per_p = log_p.clamp(min=_LOG_ZERO).add_(entropy[:, None]).mul_(-upstream[:, None]).add_(of_p[:, None])
        grad = log_p.exp_().mul_(per_p)
    index, inside = _locate(targets, vocab)
    at_target = grad.gather(-1, index[:, None]) + torch.where(inside, grads.logps, 0)[:, None]
    grad.scatter_(-1, index[:, None], at_target)
    if slope is not None:
        grad *= slope
    factor = problem.scale / problem.temperature
    return grad if factor == 1.0 else grad.mul_(factor)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total += a @ b`, `a` rounded to the operand dtype of `b` first where that is a half precision."""
    if b.dtype.itemsize == 2:
        return total.add_(_product(a.to(b.dtype), b))
    return torch.addmm(total, a, b, out=total)


class _HeadGrad:
    """The gradient of a tensor of the head summed over token chunks in its final dtype.

    Beside it stands the low-order half if that is half.

    Rounding each partial sum to bf16 would add 1.1e-3 of relative error a chunk. High and low half together carry 16
    bits of mantissa, so that the number of chunks does not matter, at half the size of an fp32 sum.
    """

    def __init__(self, like: Tensor, compensate: bool) -> None:
        self.high = torch.zeros_like(like, memory_format=torch.contiguous_format)
        self.low = torch.zeros_like(self.high) if compensate else None

    def add(self, vocab: slice, part: Tensor) -> None:
        high = self.high[vocab]
        if self.low is None:
            high += part
            return
        total = part.add_(high).add_(self.low[vocab])
        high.copy_(total)
        self.low[vocab] = total.sub_(high)


class PyTorch(OwnGradients):
    """The impl, see above."""

    about = "tiles in plain PyTorch, any device"

    def supports(self, problem: Problem) -> str | None:
        """None, or why this impl cannot serve `problem`."""
        if problem.filter_eps is not None:
            return "its gradients are always dense (filter_eps must be None)"
        return None

    def sweep(self, problem: Problem, keep: Keep) -> tuple[RowSums, Jacobian | None]:
        """The running sums of all tokens and, if asked for, J = d logps / d hidden, [N, D] in hidden's dtype."""
        plan, sums = _plan(problem), _Sums(problem)
        jacobian = Jacobian.empty(problem) if keep == "jacobian" else None
        for tokens in plan.over_tokens(problem):
            hidden, targets = _operand(problem.hidden[tokens], problem), problem.targets[tokens]
            mean_row = hidden.new_zeros(hidden.shape, dtype=problem.logit_dtype) if jacobian is not None else None
            for vocab in plan.over_vocab(problem):
                weight = _operand(problem.weight[vocab], problem)
                z = _logits(problem, hidden, weight, vocab)
                slope = _logit_slope(problem, z) if jacobian is not None else None
                e, shrink = sums.fold(tokens, z, targets, vocab, keep=False)
                if mean_row is not None:
                    e = e if slope is None else e.mul_(slope)
                    # Without the target: rounded to an operand, p near 1 would be off by more than 1 - p.
                    index, inside = _locate(targets, vocab)
                    e.scatter_(-1, index[:, None], e.gather(-1, index[:, None]).masked_fill_(inside[:, None], 0))
                    _add_product(mean_row.mul_(shrink[:, None]), e, weight)
            if jacobian is not None and mean_row is not None:
                target_row = _operand(problem.weight.index_select(0, targets), problem).to(problem.logit_dtype)
                slope = _logit_slope(problem, sums.target[tokens])
                of_target = -sums.logps(tokens).expm1()
                target_row *= (of_target if slope is None else of_target * slope)[:, None]
                row = target_row.sub_(mean_row.div_(sums.e[tokens, None])).mul_(problem.scale / problem.temperature)
                jacobian.write(tokens, row)
        return sums, jacobian

    def two_pass_grads(self, problem: Problem, grads: TokenGrads, needs: Needs, head: KeptHead | None = None) -> Grads:
        """Gradients of hidden, weight, bias (None where not needed); a tile of dW is summed in full, written once."""
        plan, dtype = _plan(problem), problem.logit_dtype
        needs_hidden, needs_weight, needs_bias = needs
        grads, undo = fit_half(problem, grads) if _half_products(problem) else (grads, None)
        d_hidden = torch.zeros_like(problem.hidden, dtype=dtype) if needs_hidden else None
        d_weight = head_grads(problem) if needs_weight else []
        d_bias = torch.empty_like(problem.bias) if needs_bias and problem.bias is not None else None
        for vocab in plan.over_vocab(problem):
            weight = _operand(problem.weight[vocab], problem)
            d_weight_tiles = [weight.new_zeros(len(weight), g.memory.shape[1], dtype=dtype) for g in d_weight]
            d_bias_tile = weight.new_zeros(weight.shape[0], dtype=dtype) if needs_bias else None
            for tokens in plan.over_tokens(problem):
                hidden, targets = _operand(problem.hidden[tokens], problem), problem.targets[tokens]
                z = _logits(problem, hidden, weight, vocab)
                grad = _logit_grad_(problem, z, grads.rows(tokens), targets, vocab)
                if d_bias_tile is not None:
                    d_bias_tile += grad.sum(0)
                grad = grad.to(weight.dtype)
                if d_hidden is not None:
                    _add_product(d_hidden[tokens], grad, weight)
                for d_part, d_weight_tile in zip(d_weight, d_weight_tiles, strict=True):
                    _add_product(d_weight_tile, grad.t(), hidden[:, d_part.columns])
            for d_part, d_weight_tile in zip(d_weight, d_weight_tiles, strict=True):
                d_part.write(vocab, times(d_weight_tile, undo))
            if d_bias is not None and d_bias_tile is not None:
                d_bias[vocab] = times(d_bias_tile, undo)
        d_parts = of_each_part(problem, (g.memory for g in d_weight)) if needs_weight else None
        return None if d_hidden is None else times(d_hidden, undo).to(problem.hidden.dtype), d_parts, d_bias

    def one_pass(self, problem: Problem, token_loss: TokenLoss, needs: Needs) -> tuple[RowSums, Tensor, Grads] | None:
        """The softmax sums, the summed loss, and its gradients by hidden, weight and bias (None where not needed).

        The gradient of a half-precision head that is summed over several token chunks needs its low-order half
        meanwhile, `[V, D]` in the head's dtype. Where the workspace has no room for that: None.
        """
        plan = _plan_one_pass(problem)
        if plan is None:
            return None
        needs_hidden, needs_weight, needs_bias = needs
        sums = _Sums(problem)
        loss = problem.hidden.new_zeros((), dtype=problem.result_dtype)
        hidden_dtype = autograd.early_dtype(problem.hidden.dtype)
        d_hidden = torch.empty_like(problem.hidden, dtype=hidden_dtype) if needs_hidden else None
        several = plan.tokens < problem.hidden.shape[0]
        parts = trained(problem) if needs_weight else []
        d_weight = [(columns, _HeadGrad(x, several and _needs_compensation(x, problem))) for columns, x in parts]
        d_bias = problem.bias.new_zeros(problem.bias.shape, dtype=problem.logit_dtype) if needs_bias else None  # type: ignore
        for tokens in plan.over_tokens(problem):
            hidden, targets = _operand(problem.hidden[tokens], problem), problem.targets[tokens]
            rows = []  # this chunk's whole rows of logits, a tensor a tile
            for vocab in plan.over_vocab(problem):
                z = _logits(problem, hidden, _operand(problem.weight[vocab], problem), vocab)
                sums.fold(tokens, z, targets, vocab, keep=True)
                rows.append(z)
            chunk_loss, grads = grads_of_token_loss(sums, tokens, token_loss, problem.result_dtype)
            loss += chunk_loss
            grads, undo = fit_half(problem, grads) if _half_products(problem) else (grads, None)

            d_hidden_rows = hidden.new_zeros(hidden.shape, dtype=problem.logit_dtype) if needs_hidden else None
            rows.reverse()
            for vocab in plan.over_vocab(problem):
                grad = _logit_grad_(problem, rows.pop(), grads, targets, vocab)
                if d_bias is not None:
                    d_bias[vocab] += times(grad.sum(0), undo)
                grad = grad.to(hidden.dtype)
                if d_hidden_rows is not None:
                    _add_product(d_hidden_rows, grad, _operand(problem.weight[vocab], problem))
                for columns, d_part in d_weight:
                    d_part.add(vocab, times(_product(grad.t(), hidden[:, columns]), undo))
            if d_hidden is not None and d_hidden_rows is not None:
                d_hidden[tokens] = times(d_hidden_rows, undo).to(d_hidden.dtype)
        d_bias = None if d_bias is None else d_bias.to(problem.bias.dtype)  # type: ignore
        d_parts = of_each_part(problem, (d_part.high for _, d_part in d_weight)) if needs_weight else None
        return sums, loss, (d_hidden, d_parts, d_bias)

    def scale_(self, x: Tensor, factor: Tensor) -> Tensor:
        """`x` times a scalar in place, unless that is seen to be 1 without a wait for the device."""
        return x if not factor.is_cuda and factor == 1 else x.mul_(factor)


IMPL = PyTorch()
