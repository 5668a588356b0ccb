"""Time, peak memory and FLOP rate of a call, on a GPU or a CPU."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some profiler builds log each start and stop

Call = Callable[[], object]

_REPEATS = 5, 20  # at least, at most
_SECONDS = 0.4  # target duration of a measurement
_FLUSH_BYTES = 2**28  # larger than any GPU's L2 cache, as in triton.testing.do_bench


def median_ms(call: Call, device: str) -> float:
    """The median time of a call after two warm-up calls, by CUDA events on a GPU, else by the wall clock.

    On a GPU the L2 cache is overwritten before each measured call, so that it holds none of the inputs.
    """
    _wall(call, device)
    repeats = max(_REPEATS[0], min(_REPEATS[1], int(_SECONDS / _wall(call, device))))
    if device != "cuda":
        return statistics.median(_wall(call, device) for _ in range(repeats)) * 1e3
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    for start, end in events:
        flush.zero_()
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
    """Wait for the device; does nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(call: Call, device: str) -> int:
    """The peak memory of a call beyond what is allocated before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - allocated
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return max(0, *accumulate(_allocations(profiler)))


def _allocations(profiler: profile) -> list[int]:
    """Bytes of each allocation in order of time, negative for a free; from the exported trace of a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]


def product_rate(device: str) -> float:
    """FLOP/s of a square matrix product of random data: size 8192 in bf16 on a GPU, 512 in fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / (median_ms(lambda: a @ b, device) / 1e3)


def does_work(event: object, device: str) -> bool:
    """Whether a profiler event is work of the device: on a GPU kernels and copies, not their launches."""
    annotation = getattr(event, "is_user_annotation", False)  # contains other events, which would count twice
    return str(getattr(event, "device_type", "")).endswith("CUDA") == (device == "cuda") and not annotation


def spans(profiler: profile, device: str) -> list[tuple[float, float]]:
    """Start and end of each piece of work of the device, in microseconds."""
    return [(x.time_range.start, x.time_range.end) for x in profiler.events() or () if does_work(x, device)]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
