"""Ranks that share a head: what its forward and backward take on one of them and on all."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fusedalign.bench.cases import Case
from fusedalign.bench.measure import peak_bytes, synchronize
from fusedalign.ops import linear_cross_entropy, linear_logps
from fusedalign.reports import markdown_table

_GIB = 2**30
_REPEATS = 10

#: task -> whether hidden states and head need a gradient, and the scalar to differentiate.
TASKS: dict[str, tuple[bool, bool, Callable[..., Tensor]]] = {
    "no gradient": (False, False, lambda *tensors, **options: linear_logps(*tensors, **options).logps.sum()),
    "frozen head": (True, False, lambda *tensors, **options: linear_logps(*tensors, **options).logps.sum()),
    "trained head": (True, True, lambda *tensors, **options: linear_logps(*tensors, **options).logps.sum()),
    "mean NLL": (True, True, linear_cross_entropy),
}


@dataclass(frozen=True)
class Result:
    """What a task takes on one rank."""

    ms: float
    peak_bytes: int
    """head, gradients and everything else but the hidden states"""
    errors: dict[str, float]
    """relative, of loss, dhidden and dweight, from the same task in fp32 on one device"""


class Results(NamedTuple):
    """The results of all tasks."""

    one: list[Result]
    """on one rank, with the whole head"""
    ranks: list[list[Result]]
    """on each of the ranks that share the head"""


def measure(ranks: int, case: Case) -> Results:
    """Start the ranks and measure all tasks, on one of them and on all."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run_rank, (ranks, case, folder), nprocs=ranks)

        def read(name: object) -> list[Result]:
            return [Result(**x) for x in json.loads((Path(folder) / f"{name}.json").read_text())]

        return Results(read("one"), [read(rank) for rank in range(ranks)])


def table(one: list[Result], ranks: list[list[Result]], *, wide: bool = True) -> list[str]:
    """Markdown lines: each task on one rank and on all, by the slowest and the fullest of them.

    Without `wide` the last column is the largest of all errors.
    """
    columns = ["", "one ms", "sharded ms", "times as fast", "one GiB", "a rank GiB", "of one"]
    lines = [[*columns, *(("errors, one", "errors, sharded") if wide else ("largest error",))]]
    for i, task in enumerate(TASKS):
        results = [rank[i] for rank in ranks]
        ms, peak = max(x.ms for x in results), max(x.peak_bytes for x in results)
        errors = [", ".join(f"{k} {v:.1e}" for k, v in x.errors.items()) for x in (one[i], results[0])]
        if not wide:
            errors = [f"{max(x for result in (one[i], *results) for x in result.errors.values()):.1e}"]
        figures = [f"{one[i].ms:.1f}", f"{ms:.1f}", f"{one[i].ms / ms:.2f}", f"{one[i].peak_bytes / _GIB:.2f}"]
        lines.append([task, *figures, f"{peak / _GIB:.2f}", f"{peak / one[i].peak_bytes:.2f}", *errors])
    return markdown_table(lines)


def _run_rank(rank: int, ranks: int, case: Case, folder: str) -> None:
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(rank)
    store = f"file://{folder}/store"
    dist.init_process_group("nccl" if cuda else "gloo", init_method=store, rank=rank, world_size=ranks)
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if cuda else torch.float32
    hidden = torch.randn(case.tokens, case.hidden_size, device=device, generator=generator).to(dtype)
    weight = torch.randn(case.vocab, case.hidden_size, device=device, generator=generator).to(dtype)
    weight *= 2 / case.hidden_size**0.5
    targets = torch.randint(case.vocab, (case.tokens,), device=device, generator=generator)
    start, stop = (case.vocab * x // ranks for x in (rank, rank + 1))
    exact = [_gradients(task, hidden.float(), weight.float(), targets) for task in TASKS]
    if rank == 0:
        results = [_measure(task, hidden, weight, targets, exact[i], slice(None)) for i, task in enumerate(TASKS)]
        (Path(folder) / "one.json").write_text(json.dumps([vars(x) for x in results]))
    dist.barrier()
    part = weight[start:stop].clone()
    del weight
    rows, group = slice(start, stop), dist.group.WORLD
    results = [_measure(x, hidden, part, targets, exact[i], rows, process_group=group) for i, x in enumerate(TASKS)]
    (Path(folder) / f"{rank}.json").write_text(json.dumps([vars(x) for x in results]))
    dist.barrier()
    dist.destroy_process_group()


def _gradients(task: str, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> dict[str, Tensor]:
    """The loss of a task and its gradients, on fresh leaves."""
    trains_hidden, trains_head, function = TASKS[task]
    hidden, weight = hidden.detach().requires_grad_(trains_hidden), weight.detach().requires_grad_(trains_head)
    with torch.set_grad_enabled(trains_hidden):
        loss = function(hidden, weight, targets, **options)
    if trains_hidden:
        loss.backward()
    results = {"loss": loss.detach(), "dhidden": hidden.grad, "dweight": weight.grad}
    return {name: x for name, x in results.items() if x is not None}


def _measure(
    task: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    exact: dict[str, Tensor],
    rows: slice,
    **options: Any,
) -> Result:
    results = _gradients(task, hidden, weight, targets, **options)
    errors = {}
    for name, x in results.items():
        reference = exact[name][rows] if name == "dweight" else exact[name]
        errors[name] = float((x.double() - reference.double()).norm() / reference.double().norm())
    del results

    def call() -> object:
        return _gradients(task, hidden, weight, targets, **options)

    device = hidden.device.type
    peak = peak_bytes(call, device) + weight.numel() * weight.itemsize
    times = []
    for _ in range(_REPEATS):  # as many on each rank, since they wait for one another
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return Result(statistics.median(times) * 1e3, peak, errors)
