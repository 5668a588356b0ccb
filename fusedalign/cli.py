"""The command `fusedalign`: `COMMANDS` holds its subcommands, which are imported when they run."""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from typing import TextIO

import fusedalign
from fusedalign.bench import SUBCOMMANDS
from fusedalign.commandline import (
    LONGEST_ERROR,
    Command,
    CommandParser,
    calm_threads,
    fit,
    one_line,
    suggestion,
    terminal_width,
    unknown_flag,
)
from fusedalign.methods import METHODS
from fusedalign.reports import print_error

_EXTRA = ("trl", "transformers", "datasets", "accelerate", "peft", "matplotlib", "yaml")
#: Warnings of other libraries about their own defaults, which a user has not chosen and need not change.
_NOISE = (
    (r".*gradient_checkpointing\w*` is deprecated", FutureWarning),
    (r"Input and output embeddings are no longer tied after merging", UserWarning),  # the merged model is saved so
    (r"'pin_memory' argument is set as true but no accelerator is found", UserWarning),
)
_HELP, _VERSION = ("-h", "--help"), ("-V", "--version")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after `fusedalign`; default: those of this process.

    Returns:
        The exit status: 0, or the command's own (`score --strict`: 3 where rows were refused);
        2 after an error, which is printed in one line on stderr; 130 after Ctrl-C; 141 where the
        reader of the output has closed it.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars fill a file with carriage returns
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the encoding lacks must not end the command
            stream.reconfigure(errors="backslashreplace")
    for message, category in _NOISE:
        warnings.filterwarnings("ignore", message, category)
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough: print nothing, exit as a program that SIGPIPE ends
        for stream in _closed_streams():  # else the interpreter flushes again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141
    return status


def _run(words: list[str]) -> int:
    words, debug = _split_debug(words)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in _HELP:
        print(_usage())
        return 0 if words else 2
    if words[0] in _VERSION:
        print(f"fusedalign {fusedalign.__version__}")
        return 0
    try:
        name, command, arguments = _find(words)
        if not command.example and arguments in ([word] for word in _HELP):
            CommandParser(f"fusedalign {name}", f"{command.about[0].upper()}{command.about[1:]}.").parse(arguments)
            return 0
        _check_flags(name, command, arguments)
        if arguments and not command.example:
            raise ValueError(f"{name} takes no arguments, got {' '.join(arguments)}")
        return command.run(arguments) or 0
    except KeyboardInterrupt as interrupt:  # its arguments say what the command has saved
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the processes of a launch are interrupted together
            print("\n".join(["", "fusedalign: interrupted", *map(str, interrupt.args)]).rstrip(), file=sys.stderr)
        return 130
    except Exception as error:  # a user reads one line first, whatever the error
        if isinstance(error, BrokenPipeError) and _closed_streams():
            raise
        if debug:
            traceback.print_exc()
        hint = "" if debug else " (--debug shows the traceback)"
        print_error(f"fusedalign: error: {_without_secrets(_one_line(error), words)}{hint}")
        return 2


def _find(words: list[str]) -> tuple[str, Command, list[str]]:
    """The command that the first words name, a sub-command under both names, and the words after it."""
    name, *arguments = words
    if name.startswith("-"):
        raise ValueError(unknown_flag(name, {*_HELP, *_VERSION, "--debug"}, f"a command or {', '.join(_VERSION)}"))
    if name not in COMMANDS:
        hint = suggestion(name, COMMANDS)
        raise ValueError(f"command must be one of {', '.join(COMMANDS)}, got {name!r}{hint}")
    command = COMMANDS[name]
    if arguments and arguments[0] in command.subcommands:
        return f"{name} {arguments[0]}", command.subcommands[arguments[0]], arguments[1:]
    return name, command, arguments


def _check_flags(name: str, command: Command, arguments: list[str]) -> None:
    """Raise for a flag or a key of the configuration that the command does not have, before it imports torch."""
    if {*_HELP, "--help_all"} & set(arguments):
        return
    if name == "check" and arguments and arguments[0] in METHODS:
        name, *arguments = arguments
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--") and word != "--"]
    if not flags or (name == "score" and "--ref_cache" in flags):  # that is checked with the flags of a training
        return
    from fusedalign.flags import check_configuration, command_flags, flags_owner

    known = command_flags(name, command)
    for flag in flags:
        if flag not in known:
            raise ValueError(unknown_flag(flag, known, flags_owner(name)))
    if name in METHODS:
        check_configuration(name, arguments)


def _split_debug(words: list[str]) -> tuple[list[str], bool]:
    """The words without `--debug`, and whether it was among them; transformers' `--debug VALUE` stays."""
    is_ours = [
        word == "--debug" and (not following or following.startswith("-"))
        for word, following in zip(words, [*words, ""][1:], strict=True)
    ]
    return [word for word, ours in zip(words, is_ours, strict=True) if not ours], any(is_ours)


