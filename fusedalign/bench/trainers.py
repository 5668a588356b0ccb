"""`fusedalign bench trl`: whole training steps, stock TRL beside the Fused trainers, in one run and one table.

The model is built on the device from a configuration, the data of random words on the spot: nothing is loaded or saved.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fusedalign.bench.measure import covered, spans, synchronize
from fusedalign.bench.runner import OUT_OF_MEMORY, free, in_short, machine
from fusedalign.bench.table import aligned

_WARM_UP = 2  # steps: kernels compile, the optimizer makes its state
_PROFILED = 1  # after those that are measured


@dataclass(frozen=True)
class Training:
    """A row of the table: a trainer and how it trains."""

    trainer: str
    """without "Trainer" """
    about: str
    pairs: bool = True
    """whether an example is two sequences"""
    lora: bool = False
    config: dict[str, Any] = field(default_factory=dict)


TRAININGS = {
    "sft": Training("SFT", "SFT", pairs=False),
    "dpo-lora": Training("DPO", "DPO with LoRA", lora=True),
    "dpo": Training("DPO", "DPO, all weights"),
    "orpo": Training("ORPO", "ORPO", config={"max_completion_length": None}),
    "simpo": Training("CPO", "SimPO", config={"loss_type": "simpo", "cpo_alpha": 0.0}),
    "kto": Training("KTO", "KTO", pairs=False),
}
DEFAULT = ("sft", "dpo-lora", "dpo", "orpo")


@dataclass(frozen=True)
class Size:
    """The model, after Qwen3, and a batch."""

    name: str
    config: dict[str, Any]
    sequences: int
    length: int
    """tokens a sequence, of which half are the prompt"""


_COMMON = {"tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
QWEN3 = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TINY = {
    "vocab_size": 997,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
SIZES = {
    "cuda": Size("Qwen3-0.6B from its configuration", QWEN3 | _COMMON, 8, 2048),
    "cpu": Size("a tiny Qwen3 from its configuration", TINY | _COMMON, 4, 32),
}


@dataclass(frozen=True)
class Measured:
    """What one training took."""

    ms: tuple[float, ...] = ()
    """of each step"""
    gpu_ms: tuple[float, ...] = ()
    """of each profiled step: while the GPU did something. What is missing to `ms` it waited for the CPU"""
    peak_bytes: int | None = None
    """of the device, model and optimizer included; None on a CPU, like the next"""
    pass_bytes: int | None = None
    """the peak of forward and backward over what is held between steps, gradients included"""
    losses: tuple[float, ...] = ()
    """of each step"""
    reason: str = ""
    """why there is nothing else"""

    @property
    def step_ms(self) -> float | None:
        """The median."""
        return statistics.median(self.ms) if self.ms else None

    @property
    def busy_ms(self) -> float | None:
        """Likewise of the GPU; None on a CPU."""
        return statistics.median(self.gpu_ms) if self.gpu_ms else None

    def with_another(self, other: Measured) -> Measured:
        """Of two runs of the same training: all steps, and the higher peaks."""
        return Measured(
            self.ms + other.ms,
            self.gpu_ms + other.gpu_ms,
            max((x for x in (self.peak_bytes, other.peak_bytes) if x is not None), default=None),
            max((x for x in (self.pass_bytes, other.pass_bytes) if x is not None), default=None),
            self.losses or other.losses,
            self.reason or other.reason,
        )


def run(
    names: list[str], size: Size, steps: int, impl: str, device: str, progress: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[Training, Measured, Measured]]:
    """Each training with stock TRL and with its Fused trainer, both twice; one that fails has a reason, no figures."""
    for name in names:
        training = TRAININGS[name]
        measured = {False: Measured(), True: Measured()}
        for fused in (False, True, True, False):  # so that neither has the better place, on a card that warms up
            progress(f"{training.about}: {'fusedalign' if fused else 'stock TRL'}")
            measured[fused] = measured[fused].with_another(_measure(training, size, steps, impl, device, fused))
            free(device)
        yield training, measured[False], measured[True]


def table(rows: list[tuple[Training, Measured, Measured]], size: Size, steps: int, impl: str, device: str) -> str:
    """Markdown: the machine, the setting, a line a training, and why some failed."""
    where = ", ".join(x if name == "device" else f"{name} {x}" for name, x in machine(device).items())
    precision = "bf16 weights, mixed precision" if size is SIZES["cuda"] else "fp32"
    head = [
        where,
        f"{size.name}, {size.sequences} x {size.length} tokens a step, half of them prompt, {precision}, gradient",
        f"checkpointing; median of two runs of {steps} steps after {_WARM_UP}; impl {impl}",
        "GPU ms: how long the GPU worked in one more step, which was profiled; the rest of a step it waits for the CPU",
        "passes: the peak of forward and backward over what is held between steps; peak: of all, in GiB",
        "",
    ]
    times, memory = ["TRL ms", "fusedalign ms", "faster by", "TRL GPU ms", "fusedalign GPU ms"], []
    for what in ("passes", "peak"):
        memory += [f"TRL {what}", f"fusedalign {what}", "smaller by"]
    titles = ["training", *times, *memory, "loss differs by"]
    failed = failures(rows)
    notes = ["", *(f"{name}: {reason}" for name, reason in failed)] if failed else []
    return "\n".join([*head, *aligned([titles, *(_cells(*row) for row in rows)]), *notes])


def failures(rows: list[tuple[Training, Measured, Measured]]) -> list[tuple[str, str]]:
    """Which trainings failed, and why; to run out of memory is a result and no failure."""
    named = [(f"{x.about}, {who}", m) for x, *both in rows for who, m in zip(("TRL", "fusedalign"), both, strict=True)]
    return [(name, measured.reason) for name, measured in named if measured.reason not in ("", OUT_OF_MEMORY)]


def _cells(training: Training, stock: Measured, ours: Measured) -> list[str]:
    def number(x: float | None, unit: float = 1.0) -> str:
        return "-" if x is None else f"{x / unit:.4g}"

    def milliseconds(measured: Measured) -> str:
        if measured.reason:
            return OUT_OF_MEMORY if measured.reason == OUT_OF_MEMORY else "failed"
        return number(measured.step_ms)

    def ratio(a: float | None, b: float | None) -> str:
        return "-" if a is None or b is None else f"{a / b:.2f}"

    differences = [abs(a - b) / abs(a) for a, b in zip(stock.losses, ours.losses, strict=False) if a]
    differs = max(differences, key=lambda x: (math.isnan(x), x), default=None)  # one NaN is the largest of all
    gib = 2.0**30
    return [
        training.about,
        milliseconds(stock),
        milliseconds(ours),
        ratio(stock.step_ms, ours.step_ms),
        number(stock.busy_ms),
        number(ours.busy_ms),
        number(stock.pass_bytes, gib),
        number(ours.pass_bytes, gib),
        ratio(stock.pass_bytes, ours.pass_bytes),
        number(stock.peak_bytes, gib),
        number(ours.peak_bytes, gib),
        ratio(stock.peak_bytes, ours.peak_bytes),
        "-" if differs is None else f"{differs:.1e}",
    ]


def _measure(training: Training, size: Size, steps: int, impl: str, device: str, fused: bool) -> Measured:
    with tempfile.TemporaryDirectory() as folder, quiet():
        try:
            trainer = _trainer(training, size, steps, impl, device, fused, folder)
            stopwatch = _stopwatch(device, steps)
            trainer.add_callback(stopwatch)
            trainer.train()
        except Exception as error:  # the other trainings must go on
            return Measured(reason=in_short(error))
    losses = tuple(row["loss"] for row in trainer.state.log_history if "loss" in row)
    made = Measured(tuple(stopwatch.ms), losses=losses)
    if device != "cuda":
        return made
    more = {"gpu_ms": (stopwatch.gpu_ms,), "peak_bytes": stopwatch.peak, "pass_bytes": stopwatch.of_passes}
    return dataclasses.replace(made, **more)


def _stopwatch(device: str, steps: int) -> Any:
    import transformers

    class Stopwatch(transformers.TrainerCallback):
        """Times of the measured steps, from the batch to the optimizer's end; peaks of memory; a profile."""

        def __init__(self) -> None:
            self.ms: list[float] = []
            self.start, self.held, self.peak, self.of_passes, self.gpu_ms = 0.0, 0, 0, 0, 0.0
            self.measures = False
            self.profiler: profile | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize(device)
            self.measures = _WARM_UP <= state.global_step < _WARM_UP + steps
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                self.held = torch.cuda.memory_allocated()
                if state.global_step == _WARM_UP + steps:
                    self.profiler = profile(activities=[ProfilerActivity.CUDA])
                    self.profiler.start()
            self.start = time.perf_counter()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            if device == "cuda" and self.measures:
                self.of_passes = max(self.of_passes, torch.cuda.max_memory_allocated() - self.held)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize(device)
            if self.measures:
                self.ms.append((time.perf_counter() - self.start) * 1e3)
                self.peak = max(self.peak, torch.cuda.max_memory_allocated()) if device == "cuda" else 0
            if self.profiler is not None:
                self.profiler.stop()
                self.gpu_ms = covered(spans(self.profiler, device)) / 1e3

    return Stopwatch()


