"""What a training command prints of its steps: a table line for each logged one, and a progress bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fusedalign.reports import text_row

_HEADER_EVERY = 40  # rows of the table
#: Levels of `--log_level` at which only warnings or errors are printed.
_QUIET = ("error", "critical")


def show_steps(trainer: Any, *, counts: bool) -> Throughput:
    """Let a trainer print table lines instead of dictionaries; with `--log_level error` or `critical` nothing.

    Args:
        trainer: before it trains.
        counts: whether to count tokens, for a trainer that does not log them.

    Returns:
        The callback that measures tokens per second.
    """
    throughput, level = Throughput(trainer, counts=counts), trainer.args.log_level
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(transformers.trainer.DEFAULT_PROGRESS_CALLBACK)
    trainer.add_callback(throughput)
    if level not in _QUIET:
        trainer.add_callback(StepTable(throughput))
        if shows_bars(trainer.args):
            trainer.add_callback(StepBar())
    return throughput


def shows_bars(args: Any) -> bool:
    """Whether progress bars are shown: on a terminal, unless the trainer's arguments disable them."""
    return sys.stderr.isatty() and not args.disable_tqdm and args.log_level not in _QUIET


def peak_memory(device: torch.device) -> float | None:
    """The largest memory that PyTorch has held on this process's GPU, in GiB; None off CUDA."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


class StepBar(ProgressCallback):
    """transformers' progress bar without the dictionaries; `StepTable` prints the steps."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""


