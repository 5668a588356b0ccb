"""Output of the commands: tables, standard JSON, files replaced atomically, optional plots, versions, warnings."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from fusedalign.commandline import fit, one_line

NO_MATPLOTLIB = "the plot was left out: it needs matplotlib (pip install matplotlib)"
#: Stands for the version of a package.
MISSING = "not installed"


def markdown_table(rows: Sequence[Sequence[str]], widths: Sequence[int] | None = None) -> list[str]:
    """Lines of an aligned Markdown table.

    Args:
        rows: the cells; the first row holds the titles.
        widths: characters of each column; default: of its longest cell, in the last column of its title.
    """
    widths = widths or _column_widths(rows)
    lines = [markdown_row(row, widths) for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return lines


def markdown_row(cells: Iterable[str], widths: Sequence[int]) -> str:
    """One line of a Markdown table, for tables that are printed row by row."""
    return f"| {text_row(cells, widths, ' | ')} |"


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table without rules, its columns two spaces apart."""
    widths = _column_widths(rows)
    return [text_row(row, widths).rstrip() for row in rows]


def selected(rows: Sequence[Sequence[str]], titles: Iterable[str]) -> list[list[str]]:
    """The columns of a table with these titles, in the order of the titles; the first row holds all titles."""
    indices = [list(rows[0]).index(title) for title in titles]
    return [[row[i] for i in indices] for row in rows]


def bullets(lines: Iterable[str]) -> list[str]:
    """A Markdown list, wrapped at `WIDTH`."""
    return [fit(f"* {line}") for line in lines]


def text_row(cells: Iterable[str], widths: Sequence[int], gap: str = "  ") -> str:
    """Pad each cell to the width of its column; a negative width aligns to the right."""
    columns = zip(cells, widths, strict=True)
    return gap.join(f"{cell:<{width}}" if width >= 0 else f"{cell:>{-width}}" for cell, width in columns)


def _column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    # The last column has the width of its title: cells there may hold long explanations.
    return [*(max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]), len(rows[0][-1])]


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Encode as standard JSON, which has no NaN and no infinities: they become null.

    Tensors and NumPy values are converted to Python's, other objects to strings. Without an `indent` the text is one
    line.
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
    """Write a file atomically: if the disk fills up or the process dies, the previous file is unchanged."""
    with replacement(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` on success and is deleted on an exception."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def check_writable(folder: Path, option: str) -> None:
    """Create the folder of results before the work begins; ValueError, naming `option`, if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{option} must be a folder that can be written to, got {folder} ({reason})") from error


def plot_failure(draw: Callable[[Path], None], path: Path) -> str | None:
    """Save a plot; returns None or, because a plot must not cost the results, why there is none, in one line."""
    try:
        draw(path)
    except Exception as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "matplotlib":
            return NO_MATPLOTLIB
        return f"the plot {path} was left out: {type(error).__name__}: {one_line(error)}"
    return None


def silence_bars() -> None:
    """Disable the progress bars of datasets and transformers."""
    from datasets.utils import logging as datasets_logging
    from transformers.utils import logging as transformers_logging

    datasets_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def package_version(name: str) -> str | None:
    """The version of an installed distribution; None: not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def warn(text: str) -> None:
    """Print a warning as one line on stderr."""
    print(f"fusedalign: warning: {text}", file=sys.stderr, flush=True)


#: How long a process waits for the first one of its machine to print the error that both have.
_PATIENCE = timedelta(seconds=5)


def print_error(text: str) -> None:
    """Print an error as one line on stderr; one that the processes of a launch share is printed once on a machine.

    The first process prints at once. Others wait for a moment whether it has the same error; if it has not, the error
    is theirs alone, and is printed with the rank.
    """
    is_first, store = os.environ.get("LOCAL_RANK", "0") == "0", _launch_store()
    launch = [os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "GROUP_RANK")]
    key = "/".join(["fusedalign", *launch, str(zlib.crc32(text.encode()))])
    if store is not None and not is_first:
        with contextlib.suppress(Exception):  # the first process has no such error, or the launcher has ended
            store.wait([key], _PATIENCE)
            return
    print(text if is_first else f"[rank {os.environ.get('RANK')}] {text}", file=sys.stderr, flush=True)
    if store is not None and is_first:
        with contextlib.suppress(Exception):
            store.set(key, "")


def _launch_store() -> Any:
    """The key-value store of torchrun, which `accelerate launch` starts too; None with one process, or without it."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    import torch.distributed as dist

    try:
        return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=_PATIENCE)
    except Exception:  # the launcher has ended: the error must be seen all the same
        return None
