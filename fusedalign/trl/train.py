"""`fusedalign sft`, `dpo`, `kto`, `cpo`, `simpo`, `orpo`: TRL's own arguments and data, and the Fused trainers."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
import trl
import yaml

import fusedalign.trl
from fusedalign.embedded import EMBEDDED_NAME, build_embedded_model, data_directory
from fusedalign.trl.attachment import attach
from fusedalign.trl.options import HeadOptions


@dataclass(frozen=True)
class Method:
    """What a command trains with, and the data that it takes."""

    trainer: str
    """name of the class in `trl`"""
    config: str
    """name of the configuration class in `trl`"""
    columns: tuple[tuple[str, ...], ...]
    """sets of columns of which a data set must have one"""
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
        (("messages",), ("prompt", "completion"), ("text",), ("input_ids",), ("chosen",)),
        "supervised fine-tuning",
    ),
    "dpo": Method("DPOTrainer", "DPOConfig", _PAIRS, "direct preference optimisation, fifteen losses"),
    "kto": Method("KTOTrainer", "KTOConfig", (("completion", "label"), *_PAIRS), "good and bad answers, unpaired"),
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


class Written(NamedTuple):
    """What a run leaves behind."""

    model: Path
    metrics: Path
    plot: Path


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


def build(method: str, arguments: Arguments, *, fused: bool = True) -> Any:
    """The trainer on the model and data that `arguments` name: the Fused one, or stock TRL's with nothing attached.

    Raises:
        ValueError: no model or data named, a data set without the split or columns, a model without an LM head.
        FileNotFoundError: a folder without a model.
    """
    script, training, model, *_ = arguments
    train_dataset, eval_dataset = _load_data(method, arguments)
    path = _model_path(model.model_name_or_path, training)
    _check_has_head(path, model, training)
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": getattr(training, "trust_remote_code", False),
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    name = METHODS[method].trainer
    more = {"quantization_config": trl.get_quantization_config(model)}
    if METHODS[
        method
    ].experimental:  # there these trainers leave all to the model's arguments, and would spread it over devices
        training.model_init_kwargs |= {"device_map": None, **more}
        # They pad with what the tokenizer pads with before they have seen to it that it does.
        remote = {"revision": model.model_revision, "trust_remote_code": training.trust_remote_code}
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **remote)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        more = {"processing_class": tokenizer}  # type: ignore[dict-item]
    cls = getattr(fusedalign.trl, f"Fused{name}") if fused else trl_class(name)
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
    trainer.add_callback(_MetricsFile(written.metrics))
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


def launched_elsewhere(method: str, argv: Sequence[str]) -> bool:
    """Whether `accelerate_config` was given, and the command has now been run by `accelerate launch`.

    Raises:
        ValueError: no such configuration.
        RuntimeError: the command failed there, which has said why.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # this is what was launched
        return False
    name = _accelerate_config(argv)
    if name is None:
        return False
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    words = resolve_accelerate_config_argument(["--accelerate_config", name])
    command = [sys.executable, "-m", "accelerate.commands.launch", *words, "-m", "fusedalign", method, *argv]
    status = subprocess.run(command).returncode
    if status:
        raise RuntimeError(f"accelerate launch ended with status {status}")
    return True


def _accelerate_config(argv: Sequence[str]) -> str | None:
    """That one field, of the flags or the file, looked up before a device is touched."""
    flags = list(argv)
    for flag, read in (("--accelerate_config", str), ("--config", _accelerate_config_in)):
        if flag in flags[:-1]:
            found = read(flags[flags.index(flag) + 1])
            if found is not None:
                return str(found)
    return None


def _accelerate_config_in(path: str) -> str | None:
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return content.get("accelerate_config") if isinstance(content, dict) else None


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


# --------------------------------------------------------------------------------------------------------- model, data


def _model_path(name: str | None, training: Any) -> str:
    if not name:
        raise ValueError(f"model_name_or_path must name a model folder, a Hub model or {EMBEDDED_NAME!r}, got nothing")
    if name == EMBEDDED_NAME:
        directory = Path(training.output_dir) / "embedded-model"
        with training.main_process_first(desc="building the embedded model"):
            if training.process_index == 0:
                build_embedded_model(directory, seed=training.seed)
        return str(directory)
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"model_name_or_path must be a folder with a config.json, got {name} with {inside}")
    if not folder.exists() and name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model_name_or_path must name a folder that exists, got {name}")
    return name