def _usage() -> str:
    rows = every_command()
    width = max(map(len, rows))
    parts = ["usage: fusedalign COMMAND [--flag VALUE ...]"]
    for title, is_training in {"training": True, "other commands": False}.items():
        shown = {words: row for words, row in rows.items() if (words in METHODS) == is_training}
        parts.append("\n".join([f"{title}:", *(f"  {words:<{width}}  {row.about}" for words, row in shown.items())]))
    brief = [name for name, method in METHODS.items() if not method.example]
    named = {name: command.example for name, command in COMMANDS.items() if command.example and name not in brief}
    examples = [f"  fusedalign {name} {example}" for name, example in named.items()]
    parts.append("\n".join(["examples:", *examples]))
    parts.append(
        "The training commands take every field of TRL's configurations as --field VALUE, --field=VALUE or as a "
        "key of the YAML file; flags win. `fusedalign COMMAND --help` lists the flags of a command, `fusedalign "
        "--version` prints the version, --debug shows the traceback of an error."
    )
    return fit("\n\n".join(parts), terminal_width())


def _closed_streams() -> list[TextIO]:
    """The streams among stdout and stderr that no process reads any more."""
    if not hasattr(select, "poll"):  # Windows raises another error
        return []
    closed = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a replaced stream has no descriptor
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
                closed.append(stream)
    return closed


def _one_line(error: Exception) -> str:
    # The name of a missing package is sometimes a sentence of its own.
    missing = error.name if isinstance(error, PackageNotFoundError) and " " in error.name else None
    text = one_line(missing or error, LONGEST_ERROR)
    if missing:
        return text
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _EXTRA:
        return f"{text}; this command needs: pip install 'fusedalign[trl]', on Python 3.11 or later"
    if text and isinstance(error, (ValueError, TypeError, OSError)):
        return text
    return f"{type(error).__name__}: {text}" if text else f"{type(error).__name__}, without a message"


def _without_secrets(text: str, words: Sequence[str]) -> str:
    """A message without the access tokens of a command: a log may keep it."""
    from fusedalign.trl.redaction import Redactor, flag_values

    return Redactor(flag_values(words)).text(text)


def _train(method: str, argv: list[str]) -> None:
    from fusedalign.trl.command import training_command

    def preview() -> None:
        from fusedalign.check.training import check_training

        check_training(method, argv)

    training_command(method, argv, preview)


def _score(argv: list[str]) -> int:
    if {*_HELP, "--help_all"} & set(argv):
        from fusedalign.trl.help import score_help

        print(score_help())
        return 0
    from fusedalign.score.command import score_command

    calm_threads()
    return score_command(argv)


def _demo(argv: list[str]) -> None:
    from fusedalign.demo import demo

    calm_threads()
    demo()


def _completion(argv: list[str]) -> None:
    from fusedalign.completion import SHELLS, completion_script, shell_of
    from fusedalign.flags import command_flags
    from fusedalign.recipes import configurations, recipes

    shell = shell_of(argv)
    if shell is None:
        return
    tree: dict[str, list[str]] = {"": [*COMMANDS, "--help", "--version"]}
    for words, row in every_command().items():
        tree[words] = [*row.subcommands, *sorted(command_flags(words, row))]
    tree["check"] += [name for name in {**METHODS, **configurations()} if name in METHODS or name not in COMMANDS]
    tree["recipes"] += recipes()
    tree["completion"] += SHELLS
    print(completion_script(shell, tree), end="")


COMMANDS: dict[str, Command] = {
    **{
        name: Command(
            "fusedalign.cli:_train",
            re.split("[,:]", method.about)[0],
            f"--config {name} {method.example}".rstrip(),
            words=(name,),
        )
        for name, method in METHODS.items()
    },
    "check": Command(
        "fusedalign.check.command:check_command",
        "what a training would do: rows, lengths, memory, decisions",
        "dpo --config dpo",
    ),
    "merge": Command(
        "fusedalign.trl.mergecommand:merge_command",
        "an adapter's folder and its base model into one model",
        "runs/sft --out runs/merged",
    ),
    "score": Command(
        "fusedalign.cli:_score",
        "log-probabilities of a data set",
        "--model_name_or_path runs/sft --dataset_name pairs.jsonl --out s.parquet",
    ),
    "plan": Command(
        "fusedalign.plan.command:plan_command",
        "the memory of a training step",
        "--model_name_or_path Qwen/Qwen3-1.7B --memory 24GiB",
    ),
    "support": Command(
        "fusedalign.supportcommand:support_command",
        "what works with a model: its head, packed batches, kernels",
        "--model_name_or_path Qwen/Qwen3-1.7B",
    ),
    "bench": Command(
        "fusedalign.bench.command:bench",
        "time, memory and error of our impls and of other libraries",
        "logps --cases qwen3-1.7b",
        subcommands=SUBCOMMANDS,
    ),
    "demo": Command(
        "fusedalign.cli:_demo",
        "SFT, then DPO by stock TRL and by fusedalign: a table and a picture",
    ),
    "recipes": Command(
        "fusedalign.recipes:recipes_command", "configurations to start from: lists them, or prints one", "dpo > my.yaml"
    ),
    "env": Command(
        "fusedalign.envcommand:env_command", "versions, devices, and which impl can run here", "--json > env.json"
    ),
    "completion": Command(
        "fusedalign.cli:_completion", "a script that completes commands and flags in a shell", "bash"
    ),
}


def every_command() -> dict[str, Command]:
    """The commands and their sub-commands, by all their words: "bench", "bench trl"."""
    rows: dict[str, Command] = {}
    for name, command in COMMANDS.items():
        rows |= {name: command} | {f"{name} {word}": row for word, row in command.subcommands.items()}
    return rows


if __name__ == "__main__":
    sys.exit(main())
