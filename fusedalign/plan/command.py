"""The command `fusedalign plan`: its arguments, and the step that they describe."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fusedalign.commandline import CommandParser
from fusedalign.methods import WITH_REFERENCE
from fusedalign.plan.advice import LORA_R
from fusedalign.plan.shape import DEFAULT_OPTIMISER, ITEM, METHODS, OPTIMISERS, Step
from fusedalign.reports import to_json, warn

WORD = "plan"
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_MINIMA = {"batch": 1, "length": 2, "prompt": 0, "lora_r": 1, "accumulation": 1, "tokens": 1}


def plan_command(argv: Sequence[str]) -> None:
    """Run `fusedalign plan`. Raises ValueError, one line, for bad arguments or a model that cannot be planned."""
    options = _parser().parse(argv)
    if options is None:
        return
    if options.model_name_or_path is None:
        raise ValueError(
            f"{WORD} needs --model_name_or_path: a folder with a config.json, a name of the Hub, or embedded"
        )
    from fusedalign.plan.model import Shapes, read_config  # these import torch
    from fusedalign.plan.plan import plan
    from fusedalign.plan.table import render

    step = step_of(options)
    memory = None if options.memory is None else parse_memory(options.memory)
    config = read_config(options.model_name_or_path)
    if getattr(config, "quantization_config", None) is not None:
        warn(
            f"{options.model_name_or_path} has a quantization_config, which is left out: weights are {step.dtype} here"
        )
    result = plan(Shapes(config, options.model_name_or_path), step, memory)
    print(to_json(asdict(result), indent=1) if options.json else render(result))


def step_of(options: argparse.Namespace) -> Step:
    """The step that the arguments describe. Raises ValueError for a number out of range."""
    for name, minimum in _MINIMA.items():
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{name} must be at least {minimum}, got {value}")
    if options.prompt >= options.length:
        raise ValueError(f"--prompt must be below --length {options.length}, got {options.prompt}")
    if options.precompute_ref_log_probs and options.method not in WITH_REFERENCE:
        methods = ", ".join(WITH_REFERENCE)
        raise ValueError(
            f"--precompute_ref_log_probs needs a method with a reference ({methods}), got {options.method}"
        )
    step = Step(
        **{name: getattr(options, name) for name in ("method", "dtype", *_MINIMA) if name != "lora_r"},
        lora_r=options.lora_r or (LORA_R if options.lora else 0),
        checkpointing=options.gradient_checkpointing == "true",
        precomputed=options.precompute_ref_log_probs,
        optimiser=options.optim,
    )
    if options.tokens is not None and options.tokens > step.padded:
        raise ValueError(f"--tokens must be at most the {step.padded:,} of full rows, got {options.tokens:,}")
    return step


def parse_memory(text: str) -> int:
    """The bytes of a size such as 24GiB, 24GB, 80G or 25769803776. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(iB|B|b|ib)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"--memory must be a number with a unit, such as 24GiB or 80GB, got {text!r}")
    number, prefix, unit = match.groups()
    base = 1024 if unit is None or unit.lower() == "ib" else 1000
    size = int(float(number) * base ** _UNITS[prefix.upper()])
    if size < 2**20:
        raise ValueError(f"--memory must be at least 1MiB, got {text!r}")
    return size


def _parser() -> CommandParser:
    default = Step()
    parser = CommandParser(
        f"fusedalign {WORD}",
        "Predicts the peak memory of a training step on one GPU from a model's configuration; no weights are loaded. "
        "Each line is a component with its formula: docs/plan.md.",
        epilog="example: fusedalign plan --model_name_or_path Qwen/Qwen3-1.7B --method dpo --batch 8 --length 4096 "
        "--memory 24GiB",
    )

    def add(name: str, about: str, default: Any = None, **options: Any) -> None:
        text = about if default is None else f"{about}; default: {default}"
        if "action" not in options:
            options["default"] = default
        parser.add_argument(name, help=text, **options)

    add("--model_name_or_path", "a folder with a config.json, a name of the Hub, or embedded", metavar="M")
    add("--method", "the training method", default.method, choices=METHODS)
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    add("--batch", "rows, or pairs, per micro-batch", default.batch, **number)
    add("--length", "tokens per row, prompt and answer", default.length, **number)
    add("--prompt", "tokens of the prompt among them: no loss, packed once per pair", default.prompt, **number)
    add("--tokens", "tokens of the packed batch, if rows are shorter; default: all rows full", **number)
    add("--accumulation", "micro-batches per step", default.accumulation, **number)
    add("--dtype", "of the weights; matrix products are in bf16", default.dtype, choices=tuple(ITEM))
    add("--lora", f"train LoRA on all linear layers, r={LORA_R}", action="store_true")
    add("--lora_r", "the same with another rank", type=int, metavar="R")
    add(
        "--gradient_checkpointing",
        "of the planned step; the peaks of both are shown",
        "true",
        choices=("true", "false"),
    )
    add("--precompute_ref_log_probs", "train without a reference model in memory (dpo, kto)", action="store_true")
    add("--optim", "the optimiser, by its name in transformers", DEFAULT_OPTIMISER, choices=tuple(OPTIMISERS))
    add("--memory", "of the GPU, such as 24GiB: whether the step fits, and which change saves most", metavar="SIZE")
    add("--json", "print JSON", action="store_true")
    return parser
