"""Commands with several processes, ended after a time limit instead of hanging."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


class Ended(NamedTuple):
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str


def run(command, limit, **environment):
    """Run a command with this process's import path; after `limit` seconds it and its ranks are ended.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        with subprocess.Popen(command, stdout=stdout, stderr=stderr, env=os.environ | path | environment) as process:
            try:
                status = process.wait(limit)
            except BaseException:
                process.send_signal(signal.SIGTERM)  # launchers end their ranks, which are in sessions of their own
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
                raise
        for stream in (stdout, stderr):
            stream.seek(0)
        return Ended(status, stdout.read(), stderr.read())
