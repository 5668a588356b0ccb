"""`fusedalign bench --profile IMPL`: the time of one row by kernel."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from fusedalign.bench.cases import Case
from fusedalign.bench.data import Data
from fusedalign.bench.exact import reference
from fusedalign.bench.measure import covered, does_work, spans, synchronize
from fusedalign.bench.peers import Implementation
from fusedalign.bench.runner import Calls
from fusedalign.bench.tasks import Task

_TOP = 15


def profile_row(impl: Implementation, task: Task, case: Case, data: Data, *, seed: int, device: str) -> str:
    """The kernels (on a CPU: operators) of one forward and backward, most expensive first, and the idle time."""
    calls = Calls(impl, task, data, reference(task, data, seed=seed))
    for _ in range(3):
        calls.forward_backward()
    synchronize(device)
    on_gpu = [ProfilerActivity.CUDA] if device == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
        calls.forward_backward()
        synchronize(device)

    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = [(getattr(x, key), x.count, x.key) for x in profiler.key_averages() if does_work(x, device)]
    kernels.sort(reverse=True)
    intervals = spans(profiler, device)
    if not intervals:
        raise RuntimeError("expected kernels in the profile, the profiler saw none")
    total = max(end for _, end in intervals) - min(start for start, _ in intervals)
    idle = total - covered(intervals)
    lines = [
        f"{impl.name}, {task.name}, {case.title}: {total / 1e3:.4g} ms from the first start to the last end",
        f"{'share':>6}  {'ms':>9}  {'calls':>5}  what",
    ]
    lines += [f"{us / total:6.1%}  {us / 1e3:9.4f}  {count:5}  {name[:90]}" for us, count, name in kernels[:_TOP]]
    others = kernels[_TOP:]
    if others:
        us, count = sum(kernel[0] for kernel in others), sum(kernel[1] for kernel in others)
        lines.append(f"{us / total:6.1%}  {us / 1e3:9.4f}  {count:5}  {len(others)} others")
    lines.append(f"{idle / total:6.1%}  {idle / 1e3:9.4f}         idle: none of these ran")
    return "\n".join(lines)
