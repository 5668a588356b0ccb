"""`fusedalign bench microbatches`: the last stage of a pipeline, where many forwards wait for their backwards.

All forwards run first, each saving tensors for its backward, then all backwards, which accumulate one gradient of the
head: the order of GPipe. The memory that a forward saves is therefore multiplied by the number of micro-batches.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedalign.bench.cases import CASE_HELP, KINDS, parse_case
from fusedalign.bench.machine import device_type, machine
from fusedalign.bench.peers import Functions, Implementation, fused
from fusedalign.commandline import CommandParser, calm_threads, suggestion
from fusedalign.reports import check_writable, replace_text, to_json

if TYPE_CHECKING:
    from torch import Tensor

    from fusedalign.bench.data import Data

WORD = "microbatches"
CUDA, CPU = "qwen3-1.7b", "N=32,D=24,V=300"
COUNT = 8


def _full_logits(*, in_fp32: bool = False, parts: int = 1) -> Callable[[], Functions]:
    """The mean NLL from full logits; the loss of one part of the tokens at a time."""

    def load() -> Functions:
        import torch
        import torch.nn.functional as F

        from fusedalign.bench.data import capped

        def nll(d: Data) -> Tensor:
            logits = F.linear(d.hidden, d.weight)
            logits = capped(logits.float() if in_fp32 else logits, d.softcap)
            if parts == 1:
                return F.cross_entropy(logits, d.targets)
            size = max(1, len(d.targets) // parts)
            chunks = zip(logits.split(size), d.targets.split(size), strict=True)
            return torch.stack([F.cross_entropy(z, t, reduction="sum") for z, t in chunks]).sum() / len(d.targets)

        return Functions(None, nll)

    return load


def _ours(name: str, **options: Any) -> Implementation:
    return Implementation(name, fused(**options), ours=True)


#: The rows; "held" is memory of the head's size that a forward saves.
ROWS = {
    row.name: row
    for row in (
        Implementation("full logits", _full_logits()),
        Implementation("full logits, fp32", _full_logits(in_fp32=True)),
        Implementation("chunked loss on the logits", _full_logits(parts=4)),
        Implementation("liger", fused(impl="liger")),
        Implementation("liger, nothing held", fused(impl="liger", keep_head=False)),
        Implementation("cce, filtering", fused(impl="cce", filter_eps=2**-12)),
        Implementation("cce", fused(impl="cce")),
        _ours("pytorch", impl="pytorch", keep_head=False),
        _ours("triton", impl="triton", keep_head=False),
        _ours("triton, 64 MiB", impl="triton", keep_head=False, workspace=2**26),
        _ours("triton, head held", impl="triton"),
    )
}


def microbatches(argv: list[str]) -> None:
    """Run `fusedalign bench microbatches`. Raises ValueError, one line, for bad arguments."""
    options = _parser().parse(argv)
    if options is None:
        return
    if options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}")
    rows = _choose(options.rows)
    case = None if options.case is None else parse_case(options.case)
    if options.out is not None:
        check_writable(options.out, "--out")
    import torch

    from fusedalign.bench.stage import Figures, Stage, report

    calm_threads()
    device = device_type()
    case = case or parse_case(CUDA if device == "cuda" else CPU)
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


def _choose(words: str) -> list[Implementation]:
    if words == "all":
        return list(ROWS.values())
    names = [word.strip() for word in words.split(";")]
    for name in names:
        if name not in ROWS:
            raise ValueError(f"--rows must be all, or among {'; '.join(ROWS)}, got {name!r}{suggestion(name, ROWS)}")
    return [ROWS[name] for name in names]


def _parser() -> CommandParser:
    parser = CommandParser(
        f"fusedalign bench {WORD}",
        "A pipeline's last stage: all micro-batches forward, then all backward, one gradient of the head.",
        {"rows": dict.fromkeys(ROWS, "")},
    )
    add = parser.add_argument
    add("--case", help=f"{CASE_HELP}; default: {CUDA} on a GPU, {CPU} on a CPU")
    add("--count", type=int, default=COUNT, metavar="N", help=f"micro-batches; default: {COUNT}")
    add("--rows", default="all", metavar="NAMES", help="names with semicolons between; default: all")
    add("--data", default=KINDS[0], choices=KINDS, help=f"as in `fusedalign bench`; default: {KINDS[0]}")
    add("--seed", type=int, default=0, metavar="N", help="of the data; default: 0")
    add("--wide", action="store_true", help="print all columns; the files of --out always have them")
    add("--out", type=Path, metavar="DIR", help=f"also write {WORD}.md and {WORD}.json there")
    return parser
