"""`fusedalign bench --profile IMPL`: where the time of one row goes."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from fusedalign.bench.cases import Case
from fusedalign.bench.data import Data
from fusedalign.bench.measure import covered, does_work, spans, synchronize
from fusedalign.bench.peers import Implementation
from fusedalign.bench.runner import Calls
from fusedalign.bench.tasks import Task, reference

_TOP = 15


def profile_row(impl: Implementation, task: Task, case: Case, data: Data, *, seed: int, device: str) -> str:
    """The kernels (on a CPU: operators) of one forward and backward, most expensive first, and what is idle.

    Raises:
        Exception: whatever the implementation raises.
    """
    calls = Calls(impl, task, data, reference(task, data, seed=seed))
    for _ in range(3):
        calls.both()
    synchronize(device)
    on_gpu = [ProfilerActivity.CUDA] if device == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
        calls.both()
        synchronize(device)

    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = [(getattr(x, key), x.count, x.key) for x in profiler.key_averages() if does_work(x, device)]
    table.sort(reverse=True)
    seen = spans(profiler, device)
    if not seen:
        raise RuntimeError("expected kernels in the profile, the profiler saw none")
    total = max(end for _, end in seen) - min(start for start, _ in seen)
    idle = total - covered(seen)
    lines = [
        f"{impl.name}, {task.name}, {case.title}: {total / 1e3:.4g} ms from the first start to the last end",
        f"{'share':>6}  {'ms':>9}  {'calls':>5}  what",
    ]
    lines += [f"{us / total:6.1%}  {us / 1e3:9.4f}  {count:5}  {name[:90]}" for us, count, name in table[:_TOP]]
    rest = table[_TOP:]
    if rest:
        us, count = sum(row[0] for row in rest), sum(row[1] for row in rest)
        lines.append(f"{us / total:6.1%}  {us / 1e3:9.4f}  {count:5}  {len(rest)} others")
    lines.append(f"{idle / total:6.1%}  {idle / 1e3:9.4f}         idle: none of these ran")
    return "\n".join(lines)
