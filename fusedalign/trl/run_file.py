"""`run.json` of an output directory: what was run, with what, and how it ended."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fusedalign.commandline import LONGEST_ERROR, one_line
from fusedalign.reports import replace_text, to_json, warn
from fusedalign.trl.redaction import Redactor

RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"


class RunFile:
    """The record of one run, written when it starts and again when it ends: a context around the training.

    Its `state` is running (also after the process was killed), finished, interrupted by Ctrl-C, or failed, with the
    `error`. A record that cannot be written costs a warning, not the run.

    Args:
        path: of the file; None in all processes but the first, where nothing is written.
        command: the command line.
        facts: returns what else is known at the start.
        progress: returns what has been reached so far; called when the run ends, however it does.
        previous: records of earlier runs that this one goes on from, oldest first.
        redactor: applied to all of it.
    """

    def __init__(
        self,
        path: Path | None,
        command: str,
        facts: Callable[[], Mapping[str, Any]],
        progress: Callable[[], Mapping[str, Any]],
        previous: list[dict[str, Any]],
        redactor: Redactor,
    ) -> None:
        self.path, self.complete = path, path is not None
        self._command, self._describe, self._progress = command, facts, progress
        self._previous, self._redactor = previous, redactor
        self._facts: Mapping[str, Any] = {}
        self._started = time.time()

    def __enter__(self) -> RunFile:
        if self.path is not None:
            self._facts = {"command": self._command, **self._gathered(self._describe)}
        self._write(RUNNING)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._write(INTERRUPTED)
        elif error is not None:
            self._write(FAILED, error=one_line(f"{type(error).__name__}: {error}", LONGEST_ERROR))

    def finish(self, **facts: Any) -> None:
        """Record that the run has ended well."""
        self._write(FINISHED, **facts)

    def _write(self, state: str, **facts: Any) -> None:
        if self.path is None:
            return
        times = {"started": _clock(self._started)}
        if state != RUNNING:
            times["ended"] = _clock(time.time())
            facts = {**self._gathered(self._progress), **facts}
        record = self._redactor.data({"state": state, **times, **self._facts, **facts})
        try:
            replace_text(self.path, to_json(record | {"previous": self._previous}, indent=2) + "\n")
            self.complete = True
        except OSError as error:
            self.complete = False
            warn(f"{self.path} cannot be written, the run goes on without it: {error.strerror or error}")

    def _gathered(self, function: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        try:
            return function()
        except Exception as error:  # a record must not stop the training, nor hide why it stopped
            warn(f"{self.path} is incomplete: {type(error).__name__}: {one_line(error)}")
            return {}


def read_previous(path: Path) -> list[dict[str, Any]]:
    """The record in a `run.json` and those that it goes on from, oldest first; none without a readable file."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict):
            earlier = record.pop("previous", None)
            return [*(earlier if isinstance(earlier, list) else []), record]
    return []


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))
