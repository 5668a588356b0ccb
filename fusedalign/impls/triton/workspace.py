"""The workspace of a call that names none: more than the default where that saves work and a GPU has the room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fusedalign.problem import DEFAULT_WORKSPACE, Problem


def fit_workspace(problem: Problem, is_enough: Callable[[Problem], bool]) -> Problem:
    """`problem` with a workspace that its call did not name: the smallest that `is_enough`, where that is free.

    It is `DEFAULT_WORKSPACE` times a power of two, at most half of what the gradients leave of the free memory of a
    GPU. The few sizes return from step to step, which spares the allocator and the preparation of kernels. The problem
    stays as it is on other devices, and where PyTorch is to use deterministic algorithms: the rounding of a gradient
    depends on the workspace, and free memory differs between runs.
    """
    if problem.memory.workspace is not None or not problem.hidden.is_cuda:
        return problem
    if torch.are_deterministic_algorithms_enabled() or is_enough(problem):
        return problem
    tensors = problem.hidden, problem.bias, *(x for _, x in problem.head)
    grad_bytes = sum(x.nbytes for x in tensors if x is not None and x.requires_grad)
    limit, workspace = (free_memory(problem.hidden.device) - grad_bytes) // 2, DEFAULT_WORKSPACE
    while 2 * workspace <= limit and not is_enough(problem):
        workspace *= 2
        problem = replace(problem, memory=problem.memory._replace(workspace=workspace))
    return problem


def free_memory(device: torch.device) -> int:
    """Bytes that PyTorch may still allocate on a GPU: free in its allocator, or left of the card for this process.

    0 where the allocator has had to give its cache back, since more of that costs time, and in the capture of a graph.
    """
    if torch.cuda.is_current_stream_capturing():
        return 0
    stats = torch.cuda.memory_stats(device)
    if stats.get("num_alloc_retries", 0):
        return 0
    reserved, allocated = (stats.get(f"{name}_bytes.all.current", 0) for name in ("reserved", "allocated"))
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return reserved - allocated + max(0, min(free, share))
