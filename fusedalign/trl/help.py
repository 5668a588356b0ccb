"""The text of `fusedalign METHOD --help`."""

from __future__ import annotations

import re
import textwrap
from dataclasses import fields
from typing import Any

import transformers

from fusedalign.methods import METHODS
from fusedalign.trl.arguments import FusedArguments, method_parser, trl_class

_USUAL = (
    "model_name_or_path", "dtype", "dataset_name", "dataset_train_split", "dataset_test_split", "output_dir",
    "overwrite_output_dir", "resume_from_checkpoint",
    "max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "num_train_epochs",
    "max_steps", "warmup_steps", "lr_scheduler_type", "bf16", "gradient_checkpointing", "logging_steps",
    "eval_strategy", "save_strategy", "report_to", "seed", "use_peft", "lora_r", "lora_alpha", "lora_target_modules",
    "load_in_4bit",
)  # fmt: skip
#: Our own help for fields that take more values than TRL documents.
_HELP = {"resume_from_checkpoint": "last: go on from the latest checkpoint in output_dir; or a checkpoint's folder"}


def help_text(method: str, *, everything: bool = False) -> str:
    """The text of `fusedalign METHOD --help`: the usual flags and the method's own; or all of several hundred."""
    parser, row = method_parser(method), METHODS[method]
    if everything:
        return parser.format_help()
    actions = {action.dest: action for action in parser._actions}
    config = trl_class(row.config)
    inherited = {f.name for f in fields(transformers.TrainingArguments)} | set(_USUAL)
    own = [f.name for f in fields(config) if f.name not in inherited and f.name in actions]
    columns = " or ".join("+".join(choice) for choice in row.columns)
    parts = [
        f"fusedalign {method}: {row.about}",
        f"usage: fusedalign {method} --config recipes/{method}.yaml [--field VALUE ...]",
        textwrap.fill(f"Data with the columns {columns}. Flags win over the file; both have the same names.", 112),
    ]
    groups = {
        "The usual": _USUAL,
        f"{row.config}'s own": own,
        "fusedalign's own": [f.name for f in fields(FusedArguments) if f.name not in _USUAL],
    }
    for title, names in groups.items():
        parts.append("\n".join([f"{title}:", *(help_line(actions[name]) for name in names if name in actions)]))
    parts.append(
        f"fusedalign {method} --help_all lists the other fields of TRL's and transformers' configurations.\n"
        "Flags of accelerate launch, such as --num_processes 2, are passed on to it."
    )
    return "\n\n".join(parts)


def help_line(action: Any) -> str:
    """A flag with its meaning and default, on lines of 112 characters."""
    text = re.sub(r"\s+", " ", _HELP.get(action.dest, action.help) or "").replace("%%", "%").replace("`", "")
    text = re.split(r"(?<=[a-z)\]])\. ", text)[0].rstrip(".")
    default = "" if action.default in (None, "==SUPPRESS==", []) else f" [{action.default}]"
    body = textwrap.shorten(text, 150, placeholder=" ...") + default
    return textwrap.fill(body, 112, initial_indent=f"  --{action.dest:<30} ", subsequent_indent=" " * 35)
