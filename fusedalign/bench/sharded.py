"""The command `fusedalign bench sharded`: a head sharded over all GPUs of this machine, against one GPU."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from fusedalign.bench.cases import CASE_HELP, parse_case
from fusedalign.bench.machine import describe_machine, device_type, gpu_count, machine
from fusedalign.commandline import CommandParser, fit
from fusedalign.reports import check_writable, replace_text, to_json

WORD = "sharded"
DEFAULT_CUDA, DEFAULT_CPU = "N=8192,D=4096,V=151936", "tiny"
CPU_RANKS = 2


def sharded(argv: list[str]) -> None:
    """Run `fusedalign bench sharded`.

    Raises:
        ValueError: an invalid argument, or fewer than two GPUs on a machine with one.
    """
    options = _parser().parse(argv)
    if options is None:
        return
    case = None if options.case is None else parse_case(options.case)
    if options.ranks is not None and options.ranks < 2:
        raise ValueError(f"--ranks must be at least 2, got {options.ranks}")
    if options.out is not None:
        check_writable(options.out, "--out")
    device, gpus = device_type(), gpu_count()
    ranks = options.ranks or gpus or CPU_RANKS
    if device == "cuda" and not 2 <= ranks <= gpus:
        raise ValueError(f"--ranks must be from 2 to the number of GPUs ({gpus}), got {ranks}")
    from fusedalign.bench.ranks import TASKS, measure, table

    case = case or parse_case(DEFAULT_CUDA if device == "cuda" else DEFAULT_CPU)
    results, facts = measure(ranks, case), machine(device)
    print(f"# fusedalign bench {WORD}\n\n{fit(describe_machine(facts))}\n\n{case}; {ranks} ranks\n")
    print("\n".join(table(*results, wide=options.wide)))
    if options.out is not None:
        report = {"machine": facts, "case": asdict(case), "tasks": list(TASKS)}
        ranks_figures = [[asdict(x) for x in rank] for rank in results.ranks]
        figures = {"one": [asdict(x) for x in results.one], "ranks": ranks_figures}
        replace_text(options.out / f"{WORD}.json", to_json(report | figures, indent=1) + "\n")


def _parser() -> CommandParser:
    parser = CommandParser(
        f"fusedalign bench {WORD}",
        "A head with its rows sharded over the GPUs of this machine (on a CPU: over processes), against one GPU: time "
        "of forward and backward, memory with head and gradients, and errors against fp32.",
    )
    add = parser.add_argument
    add("--case", help=f"{CASE_HELP}; default: {DEFAULT_CUDA} on a GPU, {DEFAULT_CPU} on a CPU")
    add("--ranks", type=int, metavar="N", help=f"GPUs or processes; default: all GPUs, {CPU_RANKS} on a CPU")
    add("--wide", action="store_true", help="print the errors of each tensor; the file of --out always has them")
    add("--out", type=Path, metavar="DIR", help=f"also write {WORD}.json there")
    return parser
