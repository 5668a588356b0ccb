"""`fusedalign bench score`: log-probabilities of preference pairs by this package and by others."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fusedalign.bench.machine import describe_machine, device_type, machine
from fusedalign.bench.training.processes import run_program
from fusedalign.bench.training.settings import MIXES, SIZES
from fusedalign.commandline import CommandParser, fit, listed_names
from fusedalign.reports import bullets, check_writable, markdown_row, markdown_table, replace_text, to_json

WORD = "score"
DEFAULT_CUDA, DEFAULT_CPU = "0.6b", "tiny"
DEFAULT_ROWS = 2000

#: Measures one side.
PROGRAM = "fusedalign.bench.scorers"
#: The ways to score: a hand-written loop, the usual harness, and this package.
SIDES = {
    "loop": "model(...).logits.log_softmax(-1).gather(...) on padded rows, the largest batch that fits",
    "lm-eval": "the `hf` model of the lm-evaluation-harness, batch_size=auto",
    "fusedalign": "fusedalign.score, max_tokens_per_batch=auto, packed",
}

_COLUMNS = ("", "rows/s", "tokens/s", "s", "first rows, s", "peak, GiB", "sum, nats")
_WIDTHS = [max(10, len(title)) for title in _COLUMNS]


class Job(NamedTuple):
    """One measurement: a side, a model and data."""

    side: str
    size: str
    mix: str
    rows: int
    """answers, two per prompt"""


class Pair(NamedTuple):
    """Token ids of a prompt and of two answers."""

    prompt: list[int]
    answers: tuple[list[int], list[int]]


@dataclass(frozen=True)
class Measured:
    """The figures of one side for one mix, or the reason why there are none."""

    side: str
    mix: str
    seconds: float | None = None
    first_seconds: float | None = None
    """of a first pass over a few rows, which includes compilation"""
    rows: int = 0
    """answers"""
    tokens: int = 0
    """of all rows, without padding; a prompt counts once per answer"""
    peak_bytes: int | None = None
    """beyond the weights; None on a CPU"""
    total: float = 0.0
    """the sum of all log-probabilities, which should be equal for all sides"""
    reason: str = ""


def pairs(mix: str, size: str, rows: int) -> list[Pair]:
    """Pairs of random tokens with the lengths of a mix."""
    lengths, vocab, shrink = MIXES[mix], SIZES[size].config["vocab_size"], SIZES[size].shrink
    generator = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(3, vocab) for _ in range(count)]

    return [
        Pair(
            tokens(lengths.prompt.draw(generator, shrink)),
            (tokens(lengths.chosen.draw(generator, shrink)), tokens(lengths.rejected.draw(generator, shrink))),
        )
        for _ in range(rows // 2)
    ]


def scoring(argv: list[str]) -> None:
    """Run `fusedalign bench score`.

    Raises:
        ValueError: an invalid argument or, after the tables, the sides that failed; one line.
    """
    options = _parser().parse(argv)
    if options is None:
        return
    mixes = listed_names("--mixes", options.mixes, MIXES)
    available = [side for side in SIDES if side != "lm-eval" or importlib.util.find_spec("lm_eval") is not None]
    sides = available if options.sides is None else listed_names("--sides", options.sides, SIDES)
    if options.rows < 2:
        raise ValueError(f"--rows must be at least 2, got {options.rows}")
    if options.out is not None:
        check_writable(options.out, "--out")
    cuda = device_type() == "cuda"
    size = options.size or (DEFAULT_CUDA if cuda else DEFAULT_CPU)
    print(_header(size, options, sides, cuda), flush=True)
    results: list[Measured] = []
    for mix in mixes:
        print("\n".join(["", f"## {mix}", "", *markdown_table([_COLUMNS], _WIDTHS)]), flush=True)
        for side in sides:
            figures = run_program(PROGRAM, Job(side, size, mix, options.rows))
            results.append(Measured(**({"side": side, "mix": mix} | figures)))
            print(table_row(results[-1]), flush=True)
        rows = [x for x in results if x.mix == mix]
        notes = ["", *bullets(f"{x.side}: {x.reason}" for x in rows if x.reason)]
        print("\n".join([*(notes if len(notes) > 1 else []), *comparison(rows)]), flush=True)
    if options.out is not None:
        report = {"machine": machine("cuda" if cuda else "cpu"), "rows": [dataclasses.asdict(x) for x in results]}
        replace_text(options.out / f"{WORD}.json", to_json(report, indent=1) + "\n")
    failed = [f"{x.side}, {x.mix}: {x.reason}" for x in results if x.reason]
    if failed:
        raise ValueError(f"bench {WORD}: {'; '.join(failed)}")


def _header(size: str, options: argparse.Namespace, sides: Sequence[str], cuda: bool) -> str:
    lines = [
        f"# fusedalign bench {WORD}",
        "",
        fit(describe_machine(machine("cuda" if cuda else "cpu"))),
        "",
        fit(
            f"{SIZES[size].about}, random weights, {'bf16' if cuda else 'fp32'}; {options.rows} rows: "
            f"{options.rows // 2} prompts with two answers each. Each side is a process of its own. Rows/s and "
            "tokens/s are of a second pass, without compilation. Peak: of memory beyond the weights."
        ),
        "",
        *bullets(f"{side}: {SIDES[side]}" for side in sides),
    ]
    return "\n".join(lines)


def table_row(x: Measured) -> str:
    """The row of one side."""
    if x.seconds is None:
        return markdown_row([x.side, *["-"] * 5, "failed"], _WIDTHS)
    peak = "-" if x.peak_bytes is None else f"{x.peak_bytes / 2**30:.2f}"
    rates = [f"{x.rows / x.seconds:.1f}", f"{x.tokens / x.seconds:,.0f}"]
    return markdown_row([x.side, *rates, f"{x.seconds:.2f}", f"{x.first_seconds:.2f}", peak, f"{x.total:.1f}"], _WIDTHS)


def comparison(results: Sequence[Measured]) -> Iterator[str]:
    """Compare this package with each other side."""
    ours = next((x for x in results if x.side == "fusedalign" and x.seconds), None)
    for x in results:
        if ours is None or x is ours or x.seconds is None or ours.seconds is None:
            continue
        memory = ""
        if x.peak_bytes and ours.peak_bytes is not None:
            memory = f", with {ours.peak_bytes / x.peak_bytes:.2f} of its memory over the weights"
        yield f"\n{x.seconds / ours.seconds:.2f} times as many rows a second as {x.side}{memory}"


def _parser() -> CommandParser:
    parser = CommandParser(
        f"fusedalign bench {WORD}",
        "Log-probabilities of preference pairs of uneven length, by this package and by others, each in a process of "
        "its own.",
        {"sides": SIDES},
    )
    add = parser.add_argument
    add("--size", choices=SIZES, help=f"of the model; default: {DEFAULT_CUDA} on a GPU, {DEFAULT_CPU} on a CPU")
    add(
        "--mixes",
        default=",".join(MIXES),
        metavar="NAMES",
        help=f"{', '.join(MIXES)}, with commas between; default: all",
    )
    add("--rows", type=int, default=DEFAULT_ROWS, metavar="N", help=f"answers, two a prompt; default: {DEFAULT_ROWS}")
    add("--sides", metavar="NAMES", help="names with commas between; default: all that are installed")
    add("--out", type=Path, metavar="DIR", help=f"also write {WORD}.json there")
    return parser
