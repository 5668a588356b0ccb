"""Builds, runs and measures one training in this process."""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from fusedalign.bench.failures import in_short
from fusedalign.bench.measure import covered, spans, synchronize
from fusedalign.bench.training.data import examples, tokenizer
from fusedalign.bench.training.quiet import quiet
from fusedalign.bench.training.settings import MAX_LENGTH, SIDES, SIZES, TRAININGS, Job, Measured, Side


def measure(job: Job) -> Measured:
    """Run the training of a job; an exception becomes the reason why there are no figures."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        try:
            trainer, tokens = build(job, folder)
            stopwatch = _stopwatch(job, _embeddings(trainer))
            trainer.add_callback(stopwatch)
            trainer.train()
        except Exception as error:  # continue with the other rows
            return Measured(reason=in_short(error))
    losses = tuple(row["loss"] for row in trainer.state.log_history if "loss" in row)
    seconds = getattr(trainer, "precompute_seconds", None)
    steps = len(stopwatch.ms)
    figures = stopwatch.gpu_figures | {"precompute_seconds": seconds}
    return _of_ranks(Measured(tuple(stopwatch.ms), tuple(tokens[:steps]), tuple(stopwatch.slots), losses, **figures))


def _of_ranks(measured: Measured) -> Measured:
    """The figures of all ranks from those of this one: the largest peaks, and the sum of slots."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return measured
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, measured)

    def largest(name: str) -> int | None:
        return max((getattr(x, name) or 0 for x in ranks), default=0) or None

    return dataclasses.replace(
        measured,
        slots=tuple(map(sum, zip(*(x.slots for x in ranks), strict=True))),
        peak_bytes=largest("peak_bytes"),
        pass_bytes=largest("pass_bytes"),
    )


def build(job: Job, folder: str) -> tuple[Any, list[int]]:
    """The trainer of a job, with `folder` as its output directory, and the number of tokens of each step."""
    import datasets

    from fusedalign.trl.arguments import trl_class

    training, side, cuda = TRAININGS[job.training], SIDES[job.side], job.device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    rows, tokens = examples(job)
    args = trl_class(f"{training.trainer}Config")(
        output_dir=folder,
        max_steps=job.all_steps,
        per_device_train_batch_size=job.batch,
        train_sampling_strategy="sequential",  # so that the rows of each step are known
        max_length=MAX_LENGTH,
        gradient_checkpointing=True,
        learning_rate=1e-6,
        bf16=cuda,
        use_cpu=not cuda,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=training.trainer not in ("CPO", "ORPO"),
        **({"precompute_ref_log_probs": True} if side.precomputed else {}),
        **training.config,
    )
    options = {"impl": job.impl, "packed": side.packed} | ({"liger_kernels": True} if side.liger else {})
    trainer = _trainer_class(training.trainer, side)(
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(job),
        **_models(job),
        **(options if side.fused else {}),
    )
    return trainer, tokens


def _models(job: Job) -> dict[str, Any]:
    """The model and its adapter or reference, as keywords of a trainer."""
    import transformers

    training, side = TRAININGS[job.training], SIDES[job.side]
    dtype = torch.bfloat16 if job.device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(job.device):
        config = transformers.Qwen3Config(**SIZES[job.size].config)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    models = {"model": model}
    if training.has_reference and not training.lora and not side.precomputed:
        models["ref_model"] = copy.deepcopy(model)
    if side.liger and not side.fused:
        for module in models.values():  # use_liger_kernel of TRL's configurations does not change the reference
            _apply_liger(module)
    if training.lora:
        import peft

        models["peft_config"] = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return models


def _apply_liger(model: Any) -> None:
    """Replace layers of one model by Liger's kernels, through its public function, but not the loss."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3

    on, off = ("rope", "rms_norm", "swiglu"), ("cross_entropy", "fused_linear_cross_entropy")
    apply_liger_kernel_to_qwen3(model=model, **dict.fromkeys(on, True), **dict.fromkeys(off, False))


def _trainer_class(name: str, side: Side) -> Any:
    """TRL's class or ours; for a precomputed reference a subclass that measures its time."""
    import fusedalign.trl
    from fusedalign.trl.arguments import trl_class

    cls: Any = getattr(fusedalign.trl, f"Fused{name}Trainer") if side.fused else trl_class(f"{name}Trainer")
    if not side.precomputed:
        return cls

    def precompute(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return cls._precompute_ref_logps(self, *args, **kwargs)
        finally:
            self.precompute_seconds = time.perf_counter() - start

    return type(cls.__name__, (cls,), {"_precompute_ref_logps": precompute})


def _embeddings(trainer: Any) -> list[Any]:
    """The input embeddings of the model and of its reference, which see every token position of a forward."""
    models = [trainer.model, getattr(trainer, "ref_model", None)]
    return [trainer.accelerator.unwrap_model(model).get_input_embeddings() for model in models if model is not None]


def _stopwatch(job: Job, embeddings: list[Any]) -> Any:
    import transformers

    class Stopwatch(transformers.TrainerCallback):
        """Records time and slots of each step, peak memory after the first, and a profile of the last."""

        def __init__(self) -> None:
            self.ms: list[float] = []
            self.slots: list[int] = []
            self.gpu_figures: dict[str, Any] = {}
            self.peak = self.pass_peak = self.allocated = self.step_slots = 0
            self.profiler: profile | None = None
            for embedding in embeddings:
                embedding.register_forward_pre_hook(self.count)

        def count(self, module: Any, args: tuple[Any, ...]) -> None:
            self.step_slots += args[0].numel()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start_of_step()

        def start_of_step(self) -> None:
            synchronize(job.device)
            self.step_slots, self.start = 0, time.perf_counter()

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if job.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                self.allocated = torch.cuda.memory_allocated()
                if state.global_step == job.all_steps - 1:
                    self.profiler = profile(activities=[ProfilerActivity.CUDA])
                    self.profiler.start()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if job.device == "cuda" and state.global_step:
                self.pass_peak = max(self.pass_peak, torch.cuda.max_memory_allocated() - self.allocated)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize(job.device)
            if state.global_step < job.all_steps:
                self.ms.append((time.perf_counter() - self.start) * 1e3)
                self.slots.append(self.step_slots)
            if job.device == "cuda" and state.global_step > 1:
                self.peak = max(self.peak, torch.cuda.max_memory_allocated())
            if self.profiler is not None:
                self.profiler.stop()
                busy = covered(spans(self.profiler, job.device)) / 1e3
                self.gpu_figures = {"gpu_ms": busy, "peak_bytes": self.peak, "pass_bytes": self.pass_peak}
            self.start_of_step()

    return Stopwatch()
