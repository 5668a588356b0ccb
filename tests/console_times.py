"""Seconds of the console's commands before any training, each in a fresh process: `python tests/console_times.py`."""

import subprocess
import sys
import time

from fusedalign.cli import every_command

WORDS = (
    "",
    "--version",
    "sfft",
    *(f"{words} --help" for words in every_command()),
    "dpo --help_all",
    "dpo --bata 0.2",
    "dpo --config dop",
    "bench logpz",
    "bench --dtype bf17",
    "bench trl ppo",
    "check dop",
    "recipes",
    "completion bash",
    "env",
    "check dpo",
)


def seconds(words: str) -> float:
    """The shortest of three runs."""
    command = [sys.executable, "-m", "fusedalign", *words.split()]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    for words in WORDS:
        print(f"{seconds(words):6.2f} s  fusedalign {words}", flush=True)
