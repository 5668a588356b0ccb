"""`fusedalign bench trl`: its arguments, and the loop over the trainings that they name."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

from fusedalign.bench.machine import device_type, gpu_count, machine
from fusedalign.bench.training import processes
from fusedalign.bench.training.plot import draw
from fusedalign.bench.training.settings import ALL_MIXES, ENGINES, EQUAL, MIXES, SIDES, SIZES, STEPS, TRAININGS, Job
from fusedalign.bench.training.table import (
    COLUMNS,
    LENGTHS,
    NARROW,
    Result,
    failures,
    group_title,
    head,
    header,
    line,
    notes,
)
from fusedalign.commandline import CommandParser, listed_names
from fusedalign.impls import check_name
from fusedalign.reports import NO_MATPLOTLIB, check_writable, plot_failure, replace_text, to_json, warn

WORD = "trl"
DEFAULT_TRAINING, DEFAULT_CUDA, DEFAULT_CPU = "dpo", "0.6b", "tiny"


def trainings(argv: list[str]) -> None:
    """Run `fusedalign bench trl`.

    Raises:
        ValueError: an invalid argument or, after all tables, the rows that failed; one line.
    """
    options = _parser().parse(argv)
    if options is None:
        return
    if importlib.util.find_spec("trl") is None:
        raise ValueError("bench trl needs TRL: pip install 'fusedalign[trl]', on Python 3.11 or later")
    planned = jobs(options)
    if options.out is not None:
        check_writable(options.out, "--out")
        if importlib.util.find_spec("matplotlib") is None:
            warn(NO_MATPLOTLIB)
    results = _run(planned, options.out, tuple(COLUMNS) if options.wide else NARROW)
    failed = failures(results)
    if failed:
        raise ValueError(f"bench {WORD}: {'; '.join(failed)}")


def jobs(options: argparse.Namespace) -> list[Job]:
    """The trainings to measure, table by table.

    Raises:
        ValueError: an unknown name, or rows that none of the trainings has.
    """
    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}")
    if options.batch is not None and (options.batch < 2 or options.batch % 2):
        raise ValueError(f"--batch must be an even number of rows, at least 2, got {options.batch}")
    check_name(options.impl)
    if options.equal and options.mixes is not None:
        raise ValueError(f"--equal takes the place of --mixes, got both (--mixes {options.mixes})")
    mixes = [EQUAL] if options.equal else listed_names("--mixes", options.mixes or ",".join(MIXES), MIXES)
    training_names = listed_names("a training", ",".join(options.trainings or [DEFAULT_TRAINING]), TRAININGS)
    rows = listed_names("--rows", options.rows or ",".join(SIDES), SIDES)
    sizes = None if options.sizes is None else listed_names("--sizes", options.sizes, SIZES)
    device, gpus = device_type(), gpu_count()  # imports torch, once all names are known to be right
    if options.ranks < 1 or (options.ranks > 1 and options.ranks > gpus):
        raise ValueError(f"--ranks must be at least 1 and at most the number of GPUs, {gpus}, got {options.ranks}")
    sizes = sizes or [DEFAULT_CUDA if device == "cuda" else DEFAULT_CPU]
    sides = _sides(rows, device, named=options.rows is not None)
    planned = [
        Job(
            training,
            size,
            mix,
            side,
            options.steps,
            options.impl,
            device,
            options.batch,
            options.engine,
            options.ranks,
        )
        for size, training, mix, side in product(sizes, training_names, mixes, sides)
        if SIDES[side].serves(TRAININGS[training])
    ]
    if not planned:
        raise ValueError(f"--rows must name a row that {', '.join(training_names)} has, got {options.rows}: see --help")
    return planned


def _sides(names: list[str], device: str, *, named: bool) -> list[str]:
    """The rows that can run here, stock TRL, the baseline, first. Raises ValueError where a `named` one cannot."""
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    missing = "a GPU" if device != "cuda" else "" if has_liger else "liger-kernel (pip install liger-kernel)"
    with_liger = [name for name in names if SIDES[name].liger]
    if missing and with_liger:
        if named:
            raise ValueError(f"the rows {', '.join(with_liger)} need {missing}")
        warn(f"the rows {', '.join(with_liger)} are left out: they need {missing}")
    return [name for name in SIDES if name in names and not (missing and SIDES[name].liger)]


def _run(planned: Sequence[Job], out: Path | None, columns: Sequence[str]) -> list[Result]:
    """Measure all jobs; print each row when it is measured, and write the results so far into `out`."""
    print(header(planned, columns), flush=True)
    results: list[Result] = []
    try:
        for _, group in groupby(planned, group_title):
            rows: list[Result] = []
            for job in group:
                if not rows:
                    print(f"\n{head(job, columns)}", flush=True)
                print(f"{group_title(job)}: {SIDES[job.side].title}", file=sys.stderr, flush=True)
                result = Result(job, processes.measure_alone(job))
                print(line(result, rows, columns), flush=True)
                rows.append(result)
                results.append(result)
                if out is not None:
                    _write(planned, results, out)
            if notes(rows):
                print(f"\n{notes(rows)}", flush=True)
    finally:  # plot the rows measured so far after Ctrl-C too
        if out is not None and results:
            reason = plot_failure(lambda path: draw(results, path), out / f"{WORD}.png")
            if reason not in (None, NO_MATPLOTLIB):
                warn(str(reason))
    return results


def _write(planned: Sequence[Job], results: Sequence[Result], out: Path) -> None:
    """Write the text and the figures of the results."""
    report: dict[str, Any] = {"machine": machine(planned[0].device)}
    report["mixes"] = {job.mix: dataclasses.asdict(ALL_MIXES[job.mix]) for job in planned}
    report["rows"] = [dataclasses.asdict(job) | dataclasses.asdict(measured) for job, measured in results]
    replace_text(out / f"{WORD}.md", _text(planned, results) + "\n")
    replace_text(out / f"{WORD}.json", to_json(report, indent=1) + "\n")


def _text(planned: Sequence[Job], results: Sequence[Result]) -> str:
    """The printed text of the results."""
    parts = [header(planned)]
    for _, group in groupby(results, lambda result: group_title(result.job)):
        rows = list(group)
        table = [head(rows[0].job), *(line(row, rows[:i]) for i, row in enumerate(rows))]
        parts += ["\n".join(table), *filter(None, [notes(rows)])]
    return "\n\n".join(parts)


def _parser() -> CommandParser:
    parser = CommandParser(
        f"fusedalign bench {WORD}",
        "Training steps on rows of uneven length, new lengths at every step: stock TRL and the Fused trainers, each in "
        "a new process without compiled kernels.",
        {
            "trainings": {name: training.about for name, training in TRAININGS.items()},
            f"mixes, {LENGTHS}": {name: str(mix) for name, mix in MIXES.items()},
            "rows": {name: side.about for name, side in SIDES.items()},
            "columns": COLUMNS,
        },
    )
    add, all_of = parser.add_argument, "names with commas between; default: all"
    add("trainings", nargs="*", metavar="TRAINING", help=f"default: {DEFAULT_TRAINING}")
    size_help = f"{', '.join(SIZES)}, with commas between; default: {DEFAULT_CUDA} on a GPU, {DEFAULT_CPU} on a CPU"
    add("--sizes", metavar="NAMES", help=size_help)
    add("--mixes", metavar="NAMES", help=all_of)
    add("--equal", action="store_true", help="rows of 2048 tokens, half of them prompt, 8 a step, instead of the mixes")
    add("--rows", metavar="NAMES", help=f"{all_of} that can run here")
    rows = f"{MIXES['chat'].rows}, or {ALL_MIXES[EQUAL].rows} with --equal"
    add("--batch", type=int, metavar="N", help=f"rows per step and GPU, half as many pairs; default: {rows}")
    add("--steps", type=int, default=STEPS, metavar="N", help=f"measured steps, after the first; default: {STEPS}")
    add("--ranks", type=int, default=1, metavar="N", help="GPUs, each with the rows of --batch; default: 1")
    add("--engine", choices=ENGINES, default=ENGINES[0], help=f"of several ranks; default: {ENGINES[0]}")
    add("--impl", default="auto", metavar="NAME", help="of the Fused trainers; default: auto")
    add("--wide", action="store_true", help="print all columns; the files of --out always have them")
    add("--out", type=Path, metavar="DIR", help=f"also write {WORD}.md, {WORD}.json and {WORD}.png there")
    return parser
