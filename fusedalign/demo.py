"""`fusedalign demo`: SFT, then DPO with stock TRL and with fusedalign from the same seed, on the built-in data."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedalign.bench.training.quiet import quiet
from fusedalign.embedded import EMBEDDED_NAME, data_directory
from fusedalign.ops import linear_logps
from fusedalign.reports import markdown_table, plot_failure, warn
from fusedalign.trl import stock
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
    history: list[dict[str, float]]
    """the trainer's log"""
    largest: int
    """bytes of the largest tensor that the loss layer allocates in forward and backward"""
    full_logits: int
    """the same for the reference with full logits on the same batch"""
    seconds: float
    answer: str
    """greedy completion of `PROMPT`"""
    written: Written

    def last(self, key: str) -> float:
        """The last logged value of a metric."""
        return next(row[key] for row in reversed(self.history) if key in row)


def demo(argv: list[str]) -> None:
    """Run the trainings, print the table, save the plot. Raises ValueError for arguments: there are none."""
    if argv:
        raise ValueError(f"demo takes no arguments, got {' '.join(argv)}")
    start = time.perf_counter()
    print("1/3  SFT of a small Qwen3 with random weights", flush=True)
    sft = _train("sft", "fusedalign", EMBEDDED_NAME)
    print("2/3  DPO from there with stock TRL", flush=True)
    model = str(OUTPUT / "sft-fusedalign")
    stock = _train("dpo", "stock TRL", model)
    print("3/3  DPO from there with fusedalign, same seed", flush=True)
    fused = _train("dpo", "fusedalign", model)
    plot = OUTPUT / "demo.png"
    failure = plot_failure(lambda path: _plot(stock, fused, path), plot)
    print(_table(stock, fused))
    print(f"\nPrompt: {PROMPT}\n  after SFT: {sft.answer}\n  after DPO: {fused.answer}")
    print(f"\n{fused.written._replace(plot=plot if failure is None else None)}")
    warnings = [text for result in (sft, stock, fused) for text in result.written.warnings]
    for text in dict.fromkeys([*warnings, *([failure] if failure else [])]):
        warn(text)
    cpu = f"a CPU, {torch.get_num_threads()} thread(s)"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    print(f"{time.perf_counter() - start:.0f} seconds on {device}")


def _train(method: str, name: str, model: str) -> Run:
    """Train with the recipe of a method; `name` is "fusedalign" or that of the stock trainer."""
    options = {
        "config": data_directory().parent / f"{method}.yaml",
        "model_name_or_path": model,
        "output_dir": OUTPUT / f"{method}-{name.split()[0].lower()}",
        "disable_tqdm": "true",
        "overwrite_output_dir": "true",
    }
    arguments = parse(method, [word for option, value in options.items() for word in (f"--{option}", str(value))])
    with quiet(), claimed(arguments) as folder:  # the metrics are in metrics.jsonl
        trainer = build(method, arguments, fused=False)
        if name == "fusedalign":
            attach(trainer)
        with _Probe() as probe:
            start = time.perf_counter()
            written = run(trainer, folder)
            seconds = time.perf_counter() - start
        answer = _answer(trainer)
    return Run(name, trainer.state.log_history, probe.largest, probe.full_logits, seconds, answer, written)


def _answer(trainer: Any) -> str:
    """The greedy completion of `PROMPT`."""
    tokenizer = tokenizer_of(trainer)
    messages, template = [{"role": "user", "content": PROMPT}], tokenizer.apply_chat_template
    inputs: Any = template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    trainer.model.eval()
    with torch.no_grad():
        out = trainer.model.generate(**inputs.to(trainer.model.device), max_new_tokens=60, do_sample=False)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


class _LargestStorage(TorchDispatchMode):
    """Records the bytes of the largest storage that an operator allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in inputs:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


class _Probe:
    """Repeats the first training call of the loss layer, forward and backward, to record its allocations."""

    def __init__(self) -> None:
        self.largest = self.full_logits = 0

    def __enter__(self) -> _Probe:
        self._inner: Any = stock.fused_head()
        stock.replace_fused_head(self)
        return self

    def __exit__(self, *_: object) -> None:
        stock.replace_fused_head(self._inner)

    def apply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any) -> Any:
        """Like TRL's `_ChunkedLogProbFunction.apply`, whose place this object takes."""
        if not self.largest and torch.is_grad_enabled() and hidden.requires_grad:
            self.largest = self._measure(self._inner.apply, hidden, weight, bias, targets, *options)
            self.full_logits = self._measure(_reference, hidden, weight, bias, targets)
        return self._inner.apply(hidden, weight, bias, targets, *options)

    @staticmethod
    def _measure(function: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> int:
        leaves = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in (hidden, weight, bias)]
        with _LargestStorage() as largest:
            function(*leaves, *others)[0].sum().backward()
        return largest.bytes


def _reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, ...]:
    return (linear_logps(hidden, weight, targets, bias=bias, impl="reference").logps,)


def largest_difference(a: list[dict[str, float]], b: list[dict[str, float]]) -> float:
    """The largest |a - b| over all steps and metrics, except times and rates, of two logs with the same metrics."""
    largest = 0.0
    for x, y in zip(a, b, strict=True):
        if x.keys() != y.keys():
            raise ValueError(f"expected the same metrics in both logs, got {sorted(x.keys() ^ y.keys())} in one only")
        names = [k for k in x if not k.endswith(("_runtime", "_per_second"))]
        largest = max([largest, *(abs(x[k] - y[k]) if not math.isnan(x[k]) else 0.0 for k in names)])
    return largest


def _table(stock: Run, fused: Run) -> str:
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
    rows.append(("largest tensor in the loss layer, MiB", f"{stock.largest / mib:.2f}", f"{fused.largest / mib:.2f}"))
    rows.append(("seconds", f"{stock.seconds:.1f}", f"{fused.seconds:.1f}"))
    return "\n".join(["", *markdown_table(rows)])


def _plot(stock: Run, fused: Run, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    for result, style in ((stock, {"linewidth": 5, "alpha": 0.35}), (fused, {"linewidth": 1.5})):
        points = [(row["step"], row["loss"]) for row in result.history if "loss" in row]
        curves.plot(*zip(*points, strict=True), label=result.name, **style)
    curves.set(title="DPO loss", xlabel="step")
    curves.legend()
    sizes = {"full logits": stock.full_logits, stock.name: stock.largest, fused.name: fused.largest}
    drawn = bars.bar(
        list(sizes), [size / 2**20 for size in sizes.values()], color=["tab:gray", "tab:blue", "tab:orange"]
    )
    bars.bar_label(drawn, fmt="%.2f")
    bars.set(title="largest tensor in the loss layer, MiB")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
