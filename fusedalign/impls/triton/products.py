"""Products of whole tiles, by the library: their operands, and the sums of the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedalign.impls.autograd import Grads
from fusedalign.impls.head_grads import GradTarget, in_head_order
from fusedalign.impls.softmax import scaled_
from fusedalign.impls.triton.launch import is_operand
from fusedalign.impls.triton.plan import plan_grads
from fusedalign.problem import NeedsGrad, Problem


def as_operand(x: Tensor, problem: Problem) -> Tensor:
    """`x` as it enters a product: in the operand dtype, rows contiguous."""
    x = x.to(problem.operand_dtype)
    return x if is_operand(x, problem) else x.contiguous()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` in fp32, in the product's own epilogue."""
    if a.dtype.itemsize == 4:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a.float() @ b.float()


def write_product(target: GradTarget, vocab: slice, a: Tensor, b: Tensor, scale: Tensor | None) -> None:
    """Write the rows of a head's gradient for some vocabulary columns: a @ b * scale, summed in fp32, rounded once."""
    out = target.memory[vocab]
    if out.dtype == a.dtype and (a.dtype == torch.float32 or (a.dtype == torch.bfloat16 and a.is_cuda)):
        torch.addmm(out, a, b, out=out) if target.adds else torch.mm(a, b, out=out)
    else:
        half = a.dtype.itemsize == 2
        product = torch.mm(a, b, out_dtype=torch.float32) if half and a.is_cuda else torch.mm(a.float(), b.float())
        target.write(vocab, scaled_(product, scale))


class GradSums:
    """dH, dW and db, from tiles of logit gradients in the order of the vocabulary.

    Args:
        scale: what every product must be multiplied by, see `softmax.scale_for_fp16`.
        targets: where the gradients of the head are written; None where they are not needed.
    """

    def __init__(
        self, problem: Problem, needs: NeedsGrad, scale: Tensor | None, targets: list[GradTarget] | None
    ) -> None:
        hidden, self.problem = problem.hidden, problem
        self.plan, self.scale, self.targets = plan_grads(problem), scale, targets
        self.tile = hidden.new_empty((len(hidden), self.plan.vocab), dtype=problem.operand_dtype)
        self.d_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if needs.hidden else None
        self.d_bias = torch.empty_like(problem.bias) if needs.bias and problem.bias is not None else None

    def add(self, vocab: slice, d_logits: Tensor, hidden: Tensor, weight: Tensor, d_bias: Tensor | None) -> None:
        """Add a tile: `d_logits` [N, v] and `weight` [v, D] in the operand dtype, `d_bias` [v] fp32."""
        if self.d_hidden is not None:
            add_product(self.d_hidden, d_logits, weight)
        for target in self.targets or ():
            write_product(target, vocab, d_logits.t(), hidden[:, target.columns], self.scale)
        if self.d_bias is not None and d_bias is not None:
            self.d_bias[vocab] = scaled_(d_bias, self.scale)

    def results(self, *, round_hidden: bool = True) -> Grads:
        """Gradients of hidden, weight and bias; that of hidden in fp32 unless `round_hidden`."""
        d_hidden = None if self.d_hidden is None else scaled_(self.d_hidden, self.scale)
        if d_hidden is not None and round_hidden:
            d_hidden = d_hidden.to(self.problem.hidden.dtype)
        d_weight = None if self.targets is None else in_head_order(self.problem, (x.memory for x in self.targets))
        return d_hidden, d_weight, self.d_bias
