"""The command `fusedalign bench`: its arguments, its sub-commands, and printing and saving of the tables."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fusedalign.bench import SUBCOMMANDS
from fusedalign.bench.cases import CASES, DEFAULT_CPU, DEFAULT_CUDA, KINDS, parse_cases
from fusedalign.bench.machine import device_type
from fusedalign.bench.peers import Implementation, choose, implementations, reason
from fusedalign.bench.tasks import TASKS, Task
from fusedalign.commandline import CommandParser, calm_threads, suggestion
from fusedalign.reports import NO_MATPLOTLIB, check_writable, warn

if TYPE_CHECKING:
    from fusedalign.bench.runner import Settings

#: Short names of torch's dtypes.
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _parser() -> CommandParser:
    parser = CommandParser(
        "fusedalign bench",
        "Time, memory and error of head and loss: this package's impls against other libraries.",
        {
            "commands, each with its own --help": {word: command.about for word, command in SUBCOMMANDS.items()},
            "tasks": {task.name: task.about for task in TASKS.values()},
            "cases": {case.name: str(case) for case in CASES.values()},
        },
    )
    add = parser.add_argument
    add("tasks", nargs="*", metavar="TASK", help="default: all")
    default = f"default: {','.join(DEFAULT_CUDA)} on a GPU, {','.join(DEFAULT_CPU)} on a CPU"
    cases_help = f"names with commas between, or N=..,D=..,V=..[,softcap=..]; may be repeated; {default}"
    impls_help = f"ours, or names with commas between, of {', '.join(implementations())}; default: all"
    add("--cases", action="append", metavar="CASES", help=cases_help)
    add("--impls", default="all", metavar="NAMES", help=impls_help)
    add(
        "--data",
        default=KINDS[0],
        choices=KINDS,
        help=f"statistics like a trained model's, or Gaussians; default: {KINDS[0]}",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the data; default: 0")
    add("--dtype", choices=_DTYPES, help="of hidden states and head; default: bf16 on a GPU, fp32 on a CPU")
    add("--out", type=Path, metavar="DIR", help="also write bench.md, bench.json and bench.png there")
    add("--wide", action="store_true", help="print all columns; the files of --out always have them")
    add("--profile", metavar="NAME", help="profile one impl instead: the kernels of each task, by time")
    return parser


def bench(argv: list[str]) -> None:
    """Run `fusedalign bench`. Raises ValueError, one line, for bad arguments."""
    options = _parser().parse(argv)
    if options is None:
        return
    settings = _settings(options)
    if options.profile is not None:
        _profile(settings)
        return
    if options.out is not None:
        check_writable(options.out, "--out")
        if importlib.util.find_spec("matplotlib") is None:
            warn(NO_MATPLOTLIB)
    calm_threads()
    _run_tables(settings, options.out, wide=options.wide)


def _run_tables(settings: Settings, out: Path | None, *, wide: bool) -> None:
    """Print each table when it is measured, and write the report so far into `out`."""
    from fusedalign.bench.runner import run
    from fusedalign.bench.table import case_footer, case_header, header, task_section, write

    write_error = no_plot = None
    for count, report in enumerate(run(settings, lambda line: print(line, file=sys.stderr, flush=True))):
        if count == 0:
            print(header(report))
        case = report.cases[-1]
        if len(case.tables) == 1:
            print("\n" + case_header(case, report))
        print("\n" + task_section(case.tables[-1], wide=wide), flush=True)
        if len(case.tables) == len(settings.tasks):
            print("\n" + case_footer(case), flush=True)
        if out is not None:
            try:
                write_error, no_plot = None, write(report, out)
            except OSError as error:  # try again after the next table
                write_error = error
    if no_plot not in (None, NO_MATPLOTLIB):
        warn(str(no_plot))
    if write_error is not None:
        raise write_error


def _profile(settings: Settings) -> None:
    from fusedalign.bench.profiling import profile_row
    from fusedalign.bench.runner import free, inputs

    (impl,) = settings.impls
    for case in settings.cases:
        data = inputs(case, settings)
        for task in settings.tasks:
            try:
                text = profile_row(impl, task, case, data, seed=settings.seed, device=settings.device)
            except Exception as error:  # a library may raise anything
                raise ValueError(f"{impl.name}: {reason(error, impl)}") from error
            print(text + "\n", flush=True)
            free(settings.device)


def _tasks(names: list[str], impls: list[Implementation]) -> list[Task]:
    """The named tasks; by default all that at least one of the impls supports."""
    supported = {name for impl in impls for name in impl.tasks}
    for name in names:
        if name not in supported:
            tasks = "; ".join(f"{impl.name} has {', '.join(impl.tasks)}" for impl in impls)
            raise ValueError(f"a task must be one that the impls have, got {name!r}: {tasks}")
    return [task for name, task in TASKS.items() if name in (names or supported)]


def _settings(options: argparse.Namespace) -> Settings:
    for name in options.tasks:
        if name not in TASKS:
            hint = suggestion(name, [*TASKS, *SUBCOMMANDS])
            raise ValueError(f"a task must be one of {', '.join(TASKS)}, got {name!r}{hint}")
    impls = choose(options.impls if options.profile is None else options.profile)
    if options.profile is not None and (len(impls) != 1 or options.out is not None):
        raise ValueError(f"--profile must name one impl and prints only, without --out, got {options.profile!r}")
    tasks = _tasks(options.tasks, impls)
    cases = None if options.cases is None else parse_cases(options.cases)
    import torch  # once all words are known to be right

    from fusedalign.bench.runner import Settings

    device = device_type()
    cases = cases or parse_cases(DEFAULT_CUDA if device == "cuda" else DEFAULT_CPU)
    dtype = getattr(torch, _DTYPES[options.dtype or ("bf16" if device == "cuda" else "fp32")])
    return Settings(tasks, cases, impls, options.data, options.seed, dtype, device)
