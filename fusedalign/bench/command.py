"""The command `fusedalign bench`: its words, and what they start."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import NoReturn

import torch

from fusedalign.bench import scoring
from fusedalign.bench.cases import CASES, DEFAULT_CPU, DEFAULT_CUDA, parse_cases
from fusedalign.bench.data import KINDS
from fusedalign.bench.microbatches import WORD, microbatches
from fusedalign.bench.peers import Implementation, choose, implementations
from fusedalign.bench.profiling import profile_row
from fusedalign.bench.runner import Settings, free, inputs, reason, run
from fusedalign.bench.table import about, afterwards, header, tabled, write
from fusedalign.bench.tasks import TASKS, Task
from fusedalign.bench.training import command as training
from fusedalign.reports import NO_MATPLOTLIB, check_writable, warn

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and no usage, like every other command."""
        raise ValueError(f"bench: {message}")


def _parser() -> _Parser:
    tasks = "\n".join(f"  {task.name:<8} {task.about}" for task in TASKS.values())
    cases = "\n".join(f"  {case.name:<12} {case}" for case in CASES.values())
    parser = _Parser(
        prog="fusedalign bench",
        description="This package's impls beside other libraries: time, memory and error of the head and loss.\n"
        f"By themselves, with --help of their own: fusedalign bench {WORD}, a pipeline's last stage, and\n"
        f"fusedalign bench {training.WORD}, whole training steps, and fusedalign bench {scoring.WORD}, data sets.\n"
        f"\ntasks (default: all)\n{tasks}\n\ncases\n{cases}\n\nimpls\n  {', '.join(implementations())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("tasks", nargs="*", metavar="TASK", help="which tasks to run")
    add("-h", "--help", action="store_true", help="show this text")
    default = f"default: {','.join(DEFAULT_CUDA)} on a GPU, {','.join(DEFAULT_CPU)} on a CPU"
    cases_help = f"names with commas between, or N=..,D=..,V=..[,softcap=..]; may be repeated; {default}"
    add("--cases", action="append", help=cases_help)
    add("--impls", default="all", help="all, ours, or names with commas between; default: all")
    add("--data", default="trained", choices=KINDS, help="statistics like a trained model's (default), or Gaussians")
    add("--seed", type=int, default=0, help="of the data; default: 0")
    add("--dtype", choices=_DTYPES, help="of hidden states and head; default: bf16 on a GPU, fp32 on a CPU")
    add("--out", type=Path, metavar="DIR", help="also write bench.md, bench.json and bench.png there")
    add("--profile", metavar="IMPL", help="instead of the tables: the kernels of one row of each, by time")
    return parser


def bench(argv: list[str]) -> None:
    """Run `fusedalign bench` with the words that follow it.

    Raises:
        ValueError: a word that does not fit; one line with what was expected and came.
    """
    if argv[:1] == [WORD]:
        microbatches(argv[1:])
        return
    if argv[:1] == [training.WORD]:
        training.trainings(argv[1:])
        return
    if argv[:1] == [scoring.WORD]:
        scoring.scoring(argv[1:])
        return
    parser = _parser()
    options = parser.parse_args(argv)
    if options.help:
        print(parser.format_help(), end="")
        return
    settings = _settings(options)
    if options.profile is not None:
        _profile(settings)
        return
    if options.out is not None:
        check_writable(options.out, "--out")
        if importlib.util.find_spec("matplotlib") is None:
            warn(NO_MATPLOTLIB)
    unwritten = no_plot = None
    for done, report in enumerate(run(settings, lambda line: print(line, file=sys.stderr, flush=True))):
        if not done:
            print(header(report))
        case = report.cases[-1]
        if len(case.tables) == 1:
            print("\n" + about(case, report))
        print("\n" + tabled(case.tables[-1]), flush=True)
        if len(case.tables) == len(settings.tasks):
            print("\n" + afterwards(case), flush=True)
        if options.out is not None:
            try:
                unwritten, no_plot = None, write(report, options.out)
            except OSError as error:  # the rest is printed all the same, and written with the next table
                unwritten = error
    if no_plot not in (None, NO_MATPLOTLIB):
        warn(str(no_plot))
    if unwritten is not None:
        raise unwritten


def _profile(settings: Settings) -> None:
    (impl,) = settings.impls
    for case in settings.cases:
        data = inputs(case, settings)
        for task in settings.tasks:
            try:
                text = profile_row(impl, task, case, data, seed=settings.seed, device=settings.device)
            except Exception as error:  # as in the tables: whatever a library raises
                raise ValueError(f"{impl.name}: {reason(error, impl)}") from error
            print(text + "\n", flush=True)
            free(settings.device)


def _tasks(names: list[str], impls: list[Implementation]) -> list[Task]:
    """Those that are named, else all that any of the impls can do: a table without rows says nothing."""
    can = {name for impl in impls for name in impl.tasks}
    for name in names:
        if name not in can:
            has = "; ".join(f"{impl.name} has {', '.join(impl.tasks)}" for impl in impls)
            raise ValueError(f"a task must be one that the impls have, got {name!r}: {has}")
    return [task for name, task in TASKS.items() if name in (names or can)]


def _settings(options: argparse.Namespace) -> Settings:
    for name in options.tasks:
        if name not in TASKS:
            raise ValueError(f"a task must be one of {', '.join(TASKS)}, got {name!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    impls = choose(options.impls if options.profile is None else options.profile)
    if options.profile is not None and (len(impls) != 1 or options.out is not None):
        raise ValueError(f"--profile must name one impl and prints only, without --out, got {options.profile!r}")
    tasks = _tasks(options.tasks, impls)
    cases = parse_cases(options.cases or (DEFAULT_CUDA if device == "cuda" else DEFAULT_CPU))
    dtype = _DTYPES[options.dtype or ("bf16" if device == "cuda" else "fp32")]
    return Settings(tasks, cases, impls, options.data, options.seed, dtype, device)
