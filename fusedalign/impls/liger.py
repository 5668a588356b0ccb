"""Adapter to Liger Kernel, which has two functions of a head, each for what it can do.

* `LigerFusedLinearScaledCrossEntropyFunction`: the NLL of each token, and the entropy. On Hopper with
  `nvidia-cutlass-dsl` a CuTe kernel; elsewhere chunks of 512 tokens in plain PyTorch, on any device.
* `LigerFusedLinearCrossEntropyFunction`: chunks of logits and Triton; knows bias and softcap. Per token its gradients
  are computed in the backward; for the NLL summed with one weight for all tokens already in the forward.

Source: Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedalign.impls import adapter, autograd
from fusedalign.impls.base import Impl
from fusedalign.problem import Problem, TokenLogps, TokenLoss, with_tensors

_INSTALL = "pip install 'liger-kernel>=0.8.5'"
_CUTE = "nvidia-cutlass-dsl"


class _Library(NamedTuple):
    chunks: Any
    """LigerFusedLinearCrossEntropyFunction"""
    tokens: Any
    """LigerFusedLinearScaledCrossEntropyFunction"""


def _load() -> _Library:
    from liger_kernel import ops

    return _Library(ops.LigerFusedLinearCrossEntropyFunction, ops.LigerFusedLinearScaledCrossEntropyFunction)


_find = adapter.lazy_library("liger_kernel", _INSTALL, _load)


def _token_logps(problem: Problem) -> TokenLogps:
    if _takes_chunks(problem):
        return TokenLogps(adapter.to_logps(_chunks(problem, "none"), problem))
    hidden, weight = adapter.operands(problem, problem.scale)
    entropy = "entropy" in problem.outputs
    # temperature, ignore_index (no target is ignored here), what the CuTe kernel takes for compatibility, entropy
    out = _find().library.tokens.apply(hidden, weight, problem.targets, float(problem.temperature), -100, 1, entropy)
    if not entropy:
        return TokenLogps(adapter.to_logps(out, problem))
    return TokenLogps(adapter.to_logps(out[0], problem), entropy=out[1].to(problem.result_dtype).clamp(min=0))


def _takes_chunks(problem: Problem) -> bool:
    """Whether the function that chunks the logits serves; else the one per token."""
    if "entropy" in problem.outputs or not _runs_triton(problem.hidden.device):
        return False
    return _has_extras(problem) or not _has_cute(problem)


def _chunks(problem: Problem, reduction: str) -> Tensor:
    scale = adapter.logit_scale(problem)
    hidden, weight = adapter.operands(problem, scale)
    bias = None if problem.bias is None else (problem.bias * scale).to(problem.operand_dtype)
    # class weights, ignore_index (no target is ignored here), z-loss, label smoothing
    options = None, -100, 0.0, 0.0, reduction, adapter.softcap(problem)
    return _find().library.chunks.apply(hidden, weight, problem.targets, bias, *options)[0]


def _has_extras(problem: Problem) -> bool:
    return problem.bias is not None or problem.softcap is not None


def _runs_triton(device: torch.device) -> bool:
    return device.type == "cuda"


def _is_hopper(device: torch.device) -> bool:
    hip = torch.version.hip is not None
    return device.type == "cuda" and not hip and torch.cuda.get_device_capability(device) == (9, 0)


def _has_cute(problem: Problem) -> bool:
    """Whether the CuTe kernel would serve, were there no bias and no softcap."""
    return problem.operand_dtype == torch.bfloat16 and _is_hopper(problem.hidden.device) and _cute_runs()


@functools.cache
def _cute_runs() -> bool:
    """Whether the package that Liger's CuTe kernels import can be imported."""
    try:
        importlib.import_module("cutlass.cute")
    except Exception:  # of a broken installation
        return False
    return True


