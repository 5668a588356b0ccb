"""The command `fusedalign`: `COMMANDS` holds its subcommands."""

from __future__ import annotations

import contextlib
import os
import platform
import select
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple, TextIO

import torch

import fusedalign
from fusedalign.impls import explain
from fusedalign.impls.survey import auto_choices, coverage
from fusedalign.methods import METHODS
from fusedalign.reports import MISSING, package_version, print_error, text_table, warn

_PACKAGES = ("triton", "transformers", "trl", "datasets", "accelerate", "peft", "liger-kernel", "cut-cross-entropy")
_EXTRA = ("trl", "transformers", "datasets", "accelerate", "peft", "matplotlib", "yaml")
_LONGEST = 400  # characters of a message: other libraries' messages span many lines


class Command(NamedTuple):
    """A subcommand."""

    run: Callable[[list[str]], int | None]
    """from the words after its name to the exit status; None: 0"""
    about: str
    example: str = ""
    """arguments for the usage text; "": the command takes none"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after `fusedalign`; default: those of this process.

    Returns:
        The exit status: 0, or the command's own (`score --strict`: 3 where rows were refused);
        2 after an error, which is printed in one line on stderr; 130 after Ctrl-C; 141 where the
        reader of the output has closed it.
    """
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
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else 2
    name, *arguments = words
    try:
        if name not in COMMANDS:
            raise ValueError(f"command must be one of {', '.join(COMMANDS)}, got {name!r}")
        command = COMMANDS[name]
        if not command.example and arguments in (["-h"], ["--help"]):
            print(f"usage: fusedalign {name}\n\n{command.about[0].upper()}{command.about[1:]}.")
            return 0
        return command.run(arguments) or 0
    except KeyboardInterrupt as interrupt:  # its arguments say what the command has saved
        print("\n".join(["", "fusedalign: interrupted", *map(str, interrupt.args)]).rstrip(), file=sys.stderr)
        return 130
    except Exception as error:  # a user reads one line first, whatever the error
        if isinstance(error, BrokenPipeError) and _closed_streams():
            raise
        if debug:
            traceback.print_exc()
        hint = "" if debug else " (--debug shows the traceback)"
        print_error(f"fusedalign: error: {_one_line(error)}{hint}")
        return 2


def _split_debug(words: list[str]) -> tuple[list[str], bool]:
    """The words without `--debug`, and whether it was among them; transformers' `--debug VALUE` stays."""
    is_ours = [
        word == "--debug" and (not following or following.startswith("-"))
        for word, following in zip(words, [*words, ""][1:], strict=True)
    ]
    return [word for word, ours in zip(words, is_ours, strict=True) if not ours], any(is_ours)


def _usage() -> str:
    brief = [name for name, method in METHODS.items() if not method.example]
    rows = [
        (f"{name:<5} {command.about}", f"fusedalign {name} {command.example}" if command.example else "")
        if name not in brief
        else (", ".join(brief), "the same, each with a recipe of its name")
        for name, command in COMMANDS.items()
        if name not in brief[1:]
    ]
    lines = "\n".join(f"  {left:<39}  {right}".rstrip() for left, right in rows)
    return f"""\
usage: fusedalign COMMAND [--debug] [...]

{lines}

The training commands take every field of TRL's configurations as --field VALUE or as a key of the YAML file; flags
win. fusedalign sft --help lists the usual ones. --debug shows the traceback of an error."""


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
    text = textwrap.shorten(str(error), _LONGEST, placeholder=" ...")
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _EXTRA:
        return f"{text}; this command needs: pip install 'fusedalign[trl]', on Python 3.11 or later"
    if text and isinstance(error, (ValueError, TypeError, OSError)):
        return text
    return f"{type(error).__name__}: {text}" if text else f"{type(error).__name__}, without a message"


