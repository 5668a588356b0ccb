"""Bars of step times and memory: a column of panels per model and mix, a group of bars per training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusedalign.bench.training.settings import SIDES, SIZES, TRAININGS, Measured
from fusedalign.bench.training.table import Result


def draw(results: Sequence[Result], path: Path) -> None:
    """Save the bars as a PNG: median step times and, on a GPU, the memory of forward and backward."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys((result.job.size, result.job.mix) for result in results))
    lines: list[tuple[str, Callable[[Measured], float | None]]] = [("ms a step", lambda m: m.median_ms)]
    if any(result.measured.pass_bytes is not None for result in results):
        lines.append(("GiB of the passes", lambda m: None if m.pass_bytes is None else m.pass_bytes / 2**30))
    trainings = len({result.job.training for result in results})
    size = 1.5 + (1.5 + 1.2 * trainings) * len(columns), 0.7 + 2.6 * len(lines)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(lines), len(columns), squeeze=False, sharey="row")
    sides = [name for name in SIDES if any(result.job.side == name for result in results)]
    drawn: dict[str, Any] = {}
    for (label, value), row in zip(lines, panels, strict=True):
        for column, panel in zip(columns, row, strict=True):
            group = [result for result in results if (result.job.size, result.job.mix) == column]
            drawn |= _bars(panel, group, sides, value)
            panel.set_title(f"{SIZES[column[0]].about}, {column[1]}", fontsize=9)
            panel.grid(alpha=0.3, axis="y")
        row[0].set_ylabel(label)
    titles = [SIDES[name].title for name in sides if name in drawn]
    figure.legend([drawn[name] for name in sides if name in drawn], titles, loc="outside right center")
    figure.savefig(path, dpi=120)


def _bars(
    panel: Any, results: Sequence[Result], sides: Sequence[str], value: Callable[[Measured], float | None]
) -> dict[str, Any]:
    """Draw one panel; returns the bars of each side."""
    trainings, width = list(dict.fromkeys(result.job.training for result in results)), 0.8 / len(sides)
    drawn = {}
    for k, side in enumerate(sides):
        heights = {result.job.training: value(result.measured) for result in results if result.job.side == side}
        bars = {trainings.index(name) + k * width: x for name, x in heights.items() if x is not None}
        if bars:
            drawn[side] = panel.bar(list(bars), list(bars.values()), width, align="edge", color=f"C{k}")
    middle = [i + 0.4 for i in range(len(trainings))]
    panel.set_xticks(middle, [TRAININGS[name].about.replace(", ", ",\n") for name in trainings], fontsize=8)
    return drawn
