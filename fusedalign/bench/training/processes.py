"""A job in a process of its own: one with no compiled kernels, no cuDNN plans and no memory of the job before it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fusedalign.bench.training.settings import Job
from fusedalign.bench.training.worker import Measured

PROGRAM = "fusedalign.bench.training"


def measure_alone(job: Job) -> Measured:
    """Measure a job in a new process; one that ends without a result has the reason instead of figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        caches = {name: str(Path(folder) / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        command = [sys.executable, "-m", PROGRAM, json.dumps(dataclasses.asdict(job)), str(path)]
        done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, errors="replace")
        if not path.exists():
            return Measured(reason=_why(done.returncode, done.stderr))
        return read(path)


def read(path: Path) -> Measured:
    """What the program has written."""
    figures: dict[str, Any] = json.loads(path.read_text())
    lists = {name: tuple(x) for name, x in figures.items() if isinstance(x, list)}
    return Measured(**{**figures, **lists})


def _why(status: int, output: str) -> str:
    """Why a process has no result, in one line of at most 160 characters."""
    if status < 0:
        return f"the process was ended by signal {-status} ({signal.strsignal(-status)})"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    text = lines[-1] if lines else "no output"
    return f"the process ended with status {status}: {text}"[:160]
