"""The argument parsers of the commands that are not TRL's, and the fields of those that are."""

import argparse
from collections.abc import Sequence
from dataclasses import field
from typing import Any, NoReturn


def argument(default: Any, help_text: str) -> Any:
    """A field of a dataclass from which TRL's parser makes a flag."""
    return field(default=default, metadata={"help": help_text})


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises its errors as one line, which starts with `prog` without "fusedalign"."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError instead of printing the usage and exiting."""
        raise ValueError(f"{self.prog.removeprefix('fusedalign ')}: {message}")


class CommandParser(OneLineParser):
    """The parser of a command: its description keeps line breaks, `--help` does not exit."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(prog, None, description, epilog, add_help=False, allow_abbrev=False)
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        self.add_argument("-h", "--help", action="store_true", help="show this text")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace | None:
        """Parse the arguments, or print the help and return None."""
        options = self.parse_args(argv)
        if options.help:
            print(self.format_help(), end="")
        return None if options.help else options
