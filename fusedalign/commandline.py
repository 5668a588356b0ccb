"""The argument parser of the commands that are not TRL's."""

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises its errors as one line, which starts with `prog` without "fusedalign"."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError instead of printing the usage and exiting."""
        raise ValueError(f"{self.prog.removeprefix('fusedalign ')}: {message}")
