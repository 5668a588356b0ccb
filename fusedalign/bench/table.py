"""The report of a run as Markdown and JSON, and a plot of time against memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fusedalign.bench.data import TARGET
from fusedalign.bench.machine import describe_machine
from fusedalign.bench.runner import CaseReport, Report, Row, TaskTable
from fusedalign.bench.tasks import TASKS
from fusedalign.commandline import fit
from fusedalign.reports import bullets, markdown_table, plot_failure, replace_text, selected, to_json

#: The columns without --wide, before the speed-up.
_NARROW = ("impl", "fwd ms", "fwd+bwd ms", "over grads MiB", "dH err.")


def markdown(report: Report) -> str:
    """The complete report."""
    return "\n\n".join([header(report), *(section(case, report) for case in report.cases)])


def header(report: Report) -> str:
    """Device, versions, and the meaning of the columns."""
    return f"""\
# fusedalign bench

{fit(describe_machine(report.machine))}

{report.dtype}, medians. U: the time of 2*N*D*V FLOPs at the rate of a large matrix product measured
before the rows. MiB: the peak beyond the inputs; "over grads": that of fwd+bwd less the returned
gradients. Errors: relative (Frobenius norms), against an fp32 reference, fp64 for fp32 inputs. A
row with an error over its budget gets no speed-up."""


def section(case: CaseReport, report: Report) -> str:
    """One case: its data, and a table for each task."""
    return "\n\n".join([case_header(case, report), *map(task_section, case.tables), case_footer(case)])


def case_header(case: CaseReport, report: Report) -> str:
    """The shape of a case and the statistics of its data."""
    rows = [["data", "entropy", "p > 2^-12", "tail mass", "tiles 2^-12", "2^-14", "2^-16"]]
    data = [(f"{report.data}, seed {report.seed}", case.statistics)]
    if report.data == "trained":
        data.insert(0, ("target: a trained model's", TARGET))
    for name, s in data:
        shares = [f"{x:.2f}" for x in (s.tiles_12, s.tiles_14, s.tiles_16)]
        rows.append([name, f"{s.entropy:.2f}", f"{s.likely:.0f}", f"{s.tail:.3f}", *shares])
    rate = f"{case.rate / 1e12:.4g} TFLOP/s before the rows"
    lines = [f"## {case.case.title}", "", f"U = {case.u_ms:.4g} ms; the large product ran at {rate}.", ""]
    return "\n".join([*lines, *markdown_table(rows)])


def case_footer(case: CaseReport) -> str:
    """The rate after the rows, which shows whether the device has slowed down."""
    return f"After the rows the large product ran at {case.rate_after / 1e12:.4g} TFLOP/s."


def task_section(table: TaskTable, *, wide: bool = True) -> str:
    """The title, the budgets and the table of one task; not `wide`: at most `WIDTH` columns, with reasons below."""
    budgets = ", ".join(f"{name} {value:g}" for name, value in table.budgets.items())
    speedup = f"speed-up over {table.baseline}" if table.baseline else "speed-up"
    titles = ["impl", "fwd ms", "fwd+bwd ms", "fwd U", "fwd+bwd U", "fwd MiB", "fwd+bwd MiB", "over grads MiB"]
    rows = [[*titles, "loss err.", "dH err.", "dW err.", speedup]]
    rows += [_cells(row, table) for row in table.rows]
    head = [f"### {table.task}: {TASKS[table.task].about}", "", f"Budgets: {budgets}."]
    if wide:
        return "\n".join([*head, "", *markdown_table(rows)])
    reasons = [f"{row.impl}: {row.reason}" for row in table.rows if row.reason is not None]
    rows = selected(rows, (*_NARROW, speedup))
    for cells, row in zip(rows[1:], table.rows, strict=True):
        cells[-1] = "not run" if row.reason is not None else cells[-1].removeprefix("baseline; ")
    notes = ["", *bullets(reasons)] if reasons else []
    return "\n".join([*head, "", *markdown_table(rows), *notes])


def _cells(row: Row, table: TaskTable) -> list[str]:
    name = f"fusedalign {row.impl}" if row.ours else row.impl
    if row.reason is not None:
        return [name, *["-"] * 10, row.reason.replace("|", "/")]
    milliseconds = [_number(x) for x in (row.forward_ms, row.total_ms)]
    multiples = [f"{x:.2f}" for x in (row.forward_u, row.total_u)]
    mib = [_number(x) for x in (row.forward_mib, row.total_mib, row.over_gradients_mib)]
    errors = [f"{row.errors[key]:.1e}" if key in row.errors else "-" for key in ("loss", "dH", "dW")]
    return [name, *milliseconds, *multiples, *mib, *errors, _verdict(row, table)]


def _number(x: float | None) -> str:
    """Three digits without an exponent."""
    return "-" if x is None else f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"


def _verdict(row: Row, table: TaskTable) -> str:
    if row.over_budget:
        return f"{'baseline; ' if row.impl == table.baseline else ''}error: {', '.join(row.over_budget)}"
    return "-" if row.speedup is None else f"{row.speedup:.2f}"


def write(report: Report, directory: Path) -> str | None:
    """Write bench.md, bench.json and bench.png into `directory`; returns why there is no plot, or None."""
    replace_text(directory / "bench.md", markdown(report) + "\n")
    replace_text(directory / "bench.json", to_json(dataclasses.asdict(report), indent=1) + "\n")
    return plot_failure(lambda path: _plot(report, path), directory / "bench.png")


def _plot(report: Report, path: Path) -> None:
    """Time in U against memory over the gradients: one line of panels per case, a panel per task, a marker per impl."""
    from matplotlib.figure import Figure

    columns = max(len(case.tables) for case in report.cases)
    figure = Figure(figsize=(1.5 + 3.2 * columns, 0.7 + 2.8 * len(report.cases)), layout="constrained")
    panels = figure.subplots(len(report.cases), columns, squeeze=False, sharey="row")
    names = list(dict.fromkeys(row.impl for case in report.cases for table in case.tables for row in table.rows))
    drawn: dict[str, Any] = {}
    for case, case_panels in zip(report.cases, panels, strict=True):
        for table, panel in zip(case.tables, case_panels, strict=False):  # a task that failed has no table
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
        largest = max((row.over_gradients_mib or 0.0 for table in case.tables for row in table.rows), default=0.0)
        axes = case_panels[0]  # the panels of a case share the y axis
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, max(10.0, 2 * largest))
        axes.set_ylabel("MiB beyond the gradients")
    handles = {name: drawn[name] for name in names if name in drawn}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", title="hollow: not exact")
    figure.savefig(path, dpi=120)
