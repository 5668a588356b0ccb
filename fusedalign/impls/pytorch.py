"""Tiles of logits in plain PyTorch: any device, no Triton, never the `[N, V]` logits.

The gradient paths and their costs are in docs/design.md: scalar losses take 3 products of the head's size, any other
loss of a trained head 4.

Logits, their sums and the accumulated products are fp32 (fp64 for fp64 operands). On CUDA, half-precision operands
enter a product as they are, with an fp32 result; other devices round the result of half-precision products, so there a
tile's operands are widened to fp32 first.

The workspace holds at most three tiles of `[tokens, vocab]` (logits, exponentials, the derivative of the softcap), a
half-precision copy of one, and `[vocab, D]` and `[tokens, D]` slices of the operands and gradients.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fusedalign.impls import autograd
from fusedalign.impls.autograd import Grads, Jacobian, KeepMode, KeptExps, OwnGradients
from fusedalign.impls.head_grads import Accumulators, CompensatedSum, grad_targets, in_head_order, trainable_parts
from fusedalign.impls.logits import locate, slope, transform_
from fusedalign.impls.softmax import LOG_ZERO, SoftmaxStats, TokenGrads, scale_for_fp16, scaled_, token_loss_grads
from fusedalign.impls.tiles import TileSizes
from fusedalign.problem import DEFAULT_WORKSPACE, NeedsGrad, Problem, TokenLoss


def _plan(problem: Problem) -> TileSizes:
    """Tiles that fit the workspace. Small problems are cut too, so that tests run the code of large ones."""
    (n, d), v = problem.hidden.shape, problem.weight.shape[0]
    memory, item = problem.memory, problem.logit_dtype.itemsize
    budget = memory.workspace or DEFAULT_WORKSPACE
    vocab = memory.vocab_chunk or min(8192, -(-v // 4), budget // (8 * item * d))
    vocab = max(1, min(vocab, v))
    tokens = memory.token_chunk or (budget - 2 * item * vocab * d) // (_bytes_per_logit(problem) * vocab + 2 * item * d)
    return TileSizes(max(1, min(tokens, n if memory.token_chunk else -(-n // 2))), vocab)


def _plan_one_pass(problem: Problem) -> TileSizes | None:
    """Tiles whose tokens' logits fit the workspace over the whole vocabulary; None where too few tokens do."""
    plan = _plan(problem)
    if problem.memory.token_chunk:
        return plan
    (n, d), v = problem.hidden.shape, problem.weight.shape[0]
    largest = max(1, -(-n // 4))  # of all tokens at once these would be the full logits
    item = problem.logit_dtype.itemsize
    budget = (problem.memory.workspace or DEFAULT_WORKSPACE) - 3 * item * plan.vocab * d
    budget -= sum(x.numel() * x.dtype.itemsize for _, x in trainable_parts(problem) if _needs_compensation(x, problem))
    tokens = budget // (item * v + _bytes_per_logit(problem) * plan.vocab + 2 * item * d)
    return replace(plan, tokens=min(tokens, largest)) if tokens >= min(largest, 256) else None


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
    return transform_(problem, _product(hidden, weight.t()), None if problem.bias is None else problem.bias[vocab])


def _logit_grad_(problem: Problem, z: Tensor, grads: TokenGrads, targets: Tensor, vocab: slice) -> Tensor:
    """d loss / d raw logits of a tile, [tokens, vocab], written over its final logits `z`.

    With p the softmax: d logps = onehot - p, d lse = p, d entropy = -p (log p + entropy); times the logits' slope.
    """
    cap_slope = slope(problem, z)
    log_p = z.sub_(grads.max[:, None]).sub_(grads.log_e[:, None])
    p_scale = grads.p_scale()
    if grads.entropy is None:
        grad = log_p.exp_().mul_(p_scale[:, None])
    else:
        d_entropy, entropy = grads.entropy
        p_scales = log_p.clamp(min=LOG_ZERO).add_(entropy[:, None]).mul_(-d_entropy[:, None]).add_(p_scale[:, None])
        grad = log_p.exp_().mul_(p_scales)
    index, inside = locate(targets, vocab)
    target_grad = grad.gather(-1, index[:, None]) + torch.where(inside, grads.logps, 0)[:, None]
    grad.scatter_(-1, index[:, None], target_grad)
    if cap_slope is not None:
        grad *= cap_slope
    return grad if problem.logit_scale == 1.0 else grad.mul_(problem.logit_scale)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total += a @ b`, `a` rounded to the operand dtype of `b` first where that is a half precision."""
    if b.dtype.itemsize == 2:
        return total.add_(_product(a.to(b.dtype), b))
    return torch.addmm(total, a, b, out=total)


class PyTorch(OwnGradients):
    """The impl, see above."""

    about = "tiles in plain PyTorch, any device"

    def supports(self, problem: Problem) -> str | None:
        """None, or why this impl cannot serve `problem`."""
        if problem.filter_eps is not None:
            return "its gradients are always dense (filter_eps must be None)"
        return None

    def sweep(self, problem: Problem, keep: KeepMode) -> tuple[SoftmaxStats, Jacobian | None]:
        """The statistics of all tokens and, if asked for, J = d logps / d hidden, [N, D]."""
        plan, stats = _plan(problem), SoftmaxStats(problem)
        jacobian = Jacobian.empty(problem) if keep == "jacobian" else None
        for tokens in plan.token_slices(problem):
            hidden, targets = _operand(problem.hidden[tokens], problem), problem.targets[tokens]
            mean_row = None if jacobian is None else hidden.new_zeros(hidden.shape, dtype=problem.logit_dtype)
            for vocab in plan.vocab_slices(problem):
                weight = _operand(problem.weight[vocab], problem)
                z = _logits(problem, hidden, weight, vocab)
                cap_slope = None if mean_row is None else slope(problem, z)
                e, shrink = stats.fold(tokens, z, targets, vocab, keep=False)
                if mean_row is not None:
                    e = e if cap_slope is None else e.mul_(cap_slope)
                    # Without the target: rounded to an operand, p near 1 would be off by more than 1 - p.
                    index, inside = locate(targets, vocab)
                    e.scatter_(-1, index[:, None], e.gather(-1, index[:, None]).masked_fill_(inside[:, None], 0))
                    _add_product(mean_row.mul_(shrink[:, None]), e, weight)
            if jacobian is not None and mean_row is not None:
                target_row = _operand(problem.weight.index_select(0, targets), problem).to(problem.logit_dtype)
                cap_slope, d_target = slope(problem, stats.target[tokens]), -stats.logps(tokens).expm1()
                target_row *= (d_target if cap_slope is None else d_target * cap_slope)[:, None]
                jacobian.write(tokens, target_row.sub_(mean_row.div_(stats.e[tokens, None])).mul_(problem.logit_scale))
        return stats, jacobian

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
        """Gradients of hidden, weight, bias (None where not needed); a tile of dW is summed in full, written once."""
        plan, dtype = _plan(problem), problem.logit_dtype
        grads, undo = scale_for_fp16(problem, grads) if _half_products(problem) else (grads, None)
        d_hidden = torch.zeros_like(problem.hidden, dtype=dtype) if needs.hidden else None
        d_weight = grad_targets(problem, accumulators) if needs.weight else []
        d_bias = torch.empty_like(problem.bias) if needs.bias and problem.bias is not None else None
        for vocab in plan.vocab_slices(problem):
            weight = _operand(problem.weight[vocab], problem)
            d_weight_tiles = [weight.new_zeros(len(weight), g.memory.shape[1], dtype=dtype) for g in d_weight]
            d_bias_tile = None if d_bias is None else weight.new_zeros(weight.shape[0], dtype=dtype)
            for tokens in plan.token_slices(problem):
                hidden, targets = _operand(problem.hidden[tokens], problem), problem.targets[tokens]
                z = _logits(problem, hidden, weight, vocab)
                grad = _logit_grad_(problem, z, grads[tokens], targets, vocab)
                if d_bias_tile is not None:
                    d_bias_tile += grad.sum(0)
                grad = grad.to(weight.dtype)
                if d_hidden is not None:
                    _add_product(d_hidden[tokens], grad, weight)
                for target, tile in zip(d_weight, d_weight_tiles, strict=True):
                    _add_product(tile, grad.t(), hidden[:, target.columns])
            for target, tile in zip(d_weight, d_weight_tiles, strict=True):
                target.write(vocab, scaled_(tile, undo))
            if d_bias is not None and d_bias_tile is not None:
                d_bias[vocab] = scaled_(d_bias_tile, undo)
        d_parts = in_head_order(problem, (g.memory for g in d_weight)) if needs.weight else None
        d_hidden = None if d_hidden is None else scaled_(d_hidden, undo)
        return d_hidden.to(problem.hidden.dtype) if d_hidden is not None and round_hidden else d_hidden, d_parts, d_bias

    def one_pass(
        self, problem: Problem, token_loss: TokenLoss, needs: NeedsGrad
    ) -> tuple[SoftmaxStats, Tensor, Grads] | None:
        """The statistics, the summed loss, and its gradients by hidden, weight and bias (None where not needed).

        The gradient of a half-precision head that is summed over several token chunks needs its low-order half
        meanwhile, `[V, D]` in the head's dtype. Where the workspace has no room for that: None.
        """
        plan = _plan_one_pass(problem)
        if plan is None:
            return None
        stats = SoftmaxStats(problem)
        loss = problem.hidden.new_zeros((), dtype=problem.result_dtype)
        early_dtype = autograd.early_dtype(problem.hidden.dtype)
        d_hidden = torch.empty_like(problem.hidden, dtype=early_dtype) if needs.hidden else None
        several = plan.tokens < problem.hidden.shape[0]
        parts = trainable_parts(problem) if needs.weight else []
        d_weight = [(columns, CompensatedSum(x, several and _needs_compensation(x, problem))) for columns, x in parts]
        bias = problem.bias if needs.bias else None
        d_bias = None if bias is None else bias.new_zeros(bias.shape, dtype=problem.logit_dtype)
        for tokens in plan.token_slices(problem):
            hidden, targets = _operand(problem.hidden[tokens], problem), problem.targets[tokens]
            logits = []  # of these tokens over the whole vocabulary, a tensor a tile
            for vocab in plan.vocab_slices(problem):
                z = _logits(problem, hidden, _operand(problem.weight[vocab], problem), vocab)
                stats.fold(tokens, z, targets, vocab, keep=True)
                logits.append(z)
            chunk_loss, grads = token_loss_grads(stats, tokens, token_loss, problem.result_dtype)
            loss += chunk_loss
            grads, undo = scale_for_fp16(problem, grads) if _half_products(problem) else (grads, None)

            d_hidden_chunk = hidden.new_zeros(hidden.shape, dtype=problem.logit_dtype) if needs.hidden else None
            logits.reverse()
            for vocab in plan.vocab_slices(problem):
                grad = _logit_grad_(problem, logits.pop(), grads, targets, vocab)  # popped: its memory is freed
                if d_bias is not None:
                    d_bias[vocab] += scaled_(grad.sum(0), undo)
                grad = grad.to(hidden.dtype)
                if d_hidden_chunk is not None:
                    _add_product(d_hidden_chunk, grad, _operand(problem.weight[vocab], problem))
                for columns, total in d_weight:
                    total.add(vocab, scaled_(_product(grad.t(), hidden[:, columns]), undo))
            if d_hidden is not None and d_hidden_chunk is not None:
                d_hidden[tokens] = scaled_(d_hidden_chunk, undo).to(d_hidden.dtype)
        d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
        d_parts = in_head_order(problem, (total.high for _, total in d_weight)) if needs.weight else None
        return stats, loss, (d_hidden, d_parts, d_bias)

    def scale_(self, x: Tensor, factor: Tensor) -> Tensor:
        """`x` times a scalar in place, unless that is seen to be 1 without a wait for the device."""
        return x if not factor.is_cuda and factor == 1 else x.mul_(factor)


IMPL = PyTorch()
