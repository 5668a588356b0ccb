"""`fusedalign bench score`: log-probabilities of preference pairs by this package and by others."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedalign.bench.measure import synchronize
from fusedalign.bench.runner import describe_machine, in_short, machine
from fusedalign.bench.training.processes import run_program
from fusedalign.bench.training.settings import MIXES, SIZES
from fusedalign.commandline import CommandParser, fit
from fusedalign.reports import bullets, check_writable, markdown_row, markdown_table, replace_text, to_json
from fusedalign.score.records import Answer, Example, Window

WORD = "score"

#: The ways to score: a hand-written loop, the usual harness, and this package.
SIDES = {
    "loop": "model(...).logits.log_softmax(-1).gather(...) on padded rows, the largest batch that fits",
    "lm-eval": "the `hf` model of the lm-evaluation-harness, batch_size=auto",
    "fusedalign": "fusedalign.score, max_tokens_per_batch=auto, packed",
}

#: The loop's batch size starts here and is halved until a batch of the longest rows fits.
_LARGEST_BATCH = 128
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
    cuda = torch.cuda.is_available()
    size = options.size or ("0.6b" if cuda else "tiny")
    mixes = options.mixes.split(",")
    if size not in SIZES:
        raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {size!r}")
    for mix in mixes:
        if mix not in MIXES:
            raise ValueError(f"--mixes must be of {', '.join(MIXES)}, got {mix!r}")
    available = [side for side in SIDES if side != "lm-eval" or importlib.util.find_spec("lm_eval") is not None]
    sides = options.sides.split(",") if options.sides else available
    for side in sides:
        if side not in SIDES:
            raise ValueError(f"--sides must be of {', '.join(SIDES)}, got {side!r}")
    if options.rows < 2:
        raise ValueError(f"--rows must be at least 2, got {options.rows}")
    if options.out is not None:
        check_writable(options.out, "--out")
    print(_header(size, options, sides, cuda), flush=True)
    results: list[Measured] = []
    for mix in mixes:
        print("\n".join(["", f"## {mix}", "", *markdown_table([_COLUMNS], _WIDTHS)]), flush=True)
        for side in sides:
            figures = run_program(__name__, Job(side, size, mix, options.rows))
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


def measure(job: Job) -> Measured:
    """Build the model and score the rows of a mix with it in this process."""
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        config = transformers.Qwen3Config(**SIZES[job.size].config)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    data = pairs(job.mix, job.size, job.rows)
    longest = sorted(data, key=lambda pair: -len(pair.prompt) - max(map(len, pair.answers)))
    try:
        run = {"loop": _loop, "lm-eval": _lm_eval, "fusedalign": _ours}[job.side](model, longest, device)
        start = time.perf_counter()
        run(data[:16])
        synchronize(device)
        first = time.perf_counter() - start
        allocated = torch.cuda.memory_allocated() if device == "cuda" else 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        total = run(data)
        synchronize(device)
        seconds = time.perf_counter() - start
    except Exception as error:  # continue with the other sides
        return Measured(job.side, job.mix, reason=in_short(error))
    peak = torch.cuda.max_memory_allocated() - allocated if device == "cuda" else None
    count = sum(len(pair.prompt) + len(answer) for pair in data for answer in pair.answers)
    return Measured(job.side, job.mix, seconds, first, 2 * len(data), count, peak, total)


Runner = Callable[[Sequence[Pair]], float]


def _loop(model: Any, longest: Sequence[Pair], device: str) -> Runner:
    """The usual hand-written loop, with the largest batch size that fits the longest rows."""

    @torch.no_grad()
    def run(data: Sequence[Pair], size: int) -> float:
        rows = [(pair.prompt, answer) for pair in data for answer in pair.answers]
        total = 0.0
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            width = max(len(prompt) + len(answer) for prompt, answer in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.int64)
            mask, is_answer = torch.zeros_like(ids), torch.zeros_like(ids)
            for i, (prompt, answer) in enumerate(batch):
                n = len(prompt) + len(answer)
                ids[i, :n] = torch.tensor(prompt + answer)
                mask[i, :n] = 1
                is_answer[i, len(prompt) : n] = 1
            ids, mask, is_answer = ids.to(device), mask.to(device), is_answer.to(device)
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            total += (logps.double() * is_answer[:, 1:]).sum().item()
        return total

    size = _LARGEST_BATCH if device == "cuda" else 8
    while size > 1:
        try:
            run(longest[: max(1, size // 2)], size)
            break
        except torch.OutOfMemoryError:
            size //= 2
        torch.cuda.empty_cache()
    return lambda data: run(data, size)


def _lm_eval(model: Any, longest: Sequence[Pair], device: str) -> Runner:
    """The `hf` model of the lm-evaluation-harness on token ids."""
    from lm_eval.models.huggingface import HFLM

    from fusedalign.bench.training.data import tokenizer
    from fusedalign.bench.training.settings import Job as TrainingJob

    size = next(name for name, x in SIZES.items() if x.config["hidden_size"] == model.config.hidden_size)
    width = len(longest[0].prompt) + max(map(len, longest[0].answers))
    harness = HFLM(
        pretrained=model,
        tokenizer=tokenizer(TrainingJob("dpo", size, next(iter(MIXES)), "trl")),
        batch_size="auto",
        max_batch_size=256,
        max_length=width + 1,
    )

    def run(data: Sequence[Pair]) -> float:
        requests = [(None, pair.prompt, answer) for pair in data for answer in pair.answers]
        return sum(logps for logps, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True))

    return run


def _ours(model: Any, longest: Sequence[Pair], device: str) -> Runner:
    """The scorer of this package."""
    from fusedalign.score.scorer import Scorer

    scorer = Scorer(model)

    def run(data: Sequence[Pair]) -> float:
        examples = [
            Example(
                i,
                tuple(
                    Answer(name, (Window(pair.prompt + answer, [-100] * len(pair.prompt) + answer),))
                    for name, answer in zip(("chosen", "rejected"), pair.answers, strict=True)
                ),
            )
            for i, pair in enumerate(data)
        ]
        return sum(score.logps for scores in scorer.scores(examples) if not isinstance(scores, str) for score in scores)

    return run


def _parser() -> CommandParser:
    sides = "\n".join(f"  {name:<10}  {about}" for name, about in SIDES.items())
    parser = CommandParser(
        f"fusedalign bench {WORD}",
        "Log-probabilities of preference pairs of uneven length, by this package and by others, each in a\n"
        f"process of its own.\n\nsides\n{sides}",
    )
    add = parser.add_argument
    add("--size", help=f"one of {', '.join(SIZES)}; default: 0.6b on a GPU, tiny on a CPU")
    add("--mixes", default=",".join(MIXES), help="names with commas between; default: all")
    add("--rows", type=int, default=2000, help="answers, two a prompt; default: 2000")
    add("--sides", help="names with commas between; default: all that are installed")
    add("--out", type=Path, metavar="DIR", help=f"also write {WORD}.json there")
    return parser


if __name__ == "__main__":
    job, path = sys.argv[1:]
    replace_text(Path(path), json.dumps(dataclasses.asdict(measure(Job(*json.loads(job))))))
