"""Dry runs of paths over problems without memory: what they launch is compiled before the paths themselves run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from fusedalign.impls.triton import ahead
from fusedalign.impls.triton.launch import INTERPRETED, is_operand
from fusedalign.impls.triton.plan import TOKENS_AT_ONCE
from fusedalign.problem import DEFAULT_WORKSPACE, Problem, as_head


def prepare_path(problem: Problem, path: Hashable, run: Callable[[Problem], object]) -> None:
    """Compile what `run` launches for problems like this one, whatever the number of tokens, once per `path`."""
    if INTERPRETED or problem.hidden.is_meta:
        return
    tensors = [*(x for _, x in problem.head), *([] if problem.bias is None else [problem.bias])]
    layouts = tuple((x.shape, x.stride(), x.dtype, x.data_ptr() % 16, x.requires_grad) for x in tensors)
    numbers = problem.softcap is None, (problem.softcap or 0) / problem.temperature, problem.outputs, problem.memory
    hidden = problem.hidden.dtype, _row_stride(problem), problem.hidden.requires_grad, problem.operand_dtype
    device = problem.hidden.device

    def dry_run() -> None:
        for n in tokens_of_dry_runs(problem):
            run(_without_memory(problem, n))

    ahead.prepare((path, device, layouts, numbers, hidden, len(problem.head)), device, dry_run)


def tokens_of_dry_runs(problem: Problem) -> tuple[int, int]:
    """Two numbers of tokens that together reach every branch: all tokens in one tile, and more than can be kept."""
    v, d = problem.weight.shape
    return 2, 8 * TOKENS_AT_ONCE + 4 * d + (problem.memory.workspace or DEFAULT_WORKSPACE) // v


def _without_memory(problem: Problem, n: int) -> Problem:
    """`problem` with `n` tokens, on the device "meta"."""

    def like(x: Tensor) -> Tensor:
        offset = x.data_ptr() % 16 // x.itemsize
        size = offset + 1 + sum((length - 1) * step for length, step in zip(x.shape, x.stride(), strict=True))
        memory = torch.empty(size, dtype=x.dtype, device="meta")
        return memory.as_strided(x.shape, x.stride(), offset).requires_grad_(x.requires_grad)

    d, weight = problem.hidden.shape[1], problem.weight
    hidden = torch.empty_strided((n, d), (_row_stride(problem), 1), dtype=problem.hidden.dtype, device="meta")
    return replace(
        problem,
        hidden=hidden.requires_grad_(problem.hidden.requires_grad),
        weight=as_head(tuple(like(x) for _, x in problem.head), weight.dtype),
        targets=torch.empty(n, dtype=torch.int64, device="meta"),
        bias=None if problem.bias is None else like(problem.bias),
    )


def _row_stride(problem: Problem) -> int:
    """The row stride of the kernels' operand: that of the hidden states, or of a contiguous copy."""
    hidden = problem.hidden
    return hidden.stride(0) if len(hidden) > 1 and is_operand(hidden, problem) else hidden.shape[1]
