"""What all commands share: the record of a command, parsers with errors of one line, and suggestions for names."""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, NamedTuple, NoReturn

#: Columns of help texts and tables, at most.
WIDTH = 100
#: Characters of an error, at most: messages of other libraries span many lines.
LONGEST_ERROR = 400


class Command(NamedTuple):
    """A command, or a sub-command of one; its function is imported when it runs."""

    target: str
    """module:function, a function of the words after the command's name that returns the exit status; None: 0"""
    about: str
    example: str = ""
    """arguments for the usage text; "": the command takes none"""
    words: tuple[str, ...] = ()
    """arguments of the function before the words of the command line"""
    subcommands: Mapping[str, Command] = {}

    def run(self, arguments: list[str]) -> int | None:
        """Import the function and call it."""
        module, function = self.target.split(":")
        return getattr(importlib.import_module(module), function)(*self.words, arguments)


def terminal_width() -> int:
    """Columns of a help text: those of the terminal, or `WIDTH` if it is wider or there is none."""
    return max(40, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def fit(text: str, width: int = WIDTH) -> str:
    """Wrap the lines of a text that are longer than `width`; what goes on starts below the line's second column."""
    lines = []
    for line in text.split("\n"):
        start = re.match(r"\s*(\S+(?: \S+)* {2,}|[*] )?", line)
        indent = " " * len(start.group()) if start else ""
        wrapper = textwrap.TextWrapper(width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
        lines += wrapper.wrap(line) if len(line) > width else [line]
    return "\n".join(lines)


def fold(text: str, start: str = "", indent: int | None = None, width: int = WIDTH) -> list[str]:
    """Wrap a text at `width`, not at hyphens: flags, names and paths stay whole where they fit.

    Args:
        text: its line breaks count as spaces.
        start: of the first line.
        indent: spaces before the other lines; default: the length of `start`.
        width: of a line, in characters.

    Returns:
        At least one line.
    """
    later = " " * (len(start) if indent is None else indent)
    wrapper = textwrap.TextWrapper(width, initial_indent=start, subsequent_indent=later, break_on_hyphens=False)
    return wrapper.wrap(text) or [start.rstrip()]


def wrapped_table(rows: Iterable[tuple[str, str]], indent: int = 0, columns: int = WIDTH) -> list[str]:
    """Lines of a table of two columns, the second wrapped; no line is longer than `columns`."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    lines = []
    for name, text in rows:
        lines += fold(text, f"{'':{indent}}{name:<{width}}  ", width=columns)
    return lines


def one_line(text: object, longest: int | None = None) -> str:
    """A text, such as an exception, with its line breaks as spaces; cut at `longest` characters, default: not."""
    line = " ".join(str(text).split())
    if longest is None or len(line) <= longest:
        return line
    words = line[: longest - 3].rpartition(" ")[0]
    return f"{words or line[: longest - 4]} ..."


def argument(default: Any, help_text: str) -> Any:
    """A field of a dataclass from which TRL's parser makes a flag."""
    return field(default=default, metadata={"help": help_text})


def suggestion(name: str, known: Iterable[str], cutoff: float = 0.65) -> str:
    """The end of an error about a name: "; did you mean ...?", or "" where no known name is similar."""
    matches = difflib.get_close_matches(name.lower(), sorted(known), n=3, cutoff=cutoff)
    matches.sort(key=lambda match: sorted(match) != sorted(name.lower()))  # swapped letters first: --otu, --out
    return f"; did you mean {matches[0]}?" if matches else ""


def listed_names(option: str, words: str, known: Iterable[str]) -> list[str]:
    """The names of a list with commas, each once. Raises ValueError, naming `option`, for one that is not known."""
    known = list(known)
    names = list(dict.fromkeys(word.strip() for word in words.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"{option} must be one of {', '.join(known)}, got {name!r}{suggestion(name, known)}")
    return names


def unknown_flag(name: str, known: Iterable[str], expected: str) -> str:
    """The error about a flag that does not exist; `expected` says what it should be one of."""
    known = sorted(known)
    # A renamed field often keeps one part of its name: torch_dtype, dtype.
    parts = set(name.strip("-").split("_"))
    nested = [flag for flag in known if "-" not in flag[2:] and set(flag[2:].split("_")) < parts]
    hint = suggestion(name, known, 0.85) or suggestion(name, sorted(nested, key=len)[-1:], 0.0)
    return f"expected {expected}, got the unknown {name}{hint or suggestion(name, known)}"


#: Types of arguments as errors name them.
_KINDS = {"int": "an integer", "float": "a number"}


def argument_error(message: str) -> str:
    """An error of argparse as ours are: the flag in one spelling, what was expected and what came; a suggestion."""
    message = re.sub(r"^argument (--\w+)(/--?[\w-]+)*", r"\1", message)
    if match := re.fullmatch(r"(.*?): invalid (\w+) value: (.*)", message, re.DOTALL):
        return f"{match[1]} must be {_KINDS.get(match[2], match[2])}, got {match[3]}"
    if match := re.fullmatch(r"(.*?): invalid choice: (.*?) \(choose from (.*)\)", message, re.DOTALL):
        value, *choices = (word.strip("'\"") for word in (match[2], *match[3].split(", ")))
        return f"{match[1]} must be one of {', '.join(choices)}, got {value!r}{suggestion(value, choices)}"
    return message


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises its errors as one line."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError instead of printing the usage and exiting."""
        raise ValueError(argument_error(message))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps the help of flags not at hyphens, so that names stay whole."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return fold(text, width=width)


class CommandParser(OneLineParser):
    """The parser of a command: its description keeps line breaks, `--help` does not exit.

    Args:
        prog: the words of the command.
        description: what the command does.
        tables: title -> names and their meanings, shown below the description.
        epilog: shown at the end.
    """

    def __init__(
        self, prog: str, description: str, tables: Mapping[str, Mapping[str, str]] = {}, epilog: str | None = None
    ) -> None:
        width = terminal_width()
        parts = [fit(description, width)]
        for title, rows in tables.items():
            parts.append("\n".join([fit(f"{title}:", width), *wrapped_table(rows.items(), 2, width)]))
        about = "\n\n".join(parts)
        super().__init__(prog, None, about, epilog and fit(epilog, width), add_help=False, allow_abbrev=False)
        self.formatter_class = functools.partial(_HelpFormatter, width=width)
        self.add_argument("-h", "--help", action="store_true", help="show this text")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace | None:
        """Parse the arguments, or print the help and return None."""
        options, unknown = self.parse_known_args(argv)
        if options.help:
            print(self.format_help(), end="")
            return None
        if unknown:
            known = {flag for action in self._actions for flag in action.option_strings}
            self.error(unknown_flag(unknown[0].partition("=")[0], known, f"flags of {self.prog}"))
        return options


def calm_threads() -> None:
    """One thread on a CPU with one or two cores, unless OMP_NUM_THREADS says otherwise.

    OpenMP's threads spin while they wait for each other. Where the second core is busy or virtual this slows a small
    model's steps down many times; the gain is a factor of 2 at best.
    """
    import torch

    if not torch.cuda.is_available() and (os.cpu_count() or 1) <= 2 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
