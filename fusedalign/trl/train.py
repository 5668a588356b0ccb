"""`fusedalign sft` and `fusedalign dpo`: TRL's own arguments, data and trainers, with this package's head attached."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
import trl
import yaml

from fusedalign.embedded import EMBEDDED_NAME, build_embedded_model, data_directory
from fusedalign.trl.attachment import attach


@dataclass(frozen=True)
class Method:
    """What a command trains with, and the data that it takes."""

    trainer: str
    """name of the class in `trl`"""
    config: str
    """name of the configuration class in `trl`"""
    columns: tuple[tuple[str, ...], ...]
    """sets of columns of which a data set must have one"""


METHODS = {
    "sft": Method(
        "SFTTrainer", "SFTConfig", (("messages",), ("prompt", "completion"), ("text",), ("input_ids",), ("chosen",))
    ),
    "dpo": Method("DPOTrainer", "DPOConfig", (("chosen", "rejected"),)),
}


class Arguments(NamedTuple):
    """TRL's four argument classes, in the order in which its parser returns them."""

    script: Any
    training: Any
    model: Any
    mixture: Any


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
    types: Any = (trl.ScriptArguments, getattr(trl, METHODS[method].config), trl.ModelConfig, trl.DatasetMixtureConfig)
    parser = _Parser(types, prog=f"fusedalign {method}", allow_abbrev=False)
    # Before TRL looks at any value, so that a misspelt name is not hidden behind another complaint.
    _check_names(parser, METHODS[method].config, argv)
    return Arguments(*parser.parse_args_and_config(list(argv)))


def _check_names(parser: _Parser, config: str, argv: Sequence[str]) -> None:
    flags, names = list(argv), []
    if "--config" in flags:
        at = flags.index("--config")
        if at + 1 == len(flags):
            raise ValueError("--config must be followed by a YAML file, got nothing")
        fields = yaml.safe_load(Path(flags[at + 1]).read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"--config must name a YAML file of `field: value` lines, got {flags[at + 1]}")
        names = [f"--{name}" for name in fields if name != "env"]
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


def build(method: str, arguments: Arguments) -> Any:
    """The trainer on the model and data that `arguments` name; stock TRL, nothing attached yet.

    Raises:
        ValueError: no model or data named, a data set without the split or columns, a model without an LM head.
        FileNotFoundError: a folder without a model.
    """
    script, training, model, _ = arguments
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
    trainer = getattr(trl, METHODS[method].trainer)(
        model=path,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=trl.get_quantization_config(model),
        peft_config=trl.get_peft_config(model),
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
    """The whole command: parse, build, attach, run. Returns the trainer and what was written."""
    trainer = attach(build(method, parse(method, argv)))
    return trainer, run(trainer)


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
    script, training, _, mixture = arguments
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
