"""`fusedalign bench --profile IMPL`: where the time of one row goes."""

from __future__ import annotations

from collections.abc import Iterable

from torch.profiler import ProfilerActivity, profile

from fusedalign.bench.cases import Case
from fusedalign.bench.data import Data
from fusedalign.bench.measure import synchronize
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
    table = [(getattr(x, key), x.count, x.key) for x in profiler.key_averages() if _counts(x, bool(on_gpu))]
    table.sort(reverse=True)
    spans = [(x.time_range.start, x.time_range.end) for x in profiler.events() if _counts(x, bool(on_gpu))]
    if not spans:
        raise RuntimeError("expected kernels in the profile, the profiler saw none")
    total = max(end for _, end in spans) - min(start for start, _ in spans)
    idle = total - _covered(spans)
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


def _counts(event: object, on_gpu: bool) -> bool:
    """Whether an event is work of the device that is looked at: on a GPU kernels and copies, not their launches."""
    annotation = getattr(event, "is_user_annotation", False)  # spans that contain work, and would count it twice
    return str(getattr(event, "device_type", "")).endswith("CUDA") == on_gpu and not annotation


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
