"""What `fusedalign sft`, `dpo`, `kto`, `cpo`, `simpo`, `orpo` do: build the Fused trainer, train, save."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

import fusedalign.trl
from fusedalign.trl.arguments import METHODS, Arguments, parse, trl_class
from fusedalign.trl.attachment import attach
from fusedalign.trl.data import load_data
from fusedalign.trl.models import check_has_head, model_path
from fusedalign.trl.record import MetricsFile, Written, plot_metrics
from fusedalign.trl.reference import keyed


def build(method: str, arguments: Arguments, *, fused: bool = True) -> Any:
    """The trainer on the model and data that `arguments` name: the Fused one, or stock TRL's with nothing attached.

    Raises:
        ValueError: no model or data named, a data set without the split or columns, a model without an LM head.
        FileNotFoundError: a folder without a model.
    """
    script, training, model, *_ = arguments
    train_dataset, eval_dataset = load_data(method, arguments)
    path = model_path(model.model_name_or_path, training)
    check_has_head(path, model, training)
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": getattr(training, "trust_remote_code", False),
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    name = METHODS[method].trainer
    more = {"quantization_config": trl.get_quantization_config(model)}
    if METHODS[method].experimental:
        # There these trainers leave all to the model's arguments, and would spread it over devices.
        training.model_init_kwargs |= {"device_map": None, **more}
        # They pad with what the tokenizer pads with before they have seen to it that it does.
        remote = {"revision": model.model_revision, "trust_remote_code": training.trust_remote_code}
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **remote)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        more = {"processing_class": tokenizer}  # type: ignore[dict-item]
    cls = getattr(fusedalign.trl, f"Fused{name}") if fused else keyed(trl_class(name))
    trainer = cls(
        model=path,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=trl.get_peft_config(model),
        **more,
        **(arguments.fused.head if fused else {}),
    )
    if script.ignore_bias_buffers:  # DDP cannot broadcast boolean buffers
        buffers = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = buffers
    return trainer


def run(trainer: Any) -> Written:
    """Train, then save model, metrics and plot into the trainer's output directory."""
    output = Path(trainer.args.output_dir)
    written = Written(output, output / "metrics.jsonl", output / "metrics.png")
    trainer.add_callback(MetricsFile(written.metrics))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        plot_metrics(trainer.state.log_history, written.plot)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return written


def train(method: str, argv: Sequence[str]) -> tuple[Any, Written]:
    """The whole command: parse, build, run. Returns the trainer and what was written."""
    arguments = parse(method, argv)
    if _sharded(arguments.training) and not METHODS[method].experimental:  # TRL's own forward gathers the head
        trainer = attach(build(method, arguments, fused=False), **arguments.fused.head)
    else:
        trainer = build(method, arguments)
    return trainer, run(trainer)


def _sharded(training: Any) -> bool:
    return bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def tokenizer_of(trainer: Any) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer, also where the processing class is a processor that holds one."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
