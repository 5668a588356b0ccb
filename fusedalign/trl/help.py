"""The texts of `fusedalign METHOD --help` and `fusedalign score --help`."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from fusedalign.commandline import fit, one_line, terminal_width
from fusedalign.methods import METHODS
from fusedalign.sources import Field
from fusedalign.trl.fields import score_fields, training_fields

_USUAL = (
    "model_name_or_path", "dtype", "dataset_name", "dataset_train_split", "dataset_test_split", "output_dir",
    "overwrite_output_dir", "resume_from_checkpoint",
    "max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "num_train_epochs",
    "max_steps", "warmup_steps", "lr_scheduler_type", "bf16", "gradient_checkpointing", "logging_steps",
    "eval_strategy", "save_strategy", "report_to", "seed", "use_peft", "lora_r", "lora_alpha", "lora_target_modules",
    "load_in_4bit",
)  # fmt: skip
_USUAL_OF_SCORE = (
    "model_name_or_path", "adapter", "dataset_name", "dataset_config", "dataset_train_split", "out", "ref_model",
    "beta", "max_length", "truncation_mode", "stride", "completion_only_loss", "assistant_only_loss",
    "dataset_text_field", "max_tokens_per_batch", "per_token", "strict", "dtype", "load_in_4bit", "load_in_8bit",
    "trust_remote_code", "fused_impl", "fused_packed", "accelerate_config",
)  # fmt: skip
#: Columns below which a flag has a line of its own.
_NARROW = 80
#: Our own help for fields that take more values than TRL documents.
_HELP = {"resume_from_checkpoint": "last: go on from the latest checkpoint in output_dir; or a checkpoint's folder"}
_SCORE = """\
usage: fusedalign score --model_name_or_path M --dataset_name D --out scores.parquet
                        [--config FILE] [--field VALUE ...]
       fusedalign score --ref_cache ref.parquet --method dpo --config dpo [--field VALUE ...]

Log-probabilities of a data set under a model: pairs (chosen, rejected), \
prompts with completions, conversations (messages), or plain text (text); \
tokens and truncation are those of TRL's trainers. An interrupted run continues when the same command is \
repeated. Rows that cannot be scored are listed in scores.refused.jsonl. Under `torchrun` or `accelerate \
launch` the processes share the work.

With --ref_cache: the reference log-probabilities of a DPO or KTO training, from the arguments of that training, \
which then needs --ref_logps ref.parquet and no reference model.

usual flags:"""


def help_text(method: str, *, everything: bool = False) -> str:
    """The text of `fusedalign METHOD --help`: the usual flags and the method's own; or all of several hundred."""
    fields, row = training_fields(method), METHODS[method]
    columns = " or ".join("+".join(choice) for choice in row.columns)
    parts = [
        f"usage: fusedalign {method} --config {method} [--field VALUE ...]",
        f"{row.about[0].upper()}{row.about[1:]}; data with the columns {columns}. --config takes a YAML file, or the "
        "name of a recipe that `fusedalign recipes` lists. Flags win over the file; both have the same names.",
    ]
    current = [name for name in fields.own if not fields.every[name].help.startswith("Deprecated")]
    groups = {
        "usual fields": _USUAL,
        f"{row.config}'s other fields": [name for name in current if name not in _USUAL],
        "fusedalign's other fields": [name for name in fields.ours if name not in _USUAL],
    }
    if everything:
        listed = {name for names in groups.values() for name in names}
        groups["other fields of TRL and transformers"] = [name for name in fields.every if name not in listed]
    for title, names in groups.items():
        parts.append(
            "\n".join([f"{title}:", *(help_line(fields.every[name]) for name in names if name in fields.every)])
        )
    if not everything:
        parts.append(
            f"fusedalign {method} --help_all lists the other fields of TRL's and transformers' configurations."
        )
    parts.append("Flags of accelerate launch, such as --num_processes 2, are passed on to it.")
    return fit("\n\n".join(parts), terminal_width())


def score_help() -> str:
    """The text of `fusedalign score --help`."""
    fields = score_fields()
    lines = [_SCORE, *(help_line(fields.every[name]) for name in _USUAL_OF_SCORE)]
    return fit("\n".join(lines), terminal_width())


def help_line(field: Field) -> str:
    """A flag with its meaning and default, in two columns, or below each other on a narrow terminal."""
    text = one_line(_HELP.get(field.name, field.help)).replace("%%", "%").replace("`", "")
    text = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text)  # links
    text = re.split(r"(?<=[a-z)\]])\. ", text)[0].rstrip(".")
    is_off = field.default is False or field.default in (None, "", [], {})
    default = "" if is_off else f"; default: {_value(field.default)}"
    body = textwrap.shorten(text, 150, placeholder=" ...") + default
    width, flag = terminal_width(), f"  --{field.name:<30} "
    if width < _NARROW:
        return "\n".join([flag.rstrip(), textwrap.fill(body, width, initial_indent=" " * 6, subsequent_indent=" " * 6)])
    return textwrap.fill(body, width, initial_indent=flag, subsequent_indent=" " * len(flag))


def _value(default: Any) -> str:
    """A default as it is written on the command line."""
    if isinstance(default, bool):
        return str(default).lower()
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)
