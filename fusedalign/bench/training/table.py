"""The text of `fusedalign bench trl`: a header, a table for each training, model and mix, and notes below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fusedalign.bench.failures import OUT_OF_MEMORY
from fusedalign.bench.machine import describe_machine, machine
from fusedalign.bench.training.settings import ALL_MIXES, SIDES, SIZES, STOCK, STOCK_LIGER, TRAININGS, Job, Measured
from fusedalign.commandline import fit
from fusedalign.reports import bullets, markdown_row, markdown_table

#: Title and meaning of each column after the row's name.
COLUMNS = {
    "first": "ms of the first step, in which kernels compile",
    "median": "ms of a later step, data loading included",
    "slowest": "ms of the slowest later step",
    "GPU": "ms that the GPU was busy in one more, profiled step; for the rest of it the GPU waits for the CPU",
    "tokens/s": "of the later steps, without padding; a prompt counts once per answer",
    "slots": "token positions per step that a model computed, with padding and those of the reference",
    "peak": "GiB of a later step, model and optimizer included",
    "passes": "GiB of forward and backward beyond what is held between steps",
    "x TRL": "how many times as fast as TRL, by the medians",
    "x +Liger": "how many times as fast as TRL + Liger",
    "loss": "the largest relative difference of a step's loss from the first row's",
}
#: The columns without --wide.
NARROW = ("median", "GPU", "tokens/s", "peak", "passes", "x TRL", "x +Liger", "loss")
LENGTHS = "lengths in tokens, log-normal, as median / sigma / cap"
_NAME_WIDTH = max(len(side.title) for side in SIDES.values())


class Result(NamedTuple):
    """A job and its figures."""

    job: Job
    measured: Measured

    @property
    def name(self) -> str:
        """The title of its table and its row."""
        return f"{group_title(self.job)}, {SIDES[self.job.side].title}"


def header(jobs: Sequence[Job], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """Device, versions, the settings of the trainings, and the meaning of rows and of the shown columns."""
    job = jobs[0]
    precision = "bf16 weights, mixed precision" if job.device == "cuda" else "fp32"
    mixes, sides = dict.fromkeys(job.mix for job in jobs), dict.fromkeys(job.side for job in jobs)
    shrunk = {SIZES[job.size].about: SIZES[job.size].shrink for job in jobs if SIZES[job.size].shrink > 1}
    rows = job.step_rows or ALL_MIXES[job.mix].rows
    batch = f"{rows} rows a step (SFT, KTO), or {rows // 2} pairs" + (" on each GPU" if job.ranks > 1 else "")
    lines = [
        "# fusedalign bench trl",
        "",
        fit(describe_machine(machine(job.device))),
        "",
        fit(
            f"Random weights, {precision}, gradient checkpointing, AdamW, impl {job.impl}; {batch}; {job.steps} steps "
            "after the first. Each row is a process of its own, without compiled kernels. All rows of a table train on "
            "the same data."
        ),
        "",
        f"Mixes, {LENGTHS}:",
        "",
        *bullets(describe_mix(name) for name in mixes),
        *bullets(f"{about}: all lengths divided by {shrink}" for about, shrink in shrunk.items()),
        "",
        "Rows:",
        "",
        *bullets(f"{SIDES[name].title}: {SIDES[name].about}" for name in sides),
        "",
        "Columns:",
        "",
        *bullets(f"{title}: {COLUMNS[title]}" for title in columns),
    ]
    return "\n".join(lines)


def describe_mix(name: str) -> str:
    """A mix and its parameters in one line."""
    return f"{name}: {ALL_MIXES[name]}"


def group_title(job: Job) -> str:
    """The title of a table: training, model and mix."""
    ranks = f", {job.ranks} GPUs, {job.engine}" if job.ranks > 1 else ""
    return f"{TRAININGS[job.training].about}: {SIZES[job.size].about}, {job.mix}{ranks}"


def head(job: Job, columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """The title of a table and its first two lines."""
    return "\n".join([f"## {group_title(job)}", "", *markdown_table([["", *columns]], _widths(columns))])


def _widths(columns: Sequence[str]) -> list[int]:
    return [_NAME_WIDTH, *(max(5, len(title)) for title in columns)]


def line(result: Result, earlier: Sequence[Result], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """A row of a table; `earlier` are the rows above it, among them the baselines."""
    measured, title = result.measured, SIDES[result.job.side].title
    if measured.reason:
        outcome = OUT_OF_MEMORY if measured.reason == OUT_OF_MEMORY else "failed"
        return markdown_row([title, *["-"] * (len(columns) - 1), outcome], _widths(columns))
    medians = {other.job.side: other.measured.median_ms for other in [*earlier, result]}
    first_losses = next((other.measured.losses for other in earlier if other.measured.losses), None)
    gib = 2.0**30
    cells = [
        _number(measured.first_ms),
        _number(measured.median_ms),
        _number(measured.slowest_ms),
        _number(measured.gpu_ms),
        _number(measured.tokens_per_second),
        _number(measured.slots_per_step),
        _number(measured.peak_bytes, gib),
        _number(measured.pass_bytes, gib),
        _ratio(medians.get(STOCK), measured.median_ms),
        _ratio(medians.get(STOCK_LIGER), measured.median_ms),
        "-" if first_losses is None else f"{difference(first_losses, measured.losses):.0e}",
    ]
    every = dict(zip(COLUMNS, cells, strict=True))
    return markdown_row([title, *(every[name] for name in columns)], _widths(columns))


def notes(results: Sequence[Result]) -> str:
    """Why rows failed, and the time of precomputed references; may be empty."""
    lines = [f"{SIDES[job.side].title}: {measured.reason}" for job, measured in results if measured.reason]
    for job, measured in results:
        if measured.precompute_seconds is not None:
            seconds = f"{measured.precompute_seconds:.3g} s for the {job.all_steps * job.batch} rows of all steps"
            lines.append(f"{SIDES[job.side].title}: the reference took {seconds}, before the first one")
    return "\n".join(bullets(lines))


def failures(results: Sequence[Result]) -> list[str]:
    """The rows that failed, with their reasons; running out of memory is a result, not a failure."""
    broken = [result for result in results if result.measured.reason not in ("", OUT_OF_MEMORY)]
    return [f"{result.name} failed: {result.measured.reason}" for result in broken]


def difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest relative difference between the losses of two runs; NaN is the largest of all."""
    differences = [abs(a - b) / abs(a) for a, b in zip(losses, others, strict=False) if a]
    return max(differences, key=lambda x: (math.isnan(x), x), default=0.0)


def _number(x: float | None, unit: float = 1.0) -> str:
    """Four digits without an exponent."""
    return "-" if x is None else f"{x / unit:.4g}" if abs(x / unit) < 1000 else f"{x / unit:.0f}"


def _ratio(stock: float | None, other: float | None) -> str:
    return "-" if stock is None or other is None else f"{stock / other:.2f}"
