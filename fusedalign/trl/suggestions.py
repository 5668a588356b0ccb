"""The commands that fit after a run: what its last lines print."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import is_peft_model

from fusedalign.trl.arguments import Arguments
from fusedalign.trl.data import named_splits

#: Fields of a training that other commands need too, for the same model, and for scores of the same data.
_MODEL_FIELDS = ("trust_remote_code", "load_in_4bit", "load_in_8bit")
_DATA_FIELDS = ("dataset_config", "completion_only_loss", "assistant_only_loss", "dataset_text_field")
_SHIPPED = Path("recipes/data")
#: Stands for a file of the user's.
_PAIRS = "PAIRS.jsonl"


class Suggestion(NamedTuple):
    """A command to type next."""

    purpose: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.purpose}: {shlex.join(self.words)}"


def suggest(method: str, arguments: Arguments, changed: Collection[str], trainer: Any) -> tuple[Suggestion, ...]:
    """Commands for a run's saved model: train on preferences (after SFT), score, merge (an adapter), and try.

    Args:
        method: one of `METHODS`.
        arguments: of the run.
        changed: names of the fields that differ from their defaults.
        trainer: of the run.
    """
    config = trainer.model.config
    if getattr(config, "is_encoder_decoder", False) or hasattr(config, "vision_config"):
        return ()  # the other commands are for causal models of text
    folder, columns = str(Path(arguments.training.output_dir)), _columns(arguments)
    model = ["--model_name_or_path", folder, *_flags(_MODEL_FIELDS, arguments, changed)]
    found = []
    if method == "sft":
        pairs = _pairs(arguments, columns)
        missing = f" (chosen and rejected in {_PAIRS})" if pairs == _PAIRS else ""
        words = ["dpo", *model, "--dataset_name", pairs, "--output_dir", _sibling(folder, "dpo")]
        found.append(Suggestion(f"train on preferences{missing}", ("fusedalign", *words)))
    if arguments.script.dataset_name and not arguments.mixture.datasets and "input_ids" not in columns:
        data = ["--dataset_name", arguments.script.dataset_name, *_flags(_DATA_FIELDS, arguments, changed)]
        words = ["score", *model, *data, *_split(arguments), "--out", str(Path(folder) / "scores.parquet")]
        found.append(Suggestion("score", ("fusedalign", *words)))
    if is_peft_model(trainer.accelerator.unwrap_model(trainer.model)):
        found.append(Suggestion("merge", ("fusedalign", "merge", folder, "--out", _sibling(folder, "merged"))))
    has_template = bool(getattr(trainer.processing_class, "chat_template", None))
    found.append(Suggestion("try", ("python", "-c", _generation(folder, has_template))))
    return tuple(found)


def _sibling(folder: str, name: str) -> str:
    """A folder next to another one: runs/sft-dpo next to runs/sft."""
    path = Path(folder)
    path = path if path.name.strip(".") else path.resolve()
    return str(path.with_name(f"{path.name}-{name}"))


def _columns(arguments: Arguments) -> frozenset[str]:
    """The columns of the data set; none if it is a mixture or on the Hub, which is not asked again."""
    name = arguments.script.dataset_name
    if arguments.mixture.datasets or not name or not Path(name).expanduser().exists():
        return frozenset()
    with contextlib.suppress(ValueError, OSError):  # the files have changed since the start
        return frozenset(next(iter(named_splits(arguments.script).values())).column_names or ())
    return frozenset()


def _pairs(arguments: Arguments, columns: Collection[str]) -> str:
    """The data set for DPO: the same where it has pairs, that of the recipes after their SFT, else a placeholder."""
    name = arguments.script.dataset_name or ""
    if {"chosen", "rejected"} <= set(columns):
        return name
    return str(_SHIPPED / "preferences") if Path(name) == _SHIPPED / "sft" else _PAIRS


def _split(arguments: Arguments) -> list[str]:
    """The flag for the split to score: that of the evaluation, else that of the training."""
    script = arguments.script
    is_evaluated = arguments.training.eval_strategy != "no"
    split = script.dataset_test_split if is_evaluated else script.dataset_train_split
    return [] if split == "train" else ["--dataset_train_split", split]


def _flags(names: Sequence[str], arguments: Arguments, changed: Collection[str]) -> list[str]:
    """The changed ones of these fields as flags."""
    flags = []
    for name in names:
        group = next((group for group in arguments if hasattr(group, name)), None)
        if name in changed and group is not None:
            value = getattr(group, name)
            flags += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return flags


def _generation(folder: str, has_template: bool) -> str:
    """Python code that prints an answer of the model."""
    prompt = [{"role": "user", "content": "Hello"}] if has_template else "Hello"
    answer = '[0]["generated_text"]' + ('[-1]["content"]' if has_template else "")
    call = f'pipeline("text-generation", {json.dumps(folder)})({json.dumps(prompt)}, max_new_tokens=64)'
    return f"from transformers import pipeline; print({call}{answer})"