class Liger(Impl):
    """The impl, see above."""

    about = "Liger Kernel; Triton on a GPU, CuTe on Hopper, plain PyTorch on a CPU"
    package = "liger-kernel"

    def unavailable(self) -> str | None:
        """None, or why this impl cannot run on this machine, whatever the problem."""
        return _find().reason

    def supports(self, problem: Problem) -> str | None:
        """None, or why this impl cannot serve `problem`; see `caveat` for how well."""
        p = problem
        if (reason := adapter.split_head_refusal(p)) is not None:
            return reason
        if p.filter_eps is not None:
            return "its gradients are always dense (filter_eps must be None)"
        if p.operand_dtype == torch.float64 or p.hidden.dtype == torch.float64:
            return "it computes in float32, bfloat16 and float16, not in float64"
        if missing := sorted(p.outputs - {"entropy"}):
            return f"it gives logps and entropy, but no {', '.join(missing)}"
        if (reason := _find().reason) is not None:
            return reason
        extras = [name for name, x in (("bias", p.bias), ("softcap", p.softcap)) if x is not None]
        if extras and not _runs_triton(p.hidden.device):
            return f"its function with a {' or a '.join(extras)} needs a GPU"
        if "entropy" in p.outputs:
            if extras:
                return f"its entropy knows no {' and no '.join(extras)}"
            if _is_hopper(p.hidden.device) and not _has_cute(p):
                return f"its entropy on compute capability 9.0 takes bfloat16 alone, and {_CUTE}"
        return None

    def caveat(self, problem: Problem) -> str | None:
        """None, or what is not exact, so that "auto" skips this impl."""
        p = problem
        if not _runs_triton(p.hidden.device):
            return "on this device it is plain PyTorch that builds the logits of 512 tokens, whatever the workspace"
        if p.operand_dtype.itemsize == 2 and (_has_extras(p) or not _has_cute(p)):
            return "logits are rounded to the dtype of the operands, and gradients of the head summed in it"
        if "entropy" in p.outputs:
            half = p.operand_dtype.itemsize == 2
            return "its entropy is rounded to bfloat16" if half else "its entropy builds the logits of 512 tokens"
        if p.operand_dtype.itemsize == 2 and p.weight.requires_grad and len(p.targets) > 1024:
            return "gradients of the head are summed in bfloat16, 1024 tokens at a time"
        if p.operand_dtype.itemsize == 2 and not adapter.is_power_of_2(p.scale):
            return f"scale = {p.scale:g} is folded into the hidden states, which rounds them"
        return None

    def token_logps(self, problem: Problem, loss_hint: TokenLoss | None = None) -> TokenLogps:
        """The logps of [N] tokens and, if asked for, their entropy."""
        if not len(problem.targets):
            return adapter.empty_result(problem)
        return autograd.first_order(_token_logps, problem)

    def token_loss_sum(self, problem: Problem, token_loss: TokenLoss) -> Tensor:
        """Sum over [N] tokens of `token_loss(logps, lse)`; a plain NLL has its gradients computed in the forward."""
        nll_weight = getattr(token_loss, "nll_weight", None)
        trains_head = problem.weight.requires_grad
        # Liger's function looks at hidden alone to decide whether gradients are needed.
        early = problem.hidden.requires_grad and (problem.memory.keep_head or not trains_head)
        if nll_weight is None or not early or not torch.is_grad_enabled() or not len(problem.targets):
            return super().token_loss_sum(problem, token_loss)
        fp16 = problem.hidden.dtype == torch.float16 or not autograd.holds_early(problem)
        if fp16 or not _runs_triton(problem.hidden.device) or (_has_cute(problem) and not _has_extras(problem)):
            return super().token_loss_sum(problem, token_loss)
        # Its backward scales saved gradients in place, so that a second one would be wrong: ours runs instead.
        hidden, weight, bias = problem.hidden, adapter.as_tensor(problem.weight), problem.bias
        hidden, weight = (x.detach().requires_grad_(x.requires_grad) for x in (hidden, weight))
        bias = None if bias is None else bias.detach().requires_grad_(bias.requires_grad)
        loss = _chunks(with_tensors(problem.spec, hidden, weight, problem.targets, bias), "mean")
        leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
        grads = dict(zip(map(id, leaves), torch.autograd.grad(loss, leaves), strict=True))
        d_hidden, d_weight, d_bias = (grads.get(id(x)) for x in (hidden, weight, bias))
        loss = loss.detach().to(problem.result_dtype)
        mean = autograd.precomputed_loss(Tensor.mul_, problem, loss, (d_hidden, (d_weight,), d_bias))
        return mean * (nll_weight * len(problem.targets)).to(mean.device)


IMPL = Liger()
