"""What commands write next to their results: JSON that every parser reads, plots that may fail, warnings."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON by the standard: NaN and infinities, which it does not have, are null.

    Args:
        value: numbers, texts, mappings and sequences of these; tensors and NumPy's numbers count as Python's, anything
            else as its text.
        indent: spaces a level; None: one line.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def replace_text(path: Path, text: str) -> None:
    """Write a file at once: a full disk, or a process that ends here, leaves the earlier one as it was."""
    with replacement(path) as whole:
        whole.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """The path to write a file at, which takes the place of `path` when it is whole and is removed when it is not."""
    whole = path.with_name(f"{path.name}.tmp")
    try:
        yield whole
        os.replace(whole, path)
    except BaseException:
        with contextlib.suppress(OSError):
            whole.unlink(missing_ok=True)
        raise


def check_writable(folder: Path, option: str) -> None:
    """Make a folder and see whether it takes files, before what is to be written there costs time.

    Raises:
        ValueError: it does not; names the option that gave it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{option} must be a folder that can be written to, got {folder} ({reason})") from error


def plot_failure(draw: Callable[[Path], None], path: Path) -> str | None:
    """Save a plot, which is an extra: whatever goes wrong must not take the results with it.

    Args:
        draw: saves the plot at the path that it is given.
        path: of the PNG; removed when it could not be written to its end.

    Returns:
        Why there is no plot, in one line; None where there is one.
    """
    try:
        draw(path)
    except Exception as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "matplotlib":
            return NO_MATPLOTLIB
        return f"the plot {path} was left out: {type(error).__name__}: {' '.join(str(error).split())}"
    return None


NO_MATPLOTLIB = "the plot was left out: it needs matplotlib (pip install matplotlib)"


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"fusedalign: warning: {text}", file=sys.stderr, flush=True)
