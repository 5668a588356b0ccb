"""The arguments of a training command: TRL's and ours, from flags and a YAML file."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
import trl
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from fusedalign.commandline import argument, argument_error, unknown_flag
from fusedalign.methods import METHODS, WITH_REFERENCE
from fusedalign.recipes import config_path
from fusedalign.trl.config import file_value, kinds, read_config
from fusedalign.trl.fields import NOT_PASSED_ON, RENAMED
from fusedalign.trl.layouts import PACKED_DEFAULT
from fusedalign.trl.options import HeadOptions


def trl_class(name: str) -> Any:
    """A trainer or configuration of `trl`, else of `trl.experimental`, by its name."""
    if hasattr(trl, name):
        return getattr(trl, name)
    with warnings.catch_warnings():  # that they are experimental
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(f"trl.experimental.{re.sub('Trainer|Config', '', name).lower()}"), name)


def is_experimental(method: str) -> bool:
    """Whether the method's trainer is one of `trl.experimental`."""
    return not hasattr(trl, METHODS[method].trainer)


@dataclass
class HeadArguments:
    """This package's flags for the head and the layout of batches, in TRL's style."""

    fused_impl: str = argument(HeadOptions().impl, "The impl of the head: auto, or one that `fusedalign env` lists.")
    fused_filter_eps: float | None = argument(
        HeadOptions().filter_eps, "Gradients of probabilities below this may be dropped; exact where not given."
    )
    fused_workspace: int | None = argument(
        None, "Bytes that the tiles of the head may take; 256 MiB or, on a GPU with free memory, more where not given."
    )
    fused_packed: str = argument(
        PACKED_DEFAULT, "Run batches without padding, prompts of a pair once: true, false, or auto, on CUDA if proven."
    )

    @property
    def head(self) -> dict[str, Any]:
        """The options of the head, for the Fused trainers and `attach`."""
        options = {name: getattr(self, f"fused_{name}") for name in HeadOptions._fields}
        return {**options, "workspace": "auto" if self.fused_workspace is None else self.fused_workspace}

    @property
    def packed(self) -> bool | str:
        """The `packed` of the Fused trainers; `fused_packed` is text so that flags and YAML can have all three values.

        Raises:
            ValueError: none of the three words.
        """
        values: dict[str, bool | str] = {"auto": "auto", "true": True, "false": False}
        if self.fused_packed.lower() not in values:
            raise ValueError(f"fused_packed must be auto, true or false, got {self.fused_packed!r}")
        return values[self.fused_packed.lower()]


@dataclass
class FusedArguments(HeadArguments):
    """All of this package's own flags for training."""

    liger_kernels: bool = argument(
        False, "Liger Kernel's RMSNorm, RoPE and MLP in the model and the reference; GPUs only."
    )
    ref_logps: str | None = argument(
        None, "DPO and KTO: a cache of `fusedalign score --ref_cache` in the place of a reference model."
    )
    accelerate_config: str | None = argument(
        None, "Start through `accelerate launch`: a file, or single_gpu, multi_gpu, fsdp2, ... of TRL's."
    )
    merge_adapter: bool = argument(
        False, "Where the model is an adapter's folder: merge it and train all weights, not the adapter."
    )
    overwrite_output_dir: bool = argument(
        False, "Start anew where output_dir holds a run: its checkpoints, metrics and model are removed."
    )
    dry_run: bool = argument(False, "Only show what would be trained and on what, without weights; see `check`.")

    @property
    def trainer_options(self) -> dict[str, Any]:
        """The keywords of the Fused trainers."""
        cache = {} if self.ref_logps is None else {"ref_logps": self.ref_logps}
        return {**self.head, "packed": self.packed, "liger_kernels": self.liger_kernels, **cache}


class Arguments(NamedTuple):
    """TRL's four argument classes and ours, in the parser's order."""

    script: Any
    training: Any
    model: Any
    mixture: Any
    fused: FusedArguments


class Words(NamedTuple):
    """A command's words and its YAML file, split into our fields and the launcher's flags."""

    fields: list[str]
    """the words without the launcher's flags; `--config FILE` first"""
    values: argparse.Namespace
    """every field: from the flags, else from the file, else the default"""
    env: dict[str, str]
    """environment variables of the file"""
    launch: list[str]
    """flags of `accelerate launch`, from words and file"""


class Parser(trl.TrlParser):
    """TRL's parser, with errors of one line."""

    owner: str = ""
    """name of what defines the fields, for errors"""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing a usage of several hundred flags."""
        raise ValueError(argument_error(message))


def parse(method: str, argv: Sequence[str]) -> Arguments:
    """TRL's arguments and ours from `--config FILE` and flags; flags win.

    bf16, TRL's default, is off where no accelerator supports it. Several processes without an accelerator are ranks on
    the CPU, as with `use_cpu`.

    Raises:
        ValueError: a field that does not exist, or a value that does not fit.
        FileNotFoundError: no such configuration file.
    """
    parser = method_parser(method)
    words = read_words(parser, argv)
    values = words.values
    _check_json(parser, values)
    _check_counts(values)
    os.environ.update(words.env)
    if not (is_torch_bf16_gpu_available() or is_torch_xla_available()):
        if values.bf16 is None:
            values.bf16 = False
        if (values.bf16 or values.bf16_full_eval) and not values.use_cpu:
            raise ValueError(
                "bf16 must be false where no accelerator has it, got true: "
                "leave it out, or add --use_cpu true for bf16 on the CPU"
            )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        values.use_cpu = True  # else transformers would let each process train alone
    arguments = Arguments(*parser.parse_dict(vars(values), allow_extra_keys=True))
    _ = arguments.fused.packed  # raises
    if arguments.fused.ref_logps is not None and method not in WITH_REFERENCE:
        raise ValueError(
            f"ref_logps needs a method with a reference model, {' or '.join(WITH_REFERENCE)}, got {method}: "
            "leave it out"
        )
    modules = arguments.model.lora_target_modules
    # TRL reads a single name as a pattern, which would have to match a module's whole path.
    if isinstance(modules, str) and modules.isidentifier():
        arguments.model.lora_target_modules = [modules]
    return arguments


def method_parser(method: str) -> Parser:
    """The parser with every field of TRL's classes and ours as a flag."""
    config = trl_class(METHODS[method].config)
    types: Any = (trl.ScriptArguments, config, trl.ModelConfig, trl.DatasetMixtureConfig, FusedArguments)
    parser = Parser(types, prog=f"fusedalign {method}", allow_abbrev=False)
    parser.owner = f"TRL's {METHODS[method].config}"
    parser.set_defaults(**METHODS[method].defaults)
    return parser


