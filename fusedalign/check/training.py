"""The check of a training command, printed: what `fusedalign check` and `dry_run` do."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedalign.check.batches import read_batches
from fusedalign.check.decisions import describe
from fusedalign.check.findings import find, recorded_warnings
from fusedalign.check.memory import plan_memory
from fusedalign.check.rows import read_rows
from fusedalign.check.text import Check, render
from fusedalign.check.tokens import Style
from fusedalign.check.weightless import sampled_training
from fusedalign.commandline import WIDTH
from fusedalign.methods import METHODS
from fusedalign.recipes import config_path
from fusedalign.reports import silence_bars
from fusedalign.trl.arguments import method_parser, read_words
from fusedalign.trl.config import read_config
from fusedalign.trl.files import load_named


def check_training(method: str, argv: list[str]) -> None:
    """Print the check of a training command; raises as the command would before its first step."""
    style = Style(sys.stdout.isatty() and not os.environ.get("NO_COLOR"), WIDTH)
    print(render(check(method, argv), style))


def check(method: str, argv: list[str]) -> Check:
    """The check of a training command."""
    silence_bars()
    with recorded_warnings() as logged, sampled_training(method, argv) as sample:
        rows = read_rows(sample)
        slots = read_batches(sample.trainer)
        try:
            memory: Any = plan_memory(sample, slots)
        except ValueError as error:
            memory = str(error)
        decisions = describe(sample, slots, _processes(method, argv))
        findings = [*filter(None, [sample.obstacle]), *find(sample, rows)]
    return Check(sample, rows, slots, memory, decisions, findings + logged)


def find_method(config: str) -> str:
    """The method that a configuration is for: by the file's name, its keys, or the columns of its data.

    Raises:
        ValueError: none of them tells it, or the file cannot be read.
        FileNotFoundError: no such file.
    """
    path = Path(config_path(config))
    content = read_config(str(path))
    named = set(re.split(r"[^a-z]+", path.stem.lower())) & METHODS.keys()
    if len(named) == 1:
        return named.pop()
    keys = content.keys() - {"env"}
    able = [method for method in METHODS if keys <= {action.dest for action in method_parser(method)._actions}]
    if {"cpo", "simpo"} <= set(able):  # one configuration with two sets of defaults
        able.remove("cpo" if content.get("loss_type") == "simpo" else "simpo")
    if len(able) > 1 and isinstance(content.get("dataset_name"), str):
        able = _for_columns(able, content)
    if len(able) != 1:
        which = f"{', '.join(able[:-1])} or {able[-1]}" if able else f"one of {', '.join(METHODS)}"
        raise ValueError(
            f"check needs the method, which {config} does not tell: fusedalign check METHOD --config {config}, "
            f"where METHOD may be {which}"
        )
    return able[0]


def _for_columns(methods: Sequence[str], content: dict[str, Any]) -> list[str]:
    """The methods that use most of the columns of the data that a configuration names."""
    splits = load_named(content["dataset_name"], name=content.get("dataset_config"))
    columns = set(next(iter(splits.values())).column_names)
    used = {
        method: max((len(c) for c in METHODS[method].columns if set(c) <= columns), default=0) for method in methods
    }
    return [method for method in methods if used[method] == max(used.values())]


def _processes(method: str, argv: Sequence[str]) -> int:
    """The number of processes that the words start, or that have been started."""
    words = read_words(method_parser(method), argv)
    flags = " ".join(words.launch).replace("=", " ")
    match = re.search(r"--num[_-]processes (\d+)", flags)
    if match:
        return int(match[1])
    if words.values.accelerate_config is not None:
        from fusedalign.trl.launch import config_file

        count = read_config(config_file(str(words.values.accelerate_config))).get("num_processes")
        return count if isinstance(count, int) else 1
    return int(os.environ.get("WORLD_SIZE", "1"))
