"""The command `fusedalign check`, and the `dry_run` of the training commands."""

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
from fusedalign.check.text import WIDTH, Check, render
from fusedalign.check.tokens import Style
from fusedalign.check.weightless import sampled_training
from fusedalign.methods import METHODS
from fusedalign.reports import silence_bars
from fusedalign.trl.arguments import method_parser, read_words
from fusedalign.trl.config import read_config
from fusedalign.trl.files import load_named

USAGE = """\
usage: fusedalign check METHOD --config CONFIG [--field VALUE ...]
       fusedalign check CONFIG [--field VALUE ...]

Shows what a training command would do, without the weights of its model: three rows as the model will
see them, lengths, what is cut, batches, memory, what was decided and what to look at. The words after
METHOD are those of `fusedalign METHOD`, which does the same with --dry_run true. A method that CONFIG
does not tell (by its file's name, its keys or the columns of its data) must be named."""


def check_command(argv: list[str]) -> None:
    """Run `fusedalign check` with the words that follow it; raises as the training command would."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        if not argv:
            raise ValueError("check needs a METHOD and its words, or a CONFIG, got nothing")
        return
    first, *words = argv
    if first in METHODS:
        check_training(first, words)
    elif first == "--config" or first.startswith("--config="):
        file = first.partition("=")[2] or (words or [""])[0]
        check_training(find_method(file), argv)
    else:
        check_training(find_method(first), ["--config", first, *words])


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
        findings = find(sample, rows)
    return Check(sample, rows, slots, memory, decisions, findings + logged)


def find_method(config: str) -> str:
    """The method that a configuration is for: by the file's name, its keys, or the columns of its data.

    Raises:
        ValueError: none of them tells it, or the file cannot be read.
        FileNotFoundError: no such file.
    """
    if not config.endswith((".yaml", ".yml")) and not Path(config).is_file():
        raise ValueError(f"check must be followed by one of {', '.join(METHODS)} or a YAML file, got {config!r}")
    content = read_config(config)
    named = set(re.split(r"[^a-z]+", Path(config).stem.lower())) & METHODS.keys()
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
        raise ValueError(f"check needs the method, which {config} does not tell: fusedalign check METHOD --config {config}; it may be {which}")
    return able[0]


def _for_columns(methods: Sequence[str], content: dict[str, Any]) -> list[str]:
    """The methods that use most of the columns of the data that a configuration names."""
    splits = load_named(content["dataset_name"], name=content.get("dataset_config"))
    columns = set(next(iter(splits.values())).column_names)
    used = {method: max((len(c) for c in METHODS[method].columns if set(c) <= columns), default=0) for method in methods}
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
