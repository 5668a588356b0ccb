"""Runs each job in a new process, without compiled kernels, cuDNN plans or memory of the previous job."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedalign.bench.training.settings import Job, Measured

PROGRAM = "fusedalign.bench.training"


def measure_alone(job: Job) -> Measured:
    """Measure a job in a new process; if that ends without a result, only the reason is set."""
    return measured(run_program(PROGRAM, dataclasses.asdict(job), _launcher(job)))


def _launcher(job: Job) -> list[str]:
    """Words between the interpreter and `-m PROGRAM` that start the ranks of a job."""
    if job.ranks == 1:
        return []
    from fusedalign.trl.launch import config_file

    launch = ["-m", "accelerate.commands.launch", "--config_file", config_file(job.engine)]
    return [*launch, "--num_processes", str(job.ranks), "--main_process_port", "0"]


def measured(figures: dict[str, Any]) -> Measured:
    """The record of figures that were read from JSON."""
    lists = {name: tuple(x) for name, x in figures.items() if isinstance(x, list)}
    return Measured(**{**figures, **lists})


def run_program(program: str, job: Any, launcher: Sequence[str] = ()) -> dict[str, Any]:
    """Run `python -m PROGRAM JOB FILE` with empty kernel caches; returns the JSON of FILE, or the `reason` for none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        caches = {name: str(Path(folder) / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        command = [sys.executable, *launcher, "-m", program, json.dumps(job), str(path)]
        process = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, errors="replace")
        if not path.exists():
            return {"reason": _exit_reason(process.returncode, process.stderr)}
        figures: dict[str, Any] = json.loads(path.read_text())
        return figures


def _exit_reason(status: int, output: str) -> str:
    """Why a process has no result, in one line of at most 160 characters."""
    if status < 0:
        return f"the process was ended by signal {-status} ({signal.strsignal(-status)})"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    text = lines[-1] if lines else "no output"
    return f"the process ended with status {status}: {text}"[:160]
