"""The picture of the demo: memory of the loss layer, DPO's loss, and padding.

docs/figures/demo.png is the picture of one run: `fusedalign demo && cp runs/demo/demo.png docs/figures/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusedalign.demo.memory import CASE, LossMemory, computed
from fusedalign.demo.slots import EpochSlots
from fusedalign.plan.sizes import TRL_TILE

FULL_LOGITS, STOCK, FUSED = "full logits", "stock TRL", "fusedalign"
COLOURS = {FULL_LOGITS: "tab:gray", STOCK: "tab:blue", FUSED: "tab:orange"}


class Results(NamedTuple):
    """What the picture shows."""

    losses: Mapping[str, Sequence[tuple[int, float]]]
    """trainer -> (step, DPO loss)"""
    memory: LossMemory
    """measured in the demo's DPO"""
    tokens: int
    """token positions of the measured batch"""
    vocab: int
    slots: Mapping[str, EpochSlots]
    """training -> slots of an epoch"""


def plot(results: Results, path: Path) -> None:
    """Save the picture as a PNG; the folder is created."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.4), layout="constrained")
    (large, small), (losses, slots) = figure.subplots(2, 2)
    _plot_memory(large, computed(), 2**30, "GiB")
    large.set_title(f"Computed for Qwen3-1.7B, {CASE.tokens:,} tokens\nvocabulary {CASE.vocab:,}")
    _plot_memory(small, results.memory, 2**20, "MiB")
    tile = f"TRL's tile always has {TRL_TILE[1]:,} columns"
    small.set_title(f"Measured in this demo, {results.tokens:,} tokens\nvocabulary {results.vocab:,}; {tile}")
    _plot_losses(losses, results.losses)
    _plot_slots(slots, results.slots)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize("medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _plot_memory(axes: Any, memory: LossMemory, unit: int, name: str) -> None:
    sizes = [size / unit for size in memory]
    bars = axes.barh(list(COLOURS), sizes, color=list(COLOURS.values()))
    axes.bar_label(bars, fmt=f"%.3g {name}", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel(f"peak memory of the loss layer, {name}")


def _plot_losses(axes: Any, losses: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    styles = ({"linewidth": 6, "alpha": 0.4}, {"linewidth": 1.5})
    for (name, points), style in zip(losses.items(), styles, strict=True):
        axes.plot(*zip(*points, strict=True), label=name, color=COLOURS[name], **style)
    axes.set(title="Training loss, one curve over the other", xlabel="step", ylabel="DPO loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _plot_slots(axes: Any, slots: Mapping[str, EpochSlots]) -> None:
    width, places = 0.36, range(len(slots))
    padded, packed = zip(*slots.values(), strict=True)
    for shift, values, name in ((-width / 2, padded, STOCK), (width / 2, packed, FUSED)):
        label = f"{name}, padded" if name == STOCK else f"{name}, packed (default on a GPU)"
        places_of = [place + shift for place in places]
        bars = axes.bar(places_of, [value / 1e3 for value in values], width, color=COLOURS[name], label=label)
        axes.bar_label(bars, fmt="%.3g")
    axes.set_xticks(places, [f"{title}: {each.change:+.0%}" for title, each in slots.items()])
    axes.set(title="Token positions that are computed", ylabel="positions of an epoch, thousands")
    axes.set_ylim(top=1.35 * max(padded) / 1e3)
    axes.legend(frameon=False, loc="upper left")
