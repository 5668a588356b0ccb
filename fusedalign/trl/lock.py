"""A lock file in a folder, so that only one run at a time writes into it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from fusedalign.reports import to_json

LOCK = "run.lock"


class Owner(NamedTuple):
    """The process that holds a lock."""

    pid: int
    host: str
    started: float
    """seconds since the epoch, which tells it from a later process with the same pid"""

    @property
    def is_over(self) -> bool:
        """Whether it is known to have ended; never known of another host."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 2
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    def __str__(self) -> str:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host}, started {started}"


class Lock(NamedTuple):
    """A lock that this process has taken."""

    path: Path
    owner: Owner

    def check(self) -> None:
        """Raise ValueError if another run holds it: two runs may take over the lock of an ended one at once."""
        owner = _owner(self.path)
        if owner != self.owner:
            raise ValueError(_held(self.path, owner))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """Hold the lock of a folder, which is created if missing. The lock of an ended process is taken over.

    Raises:
        ValueError: another run holds it, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _take(folder / LOCK)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"output_dir must be a folder that can be written to, got {folder} ({reason})") from error
    try:
        yield lock
    finally:
        if _owner(lock.path) == lock.owner:
            lock.path.unlink(missing_ok=True)


def _take(path: Path) -> Lock:
    holder = _owner(path)
    if holder is not None and holder.is_over:
        path.unlink(missing_ok=True)
    lock = Lock(path, Owner(os.getpid(), socket.gethostname(), psutil.Process().create_time()))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(to_json(lock.owner._asdict()) + "\n")
    except FileExistsError:
        raise ValueError(_held(path, holder or _owner(path))) from None
    except OSError:  # of a full disk: what is left names no run
        path.unlink(missing_ok=True)
        raise
    return lock


def _owner(path: Path) -> Owner | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Owner(int(content["pid"]), str(content["host"]), float(content["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _held(path: Path, owner: Owner | None) -> str:
    who = owner or "a run that its lock does not name"
    known = owner is not None and owner.host == socket.gethostname()
    remedy = "wait for it, end it or choose another output_dir" if known else f"if that run is over, remove {path}"
    return f"output_dir must be written by one run at a time, got {path.parent}, held by {who}; {remedy}"
