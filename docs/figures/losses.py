"""Draw `losses.png`: every pairwise loss that is a function of one margin, and its gradient.

Run as `python docs/figures/losses.py`; `--out FILE` writes elsewhere. The same numbers on every run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from fusedalign.losses import cpo_loss, dpo_loss, orpo_loss, simpo_loss

#: Where chosen and rejected mean log-probability lie when the margin is 0; ORPO is the one curve that depends on it.
ORPO_MIDPOINT = -4.0


def dpo(margin: Tensor, loss_type: str, **options: float) -> Tensor:
    """Chosen log-ratio margin / 2, rejected -margin / 2, one token each, beta = 1."""
    zero, one = torch.zeros_like(margin), torch.ones_like(margin)
    lengths = {"chosen_lengths": one, "rejected_lengths": one}
    return dpo_loss(margin / 2, -margin / 2, zero, zero, beta=1.0, loss_type=loss_type, **lengths, **options).losses


def cpo(margin: Tensor, loss_type: str) -> Tensor:
    """Chosen log-probability margin / 2, rejected -margin / 2, beta = 1."""
    return cpo_loss(margin / 2, -margin / 2, beta=1.0, loss_type=loss_type).losses


def simpo(margin: Tensor) -> Tensor:
    """Likewise, with the margin gamma = 1 that the chosen one must win by."""
    return simpo_loss(margin / 2, -margin / 2, beta=1.0, gamma=1.0).losses


def orpo(margin: Tensor) -> Tensor:
    """Likewise around ORPO_MIDPOINT, since odds need log-probabilities below 0."""
    return orpo_loss(ORPO_MIDPOINT + margin / 2, ORPO_MIDPOINT - margin / 2, beta=1.0).losses


#: (family, its colours) -> the curves of that family as (label, line style, function of the margin)
FAMILIES: dict[tuple[str, tuple[str, ...]], list[tuple[str, str | tuple, Callable[[Tensor], Tensor]]]] = {
    ("Logistic in the margin", ("#08306b", "#2171b5", "#6baed6", "#17a2b8")): [
        ("sigmoid, sigmoid_norm,\ncpo sigmoid, aot at B = 1", "-", partial(dpo, loss_type="sigmoid")),
        ("robust, eps = 0.1", "--", partial(dpo, loss_type="robust", label_smoothing=0.1)),
        ("simpo, gamma = 1", "-.", simpo),
        ("orpo", ":", orpo),
    ],
    ("A margin that is enough", ("#a63603", "#f16913", "#fdae6b")): [
        ("hinge, cpo hinge", "-", partial(dpo, loss_type="hinge")),
        ("ipo, cpo ipo", "--", partial(dpo, loss_type="ipo")),
        ("sppo_hard", "-.", partial(dpo, loss_type="sppo_hard")),
    ],
    ("Each completion by itself", ("#00441b", "#41ab5d")): [
        ("bco_pair", "-", partial(dpo, loss_type="bco_pair")),
        ("nca_pair", "--", partial(dpo, loss_type="nca_pair")),
    ],
    ("Bounded", ("#4a1486", "#9e6fc9", "#c51b8a")): [
        ("apo_zero", "-", partial(dpo, loss_type="apo_zero")),
        ("apo_down", "--", partial(dpo, loss_type="apo_down")),
        ("exo_pair, eps = 0.1", "-.", partial(dpo, loss_type="exo_pair", label_smoothing=0.1)),
    ],
    ("Blend", ("#111111",)): [("discopop, tau = 0.05", (0, (2.5, 2.5)), partial(dpo, loss_type="discopop"))],
}


def curve(function: Callable[[Tensor], Tensor], margin: Tensor) -> tuple[Tensor, Tensor]:
    """The loss at each margin, and its derivative by autograd."""
    margin = margin.clone().requires_grad_()
    losses = function(margin)
    (gradient,) = torch.autograd.grad(losses.sum(), margin)
    return losses.detach(), gradient


def width(label: str, style: str | tuple) -> float:
    """Thick for the curve that everything is compared with, and for dots, which look thin."""
    return 3.4 if label.startswith("sigmoid") else 2.4 if style == ":" else 1.9


def draw() -> Figure:
    """Two panels and the legend to their right."""
    figure = Figure(figsize=(14, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    margin = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    handles = []
    for number, ((family, colours), curves) in enumerate(FAMILIES.items()):
        handles.append(Line2D([], [], linestyle="none", label=("\n" if number else "") + family))
        for colour, (label, style, function) in zip(colours, curves, strict=True):
            for axes, values in zip((left, right), curve(function, margin), strict=True):
                axes.plot(margin.numpy(), values.numpy(), linestyle=style, color=colour, linewidth=width(label, style))
            handles.append(Line2D([], [], linestyle=style, color=colour, linewidth=width(label, style), label=label))
    _finish(left, "Loss", (-1.0, 5.0))
    _finish(right, "Gradient: d loss / d margin", (-2.0, 1.0))
    legend = figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=11, handlelength=2.8)
    for text, handle in zip(legend.get_texts(), handles, strict=True):
        if handle.get_linestyle() == "None":
            text.set_fontweight("bold")
    return figure


def _finish(axes: Axes, title: str, limits: tuple[float, float]) -> None:
    axes.set(xlim=(-5, 5), ylim=limits, xlabel="margin: chosen minus rejected, beta = 1")
    axes.set_title(title, fontsize=13)
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.grid(color="0.92", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Write the figure where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("losses.png"))
    draw().savefig(parser.parse_args().out, metadata={"Software": None})


if __name__ == "__main__":
    main()
