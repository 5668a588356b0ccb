"""The command `fusedalign`: sft | dpo | kto | cpo | simpo | orpo | merge | score | plan | bench | demo | env."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import select
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import TextIO

import torch

import fusedalign
from fusedalign.impls import auto_choices, explain, reach
from fusedalign.reports import text_table, warn

_USAGE = """\
usage: fusedalign COMMAND [--debug] [...]

  sft   supervised fine-tuning             fusedalign sft --config recipes/sft.yaml --learning_rate 1e-4
  dpo   direct preference optimisation     fusedalign dpo --config recipes/dpo.yaml --beta 0.2
  kto, cpo, simpo, orpo                    likewise, each with a recipe of its name
  merge an adapter's folder and its base model into one model             fusedalign merge runs/sft --out runs/merged
  score log-probabilities of a data set     fusedalign score --model_name_or_path M --dataset_name D --out s.parquet
  plan  the memory of a training step      fusedalign plan --model_name_or_path Qwen/Qwen3-1.7B --memory 24GiB
  bench time, memory and error of our impls beside other libraries     fusedalign bench logps --cases qwen3-1.7b
  demo  SFT, then DPO with stock TRL and with fusedalign, on built-in data: a table and a picture
  env   versions, devices, and which impl can run here

These take every field of TRL's configurations as --field VALUE or as a key of the YAML file; flags win.
fusedalign sft --help lists the usual ones. --debug shows the traceback of an error."""

_PACKAGES = ("triton", "transformers", "trl", "datasets", "accelerate", "peft", "liger-kernel", "cut-cross-entropy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after `fusedalign`; default: those of this process.

    Returns:
        The exit status: 0, or what the command says (`score --strict`: 3 where rows were refused);
        2 after an error, which is told in one line on stderr; 130 after Ctrl-C; 141 where the
        reader of the output has gone.
    """
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough: no words, and the status of a program that SIGPIPE ends
        for stream in _closed_streams():  # else the interpreter tries again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141
    return status


def _run(words: list[str]) -> int:
    # transformers has a flag of this name too, with a value: that one is passed on.
    ours = [i for i, word in enumerate(words) if word == "--debug" and "".join(words[i + 1 : i + 2])[:1] in ("", "-")]
    debug = bool(ours)
    words = [word for i, word in enumerate(words) if i not in ours]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_USAGE)
        return 0 if words else 2
    command, *rest = words
    if command in _ABOUT and rest in (["-h"], ["--help"]):
        print(f"usage: fusedalign {command}\n\n{_ABOUT[command]}")
        return 0
    try:
        if command not in COMMANDS:
            raise ValueError(f"command must be one of {', '.join(COMMANDS)}, got {command!r}")
        return COMMANDS[command](rest) or 0
    except KeyboardInterrupt as stop:  # a command that leaves something says so
        print("\n".join(["", "fusedalign: interrupted", *map(str, stop.args)]).rstrip(), file=sys.stderr)
        return 130
    except Exception as error:  # whatever it is, a user reads one line first
        if isinstance(error, BrokenPipeError) and _closed_streams():
            raise
        if debug:
            traceback.print_exc()
        hint = "" if debug else " (--debug shows the traceback)"
        print(f"fusedalign: error: {_one_line(error)}{hint}", file=sys.stderr)
        return 2


#: The commands without arguments.
_ABOUT = {
    "demo": "SFT, then DPO with stock TRL and with fusedalign, on built-in data: a table and a picture in runs/demo.",
    "env": "Versions, devices, and which impl can run here.",
}
_EXTRA = ("trl", "transformers", "datasets", "accelerate", "peft", "matplotlib", "yaml")
_LONGEST = 400  # characters of a message: other libraries' go over many lines


def _closed_streams() -> list[TextIO]:
    """Those of stdout and stderr that have lost their reader."""
    if not hasattr(select, "poll"):  # Windows, which has another error for this
        return []
    closed = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # one that a test has replaced has no descriptor
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

    OpenMP's threads spin while they wait for each other. Where the second core is busy or virtual that made a small
    model's steps many times slower, against the factor of 2 that it can bring at best.
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
    rows = [("python", platform.python_version()), ("fusedalign", fusedalign.__version__), ("torch", torch.__version__)]
    rows += [(name, _version(name)) for name in _PACKAGES]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows.append(("CUDA devices", ", ".join(devices) or "none"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    print()
    titles = ["impl", "here", "auto", "version", "devices", "dtypes", "exact in", "outputs beside logps", "head"]
    table, why = [titles], []
    for v in explain():
        version = _version(v.package) if v.package else "-"
        row = [v.impl, "no" if v.reason else "yes", "yes" if v.auto else "no", version]
        *can, caveats = reach(v.impl) if v.reason is None else [[]] * 6
        table.append([*row, *(" ".join(words) or "-" for words in can)])
        why.append(f"{v.impl:<{width}}  {v.reason or v.about}")
        why += [f"{'':<{width}}  not exact: {caveat}" for caveat in caveats]
    print("\n".join([*text_table(table), "", *why]))
    chosen = ", ".join(f"{impl} in {' '.join(dtypes)}" for impl, dtypes in auto_choices().items())
    print(f"\nrecommended here: impl='auto', which takes {chosen}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    **{method: _train(method) for method in ("sft", "dpo", "kto", "cpo", "simpo", "orpo")},
    "merge": _merge,
    "score": _score,
    "plan": _plan,
    "bench": _bench,
    "demo": _demo,
    "env": _env,
}

if __name__ == "__main__":
    sys.exit(main())