def read_words(parser: Parser, argv: Sequence[str]) -> Words:
    """Split the words of a command and the fields of its YAML file; no device is touched.

    Raises:
        ValueError: a name that is neither a field nor a flag of `accelerate launch`, or a value of the wrong type.
        FileNotFoundError: no such configuration file.
    """
    file, groups = _split_config(argv)
    content = {} if file is None else read_config(config_path(file))
    env = content.pop("env", None) or {}
    if not isinstance(env, dict):
        raise ValueError(f"env in {file} must hold `NAME: value` lines, got {env!r}")
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    flags = {flag for action in parser._actions for flag in action.option_strings}
    launcher = launch_flags() - flags
    fields: list[str] = []
    launch: list[str] = []
    defaults: dict[str, Any] = {}
    for key, value in content.items():
        name = _current_name(key, actions)
        if name in defaults:
            raise ValueError(f"{name} in {file} must be given once, got it under its older name too")
        if name in actions:
            defaults[name] = file_value(parser, actions[name], value, f"{key} in {file}")
        elif f"--{name}" in launcher:
            launch += [f"--{name}"] * (value is not False) + [str(value)] * (not isinstance(value, bool))
        else:
            known = {f"--{dest}" for dest in actions} | launcher
            raise ValueError(unknown_flag(f"--{name}", known, f"fields of {parser.owner} in {file}"))
    for word, *values in groups:
        flag = _current_flag(word, actions)
        name = flag.partition("=")[0]
        if name not in flags | launcher:
            raise ValueError(unknown_flag(name, flags | launcher | {"--config"}, f"fields of {parser.owner}"))
        (fields if name in flags else launch).extend([flag, *values])
    parser.set_defaults(**defaults)
    namespace, unparsed = parser.parse_known_args(fields)
    if unparsed:
        raise ValueError(_no_pair(unparsed[0]))
    config = [] if file is None else ["--config", file]
    return Words([*config, *fields], namespace, {name: str(value) for name, value in env.items()}, launch)


def _current_name(name: str, actions: Container[str]) -> str:
    """The name that this version of transformers prefers for a field, so that flags and file speak of one field."""
    for old, new in RENAMED.items():
        if name in (old, new):
            return new if new in actions else old
    return name


def _current_flag(flag: str, actions: Container[str]) -> str:
    """A flag under the current name of its field; `--no_FIELD` of a renamed one becomes `--FIELD=false`."""
    word, equals, value = flag.partition("=")
    name = word[2:].replace("-", "_")
    field = name.removeprefix("no_")
    current = _current_name(field, actions)
    if current == field:
        return flag
    return f"--{current}{equals}{value}" if name == field else f"--{current}=false"


def _split_config(argv: Sequence[str]) -> tuple[str | None, list[list[str]]]:
    """The file of `--config FILE` or `--config=FILE`, and the other flags, each with its values."""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--"):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise ValueError(_no_pair(word))
    files = [["--config", *group[0].split("=", 1)[1:], *group[1:]] for group in groups if _is_config(group)]
    if len(files) > 1:
        raise ValueError(f"--config must be given once, got {' and '.join(' '.join(words[1:]) for words in files)}")
    if files and len(files[0]) == 1:
        raise ValueError("--config must be followed by a YAML file, got nothing")
    if files and len(files[0]) > 2:
        raise ValueError(_no_pair(files[0][2]))
    return (files[0][1] if files else None), [group for group in groups if not _is_config(group)]


def _is_config(group: list[str]) -> bool:
    return group[0].partition("=")[0] == "--config"


def launch_flags() -> set[str]:
    """The flags of `accelerate launch` itself."""
    from accelerate.commands.launch import launch_command_parser

    flags = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
    return {flag for flag in flags if flag.startswith("--")} - NOT_PASSED_ON


def _check_json(parser: Parser, values: argparse.Namespace) -> None:
    for name, value in vars(values).items():
        if isinstance(value, str) and value.startswith("{") and dict in kinds(parser, name):
            try:
                json.loads(value)
            except ValueError as error:
                raise ValueError(f"{name} must be JSON, got {value!r}: {error}") from None


def _check_counts(values: argparse.Namespace) -> None:
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(values, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(values, name)}")
    if values.max_steps <= 0 and not values.num_train_epochs > 0:
        raise ValueError(f"num_train_epochs must be above 0 where max_steps is not, got {values.num_train_epochs}")


def _no_pair(word: str) -> str:
    hint = f"; did you mean --config {word}?" if word.endswith((".yaml", ".yml")) else ""
    return f"expected --field value pairs, got {word!r}{hint}"
