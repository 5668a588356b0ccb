"""Measures the rows of all tables, one table per case and task. A row that fails is a row with its reason."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedalign.bench.cases import Case
from fusedalign.bench.data import Data, Statistics, make_data, statistics
from fusedalign.bench.exact import BUDGETS, Reference, reference, relative_error
from fusedalign.bench.failures import in_short
from fusedalign.bench.machine import machine
from fusedalign.bench.measure import median_ms, peak_bytes, product_rate
from fusedalign.bench.peers import Implementation, UnavailableError, reason
from fusedalign.bench.tasks import Task

#: Speed-ups are relative to the first of these that ran.
BASELINES = ("trl", "eager")


@dataclass(frozen=True)
class Settings:
    """What to measure, on which data and device."""

    tasks: Sequence[Task]
    cases: Sequence[Case]
    impls: Sequence[Implementation]
    data: str
    seed: int
    dtype: torch.dtype
    device: str
    """cuda or cpu"""


@dataclass(frozen=True)
class Row:
    """The figures of one implementation, or the reason why there are none."""

    impl: str
    ours: bool
    reason: str | None = None
    forward_ms: float | None = None
    total_ms: float | None = None
    """forward and backward"""
    forward_u: float | None = None
    total_u: float | None = None
    forward_mib: float | None = None
    """the peak beyond the inputs"""
    total_mib: float | None = None
    over_gradients_mib: float | None = None
    """`total_mib` less the returned gradients"""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    """relative, of loss, dH and (unless the head is frozen) dW"""
    over_budget: tuple[str, ...] = ()
    """the names in `errors` that exceed their budget"""
    speedup: float | None = None
    """of forward and backward over the table's baseline; None if an error is over budget"""


@dataclass(frozen=True)
class TaskTable:
    """All rows of one task in one case."""

    case: Case
    task: str
    baseline: str | None
    budgets: dict[str, float]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class CaseReport:
    """The tables of one case, with the rate of the device and the statistics of the data."""

    case: Case
    statistics: Statistics
    """of the generated data"""
    rate: float
    """FLOP/s of a large product before the rows, which defines U"""
    rate_after: float
    """the same after the rows measured so far"""
    u_ms: float
    tables: tuple[TaskTable, ...]


@dataclass(frozen=True)
class Report:
    """The results of one run."""

    machine: dict[str, str]
    data: str
    seed: int
    dtype: str
    cases: tuple[CaseReport, ...]


def run(settings: Settings, progress: Callable[[str], None] = lambda _: None) -> Iterator[Report]:
    """Measure every row of every task of every case.

    Args:
        progress: called with a line before each step.

    Yields:
        The report so far, after each table, so that an interrupted run keeps its results.

    Raises:
        ValueError: after all other tables, those whose data or exact answer could not be computed.
    """
    dtype = str(settings.dtype).removeprefix("torch.")
    report = Report(machine(settings.device), settings.data, settings.seed, dtype, ())
    failures: list[str] = []
    for case in settings.cases:
        finished = report.cases
        try:
            for case_report in _measure_case(case, settings, progress, failures):
                report = dataclasses.replace(report, cases=(*finished, case_report))
                yield report
        except Exception as error:  # continue with the other cases
            failures.append(f"{case.name}: {in_short(error)}")
        free(settings.device)
    if failures:
        raise ValueError(f"not measured: {'; '.join(failures)}")


def _measure_case(
    case: Case, settings: Settings, progress: Callable[[str], None], failures: list[str]
) -> Iterator[CaseReport]:
    """Yield the report of a case after each table; append tasks that fail to `failures`."""
    progress(f"{case.name}: data")
    data = inputs(case, settings)
    data_statistics = statistics(data)
    rate = product_rate(settings.device)
    u_ms = case.flops / rate * 1e3
    tables: tuple[TaskTable, ...] = ()
    for task in settings.tasks:
        try:
            table = _measure_task(case, data, task, u_ms, settings, progress)
        except Exception as error:  # continue with the other tasks
            failures.append(f"{case.name} {task.name}: {in_short(error)}")
            free(settings.device)
            continue
        tables = (*tables, table)
        yield CaseReport(case, data_statistics, rate, product_rate(settings.device), u_ms, tables)


def inputs(case: Case, settings: Settings) -> Data:
    """Generate the data of a case."""
    return make_data(settings.data, case, dtype=settings.dtype, device=settings.device, seed=settings.seed)


