"""The summary of a file of scores: a table in text and a histogram."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedalign.commandline import fold
from fusedalign.reports import text_row
from fusedalign.score.columns import prefixed
from fusedalign.score.rows import reason_kind

if TYPE_CHECKING:
    import pyarrow

#: The number of reasons for refused rows that are shown.
REASONS = 5
_LABEL, _CELL = 30, 14
_PERCENTILES = {5: "5th percentile", 25: "25th percentile", 50: "median", 75: "75th percentile", 95: "95th percentile"}
_BINS = 60


def summary(table: pyarrow.Table, about: Mapping[str, Any]) -> str:
    """A table in text, in lines of at most 100 characters.

    Means and percentiles are over finite values; the others are counted.

    Args:
        table: a result of `columns.table`.
        about: "refused": the `RefusedRow`s; every other entry is shown as a line above the table.
    """
    refused = Counter(reason_kind(row.reason) for row in about.get("refused", ()))
    lines = [text_row([name, str(value)], [_LABEL, 0], "") for name, value in about.items() if name != "refused"]
    lines += _row_counts(table.num_rows, refused)
    answers = _answers(table)
    if answers and table.num_rows:
        lines += ["", *_scores(table, answers)]
    if "margin" in table.column_names and table.num_rows:
        lines += ["", *_margins(table)]
    return "\n".join(wrapped for line in lines for wrapped in fold(line.rstrip(), indent=_LABEL))


def histogram(table: pyarrow.Table, path: Path) -> None:
    """Save histograms as a PNG: mean log-probabilities of the answers, and for pairs the margins, also of rewards.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no finite value to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    answers = _answers(table)
    panels = [
        ("mean log-probability, nats per token", {a: prefixed(a, "mean_logps") for a in answers}),
        ("margin (chosen - rejected), nats", {"margin": "margin"}),
        ("reward margin", {"reward margin": "reward_margin"}),
    ]
    present = [
        (label, columns) for label, columns in panels if columns and {*columns.values()} <= {*table.column_names}
    ]
    if not present or not any(len(_finite(table, name)) for _, columns in present for name in columns.values()):
        raise ValueError("expected a finite score to draw, got none")
    figure = Figure(figsize=(5.5 * len(present), 4), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    for axes, (label, columns) in zip(figure.subplots(1, len(present), squeeze=False)[0], present, strict=True):
        values = {name: _finite(table, column) for name, column in columns.items()}
        bins = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=_BINS)
        for name, x in values.items():
            axes.hist(x, bins=bins, alpha=0.6, label=name)
        if "margin" in label:
            axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel(label)
        axes.set_ylabel("rows")
        axes.legend()
    figure.savefig(path, dpi=120, format="png")


def _answers(table: pyarrow.Table) -> list[str]:
    """The names of the answers; "answer" if there is only one."""
    return [a for a in ("answer", "chosen", "rejected") if prefixed(a, "logps") in table.column_names]


def _row_counts(scored: int, refused: Counter[str]) -> list[str]:
    """The numbers of scored and refused rows, with the most frequent reasons."""
    counts = {"rows": scored + refused.total(), "scored": scored, "refused": refused.total()}
    lines = [_line(name, [f"{count:,}"]) for name, count in counts.items()]
    by_count = sorted(refused.items(), key=lambda item: (-item[1], item[0]))
    reasons = [(count, reason) for reason, count in by_count[:REASONS]]
    if others := sum(count for _, count in by_count[REASONS:]):
        reasons.append((others, "for other reasons"))
    return lines + [_line("", [f"{count:,}"]) + f"  {reason}" for count, reason in reasons]


