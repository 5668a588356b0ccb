"""`fusedalign bench microbatches`: the last stage of a pipeline, where many forwards wait for their backwards.

All forwards run first, each saving tensors for its backward, then all backwards, which accumulate one gradient of the
head: the order of GPipe. The memory that a forward saves is therefore multiplied by the number of micro-batches.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedalign.bench.cases import Case, parse_cases
from fusedalign.bench.data import Data, capped, make_data
from fusedalign.bench.measure import median_ms, peak_bytes
from fusedalign.bench.peers import Functions, Implementation
from fusedalign.bench.runner import describe_machine, free, machine, reason
from fusedalign.bench.tasks import BUDGETS, TASKS, Reference, reference, relative_error
from fusedalign.commandline import CommandParser, calm_threads, fit
from fusedalign.ops import linear_cross_entropy
from fusedalign.reports import bullets, check_writable, markdown_table, replace_text, selected, to_json

WORD = "microbatches"
CUDA, CPU = "qwen3-1.7b", "N=32,D=24,V=300"
COUNT = 8

#: GB in the published comparison that this repeats: Qwen3's vocabulary, D=2048, 8 micro-batches of 4096 tokens, bf16.
REPORTED = {"full logits": 10.50, "chunked loss on the logits": 10.59, "pytorch": 5.96, "cce, filtering": 1.82}


def _logits(d: Data) -> Tensor:
    return F.cross_entropy(capped(F.linear(d.hidden, d.weight), d.softcap), d.targets)


def _wide_logits(d: Data) -> Tensor:
    return F.cross_entropy(capped(F.linear(d.hidden, d.weight).float(), d.softcap), d.targets)


def _chunked_loss(d: Data) -> Tensor:
    logits, size = capped(F.linear(d.hidden, d.weight), d.softcap), max(1, len(d.targets) // 4)
    parts = zip(logits.split(size), d.targets.split(size), strict=True)
    return torch.stack([F.cross_entropy(z, t, reduction="sum") for z, t in parts]).sum() / len(d.targets)


def _with(impl: str, **options: Any) -> Callable[[Data], Tensor]:
    return lambda d: linear_cross_entropy(d.hidden, d.weight, d.targets, softcap=d.softcap, impl=impl, **options)


def _row(name: str, nll: Callable[[Data], Tensor], *, ours: bool = False) -> Implementation:
    return Implementation(name, lambda: Functions(None, nll), ours=ours)


#: The rows; "held" is memory of the head's size that a forward saves.
ROWS = {
    row.name: row
    for row in (
        _row("full logits", _logits),
        _row("full logits, fp32", _wide_logits),
        _row("chunked loss on the logits", _chunked_loss),
        _row("liger", _with("liger")),
        _row("liger, nothing held", _with("liger", keep_head=False)),
        _row("cce, filtering", _with("cce", filter_eps=2**-12)),
        _row("cce", _with("cce")),
        _row("pytorch", _with("pytorch", keep_head=False), ours=True),
        _row("triton", _with("triton", keep_head=False), ours=True),
        _row("triton, 64 MiB", _with("triton", keep_head=False, workspace=2**26), ours=True),
        _row("triton, head held", _with("triton"), ours=True),
    )
}


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


def microbatches(argv: list[str]) -> None:
    """Run `fusedalign bench microbatches`. Raises ValueError, one line, for bad arguments."""
    options = _parser().parse(argv)
    if options is None:
        return
    calm_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case, *extra_cases = parse_cases([options.case or (CUDA if device == "cuda" else CPU)])
    if extra_cases or options.count < 1:
        raise ValueError(f"expected one case and a count of at least 1, got {options.case!r} and {options.count}")
    rows = _choose(options.rows)
    if options.out is not None:
        check_writable(options.out, "--out")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    stage = Stage(case, options.count, data=options.data, seed=options.seed, dtype=dtype, device=device)
    figures: list[Figures] = []
    try:
        for row in rows:
            print(f"{row.name}", file=sys.stderr, flush=True)
            figures.append(stage.measure(row))
    finally:  # print the rows measured so far after Ctrl-C too
        if figures:
            print(report(case, options.count, figures, dtype, device, wide=options.wide), flush=True)
    if options.out is not None:
        replace_text(options.out / f"{WORD}.md", report(case, options.count, figures, dtype, device) + "\n")
        results = {"machine": machine(device), "case": dataclasses.asdict(case), "count": options.count}
        results["rows"] = [dataclasses.asdict(f) for f in figures]
        replace_text(options.out / f"{WORD}.json", to_json(results, indent=1) + "\n")


def report(
    case: Case, count: int, figures: list[Figures], dtype: torch.dtype, device: str, *, wide: bool = True
) -> str:
    """The table, in Markdown; not `wide`: at most `WIDTH` columns, with reasons below."""
    budgets = BUDGETS[dtype]
    has_reported = (case.tokens, case.hidden_size, case.vocab, count) == (4096, 2048, 151936, COUNT)
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


def _choose(words: str) -> list[Implementation]:
    if words == "all":
        return list(ROWS.values())
    names = [word.strip() for word in words.split(";")]
    for name in names:
        if name not in ROWS:
            raise ValueError(f"rows must be all, or among {'; '.join(ROWS)}, got {name!r}")
    return [ROWS[name] for name in names]


def _parser() -> CommandParser:
    parser = CommandParser(
        f"fusedalign bench {WORD}",
        "A pipeline's last stage: all micro-batches forward, then all backward, one gradient of the head.\n"
        f"\nrows\n  {'; '.join(ROWS)}",
    )
    add = parser.add_argument
    add("--case", help=f"a name of `fusedalign bench`, or N=..,D=..,V=..; default: {CUDA} on a GPU, {CPU} on a CPU")
    add("--count", type=int, default=COUNT, help=f"micro-batches; default: {COUNT}")
    add("--rows", default="all", help="all (default), or names with semicolons between")
    add("--data", default="trained", choices=("trained", "random"), help="as in `fusedalign bench`")
    add("--seed", type=int, default=0, help="of the data; default: 0")
    add("--wide", action="store_true", help="print all columns; the files of --out always have them")
    add("--out", type=Path, metavar="DIR", help=f"also write {WORD}.md and {WORD}.json there")
    return parser
