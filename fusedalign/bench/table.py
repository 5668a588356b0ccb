"""What a run prints and writes: Markdown, JSON, and a plot of time against memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedalign.bench.data import TARGET
from fusedalign.bench.runner import CaseReport, Report, Row, Table
from fusedalign.bench.tasks import TASKS
from fusedalign.reports import plot_failure, replace_text, to_json


def markdown(report: Report) -> str:
    """The whole report."""
    return "\n\n".join([header(report), *(section(case, report) for case in report.cases)])


def header(report: Report) -> str:
    """What it ran on, and what the columns mean."""
    versions = [value if name == "device" else f"{name} {value}" for name, value in report.machine.items()]
    return f"""\
# fusedalign bench

{", ".join(versions)}

{report.dtype}, medians. U: the time of 2*N*D*V FLOPs at the rate of a large matrix product measured before the rows.
MiB: the peak beyond the inputs; "over grads": that of fwd+bwd less the gradients that are returned. Errors: relative
(Frobenius norms), against an fp32 reference, fp64 for fp32 inputs. A row with an error over its budget gets no
speed-up."""


def section(case: CaseReport, report: Report) -> str:
    """One case: its data, and a table a task."""
    return "\n\n".join([about(case, report), *map(tabled, case.tables), afterwards(case)])


def about(case: CaseReport, report: Report) -> str:
    """The case and its data, without the tables."""
    rows = [["data", "entropy", "p > 2^-12", "tail mass", "tiles 2^-12", "2^-14", "2^-16"]]
    wanted = [(f"{report.data}, seed {report.seed}", case.statistics)]
    if report.data == "trained":
        wanted.insert(0, ("target: a trained model's", TARGET))
    for name, s in wanted:
        shares = [f"{x:.2f}" for x in (s.tiles_12, s.tiles_14, s.tiles_16)]
        rows.append([name, f"{s.entropy:.2f}", f"{s.likely:.0f}", f"{s.tail:.3f}", *shares])
    rate = f"{case.rate / 1e12:.4g} TFLOP/s before the rows"
    lines = [f"## {case.case.title}", "", f"U = {case.u_ms:.4g} ms; the large product ran at {rate}.", ""]
    return "\n".join([*lines, *aligned(rows)])


def afterwards(case: CaseReport) -> str:
    """Whether the machine is still as fast as it was."""
    return f"After the rows the large product ran at {case.rate_after / 1e12:.4g} TFLOP/s."


def tabled(table: Table) -> str:
    """One task's rows."""
    budgets = ", ".join(f"{name} {value:g}" for name, value in table.budgets.items())
    speedup = f"speed-up over {table.baseline}" if table.baseline else "speed-up"
    titles = ["impl", "fwd ms", "fwd+bwd ms", "fwd U", "fwd+bwd U", "fwd MiB", "fwd+bwd MiB", "over grads MiB"]
    rows = [[*titles, "loss err.", "dH err.", "dW err.", speedup]]
    rows += [_cells(row, table) for row in table.rows]
    head = [f"### {table.task}: {TASKS[table.task].about}", "", f"Budgets: {budgets}."]
    return "\n".join([*head, "", *aligned(rows)])


def _cells(row: Row, table: Table) -> list[str]:
    name = f"fusedalign {row.impl}" if row.ours else row.impl
    if row.reason is not None:
        return [name, *["-"] * 10, row.reason.replace("|", "/")]
    milliseconds = [_number(x) for x in (row.forward_ms, row.total_ms)]
    multiples = [f"{x:.2f}" for x in (row.forward_u, row.total_u)]
    mib = [_number(x) for x in (row.forward_mib, row.total_mib, row.over_gradients_mib)]
    errors = [f"{row.errors[key]:.1e}" if key in row.errors else "-" for key in ("loss", "dH", "dW")]
    return [name, *milliseconds, *multiples, *mib, *errors, _verdict(row, table)]


def _number(x: float | None) -> str:
    """Three digits, and no exponent."""
    return "-" if x is None else f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"


def _verdict(row: Row, table: Table) -> str:
    if row.over_budget:
        return f"{'baseline; ' if row.impl == table.baseline else ''}error: {', '.join(row.over_budget)}"
    return "-" if row.speedup is None else f"{row.speedup:.2f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, the first row its titles."""
    # The last column is as wide as its title: a reason in it may be a long line.
    widths = [*(max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)), len(rows[0][-1])]
    lines = ["| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return lines


# --------------------------------------------------------------------------------------------------------------- files


def write(report: Report, directory: Path) -> str | None:
    """Write bench.md, bench.json and bench.png into `directory`. Returns why there is no plot, or None."""
    replace_text(directory / "bench.md", markdown(report) + "\n")
    replace_text(directory / "bench.json", to_json(dataclasses.asdict(report), indent=1) + "\n")
    return plot_failure(lambda path: _plot(report, path), directory / "bench.png")


def _plot(report: Report, path: Path) -> None:
    """Time in U against memory over the gradients: a line of panels a case, a panel a task, a marker an impl."""
    from matplotlib.figure import Figure

    columns = max(len(case.tables) for case in report.cases)
    figure = Figure(figsize=(1.5 + 3.2 * columns, 0.7 + 2.8 * len(report.cases)), layout="constrained")
    panels = figure.subplots(len(report.cases), columns, squeeze=False, sharey="row")
    names = list(dict.fromkeys(row.impl for case in report.cases for table in case.tables for row in table.rows))
    drawn: dict[str, Any] = {}
    for case, line in zip(report.cases, panels, strict=True):
        for table, panel in zip(case.tables, line, strict=False):  # a case may lack some
            for row in table.rows:
                if row.total_u is not None:
                    k = names.index(row.impl)
                    (drawn[row.impl],) = panel.plot(
                        row.total_u,
                        max(row.over_gradients_mib or 0.0, 0.0),
                        marker="osD^vPX*hp<>"[k % 12],
                        color=f"C{k % 10}",
                        fillstyle="none" if row.over_budget else "full",
                        linestyle="none",
                        markersize=9,
                        clip_on=False,
                    )
            panel.set_title(f"{case.case.name}\n{table.task}", fontsize=9)
            panel.set_xlabel("forward + backward, U")
            panel.set_xlim(left=0)
            panel.grid(alpha=0.3)
        most = max((row.over_gradients_mib or 0.0 for table in case.tables for row in table.rows), default=0.0)
        line[0].set_yscale("symlog", linthresh=1)
        line[0].set_ylim(0, max(10.0, 2 * most))
        line[0].set_ylabel("MiB beyond the gradients")
    handles = {name: drawn[name] for name in names if name in drawn}
    title = "hollow: not exact"
    figure.legend(handles.values(), handles.keys(), loc="outside right center", title=title)
    figure.savefig(path, dpi=120)
