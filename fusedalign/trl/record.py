"""The files that a run writes in addition to its model: metrics and a plot."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from fusedalign.reports import replace_text, to_json, warn
from fusedalign.trl.suggestions import Suggestion


class Written(NamedTuple):
    """The files that a run has written, and what can be done with them."""

    model: Path
    metrics: Path | None
    """None if it is incomplete"""
    plot: Path | None
    """None if there is none"""
    warnings: tuple[str, ...] = ()
    """the reasons for missing files or lines"""
    record: Path | None = None
    """what was run, with what, and how it ended"""
    card: Path | None = None
    suggestions: tuple[Suggestion, ...] = ()

    def __str__(self) -> str:
        names = ("model", "metrics", "plot", "record", "card")
        files = "  ".join(f"{name}: {shlex.quote(str(path))}" for name in names if (path := getattr(self, name)))
        return "\n".join([files, *map(str, self.suggestions)])


class MetricsFile(transformers.TrainerCallback):
    """Every logged step as one line of JSON, written at once.

    A run that resumes from a checkpoint starts with the checkpoint's log: later steps are trained again. Lines that do
    not fit on the disk are written together with a later line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.complete = True
        self._has_warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start with the checkpoint's log, which is empty without a checkpoint."""
        if state.is_world_process_zero:
            self._write(self._replace, state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append one line."""
        if state.is_world_process_zero:
            if self.complete:
                self._write(self._append, state.log_history[-1:])
            else:
                self._write(self._replace, state.log_history)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Try again if lines are missing."""
        if state.is_world_process_zero and not self.complete:
            self._write(self._replace, state.log_history)

    def _write(self, write: Callable[[str], None], rows: Sequence[dict]) -> None:
        try:
            write("".join(_line(row) for row in rows))
            self.complete = True
        except OSError as error:  # metrics must not stop the training
            self.complete = False
            if not self._has_warned:
                reason = error.strerror or error
                warn(f"{self.path} cannot be written to, the training goes on without these lines: {reason}")
                self._has_warned = True

    def _append(self, lines: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)

    def _replace(self, lines: str) -> None:
        replace_text(self.path, lines)


def _line(row: dict) -> str:
    """The step, then the other values by name: the same text from a log and from a checkpoint's copy of it."""
    return to_json({"step": row["step"], **dict(sorted(row.items()))}) + "\n"


def plot_metrics(history: Sequence[dict], path: Path) -> None:
    """Save a PNG of a log: the loss and, for preferences, reward accuracy and margin against the step."""
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