def _calm_threads() -> None:
    """One thread on a CPU with one or two cores, unless OMP_NUM_THREADS says otherwise.

    OpenMP's threads spin while they wait for each other. Where the second core is busy or virtual this slows a small
    model's steps down many times; the gain is a factor of 2 at best.
    """
    if not torch.cuda.is_available() and (os.cpu_count() or 1) <= 2 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _train(method: str) -> Callable[[list[str]], None]:
    def command(argv: list[str]) -> None:
        from fusedalign.trl.arguments import method_parser
        from fusedalign.trl.help import help_text
        from fusedalign.trl.launch import launched_elsewhere
        from fusedalign.trl.train import train

        if {"-h", "--help", "--help_all"} & set(argv):
            print(help_text(method, everything="--help_all" in argv))
            return
        _calm_threads()
        if launched_elsewhere(method, method_parser(method), argv):
            return
        trainer, written = train(method, argv)
        if trainer.is_world_process_zero():
            print(written)
            for text in written.warnings:
                warn(text)

    return command


def _merge(argv: list[str]) -> None:
    from fusedalign.trl.adapters import merge_command

    merge_command(argv)


def _score(argv: list[str]) -> int:
    from fusedalign.score.command import score_command

    _calm_threads()
    return score_command(argv)


def _plan(argv: list[str]) -> None:
    from fusedalign.plan import plan_command

    plan_command(argv)


def _demo(argv: list[str]) -> None:
    from fusedalign.demo import demo

    _calm_threads()
    demo(argv)


def _bench(argv: list[str]) -> None:
    from fusedalign.bench import bench

    _calm_threads()
    bench(argv)


def _env(argv: list[str]) -> None:
    if argv:
        raise ValueError(f"env takes no arguments, got {' '.join(argv)}")
    versions = [("python", platform.python_version()), ("fusedalign", fusedalign.__version__)]
    versions += [("torch", torch.__version__), *((name, package_version(name) or MISSING) for name in _PACKAGES)]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print("\n".join([*text_table([*versions, ("CUDA devices", ", ".join(devices) or "none")]), ""]))
    titles = ("impl", "here", "auto", "version", "devices", "dtypes", "exact in", "outputs beside logps", "head")
    table: list[tuple[str, ...]] = [titles]
    reasons = []
    for verdict in explain():
        version = (package_version(verdict.package) or MISSING) if verdict.package else "-"
        row = [verdict.impl, "no" if verdict.reason else "yes", "yes" if verdict.auto else "no", version]
        *served, caveats = coverage(verdict.impl) if verdict.reason is None else [[]] * 6
        table.append((*row, *(" ".join(words) or "-" for words in served)))
        reasons.append((verdict.impl, verdict.reason or verdict.about))
        reasons += [("", f"not exact: {caveat}") for caveat in caveats]
    print("\n".join([*text_table(table), "", *text_table(reasons)]))
    chosen = ", ".join(f"{impl} in {' '.join(dtypes)}" for impl, dtypes in auto_choices().items())
    print(f"\nrecommended here: impl='auto', which takes {chosen}")


COMMANDS: dict[str, Command] = {
    **{
        name: Command(_train(name), method.about.partition(",")[0], f"--config recipes/{name}.yaml {method.example}")
        for name, method in METHODS.items()
    },
    "merge": Command(_merge, "an adapter's folder and its base model into one model", "runs/sft --out runs/merged"),
    "score": Command(
        _score, "log-probabilities of a data set", "--model_name_or_path M --dataset_name D --out s.parquet"
    ),
    "plan": Command(_plan, "the memory of a training step", "--model_name_or_path Qwen/Qwen3-1.7B --memory 24GiB"),
    "bench": Command(_bench, "time, memory and error of our impls beside other libraries", "logps --cases qwen3-1.7b"),
    "demo": Command(
        _demo, "SFT, then DPO with stock TRL and with fusedalign, on built-in data: a table and a picture in runs/demo"
    ),
    "env": Command(_env, "versions, devices, and which impl can run here"),
}

if __name__ == "__main__":
    sys.exit(main())
