"""What is recorded of a run: its command, configuration and machine, what was decided, and how far it has come."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusedalign.head import lm_head
from fusedalign.methods import WITH_REFERENCE
from fusedalign.provenance import commit, package_commit, versions
from fusedalign.trl.arguments import Arguments, method_parser, read_words
from fusedalign.trl.folder import RunFolder
from fusedalign.trl.forward import our_names
from fusedalign.trl.kernels import liger_parts
from fusedalign.trl.options import mixed_precision
from fusedalign.trl.refusals import unwrapped
from fusedalign.trl.steps import Throughput, peak_memory


def changed_fields(method: str, argv: Sequence[str]) -> list[str]:
    """The names of the fields that a command's flags and YAML file set to other values than the defaults."""
    defaults, values = (vars(read_words(method_parser(method), words).values) for words in ([], argv))
    return [name for name, value in values.items() if value != defaults[name]]


def describe(
    method: str, arguments: Arguments, changed: Sequence[str], trainer: Any, folder: RunFolder
) -> dict[str, Any]:
    """What is known of a run when its training starts; secrets are still in it."""
    groups = {name: _fields(group) for name, group in arguments._asdict().items()}
    resolved = {name: value for group in groups.values() for name, value in group.items()}
    checkpoint = folder.checkpoint
    return {
        "working_directory": os.getcwd(),
        "resumed_from": checkpoint and {"checkpoint": str(checkpoint.path), "step": checkpoint.step},
        "versions": versions(),
        "commits": {"fusedalign": package_commit(), "working_directory": commit(Path.cwd())},
        "machine": _machine(trainer),
        "decisions": {**decisions(trainer), "reference": reference_source(method, arguments, trainer)},
        "data": {"train_rows": _length(trainer.train_dataset), "eval_rows": _length(trainer.eval_dataset)},
        "changed": {name: resolved.get(name) for name in changed},
        "configuration": groups,
    }


def progress(trainer: Any, throughput: Throughput) -> dict[str, Any]:
    """How far a run has come: steps, the last value of each logged metric, time and memory."""
    history = trainer.state.log_history
    peak = peak_memory(trainer.args.device)
    return {
        "steps": trainer.state.global_step,
        "metrics": {name: value for row in history for name, value in row.items()},
        "tokens": throughput.tokens or None,
        "training_seconds": throughput.seconds,
        "tokens_per_second": throughput.mean_rate,
        "peak_memory_gib": peak,
    }


def _machine(trainer: Any) -> dict[str, Any]:
    device, state = trainer.args.device, trainer.accelerator.state
    on_cuda = device.type == "cuda"
    plugin = getattr(state, "fsdp_plugin", None)
    return {
        "device": str(device),
        "card": torch.cuda.get_device_name(device) if on_cuda else None,
        "card_memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if on_cuda else None,
        "cuda": torch.version.cuda,
        "processes": trainer.accelerator.num_processes,
        "engine": {
            "kind": str(trainer.accelerator.distributed_type.value),
            "fsdp_version": plugin and plugin.fsdp_version,
            "zero_stage": trainer.accelerator.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None,
        },
        "mixed_precision": trainer.accelerator.mixed_precision,
    }


def decisions(trainer: Any) -> dict[str, Any]:
    """What was decided while a trainer was built, as plain data."""
    policy = unwrapped(trainer, trainer.model)
    parameters = list(trainer.model.parameters())
    return {
        "trainer": type(trainer).__name__,
        "model_class": type(policy).__name__,
        "attention": getattr(policy.config, "_attn_implementation", None),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "parameters": {
            "all": sum(_size(x) for x in parameters),
            "trained": sum(_size(x) for x in parameters if x.requires_grad),
        },
        "impl": _impl(trainer, policy),
        "batches": {"layout": trainer.layouts.kind, "reason": trainer.layouts.reason},
        "liger_kernels": liger_parts(policy),
    }


def _impl(trainer: Any, policy: Any) -> dict[str, str | None]:
    """The impl that was asked for, and the one that serves the head.

    The latter is None for an encoder-decoder, which keeps TRL's head, and for "auto" under ZeRO-3, where no rank has
    the head's shape.
    """
    options, args, serving = trainer.head_options, trainer.args, None
    if trainer._heads and options.impl != "auto":
        serving = options.impl
    elif trainer._heads and not any(hasattr(x, "ds_id") for x in policy.parameters()):
        outputs = our_names(trainer._heads[0][1])
        serving = options.automatic(lm_head(policy), outputs, mixed=mixed_precision(args), device=args.device)
    return {"option": options.impl, "serving": serving}


def reference_source(method: str, arguments: Arguments, trainer: Any) -> str | None:
    """Where reference log-probabilities come from; None for a method without a reference."""
    if method not in WITH_REFERENCE:
        return None
    if arguments.fused.ref_logps is not None:
        return f"read from {arguments.fused.ref_logps}"
    if arguments.training.precompute_ref_log_probs:
        return "precomputed"
    if trainer.ref_model is not None:
        return "a second model in memory"
    copied = "ref" in getattr(trainer.model, "peft_config", {})
    return "a copy of the adapter on the same base model" if copied else "the same model with its adapter disabled"


def _fields(group: Any) -> dict[str, Any]:
    return {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}


def _size(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _length(dataset: Any) -> int | None:
    """The number of rows; None for a stream, or without data."""
    return len(dataset) if hasattr(dataset, "__len__") else None
