"""Folders that a command writes into, looked at before the work and not after it."""

from __future__ import annotations

import tempfile
from pathlib import Path


def writable_folder(path: str | Path, name: str) -> Path:
    """The folder, which is made where it is missing.

    Args:
        path: of the folder.
        name: of the argument that names it, for the error.

    Raises:
        ValueError: nothing can be written there.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name} must be a folder that can be written to, got {path}: {error.strerror}") from error
    return folder