def _trainer(training: Training, size: Size, steps: int, impl: str, device: str, fused: bool, folder: str) -> Any:
    import transformers

    import fusedalign.trl
    from fusedalign.trl.arguments import trl_class

    cuda = device == "cuda"
    torch.manual_seed(0)
    with torch.device(device):
        config = transformers.Qwen3Config(**size.config, max_position_embeddings=2 * size.length)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
    batch = size.sequences // 2 if training.pairs else size.sequences
    args = trl_class(f"{training.trainer}Config")(
        output_dir=folder,
        max_steps=_WARM_UP + steps + _PROFILED,
        per_device_train_batch_size=batch,
        max_length=size.length,
        gradient_checkpointing=True,
        learning_rate=1e-6,
        bf16=cuda,
        use_cpu=not cuda,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=training.trainer not in ("CPO", "ORPO"),
        **training.config,
    )
    more: dict[str, Any] = {"impl": impl} if fused else {}
    if training.lora:
        import peft

        more["peft_config"] = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    elif training.trainer in ("DPO", "KTO"):
        more["ref_model"] = copy.deepcopy(model)
    cls = (
        getattr(fusedalign.trl, f"Fused{training.trainer}Trainer") if fused else trl_class(f"{training.trainer}Trainer")
    )
    data = _data(training, size, batch * (_WARM_UP + steps + _PROFILED))
    return cls(model=model, args=args, train_dataset=data, processing_class=_tokenizer(size), **more)


def _tokenizer(size: Size) -> Any:
    """Words w3, w4, ... as tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size.config["vocab_size"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=size.length
    )


def _data(training: Training, size: Size, rows: int) -> Any:
    """Random words, all prompts and completions as long as one another."""
    from datasets import Dataset

    half, random = size.length // 2, torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        words = torch.randint(3, size.config["vocab_size"], (length,), generator=random)
        return " ".join(f"w{word}" for word in words.tolist())

    def row(i: int) -> dict[str, Any]:
        prompt, answer = text(half), " " + text(half - 1)  # and the end of the sequence
        if training.pairs:
            return {"prompt": prompt, "chosen": answer, "rejected": " " + text(half - 1)}
        return {"prompt": prompt, "completion": answer} | ({"label": i % 2 == 0} if training.trainer == "KTO" else {})

    return Dataset.from_list([row(i) for i in range(rows)])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the trainers' own lines and bars."""
    from datasets.utils import logging as datasets_logging
    from transformers.utils import logging as transformers_logging

    datasets_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
