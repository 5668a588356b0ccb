"""SFT, then DPO with stock TRL and with fusedalign from the same seed; a table and a picture of the results."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tqdm import tqdm

from fusedalign.bench.training.quiet import quiet
from fusedalign.demo.memory import LossMemory, measure
from fusedalign.demo.plot import FUSED, STOCK, Results, plot
from fusedalign.demo.slots import count_slots
from fusedalign.embedded import EMBEDDED_NAME, data_directory
from fusedalign.reports import markdown_table, plot_failure, warn
from fusedalign.trl.arguments import parse
from fusedalign.trl.attachment import attach
from fusedalign.trl.folder import claimed
from fusedalign.trl.record import Written
from fusedalign.trl.train import build, run, tokenizer_of

PROMPT = "Hello! Could you explain how to get a coffee stain out of a shirt?"
OUTPUT = Path("runs/demo")


class Run(NamedTuple):
    """One training of the comparison."""

    name: str
    trainer: Any
    seconds: float
    answer: str
    """greedy completion of `PROMPT`"""
    written: Written

    @property
    def history(self) -> list[dict[str, float]]:
        """The trainer's log."""
        log: list[dict[str, float]] = self.trainer.state.log_history
        return log

    def last(self, key: str) -> float:
        """The last logged value of a metric."""
        return next(row[key] for row in reversed(self.history) if key in row)

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Step and training loss of each log."""
        return [(int(row["step"]), row["loss"]) for row in self.history if "loss" in row]


class Progress(transformers.TrainerCallback):
    """One bar on stderr over all trainings if that is a terminal; else a line on stdout as each begins."""

    def __init__(self, trainings: int) -> None:
        layout = "{desc} {percentage:3.0f}% |{bar}| {elapsed}"
        self.bar = tqdm(total=trainings, disable=not sys.stderr.isatty(), leave=False, bar_format=layout)
        self.begun = 0

    def begin(self, title: str) -> None:
        """Show the title of the next training."""
        self.begun += 1
        text = f"{self.begun}/{self.bar.total}  {title}"
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.set_description_str(text)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance by one step of the training; all trainings have equal shares of the bar."""
        self.bar.update(1 / state.max_steps)


def demo() -> None:
    """Run the trainings, print the table, save the plot."""
    start = time.perf_counter()
    progress = Progress(trainings=3)
    with contextlib.closing(progress.bar):
        progress.begin("SFT of a small Qwen3 with random weights")
        sft = _train("sft", FUSED, EMBEDDED_NAME, progress)
        model = str(sft.written.model)
        progress.begin("DPO from there with stock TRL")
        stock = _train("dpo", STOCK, model, progress)
        progress.begin("DPO from there with fusedalign, same seed")
        fused = _train("dpo", FUSED, model, progress)
    path = OUTPUT / "demo.png"
    results = _results(sft, stock, fused)
    failure = plot_failure(lambda file: plot(results, file), path)
    print(_table(stock, fused, results.memory))
    print(f"\nPrompt: {PROMPT}\n  after SFT: {sft.answer}\n  after DPO: {fused.answer}")
    print(f"\n{fused.written._replace(plot=path if failure is None else None)}")
    warnings = [text for result in (sft, stock, fused) for text in result.written.warnings]
    for text in dict.fromkeys([*warnings, *([failure] if failure else [])]):
        warn(text)
    cpu = f"a CPU, {torch.get_num_threads()} thread(s)"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    print(f"{time.perf_counter() - start:.0f} seconds on {device}")


def _train(method: str, name: str, model: str, progress: Progress) -> Run:
    """Train with the recipe of a method; `name` is "fusedalign" or that of the stock trainer."""
    options = {
        "config": data_directory().parent / f"{method}.yaml",
        "model_name_or_path": model,
        "output_dir": OUTPUT / f"{method}-{name.split()[0].lower()}",
        "disable_tqdm": "true",
        "overwrite_output_dir": "true",
    }
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    with quiet():
        arguments = parse(method, words)
    with quiet(), claimed(arguments) as folder:  # the metrics are in metrics.jsonl
        trainer = build(method, arguments, fused=False)
        if name == FUSED:
            attach(trainer)
        trainer.add_callback(progress)
        start = time.perf_counter()
        written = run(trainer, folder)
        seconds = time.perf_counter() - start
        return Run(name, trainer, seconds, _answer(trainer), written)


def _answer(trainer: Any) -> str:
    """The greedy completion of `PROMPT`."""
    tokenizer = tokenizer_of(trainer)
    messages, template = [{"role": "user", "content": PROMPT}], tokenizer.apply_chat_template
    inputs: Any = template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    trainer.model.eval()
    with torch.no_grad():
        out = trainer.model.generate(**inputs.to(trainer.model.device), max_new_tokens=60, do_sample=False)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def largest_difference(a: list[dict[str, float]], b: list[dict[str, float]]) -> float:
    """The largest |a - b| over all steps and metrics, except times and rates, of two logs with the same metrics."""
    largest = 0.0
    for x, y in zip(a, b, strict=True):
        if x.keys() != y.keys():
            raise ValueError(f"expected the same metrics in both logs, got {sorted(x.keys() ^ y.keys())} in one only")
        names = [k for k in x if not k.endswith(("_runtime", "_per_second"))]
        largest = max([largest, *(abs(x[k] - y[k]) if not math.isnan(x[k]) else 0.0 for k in names)])
    return largest


def _results(sft: Run, stock: Run, fused: Run) -> Results:
    with quiet():
        peaks = measure(stock.trainer)
        memory = LossMemory(peaks.full_logits, peaks.trainer, measure(fused.trainer).trainer)
        slots = {"SFT, grouped by length": count_slots(sft.trainer), "DPO": count_slots(stock.trainer)}
    losses = {run.name: run.losses for run in (stock, fused)}
    return Results(losses, memory, peaks.tokens, stock.trainer.model.config.vocab_size, slots)


def _table(stock: Run, fused: Run, memory: LossMemory) -> str:
    mib = 2**20
    rows = [("", stock.name, fused.name)]
    for label, key in (
        ("final loss", "train_loss"),
        ("held-out loss", "eval_loss"),
        ("held-out reward accuracy", "eval_rewards/accuracies"),
        ("held-out reward margin", "eval_rewards/margins"),
    ):
        rows.append((label, f"{stock.last(key):.4f}", f"{fused.last(key):.4f}"))
    difference = f"{largest_difference(stock.history, fused.history):.1e}"
    rows.append(("largest difference, all metrics and steps", "", difference))
    peaks = f"{memory.stock / mib:.2f}", f"{memory.fused / mib:.2f}"
    rows.append(("peak memory of the loss layer, MiB", *peaks))
    rows.append(("seconds", f"{stock.seconds:.1f}", f"{fused.seconds:.1f}"))
    return "\n".join(["", *markdown_table(rows)])
