"""Exceptions of rows in one line."""

from __future__ import annotations

from fusedalign.commandline import one_line

OUT_OF_MEMORY = "out of memory"
_LONGEST = 160


def in_short(error: Exception, *, named: bool = True) -> str:
    """An exception in one line of at most 160 characters, which starts with its class if `named`."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    return one_line(f"{type(error).__name__}: {error}" if named else error, _LONGEST)