class Throughput(transformers.TrainerCallback):
    """Measures the tokens of trained steps, without padding, and the seconds that these steps take.

    Evaluations and saved checkpoints take no part in the seconds. Tokens are TRL's `num_tokens`, or for a trainer that
    does not log them the sum of its batches' attention masks over all processes.
    """

    def __init__(self, trainer: Any, *, counts: bool) -> None:
        self.tokens, self.seconds = 0, 0.0
        self.rate: float | None = None
        """tokens per second between the last two logs"""
        self._logged = 0
        self._start = self._event = time.perf_counter()
        self._counts, self._counted = counts, torch.zeros((), dtype=torch.int64, device=trainer.args.device)
        self._reduce: Callable[..., Tensor] = trainer.accelerator.reduce
        if counts:
            trainer.training_step = self._counting(trainer.training_step)

    def _counting(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def training_step(model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            for name in ("chosen_attention_mask", "rejected_attention_mask"):
                if name in inputs:
                    self._counted = self._counted + inputs[name].sum().to(self._counted.device)
            return step(model, inputs, *args, **kwargs)

        return training_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = self._event = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when the step has ended: an evaluation or a checkpoint may follow."""
        self._event = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the evaluation out of the seconds."""
        now = time.perf_counter()
        self._start, self._event = self._start + now - self._event, now

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the checkpoint out of the seconds."""
        self.on_evaluate(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the tokens and seconds of the steps since the last log."""
        if not {"loss", "train_runtime"} & set(logs):  # an evaluation's, or another callback's
            return
        now = time.perf_counter()
        tokens, seconds = self._new_tokens(logs), now - self._start
        self._start = self._event = now
        self.rate = tokens / seconds if tokens and seconds > 0 else None
        if tokens:
            self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds

    def _new_tokens(self, logs: Mapping[str, Any]) -> int:
        if self._counts:
            counted, self._counted = self._counted, torch.zeros_like(self._counted)
            return int(self._reduce(counted, "sum"))
        tokens = int(logs.get("num_tokens", self._logged)) - self._logged
        self._logged += tokens
        return tokens

    @property
    def mean_rate(self) -> float | None:
        """Tokens per second of all steps so far."""
        return self.tokens / self.seconds if self.tokens else None


class _Column(NamedTuple):
    title: str
    width: int
    shown: Callable[[Any], str]

    def text(self, value: Any) -> str:
        """The text of a value; none for a metric that was not logged."""
        return "" if value is None else self.shown(value)


def _number(value: float) -> str:
    """Four significant digits, or three where they would not fit."""
    text = f"{value:.4g}"
    return text if len(text) <= 9 else f"{value:.3g}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


#: Names of metrics, or of what `StepTable` adds to them, in the order of the columns.
_COLUMNS = {
    "kind": _Column("", 4, str),
    "step": _Column("step", 11, str),
    "epoch": _Column("epoch", 6, lambda x: f"{x:.2f}"),
    "loss": _Column("loss", 9, _number),
    "rewards/accuracies": _Column("accuracy", 8, lambda x: f"{x:.3f}"),
    "rewards/margins": _Column("margin", 9, _number),
    "mean_token_accuracy": _Column("accuracy", 8, lambda x: f"{x:.3f}"),
    "entropy": _Column("entropy", 9, _number),
    "grad_norm": _Column("grad norm", 9, _number),
    "learning_rate": _Column("lr", 8, lambda x: f"{x:.3g}"),
    "tokens_per_second": _Column("tokens/s", 9, _rate),
    "peak_memory": _Column("peak GiB", 8, lambda x: f"{x:.2f}"),
}
_REWARDS, _TOKENS = ("rewards/accuracies", "rewards/margins"), ("mean_token_accuracy", "entropy")


class StepTable(transformers.TrainerCallback):
    """Prints logged steps and evaluations as lines of one table of at most 100 columns, and a line at the end."""

    def __init__(self, throughput: Throughput) -> None:
        self._throughput = throughput
        self._columns: dict[str, _Column] = {}
        self._rows, self._first_step = 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step that the run starts from."""
        self._first_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the line of a step, of an evaluation, or of the whole run."""
        if not state.is_world_process_zero:
            return
        peak = peak_memory(args.device)
        if "train_runtime" in logs:
            _print(self._closing_line(logs, state.global_step - self._first_step, peak))
            return
        values = {name[5:]: value for name, value in logs.items() if name.startswith("eval_")}
        if values:
            values |= {"kind": "eval", "epoch": logs.get("epoch")}
        elif "loss" in logs:
            values = {**logs, "tokens_per_second": self._throughput.rate, "peak_memory": peak}
        else:
            return
        step = f"{state.global_step}/{state.max_steps}"
        values["step"] = step if len(step) <= _COLUMNS["step"].width else state.global_step
        self._columns = self._columns or _columns(values, peak)
        if self._rows % _HEADER_EVERY == 0:
            _print(self._line([column.title for column in self._columns.values()]))
        self._rows += 1
        _print(self._line([column.text(values.get(name)) for name, column in self._columns.items()]))

    def _line(self, cells: list[str]) -> str:
        return text_row(cells, [-column.width for column in self._columns.values()]).rstrip()

    def _closing_line(self, logs: Mapping[str, Any], steps: int, peak: float | None) -> str:
        parts = [f"trained {steps} step{'' if steps == 1 else 's'} in {logs['train_runtime']:.1f} s"]
        parts += [f"mean loss {_number(logs['train_loss'])}"] if "train_loss" in logs else []
        rate = self._throughput.mean_rate
        parts += [f"{_rate(rate)} tokens/s"] if rate else []
        parts += [f"peak memory {peak:.2f} GiB"] if peak else []
        return ", ".join(parts)


def _columns(values: Mapping[str, Any], peak: float | None) -> dict[str, _Column]:
    """The columns of a table with these first values: the metrics of rewards or those of tokens, as far as logged."""
    metrics = _REWARDS if _REWARDS[1] in values else _TOKENS
    left_out = {*_REWARDS, *_TOKENS} - {name for name in metrics if name in values}
    left_out |= {"peak_memory"} if peak is None else set()
    return {name: column for name, column in _COLUMNS.items() if name not in left_out}


def _print(line: str) -> None:
    tqdm.write(line, file=sys.stdout)  # above a progress bar, where there is one
    sys.stdout.flush()
