"""What was decided for a run, as lines of a name and a text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fusedalign.check.batches import Slots
from fusedalign.check.weightless import Sample, layout_refusal
from fusedalign.trl.description import decisions, reference_source
from fusedalign.trl.layouts import PACKED
from fusedalign.trl.options import mixed_precision


def describe(sample: Sample, slots: list[Slots], processes: int = 1) -> list[tuple[str, str]]:
    """The decisions of a run; `slots` are of its first batches, `processes` of a launch."""
    trainer, args = sample.trainer, sample.trainer.args
    decided = decisions(trainer)
    parameters = decided["parameters"]
    reference = reference_source(sample.method, sample.arguments, trainer)
    return [
        ("method", _method(sample)),
        ("model", f"{decided['model_class']}, {parameters['all']:,} parameters in {decided['dtype']}"),
        ("trains", _trained(sample, parameters["trained"])),
        *([("reference", reference)] if reference else []),
        ("head", _head(trainer, decided["impl"])),
        ("batches", _batches(sample)),
        ("Liger kernels", "RMSNorm, RoPE and MLP" if trainer.liger_kernels else "no (liger_kernels: true on a GPU)"),
        ("precision", f"{_precision(trainer)}, on {args.device}"),
        ("steps", _steps(sample, slots, processes)),
        ("evaluation", _evaluation(sample)),
        ("output", f"{sample.output}, checkpoints: {_word(args.save_strategy)}"),
    ]


def _method(sample: Sample) -> str:
    args = sample.trainer.args
    loss = getattr(args, "loss_type", None)
    loss = " + ".join(loss) if isinstance(loss, list) else loss
    numbers = [f"{name} {getattr(args, name)}" for name in ("beta", "simpo_gamma", "cpo_alpha") if hasattr(args, name)]
    return ", ".join([f"{sample.method} ({type(sample.trainer).__name__})", *filter(None, [loss]), *numbers])


def _trained(sample: Sample, parameters: int) -> str:
    trainer = sample.trainer
    adapters = getattr(trainer.model, "peft_config", None)
    if not adapters:
        return "all weights"
    config = adapters[trainer.model.active_adapter]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    rank = f" of rank {config.r}" if hasattr(config, "r") else ""
    origin = "a new adapter" if sample.arguments.model.use_peft else "the adapter that the model's folder holds"
    return f"{origin}, {kind}{rank}: {parameters:,} parameters"


def _head(trainer: Any, impl: Mapping[str, str | None]) -> str:
    if not trainer._heads:
        return "TRL's own path, with logits: the model is an encoder-decoder"
    eps = trainer.head_options.filter_eps
    exact = "" if eps is None else f", gradients below {eps} may be dropped"
    return f"{impl['serving']} on {trainer.args.device.type} (fused_impl: {impl['option']}){exact}"


def _batches(sample: Sample) -> str:
    trainer, packed = sample.trainer, sample.arguments.fused.packed
    text = str(trainer.layouts).removeprefix("batches: ")
    if packed is False or trainer.layouts.kind == PACKED or trainer.accelerator.device.type == "cuda":
        return text
    reason = layout_refusal(trainer)
    if reason is not None and reason in text:
        return text
    there = "packed, if the proof at the start agrees" if reason is None else f"not packed, {reason}"
    return f"{text}; on a GPU: {there}"


def _precision(trainer: Any) -> str:
    mixed = mixed_precision(trainer.args)
    return "full" if mixed is None else f"mixed, in {str(mixed).removeprefix('torch.')}"


def rows_of_epoch(sample: Sample) -> int | None:
    """Prepared rows of an epoch, estimated where the data were sampled; None: a stream."""
    if sample.total is None:
        return None
    share = len(sample.trainer.train_dataset) / max(1, len(sample.dataset))
    return round(share * sample.total)


def _steps(sample: Sample, slots: list[Slots], processes: int) -> str:
    args = sample.trainer.args
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    unit = "pairs" if sample.trainer.layouts.groups > 1 else "rows"
    factors = [(args.per_device_train_batch_size, "on a device"), (args.gradient_accumulation_steps, "micro-batches")]
    parts = [f"{count} {name}" for count, name in [*factors, (processes, "processes")] if count > 1]
    tokens = round(sum(x.tokens for x in slots) / max(1, len(slots)) * rows / args.per_device_train_batch_size)
    product = f" ({' x '.join(parts)})" if len(parts) > 1 else ""
    each = f"{rows} {unit}{product} and about {tokens:,} tokens a step"
    count = rows_of_epoch(sample)
    if count is None:
        return f"{args.max_steps:,} of a stream, {each}"
    batches = count / (args.per_device_train_batch_size * processes)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    if args.max_steps > 0:
        return f"{args.max_steps:,}, {args.max_steps / per_epoch:.2g} epochs; {each}"
    return (
        f"{math.ceil(args.num_train_epochs * per_epoch):,}, {args.num_train_epochs:g} epochs of {per_epoch:,}; {each}"
    )


def _evaluation(sample: Sample) -> str:
    strategy = _word(sample.trainer.args.eval_strategy)
    if sample.trainer.eval_dataset is None or strategy == "no":
        return "no"
    every = "each epoch" if strategy == "epoch" else f"every {sample.trainer.args.eval_steps:g} steps"
    return f"{every}, on the split {sample.arguments.script.dataset_test_split}"


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))
