"""Time, memory and rates of a call, on a GPU or a CPU."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some builds of the profiler log each start and stop

Call = Callable[[], object]

_REPEATS = 5, 20
_SECONDS = 0.4  # a measurement takes about this long, within the repeats above


def median_ms(call: Call, device: str) -> float:
    """The median time of a call, after a warm-up of two: CUDA events on a GPU, else the wall clock."""
    _wall(call, device)
    repeats = max(_REPEATS[0], min(_REPEATS[1], int(_SECONDS / _wall(call, device))))
    if device != "cuda":
        return statistics.median(_wall(call, device) for _ in range(repeats)) * 1e3
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def _wall(call: Call, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait until the device has done everything; a CPU always has."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(call: Call, device: str) -> int:
    """The most that a call holds at once beyond what was allocated before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    kineto: Any = profiler.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()  # below 0 where it frees
        peak = max(peak, now)
    return peak


def product_rate(device: str) -> float:
    """FLOP/s of one large square product of random data: 8192 wide in bf16 on a GPU, 512 in fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / (median_ms(lambda: a @ b, device) / 1e3)


def does_work(event: object, device: str) -> bool:
    """Whether a profiler's event is work of the device: on a GPU kernels and copies, not their launches."""
    annotation = getattr(event, "is_user_annotation", False)  # spans that contain work, and would count it twice
    return str(getattr(event, "device_type", "")).endswith("CUDA") == (device == "cuda") and not annotation


def spans(profiler: profile, device: str) -> list[tuple[float, float]]:
    """Start and end of all that the device did, in microseconds."""
    return [(x.time_range.start, x.time_range.end) for x in profiler.events() or () if does_work(x, device)]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
