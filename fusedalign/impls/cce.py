"""Adapter to Apple's Cut Cross-Entropy, by the features of the installation that is found and not by its version.

The releases on PyPI (25.1.1) and the head of its repository differ: the latter has a bias, the log-sum-exp, sums in
fp32 and presets. Gradients are filtered only where `filter_eps` asks for it.

Source: Wijmans et al. 2024 (Cut Your Losses in Large-Vocabulary Language Models), arXiv:2411.09009.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fusedalign.impls import adapter, autograd
from fusedalign.impls.base import Impl
from fusedalign.problem import Problem, TokenLogps, TokenLoss

_INSTALL = (
    "pip install cut-cross-entropy, or its git head, which is exact: "
    "pip install 'cut-cross-entropy @ git+https://github.com/apple/ml-cross-entropy.git'"
)


class _Library(NamedTuple):
    function: Callable[..., Any]
    parameters: frozenset[str]
    exact: bool
    """has a preset whose gradients are dense and summed in fp32; its target logit is an fp32 product too"""


def _load() -> _Library:
    from cut_cross_entropy import linear_cross_entropy

    parameters = frozenset(inspect.signature(linear_cross_entropy).parameters)
    return _Library(linear_cross_entropy, parameters, {"accum_e_fp32", "accum_c_fp32", "return_lse"} <= parameters)


_find = adapter.lazy_library("cut_cross_entropy", _INSTALL, _load)


def _refusal(p: Problem) -> str | None:
    """Why it cannot serve `p`, as far as that can be told without the library."""
    if (reason := adapter.split_head_refusal(p)) is not None:
        return reason
    if p.operand_dtype.itemsize != 2:
        dtype = str(p.operand_dtype).removeprefix("torch.")
        return f"it takes bfloat16 and float16, hidden states and head here are multiplied in {dtype}"
    if (reason := _device_refusal(p.hidden.device)) is not None:
        return reason
    if max(p.hidden.numel(), adapter.as_tensor(p.weight).numel()) >= 2**31:
        return "its kernels count in 32 bits: hidden states and head must have fewer than 2**31 elements each"
    if missing := sorted(p.outputs - {"lse"}):
        return f"it gives logps and, from its git head on, lse, but no {', '.join(missing)}"
    return None


def _token_logps(problem: Problem) -> TokenLogps:
    library = _find().library
    hidden, weight = adapter.operands(problem, adapter.logit_scale(problem))
    options: dict[str, Any] = {"softcap": adapter.softcap(problem), "reduction": "none"}
    if problem.filter_eps is None:
        options |= {"impl": "cce_exact"} if library.exact else {"filter_eps": None}
    else:
        options["filter_eps"] = float(problem.filter_eps)
    if problem.bias is not None:
        options["bias"] = (problem.bias * adapter.logit_scale(problem)).to(problem.operand_dtype)
    if "lse" not in problem.outputs:
        return TokenLogps(adapter.to_logps(library.function(hidden, weight, problem.targets, **options), problem))
    nll, lse = library.function(hidden, weight, problem.targets, return_lse=True, **options)
    return TokenLogps(adapter.to_logps(nll, problem), lse=lse.to(problem.result_dtype))


def _device_refusal(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device}"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


class CutCrossEntropy(Impl):
    """The impl, see above."""

    about = "Apple's Cut Cross-Entropy; half precision on NVIDIA GPUs from Ampere on"
    package = "cut-cross-entropy"

    def unavailable(self) -> str | None:
        """None, or why this impl cannot run on this machine."""
        if not torch.cuda.is_available():
            return "it needs a CUDA device, and this machine has none"
        return _device_refusal(torch.device("cuda")) or _find().reason

    def supports(self, problem: Problem) -> str | None:
        """None, or why this impl cannot serve `problem`; see `caveat` for how well."""
        reason = _refusal(problem)
        if reason is not None:
            return reason
        library, reason = _find()
        if reason is not None:
            return reason
        for name, needed in (("bias", problem.bias is not None), ("return_lse", "lse" in problem.outputs)):
            if needed and name not in library.parameters:
                return f"this release has no {name}, its git head has"
        return None

    def caveat(self, problem: Problem) -> str | None:
        """None, or what is not exact, so that "auto" skips this impl."""
        if _refusal(problem) is not None:
            return None
        library = _find().library
        if library is not None and not library.exact:
            return (
                "this release rounds the target's logit, and sums gradients, in half precision; its git head does not"
            )
        scale = adapter.logit_scale(problem)
        if not adapter.is_power_of_2(scale):
            return f"scale / temperature = {scale:g} is folded into the hidden states, which rounds them"
        return None

    def token_logps(self, problem: Problem, loss_hint: TokenLoss | None = None) -> TokenLogps:
        """The logps of [N] tokens and, if asked for, their lse."""
        if not len(problem.targets):
            return adapter.empty_result(problem)
        return autograd.first_order(_token_logps, problem)


IMPL = CutCrossEntropy()
