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
from fusedalign.problem import Problem, TokenLogps

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


_find = adapter.finder("cut_cross_entropy", _INSTALL, _load)


def _refusal(p: Problem) -> str | None:
    """What needs no look at the library."""
    if (reason := adapter.refusal_of_parts(p)) is not None:
        return reason
    if p.operand_dtype.itemsize != 2:
        wide = str(p.operand_dtype).removeprefix("torch.")
        return f"it takes bfloat16 and float16, hidden states and head here are multiplied in {wide}"
    if (reason := _of_device(p.hidden.device)) is not None:
        return reason
    if max(p.hidden.numel(), adapter.whole(p.weight).numel()) >= 2**31:
        return "its kernels count in 32 bits: hidden states and head must have fewer than 2**31 elements each"
    if more := sorted(p.outputs - {"lse"}):
        return f"it gives logps and, from its git head on, lse, but no {', '.join(more)}"
    return None


def _token_logps(problem: Problem) -> TokenLogps:
    library = _find().library
    hidden, weight = adapter.operands(problem, adapter.factor(problem))
    options: dict[str, Any] = {"softcap": adapter.softcap(problem), "reduction": "none"}
    if problem.filter_eps is None:
        options |= {"impl": "cce_exact"} if library.exact else {"filter_eps": None}
    else:
        options["filter_eps"] = float(problem.filter_eps)
    if problem.bias is not None:
        options["bias"] = (problem.bias * adapter.factor(problem)).to(problem.operand_dtype)
    if "lse" not in problem.outputs:
        return TokenLogps(adapter.logps_of(library.function(hidden, weight, problem.targets, **options), problem))
    nll, lse = library.function(hidden, weight, problem.targets, return_lse=True, **options)
    return TokenLogps(adapter.logps_of(nll, problem), lse=lse.to(problem.result_dtype))


def _of_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device}"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


class CutCrossEntropy(Impl):
    """The impl, see above."""

    about = "Apple's Cut Cross-Entropy; half precision on NVIDIA GPUs from Ampere on"
    package = "cut-cross-entropy"

    def unavailable(
        self,
    ) -> str | None:
        """None, or why this impl cannot run on this machine."""
        if not torch.cuda.is_available():
            return "it needs a CUDA device, and this machine has none"
        return _of_device(torch.device("cuda")) or _find().reason

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
        """None, or what is not exact, for which "auto" passes this impl by."""
        if _refusal(problem) is not None:
            return None
        library = _find().library
        if library is not None and not library.exact:
            return (
                "this release rounds the target's logit, and sums gradients, in half precision; its git head does not"
            )
        if not adapter.is_power_of_2(adapter.factor(problem)):
            return (
                f"scale / temperature = {adapter.factor(problem):g} is folded into the hidden states, which rounds them"
            )
        return None

    def token_logps(self, problem: Problem) -> TokenLogps:
        """The logps of [N] tokens and, if asked for, their lse."""
        if not len(problem.targets):
            return adapter.of_no_tokens(problem)
        return autograd.first_order(_token_logps, problem)


IMPL = CutCrossEntropy()
