"""Runs the rows: one table a case and task, every row on its own, so that one which fails is a row with its reason."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fusedalign
from fusedalign.bench.cases import Case
from fusedalign.bench.data import Data, Statistics, make_data, statistics
from fusedalign.bench.measure import median_ms, peak_bytes, product_rate
from fusedalign.bench.peers import Implementation, UnavailableError
from fusedalign.bench.tasks import BUDGETS, Reference, Task, reference, relative_error

OUT_OF_MEMORY = "out of memory"
BASELINES = ("trl", "eager")  # what speed-ups are relative to: the first that ran


@dataclass(frozen=True)
class Settings:
    """What to run."""

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
    """One implementation's figures, or the reason why there are none."""

    impl: str
    ours: bool
    reason: str | None = None
    forward_ms: float | None = None
    total_ms: float | None = None
    """forward and backward"""
    forward_u: float | None = None
    total_u: float | None = None
    forward_mib: float | None = None
    """peak over the inputs"""
    total_mib: float | None = None
    over_gradients_mib: float | None = None
    """`total_mib` less the gradients that are returned"""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    """relative, of loss, dH and (where the head is trained) dW"""
    over_budget: tuple[str, ...] = ()
    """those of `errors` that are too large to be called exact"""
    speedup: float | None = None
    """over the table's baseline, forward and backward; None unless it is exact"""


@dataclass(frozen=True)
class Table:
    """All rows of one task in one case."""

    case: Case
    task: str
    baseline: str | None
    budgets: dict[str, float]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class CaseReport:
    """What one case has measured, and on what data."""

    case: Case
    statistics: Statistics
    """reached by the tensors as they are"""
    rate: float
    """FLOP/s of a large product before the rows; U is from this one"""
    rate_after: float
    """the same after those that there are"""
    u_ms: float
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Report:
    """One run."""

    machine: dict[str, str]
    data: str
    seed: int
    dtype: str
    cases: tuple[CaseReport, ...]


def run(settings: Settings, progress: Callable[[str], None] = lambda _: None) -> Iterator[Report]:
    """Measure every row of every task of every case.

    Args:
        progress: gets a line before each step.

    Yields:
        The report so far after each table, so that a run which is cut short has something to show.

    Raises:
        ValueError: after all others, the tables that there are not: their data or exact answer could not be made.
    """
    dtype = str(settings.dtype).removeprefix("torch.")
    report = Report(machine(settings.device), settings.data, settings.seed, dtype, ())
    failures: list[str] = []
    for case in settings.cases:
        before = report.cases
        try:
            for so_far in _case(case, settings, progress, failures):
                report = dataclasses.replace(report, cases=(*before, so_far))
                yield report
        except Exception as error:  # the other cases must go on
            failures.append(f"{case.name}: {in_short(error)}")
        free(settings.device)
    if failures:
        raise ValueError(f"not measured: {'; '.join(failures)}")


def _case(case: Case, settings: Settings, progress: Callable[[str], None], failures: list[str]) -> Iterator[CaseReport]:
    progress(f"{case.name}: data")
    data = inputs(case, settings)
    reached = statistics(data)
    rate = product_rate(settings.device)
    u_ms = case.flops / rate * 1e3
    tables: tuple[Table, ...] = ()
    for task in settings.tasks:
        try:
            table = _table(case, data, task, u_ms, settings, progress)
        except Exception as error:  # the other tasks must go on
            failures.append(f"{case.name} {task.name}: {in_short(error)}")
            free(settings.device)
            continue
        tables = (*tables, table)
        yield CaseReport(case, reached, rate, product_rate(settings.device), u_ms, tables)


def inputs(case: Case, settings: Settings) -> Data:
    """The data of a case."""
    return make_data(settings.data, case, dtype=settings.dtype, device=settings.device, seed=settings.seed)


def machine(device: str) -> dict[str, str]:
    """What it runs on: the device, and the version of every package that is compared."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    found = {"device": torch.cuda.get_device_name() if device == "cuda" else cpu, "torch": torch.__version__}
    found["fusedalign"] = fusedalign.__version__
    for name in ("triton", "trl", "liger-kernel", "cut-cross-entropy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def free(device: str) -> None:
    """Give back what a row has left behind, so that the next one starts from the same memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