def free(device: str) -> None:
    """Free the memory of a row, so that every row starts from the same state."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


class Calls:
    """The measured calls of one implementation in one task."""

    def __init__(self, impl: Implementation, task: Task, data: Data, exact: Reference) -> None:
        functions = impl.load()
        if data.softcap is not None and not impl.softcap:
            raise UnavailableError("has no softcap")
        self._task, self._functions, self._loss_of = task, functions, exact.loss_of
        weight = data.weight.detach().requires_grad_(task.trains_head)
        self.data = data._replace(hidden=data.hidden.detach().requires_grad_(), weight=weight)

    def _loss(self) -> Tensor:
        if self._task.scalar and self._functions.nll is not None:
            return self._functions.nll(self.data)
        assert self._functions.logps is not None  # a task that needs it is not listed for this implementation
        return self._loss_of(self._functions.logps(self.data))

    def forward(self) -> object:
        """The loss, with or without gradients as the task says; the result keeps the graph alive."""
        with torch.set_grad_enabled(not self._task.scores):
            return self._loss()

    def forward_backward(self) -> Tensor:
        """The loss after forward and backward, which create new gradients."""
        self.drop_gradients()
        loss = self._loss()
        loss.backward()
        return loss.detach()

    def drop_gradients(self) -> None:
        """Free the gradients of the last backward."""
        self.data.hidden.grad = self.data.weight.grad = None

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of hidden states and weight, from the last backward."""
        return self.data.hidden.grad, self.data.weight.grad


@dataclass(frozen=True)
class _Workload:
    """The inputs of all rows of one table."""

    task: Task
    data: Data
    exact: Reference
    budgets: dict[str, float]
    u_ms: float
    device: str


def _measure_task(
    case: Case, data: Data, task: Task, u_ms: float, settings: Settings, progress: Callable[[str], None]
) -> TaskTable:
    progress(f"{case.name} {task.name}: exact reference")
    budgets = {name: x for name, x in BUDGETS[settings.dtype].items() if task.trains_head or name != "dW"}
    workload = _Workload(task, data, reference(task, data, seed=settings.seed), budgets, u_ms, settings.device)
    rows = []
    for impl in settings.impls:
        if task.name in impl.tasks:
            progress(f"{case.name} {task.name}: {impl.name}")
            try:
                row = _measure(impl, workload)
            except Exception as error:  # a library may raise anything; continue with the other rows
                row = Row(impl.name, impl.ours, reason=reason(error, impl))
            rows.append(row)
            free(settings.device)
    times = {row.impl: row.total_ms for row in rows if row.total_ms is not None}
    baseline = next((name for name in BASELINES if name in times), None)
    if baseline is not None:
        exact = [row.impl for row in rows if not row.over_budget]
        speedups = {name: times[baseline] / ms for name, ms in times.items() if name in exact}
        rows = [dataclasses.replace(row, speedup=speedups.get(row.impl)) for row in rows]
    return TaskTable(case, task.name, baseline, budgets, tuple(rows))


def _measure(impl: Implementation, workload: _Workload) -> Row:
    calls, exact, device = Calls(impl, workload.task, workload.data, workload.exact), workload.exact, workload.device
    errors = {"loss": abs(calls.forward_backward().double().item() / exact.loss - 1)}
    gradient_bytes = 0
    for name, gradient, expected in zip(("dH", "dW"), calls.gradients(), exact.gradients(), strict=True):
        if expected is not None:
            if gradient is None:
                raise ValueError(f"no {name} came back")
            errors[name] = relative_error(gradient, expected)
            gradient_bytes += gradient.nbytes
    gradient = None
    calls.drop_gradients()
    forward_ms, total_ms = median_ms(calls.forward, device), median_ms(calls.forward_backward, device)
    calls.drop_gradients()
    forward, total = peak_bytes(calls.forward, device), peak_bytes(calls.forward_backward, device)
    mib = 2**20
    return Row(
        impl.name,
        impl.ours,
        forward_ms=forward_ms,
        total_ms=total_ms,
        forward_u=forward_ms / workload.u_ms,
        total_u=total_ms / workload.u_ms,
        forward_mib=forward / mib,
        total_mib=total / mib,
        over_gradients_mib=(total - gradient_bytes) / mib,
        errors=errors,
        # Not "error > budget": that is False for NaN.
        over_budget=tuple(name for name, budget in workload.budgets.items() if not errors[name] <= budget),
    )