def _check_has_head(path: str, model: Any, training: Any) -> None:
    """From the configuration alone; TRL would build whatever class that names and fail later, and elsewhere."""
    remote = {"revision": model.model_revision, "trust_remote_code": getattr(training, "trust_remote_code", False)}
    names = transformers.AutoConfig.from_pretrained(path, **remote).architectures or ["no architecture in its config"]
    architecture = getattr(transformers, names[0], None)
    if architecture is None and names[0].isidentifier():
        return  # remote code
    if architecture is None or not architecture.can_generate():
        raise ValueError(f"model_name_or_path must name a causal LM with an LM head, got {path} with {names[0]}")


def _load_data(method: str, arguments: Arguments) -> tuple[Any, Any]:
    """Train and evaluation split; the latter is None where none is wanted."""
    script, training, _, mixture, _ = arguments
    if mixture.datasets:
        name, splits = "datasets", trl.get_dataset(mixture)
    elif script.dataset_name:
        name, splits = script.dataset_name, _load_named(script)
    else:
        raise ValueError(
            "dataset_name must name a data set (Hub name, folder, .jsonl, .json, .parquet, .csv), got nothing"
        )
    if script.dataset_train_split not in splits:
        raise ValueError(
            f"dataset_train_split must be a split of {name} ({', '.join(splits)}), got {script.dataset_train_split!r}"
        )
    if method == "sft":
        splits = {split: _chosen_side(dataset) for split, dataset in splits.items()}
    train_dataset, eval_dataset = splits[script.dataset_train_split], None
    _check_columns(method, name, train_dataset.column_names)
    if training.eval_strategy != "no":
        eval_dataset = splits.get(script.dataset_test_split)
        if eval_dataset is None and len(splits) > 1:
            raise ValueError(
                f"dataset_test_split must be a split of {name} ({', '.join(splits)}), got {script.dataset_test_split!r}"
            )
        if eval_dataset is None:
            print(f"{name} has the one split {script.dataset_train_split!r}: training without evaluation")
            training.eval_strategy = "no"
    return train_dataset, eval_dataset


def _chosen_side(dataset: Any) -> Any:
    """Preference data as what SFT learns from: its chosen answers. Other data as it is."""
    columns = dataset.column_names or []
    if "chosen" not in columns or {"messages", "completion", "text", "input_ids"} & set(columns):
        return dataset
    if "rejected" in columns:
        dataset = dataset.remove_columns("rejected")
    if "prompt" in columns:
        return dataset.rename_column("chosen", "completion")
    conversational = not isinstance(next(iter(dataset))["chosen"], str)
    return dataset.rename_column("chosen", "messages" if conversational else "text")


def _load_named(script: Any) -> Any:
    from datasets import load_dataset

    name, options = script.dataset_name, {"name": script.dataset_config, "streaming": script.dataset_streaming}
    path = Path(name)
    if not path.exists() and path.parts[:2] == ("recipes", "data"):  # the recipes' own data, from any working directory
        path = data_directory().joinpath(*path.parts[2:])
    if path.is_file():
        kind = {".jsonl": "json", ".ndjson": "json"}.get(path.suffix.lower(), path.suffix.lower().lstrip("."))
        if kind not in ("json", "parquet", "csv", "arrow"):
            raise ValueError(f"dataset_name must be a .jsonl, .json, .parquet, .csv or .arrow file, got {name}")
        return load_dataset(kind, data_files=str(path), **options)
    if not path.exists() and (
        name.startswith((".", "/", "~")) or path.suffix in (".jsonl", ".json", ".parquet", ".csv")
    ):
        raise FileNotFoundError(f"dataset_name must name a file or folder that exists, got {name}")
    return load_dataset(str(path) if path.exists() else name, **options)


def _check_columns(method: str, name: str, columns: Sequence[str] | None) -> None:
    wanted = METHODS[method].columns
    if columns is not None and not any(set(columns) >= set(choice) for choice in wanted):
        expected = " or ".join("+".join(choice) for choice in wanted)
        raise ValueError(
            f"data set for {method} must have the columns {expected}, got {name} with {', '.join(columns)}"
        )


# ------------------------------------------------------------------------------------------------------------- metrics


class _MetricsFile(transformers.TrainerCallback):
    """Every logged step as one line of JSON, written as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def plot_metrics(history: Sequence[dict], path: Path) -> None:
    """Save a PNG with the loss and, for preferences, reward accuracy and margin against the step.

    Args:
        history: a trainer's `state.log_history`.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    names = [name for name in ("loss", "rewards/accuracies", "rewards/margins") if any(name in row for row in history)]
    figure = Figure(figsize=(5 * max(len(names), 1), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, max(len(names), 1), squeeze=False)[0], names, strict=False):
        for key, style in ((name, "-"), (f"eval_{name}", "o--")):
            points = [(row["step"], row[key]) for row in history if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=key)
        axes.set(xlabel="step", title=name)
        axes.legend()
    figure.savefig(path, dpi=120)


def tokenizer_of(trainer: Any) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer, also where the processing class is a processor that holds one."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
