"""The picture of the demo: memory of the loss layer, DPO's loss, and padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusedalign.demo.memory import CASE, LossMemory, computed
from fusedalign.demo.slots import Slots

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
    slots: Mapping[str, Slots]
    """method -> slots of an epoch"""


def plot(results: Results, path: Path) -> None:
    """Save the picture as a PNG; the folder is created."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.4), layout="constrained")
    (large, small), (losses, slots) = figure.subplots(2, 2)
    for axes in (large, small, losses, slots):
        axes.spines[["top", "right"]].set_visible(False)
    _plot_memory(large, computed(), 2**30, "GiB")
    head = f"{CASE.vocab:,} x {CASE.hidden_size:,}"
    large.set_title(f"Qwen3-1.7B's head ({head}), {CASE.tokens:,} tokens: computed")
    _plot_memory(small, results.memory, 2**20, "MiB")
    small.set_title(f"This demo's head (vocabulary {results.vocab:,}), {results.tokens:,} tokens: measured")
    _plot_losses(losses, results.losses)
    _plot_slots(slots, results.slots)
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
    axes.set(title="Same seed, same training", xlabel="step", ylabel="DPO loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _plot_slots(axes: Any, slots: Mapping[str, Slots]) -> None:
    width, places = 0.36, range(len(slots))
    padded, packed = zip(*slots.values(), strict=True)
    for shift, values, name in ((-width / 2, padded, "padded"), (width / 2, packed, "packed, on a GPU")):
        colour = COLOURS[STOCK if name == "padded" else FUSED]
        bars = axes.bar([x + shift for x in places], [v / 1e3 for v in values], width, color=colour, label=name)
        axes.bar_label(bars, fmt="%.3g")
    titles = [f"{method.upper()}: {each.saving:.0%} fewer" for method, each in slots.items()]
    axes.set_xticks(places, titles)
    axes.set(title="Padding that is not computed", ylabel="token positions of an epoch, thousands")
    axes.margins(y=0.2)
    axes.legend(frameon=False)