class Calls:
    """The calls of one implementation in one task that are measured."""

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
        assert self._functions.logps is not None  # else the task is not among the implementation's
        return self._loss_of(self._functions.logps(self.data))

    def forward(self) -> object:
        """As the task wants it, with or without gradients. The result keeps the graph alive."""
        with torch.set_grad_enabled(not self._task.scores):
            return self._loss()

    def both(self) -> Tensor:
        """Forward and backward into fresh gradients; the loss."""
        self.drop_gradients()
        loss = self._loss()
        loss.backward()
        return loss.detach()

    def drop_gradients(self) -> None:
        """Free what the last backward has returned."""
        self.data.hidden.grad = self.data.weight.grad = None

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Those of hidden and weight, as the last backward has left them."""
        return self.data.hidden.grad, self.data.weight.grad


# --------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class _Table:
    """What the rows of one table share."""

    task: Task
    data: Data
    exact: Reference
    budgets: dict[str, float]
    u_ms: float
    device: str


def _table(
    case: Case, data: Data, task: Task, u_ms: float, settings: Settings, progress: Callable[[str], None]
) -> Table:
    progress(f"{case.name} {task.name}: exact reference")
    budgets = {name: x for name, x in BUDGETS[settings.dtype].items() if task.trains_head or name != "dW"}
    shared = _Table(task, data, reference(task, data, seed=settings.seed), budgets, u_ms, settings.device)
    rows = []
    for impl in settings.impls:
        if task.name in impl.tasks:
            progress(f"{case.name} {task.name}: {impl.name}")
            rows.append(_row(impl, shared))
            free(settings.device)
    times = {row.impl: row.total_ms for row in rows if row.total_ms is not None}
    baseline = next((name for name in BASELINES if name in times), None)
    if baseline is not None:
        rows = [_with_speedup(row, times[baseline]) for row in rows]
    return Table(case, task.name, baseline, budgets, tuple(rows))


def _with_speedup(row: Row, baseline_ms: float) -> Row:
    if row.total_ms is None or row.over_budget:
        return row
    return dataclasses.replace(row, speedup=baseline_ms / row.total_ms)


def _row(impl: Implementation, shared: _Table) -> Row:
    try:
        return _measure(impl, shared)
    except Exception as error:  # of a library that we do not know: the other rows must go on
        return Row(impl.name, impl.ours, reason=reason(error, impl))


def _measure(impl: Implementation, shared: _Table) -> Row:
    calls, exact, device = Calls(impl, shared.task, shared.data, shared.exact), shared.exact, shared.device
    errors = {"loss": abs(calls.both().double().item() / exact.loss - 1)}
    returned = 0
    for name, gradient, expected in zip(("dH", "dW"), calls.gradients(), exact.gradients(), strict=True):
        if expected is not None:
            if gradient is None:
                raise ValueError(f"no {name} came back")
            errors[name] = relative_error(gradient, expected)
            returned += gradient.nbytes
    gradient = None
    calls.drop_gradients()
    forward_ms, total_ms = median_ms(calls.forward, device), median_ms(calls.both, device)
    calls.drop_gradients()
    forward, total = peak_bytes(calls.forward, device), peak_bytes(calls.both, device)
    mib = 2**20
    return Row(
        impl.name,
        impl.ours,
        forward_ms=forward_ms,
        total_ms=total_ms,
        forward_u=forward_ms / shared.u_ms,
        total_u=total_ms / shared.u_ms,
        forward_mib=forward / mib,
        total_mib=total / mib,
        over_gradients_mib=(total - returned) / mib,
        errors=errors,
        # Not "error > budget": that is False for NaN.
        over_budget=tuple(name for name, budget in shared.budgets.items() if not errors[name] <= budget),
    )


def reason(error: Exception, impl: Implementation) -> str:
    """Why an implementation has no figures, in one line."""
    if isinstance(error, UnavailableError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and impl.install:
        return f"not installed: {impl.install} (no module {error.name})"
    return in_short(error, named=not impl.ours)  # our own errors are sentences


def in_short(error: Exception, *, named: bool = True) -> str:
    """What went wrong, in one line of at most 160 characters.

    Args:
        error: what was raised.
        named: whether to put its class in front.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    text = " ".join(str(error).split())
    if named:
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 160 else f"{text[:157]}..."
