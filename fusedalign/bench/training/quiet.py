"""Silences trainers."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from fusedalign.reports import silence_bars


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress log lines, warnings, standard output and progress bars of the trainers."""
    silence_bars()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
