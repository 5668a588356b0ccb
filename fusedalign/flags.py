"""The flags of every command, known without importing it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fusedalign.commandline import Command, unknown_flag
from fusedalign.methods import METHODS
from fusedalign.recipes import config_path
from fusedalign.sources import package_file, parser_flags, spellings
from fusedalign.trl.config import read_config
from fusedalign.trl.fields import RENAMED, launcher_flags, score_fields, training_fields


def command_flags(name: str, command: Command) -> set[str]:
    """All flags of a command, as its parser would list them. ModuleNotFoundError: it needs TRL, which is missing."""
    if name in METHODS:
        renamed = {flag for names in RENAMED.items() for field in names for flag in spellings(field)}
        return training_fields(name).flags | renamed | launcher_flags() | {"--config", "--help", "--help_all"}
    if name == "check":
        return set().union(*(command_flags(method, command) for method in METHODS))
    if name == "score":
        return score_fields().flags | launcher_flags() | {"--config", "--help", "--ref_cache", "--method"}
    module = command.target.partition(":")[0]
    return parser_flags(package_file(f"{module.replace('.', '/')}.py")) | {"--help"}


def check_configuration(method: str, words: Sequence[str]) -> None:
    """Check the keys of the file that `--config` names in the words of a training.

    Raises:
        FileNotFoundError: no such file or recipe.
        ValueError: a file that is no configuration, or a key that is no field of the method.
    """
    files = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    files += [value for word, value in itertools.pairwise(words) if word == "--config"]
    if len(files) != 1 or files[0].startswith("--"):  # none, or the parser says what is wrong
        return
    (name,) = files
    known = {f"--{field}" for field in training_fields(method).every} | launcher_flags()
    renamed = {f"--{field}" for names in RENAMED.items() for field in names}
    for key in read_config(config_path(name)):
        if key != "env" and f"--{key}" not in known | renamed:
            raise ValueError(unknown_flag(f"--{key}", known, f"{flags_owner(method)} in {name}"))


def flags_owner(name: str) -> str:
    """What the flags of a command are, for errors."""
    if name in METHODS:
        return f"fields of TRL's {METHODS[name].config}"
    return f"fields of fusedalign {name}" if name in ("check", "score") else f"flags of fusedalign {name}"