def _scores(table: pyarrow.Table, answers: list[str]) -> list[str]:
    """Lines on the log-probabilities, with a column for each answer."""
    logps, counts, greedy = (
        [_column(table, prefixed(a, name)).astype(dtype) for a in answers]
        for name, dtype in (("logps", float), ("num_tokens", np.int64), ("is_greedy", bool))
    )
    finite = [np.isfinite(x) for x in logps]
    means = [_finite(table, prefixed(a, "mean_logps")) for a in answers]
    lines = [_line("", answers)] if len(answers) > 1 else []
    lines.append(_line("tokens", [f"{int(n.sum()):,}" for n in counts]))
    if not all(x.all() for x in finite):
        lines.append(_line("not finite, left out below", [f"{int((~x).sum()):,}" for x in finite]))
    lines.append(_line("mean logps, nats per token", [""] * len(answers)))
    lines.append(_line("  mean over rows", map(_mean, means)))
    lines += [_line(f"  {label}", [_percentile(x, q) for x in means]) for q, label in _PERCENTILES.items()]
    token_means = [_ratio(x[f].sum(), n[f].sum()) for x, n, f in zip(logps, counts, finite, strict=True)]
    lines.append(_line("perplexity of all tokens", [_number(_perplexity(x)) for x in token_means]))
    medians = [float(np.median(x)) if len(x) else math.nan for x in means]
    lines.append(_line("  median over rows", [_number(_perplexity(x)) for x in medians]))
    if "num_bytes" in table.column_names:
        size = _column(table, "num_bytes").astype(float)
        known = np.isfinite(size) & finite[0]
        bits = _ratio(-logps[0][known].sum(), size[known].sum() * math.log(2))
        lines.append(_line("bytes", [f"{int(size[np.isfinite(size)].sum()):,}"]))
        lines.append(_line("bits per byte", [_number(bits)]))
    lines.append(_line("greedy", [_share(flags) for flags in greedy]))
    if prefixed(answers[0], "reward") in table.column_names:
        lines.append(_line("implicit reward, mean", [_mean(_finite(table, prefixed(a, "reward"))) for a in answers]))
    return lines


def _margins(table: pyarrow.Table) -> list[str]:
    """Lines on the margins of pairs, and of their rewards."""
    lines = []
    for margin, accuracy, title in (
        ("margin", "accuracy", "margin, nats"),
        ("reward_margin", "reward_accuracy", "reward margin"),
    ):
        if margin not in table.column_names:
            continue
        values, is_correct = _finite(table, margin), _column(table, accuracy).astype(bool)
        lines += [
            _line(f"{title}, mean", [_mean(values)]),
            *(_line(f"  {label}", [_percentile(values, q)]) for q, label in _PERCENTILES.items()),
            _line("accuracy" if margin == "margin" else "reward accuracy", [_share(is_correct)])
            + f"  ({int(is_correct.sum()):,} of {len(is_correct):,} pairs)",
        ]
    return lines


def _column(table: pyarrow.Table, name: str) -> np.ndarray:
    """A column as an array, with NaN for None."""
    return np.asarray(table[name].to_numpy())


def _finite(table: pyarrow.Table, name: str) -> np.ndarray:
    values = _column(table, name).astype(float)
    return values[np.isfinite(values)]


def _perplexity(mean_logps: float) -> float:
    return math.inf if mean_logps < -700 else math.exp(-mean_logps)


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b else math.nan


def _mean(values: np.ndarray) -> str:
    return _number(float(values.mean())) if len(values) else "-"


def _percentile(values: np.ndarray, q: float) -> str:
    return _number(float(np.percentile(values, q))) if len(values) else "-"


def _share(flags: np.ndarray) -> str:
    return f"{100 * flags.mean():.1f} %" if len(flags) else "-"


def _number(x: float) -> str:
    if math.isnan(x):
        return "-"
    return f"{x:,.4f}" if abs(x) < 1e6 else f"{x:.4g}"


def _line(label: str, cells: Iterable[Any]) -> str:
    texts = [label, *cells]
    return text_row(texts, [_LABEL, *[-_CELL] * (len(texts) - 1)], gap="")
