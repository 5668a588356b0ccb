"""What a method's command takes: TRL's own arguments and ours, from flags and a YAML file; its help."""

from __future__ import annotations

import difflib
import importlib
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import transformers
import trl
import yaml

from fusedalign.trl.options import HeadOptions


@dataclass(frozen=True)
class Method:
    """What a command trains with, and the data that it takes."""

    trainer: str
    """name of the class in `trl`"""
    config: str
    """name of the configuration class in `trl`"""
    columns: tuple[tuple[str, ...], ...]
    """sets of columns of which a data set must have one; the first that it has is used"""
    about: str
    defaults: dict[str, Any] = field(default_factory=dict)
    """of the configuration, where they are not TRL's"""

    @property
    def experimental(self) -> bool:
        """Whether the classes are those of `trl.experimental`."""
        return not hasattr(trl, self.trainer)


def trl_class(name: str) -> Any:
    """A trainer or configuration by its name: of `trl`, else of `trl.experimental`."""
    if hasattr(trl, name):
        return getattr(trl, name)
    with warnings.catch_warnings():  # of being experimental
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(f"trl.experimental.{re.sub('Trainer|Config', '', name).lower()}"), name)


_PAIRS = (("chosen", "rejected"),)
METHODS = {
    "sft": Method(
        "SFTTrainer",
        "SFTConfig",
        (("input_ids",), ("prompt", "completion"), ("messages",), ("conversations",), ("text",), ("chosen",)),
        "supervised fine-tuning",
    ),
    "dpo": Method("DPOTrainer", "DPOConfig", _PAIRS, "direct preference optimisation, fifteen losses"),
    "kto": Method(
        "KTOTrainer", "KTOConfig", (("prompt", "completion", "label"), *_PAIRS), "good and bad answers, unpaired"
    ),
    "cpo": Method("CPOTrainer", "CPOConfig", _PAIRS, "contrastive preference optimisation, no reference model"),
    "simpo": Method(
        "CPOTrainer",
        "CPOConfig",
        _PAIRS,
        "simple preference optimisation: CPO with the loss simpo and without its NLL; AlphaPO with --alpha",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
    ),
    "orpo": Method("ORPOTrainer", "ORPOConfig", _PAIRS, "SFT and an odds ratio at once, no reference model"),
}


@dataclass
class FusedArguments:
    """This package's own flags, in TRL's style."""

    fused_impl: str = field(
        default=HeadOptions().impl,
        metadata={"help": "The impl of the head: auto, or one that `fusedalign env` lists."},
    )
    fused_filter_eps: float | None = field(
        default=HeadOptions().filter_eps,
        metadata={"help": "Gradients of probabilities below this may be dropped; exact where not given."},
    )
    fused_workspace: int | None = field(
        default=HeadOptions().workspace,
        metadata={"help": "Bytes that the tiles of the head may take; 256 MiB where not given."},
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "Start through `accelerate launch`: a file, or single_gpu, multi_gpu, fsdp2, ... of TRL's."},
    )

    @property
    def head(self) -> dict[str, Any]:
        """As the Fused trainers and `attach` take it."""
        return {name: getattr(self, f"fused_{name}") for name in HeadOptions._fields}


class Arguments(NamedTuple):
    """TRL's four argument classes and ours, in the order in which the parser returns them."""

    script: Any
    training: Any
    model: Any
    mixture: Any
    fused: FusedArguments


class _Parser(trl.TrlParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of printing a usage of several hundred flags."""
        raise ValueError(message)


def parse(method: str, argv: Sequence[str]) -> Arguments:
    """TRL's arguments from `--config FILE` and flags; flags win.

    Raises:
        ValueError: a field that does not exist, or a value that does not fit.
        FileNotFoundError: no such configuration file.
    """
    parser = _parser(method)
    # Before TRL looks at any value, so that a misspelt name is not hidden behind another complaint.
    _check_names(parser, METHODS[method].config, argv)
    return Arguments(*parser.parse_args_and_config(list(argv)))


def _parser(method: str) -> _Parser:
    config = trl_class(METHODS[method].config)
    types: Any = (trl.ScriptArguments, config, trl.ModelConfig, trl.DatasetMixtureConfig, FusedArguments)
    parser = _Parser(types, prog=f"fusedalign {method}", allow_abbrev=False)
    parser.set_defaults(**METHODS[method].defaults)
    return parser


def _check_names(parser: _Parser, config: str, argv: Sequence[str]) -> None:
    flags, names = list(argv), []
    if "--config" in flags:
        at = flags.index("--config")
        if at + 1 == len(flags):
            raise ValueError("--config must be followed by a YAML file, got nothing")
        content = yaml.safe_load(Path(flags[at + 1]).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"--config must name a YAML file of `field: value` lines, got {flags[at + 1]}")
        names = [f"--{name}" for name in content if name != "env"]
        del flags[at : at + 2]
    names += parser.parse_known_args(flags)[1]
    known = [flag for action in parser._actions for flag in action.option_strings]
    for name in names:
        if not name.startswith("-"):
            raise ValueError(f"expected --field value pairs, got {name!r}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"expected fields of TRL's {config}, got the unknown {name}{hint}")


# ---------------------------------------------------------------------------------------------------------------- help

_USUAL = (
    "model_name_or_path", "dtype", "dataset_name", "dataset_train_split", "dataset_test_split", "output_dir",
    "max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "num_train_epochs",
    "max_steps", "warmup_steps", "lr_scheduler_type", "bf16", "gradient_checkpointing", "logging_steps",
    "eval_strategy", "save_strategy", "report_to", "seed", "use_peft", "lora_r", "lora_alpha", "lora_target_modules",
    "load_in_4bit",
)  # fmt: skip


def help_text(method: str, *, everything: bool = False) -> str:
    """What `fusedalign METHOD --help` prints: the usual flags and the method's own; or all of several hundred."""
    parser, about = _parser(method), METHODS[method]
    if everything:
        return parser.format_help()
    actions = {action.dest: action for action in parser._actions}
    config = trl_class(about.config)
    inherited = {f.name for f in fields(transformers.TrainingArguments)} | set(_USUAL)
    own = [f.name for f in fields(config) if f.name not in inherited and f.name in actions]
    columns = " or ".join("+".join(choice) for choice in about.columns)
    parts = [
        f"fusedalign {method}: {about.about}",
        f"usage: fusedalign {method} --config recipes/{method}.yaml [--field VALUE ...]",
        textwrap.fill(f"Data with the columns {columns}. Flags win over the file; both have the same names.", 112),
    ]
    groups = {"The usual": _USUAL, f"{about.config}'s own": own, "The head": [f.name for f in fields(FusedArguments)]}
    for title, names in groups.items():
        parts.append("\n".join([f"{title}:", *(_help_line(actions[name]) for name in names if name in actions)]))
    parts.append(f"fusedalign {method} --help_all lists the other fields of TRL's and transformers' configurations.")
    return "\n\n".join(parts)


def _help_line(action: Any) -> str:
    text = re.sub(r"\s+", " ", action.help or "").replace("%%", "%").replace("`", "")
    text = re.split(r"(?<=[a-z)\]])\. ", text)[0].rstrip(".")
    default = "" if action.default in (None, "==SUPPRESS==") else f" [{action.default}]"
    body = textwrap.shorten(text, 150, placeholder=" ...") + default
    return textwrap.fill(body, 112, initial_indent=f"  --{action.dest:<30} ", subsequent_indent=" " * 35)
