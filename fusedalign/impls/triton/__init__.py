"""Our own kernels for NVIDIA GPUs: blocks of logits live in registers, products of whole tiles are the library's.

Which kernel feeds which, and what is in memory in between, with N tokens, a tile of v vocabulary columns, and U = one
product of all hidden states with the head:

    every sweep,  hidden, head --sums--> partials [blocks, N] --fold--> stats [N]
    1U
    frozen head,  hidden, head --target_logit--> reference [N]
    2U            hidden, head --sums "reference"--> p / p_target [N, v] --mm with the head--> total [N, D] fp32
                  total --far_rows, where log p < -60 --target_rows--> J = d logps / d hidden [N, D]
                  backward: J * grad[:, None]
    two passes,   hidden, head --grads--> d_logits [N, v] --mm--> dH [N, D] fp32, and v rows of dW, written once
    4U
    trained head, hidden, head --sums "half"--> e = exp(z - block_max) of some tokens, kept until the gradients
    3U to 4U      e --kept_grads--> d_logits [N, v] --mm--> as in two passes; the other tokens through `grads`

e is kept in the memory of dW, each tile where its rows of dW will be written, and for `token_loss_sum` in the workspace
too. Logits and their sums are fp32, d_logits and p / p_target have the operand dtype, e is fp16. With fp32 operands the
library computes the logits of each tile first: tensor cores have no fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedalign.impls.autograd import OwnGradients
from fusedalign.impls.triton import launch, paths
from fusedalign.impls.triton.launch import INTERPRETED
from fusedalign.problem import Problem, TokenLogps, TokenLoss


def _on_device(problem: Problem) -> torch.cuda.device:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device_of(problem.hidden)


class Triton(OwnGradients):
    """The Triton kernels as an impl; `paths` has its arithmetic."""

    about = "our Triton kernels, exact; NVIDIA GPUs from Ampere on"
    interpreted = INTERPRETED
    sweep = staticmethod(paths.sweep)
    two_pass_grads = staticmethod(paths.two_pass_grads)
    one_pass = staticmethod(paths.one_pass)

    def unavailable(self) -> str | None:
        """Why this impl cannot run on this machine, or None."""
        if INTERPRETED or torch.cuda.is_available():
            return None
        return "it needs a CUDA device, and this machine has none"

    def supports(self, problem: Problem) -> str | None:
        """Why this impl cannot serve `problem`, or None."""
        if problem.filter_eps is not None:
            return "its gradients are always dense (filter_eps must be None)"
        if problem.operand_dtype == torch.float64 or problem.hidden.dtype == torch.float64:
            return "it computes in float32, bfloat16 and float16, not in float64"
        inputs = (problem.hidden, problem.bias, *(x for _, x in problem.head))
        if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
            return "its kernels know nothing of forward-mode derivatives"
        device = problem.hidden.device
        if INTERPRETED:
            return None
        if device.type != "cuda":
            return f"it needs a CUDA device, got {device}"
        if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
            return f"it needs compute capability 8.0 or later, got {torch.cuda.get_device_capability(device)}"
        return None

    def prepare(self, problem: Problem) -> None:
        """Start to compile, in the background, what calls of this kind launch, with gradients and without.

        Only shapes, strides and dtypes of `problem` matter, and which of its tensors need a gradient; it may have no
        tokens. The next launch waits for kernels that are still being compiled.
        """
        needs = problem.requires_grad
        with _on_device(problem):
            paths.prepare_sweep(problem, "nothing")
            if any(needs):
                paths.prepare_sweep(
                    problem, "jacobian" if needs.hidden_alone else "exps" if needs.weight else "nothing"
                )

    def token_logps(self, problem: Problem, loss_hint: TokenLoss | None = None) -> TokenLogps:
        """`TokenLogps` of [N] tokens; the hint is not used.

        It would save a product only for the tokens that fit the workspace but not the memory of dW, and the backward
        would have to synchronise.
        """
        with _on_device(problem):
            return super().token_logps(problem)

    def token_loss_sum(self, problem: Problem, token_loss: TokenLoss) -> Tensor:
        """Sum over [N] tokens of `token_loss(logps, lse)`, a scalar, and its gradients at once."""
        with _on_device(problem):
            return super().token_loss_sum(problem, token_loss)

    def scale_(self, x: Tensor, factor: Tensor) -> Tensor:
        """`x` times a scalar in place; skipped on the device where that is 1."""
        return launch.scale_(x, factor)


IMPL = Triton()
