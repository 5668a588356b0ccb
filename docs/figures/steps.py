"""Draw time and memory of whole training steps from the table in docs/performance.md, as docs/figures/steps.png.

python docs/figures/steps.py
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
TABLE = FOLDER.parent / "performance.md"
#: The rows of the table that are drawn: training and mix.
SHOWN = (
    ("DPO, live reference", "long"),
    ("DPO, precomputed, against live", "long"),
    ("SFT", "long"),
    ("KTO", "long"),
    ("SimPO", "chat"),
    ("ORPO", "chat"),
)
LABELS = {"DPO, live reference": "DPO", "DPO, precomputed, against live": "DPO, precomputed\nreference"}
SIDES = {"stock TRL": "tab:blue", "fusedalign, packed": "tab:orange"}


class Step(NamedTuple):
    """One training: milliseconds of a step, and GiB of forward and backward, of stock TRL and of fusedalign."""

    training: str
    mix: str
    ms: tuple[float, float]
    gib: tuple[float, float]


def steps(text: str) -> list[Step]:
    """The rows of the table of whole steps in a page."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith("| training | mix | stock TRL ms"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        training, mix, stock, packed, _, passes, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        stock_gib, packed_gib = map(float, passes.split("/"))
        rows.append(Step(training, mix, (_number(stock), _number(packed)), (stock_gib, packed_gib)))
    return rows


def _number(cell: str) -> float:
    """The first number of a cell such as `611 (383)`."""
    return float(cell.split()[0])


def draw(path: Path) -> None:
    """Save the figure."""
    by_name = {(step.training, step.mix): step for step in steps(TABLE.read_text(encoding="utf-8"))}
    shown = [by_name[name] for name in SHOWN]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = {"a training step, ms": "ms", "memory of forward and backward, GiB": "gib"}
    for axes, (title, field) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        values = [getattr(step, field) for step in shown]
        for i, (side, color) in enumerate(SIDES.items()):
            places = [place + 0.4 * i for place in range(len(shown))]
            bars = axes.barh(places, [pair[i] for pair in values], 0.38, color=color, label=side)
            axes.bar_label(bars, [f"{pair[i]:g}" for pair in values], padding=3)
        axes.set_yticks([place + 0.2 for place in range(len(shown))])
        axes.set_yticklabels([f"{LABELS.get(step.training, step.training)} ({step.mix})" for step in shown])
        axes.set_xlabel(title)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(FOLDER / "steps.png")
