"""The flags of every command, known without importing it."""

from __future__ import annotations

from fusedalign.commandline import Command
from fusedalign.methods import METHODS
from fusedalign.sources import package_file, parser_flags
from fusedalign.trl.fields import launcher_flags, score_fields, training_fields


def command_flags(name: str, command: Command) -> set[str]:
    """All flags of a command, as its parser would list them. ModuleNotFoundError: it needs TRL, which is missing."""
    if name in METHODS:
        return training_fields(name).flags | launcher_flags() | {"--config", "--help", "--help_all"}
    if name == "check":
        return set().union(*(command_flags(method, command) for method in METHODS))
    if name == "score":
        return score_fields().flags | launcher_flags() | {"--config", "--help", "--ref_cache", "--method"}
    module = command.target.partition(":")[0]
    return parser_flags(package_file(f"{module.replace('.', '/')}.py")) | {"--help"}


def flags_owner(name: str) -> str:
    """What the flags of a command are, for errors."""
    if name in METHODS:
        return f"fields of TRL's {METHODS[name].config}"
    return f"fields of fusedalign {name}" if name in ("check", "score") else f"flags of fusedalign {name}"
