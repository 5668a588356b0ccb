"""What a run leaves behind beside its model: metrics and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers


class Written(NamedTuple):
    """What a run leaves behind."""

    model: Path
    metrics: Path
    plot: Path


class MetricsFile(transformers.TrainerCallback):
    """Every logged step as one line of JSON, written as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start an empty file."""
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Append one line."""
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def plot_metrics(history: Sequence[dict], path: Path) -> None:
    """Save a PNG with the loss and, for preferences, reward accuracy and margin against the step.

    Args:
        history: a trainer's `state.log_history`.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    names = [name for name in ("loss", "rewards/accuracies", "rewards/margins") if any(name in row for row in history)]
    figure = Figure(figsize=(5 * max(len(names), 1), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, max(len(names), 1), squeeze=False)[0], names, strict=False):
        for key, style in ((name, "-"), (f"eval_{name}", "o--")):
            points = [(row["step"], row[key]) for row in history if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=key)
        axes.set(xlabel="step", title=name)
        axes.legend()
    figure.savefig(path, dpi=120)
