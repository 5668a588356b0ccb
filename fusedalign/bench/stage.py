"""The last stage of a pipeline: its micro-batches, the measurement of a row, and the table of all rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedalign.bench.cases import Case
from fusedalign.bench.data import Data, make_data
from fusedalign.bench.exact import BUDGETS, Reference, reference, relative_error
from fusedalign.bench.machine import describe_machine, machine
from fusedalign.bench.measure import median_ms, peak_bytes
from fusedalign.bench.peers import Implementation, reason
from fusedalign.bench.runner import free
from fusedalign.bench.tasks import TASKS
from fusedalign.commandline import fit
from fusedalign.reports import bullets, markdown_table, selected

#: GB in the published comparison that this repeats: Qwen3's vocabulary, D=2048, 8 micro-batches of 4096 tokens, bf16.
REPORTED = {"full logits": 10.50, "chunked loss on the logits": 10.59, "pytorch": 5.96, "cce, filtering": 1.82}
#: N, D, V and the number of micro-batches there.
_REPORTED_SHAPE = (4096, 2048, 151936, 8)


@dataclass(frozen=True)
class Figures:
    """The figures of one row, or the reason why there are none."""

    name: str
    ours: bool
    reason: str | None = None
    peak_gb: float | None = None
    """10^9 bytes: head, hidden states, their gradients, saved tensors and tiles"""
    ms: float | None = None
    """all forwards and backwards"""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    """relative, of loss, dH and dW"""


class Stage:
    """The micro-batches of one case, their exact gradients, and the measurement of a row."""

    def __init__(self, case: Case, count: int, *, data: str, seed: int, dtype: torch.dtype, device: str) -> None:
        all_tokens = dataclasses.replace(case, tokens=count * case.tokens)
        self.device, self.dtype = device, dtype
        self.data = make_data(data, all_tokens, dtype=dtype, device=device, seed=seed)
        self.exact: Reference = reference(TASKS["sft"], self.data, seed=seed)
        self.weight = self.data.weight.requires_grad_()
        self.hidden = [h.clone().requires_grad_() for h in self.data.hidden.chunk(count)]
        self.targets = self.data.targets.chunk(count)

    def inputs(self) -> list[Tensor]:
        """The head and all hidden states."""
        return [self.weight, *self.hidden]

    def step(self, nll: Callable[[Data], Tensor]) -> Tensor:
        """All forwards, then all backwards into new gradients; returns the mean loss."""
        for x in self.inputs():
            x.grad = None
        count = len(self.hidden)
        losses = [
            nll(Data(h, self.weight, t, self.data.softcap)) / count
            for h, t in zip(self.hidden, self.targets, strict=True)
        ]
        total = torch.stack([loss.detach() for loss in losses]).sum()
        losses.reverse()
        while losses:
            losses.pop().backward()  # frees its graph
        return total

    def measure(self, row: Implementation) -> Figures:
        """The figures of a row; an exception becomes its reason."""
        try:
            nll = row.load().nll
            assert nll is not None
            errors = self._errors(self.step(nll))
            ms = median_ms(lambda: self.step(nll), self.device)
            for x in self.inputs():
                x.grad = None
            peak = peak_bytes(lambda: self.step(nll), self.device) + sum(x.nbytes for x in self.inputs())
            return Figures(row.name, row.ours, None, peak / 1e9, ms, errors)
        except Exception as error:
            return Figures(row.name, row.ours, reason(error, row))
        finally:
            for x in self.inputs():
                x.grad = None
            free(self.device)

    def _errors(self, loss: Tensor) -> dict[str, float]:
        d_hidden = torch.cat([h.grad for h in self.hidden])  # type: ignore[misc]
        assert self.weight.grad is not None
        assert self.exact.weight_grad is not None
        return {
            "loss": abs(loss.item() / self.exact.loss - 1),
            "dH": relative_error(d_hidden, self.exact.hidden_grad),
            "dW": relative_error(self.weight.grad, self.exact.weight_grad),
        }


def report(
    case: Case, count: int, figures: list[Figures], dtype: torch.dtype, device: str, *, wide: bool = True
) -> str:
    """The table, in Markdown; not `wide`: at most `WIDTH` columns, with reasons below."""
    budgets = BUDGETS[dtype]
    has_reported = (case.tokens, case.hidden_size, case.vocab, count) == _REPORTED_SHAPE
    table = [["", "peak GB", *(["reported then"] if has_reported else []), "ms", "loss err.", "dH err.", "dW err.", ""]]
    for f in figures:
        reported = [f"{REPORTED[f.name]:.2f}" if f.name in REPORTED else "-"] if has_reported else []
        name = f"**fusedalign {f.name}**" if f.ours else f.name
        if f.reason is not None:
            table.append([name, "-", *reported, "-", "-", "-", "-", f.reason.replace("|", "/")])
            continue
        errors = [f"{f.errors[key]:.1e}" for key in ("loss", "dH", "dW")]
        over_budget = [key for key in ("loss", "dH") if not f.errors[key] <= budgets[key]]
        verdict = f"error: {', '.join(over_budget)}" if over_budget else "exact"
        table.append([name, f"{f.peak_gb:.3g}", *reported, f"{f.ms:.3g}", *errors, verdict])
    return "\n".join(
        [
            f"# {count} micro-batches in flight, {case.title}",
            "",
            fit(describe_machine(machine(device))),
            "",
            f"{str(dtype).removeprefix('torch.')}. GB: 10^9 bytes, the peak of allocated memory: head, hidden",
            "states, their gradients, saved tensors, and tiles. ms: all forwards and backwards. Errors: relative,",
            f"against an fp32 reference; exact: loss {budgets['loss']:g}, dH {budgets['dH']:g}. dW is the sum of",
            f"{count} gradients in the head's dtype, which rounds it the same in every row.",
            "",
            *(markdown_table(table) if wide else _narrow(table, figures)),
        ]
    )


def _narrow(table: list[list[str]], figures: list[Figures]) -> list[str]:
    """The lines of the table without the errors that decide least, and the reasons below it."""
    rows = selected(table, [title for title in table[0][:-1] if title not in ("loss err.", "dW err.")])
    reasons = [f"{f.name}: {f.reason}" for f in figures if f.reason is not None]
    rows[0].append("result")
    for cells, full, f in zip(rows[1:], table[1:], figures, strict=True):
        cells[0] = cells[0].strip("*")
        cells.append(full[-1] if f.reason is None else "not run")
    return [*markdown_table(rows), *(["", *bullets(reasons)] if reasons else [])]
