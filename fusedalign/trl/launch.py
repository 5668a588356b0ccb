"""Start a command again through `accelerate launch`, as the field `accelerate_config` asks for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml


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
