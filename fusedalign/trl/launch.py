"""Start a command again through `accelerate launch`, where `accelerate_config` or a flag of the launcher is given."""

from __future__ import annotations

import importlib.resources
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import is_deepspeed_available

from fusedalign.trl.arguments import Parser, read_words

#: Environment variable with the words of the command that has started the launcher of this process.
_WORDS = "FUSEDALIGN_WORDS"


def launched_elsewhere(command: str, parser: Parser, argv: Sequence[str]) -> bool:
    """Run the command through `accelerate launch` if the words ask for it, and return whether they did.

    They do with `accelerate_config`, or with a flag that only the launcher has, such as `--num_processes`; that flag is
    passed on.

    Raises:
        ValueError: no such configuration; a word that neither the command nor the launcher knows; a word for the
            launcher where another one has started this process; this machine lacks DeepSpeed, or GPUs.
        RuntimeError: the launched command failed; it has printed why.
    """
    words = read_words(parser, argv)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # this process has been launched
        misplaced = [word for word in words.launch if word.startswith("--") and word in argv]
        if misplaced:
            raise ValueError(f"{misplaced[0]} must come before `-m fusedalign`: accelerate launch has started already")
        return False
    name = words.values.accelerate_config
    if name is None and not words.launch:
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ:
        word = words.launch[0] if name is None else "accelerate_config"
        raise ValueError(f"{word} must be left out under torchrun, which has started the processes already, got it")
    config = [] if name is None else ["--config_file", config_file(str(name))]
    flags = [*config, *words.launch]
    processes = processes_here(flags)
    launcher = [sys.executable, "-m", "fusedalign.trl.launcher", *flags, *_for_several(flags)]
    os.environ.update(words.env)
    variables = {_WORDS: shlex.join(argv)}
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:  # torchrun would take 1, with a warning of six lines
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    status = _run([*launcher, "-m", "fusedalign", command, *words.fields], variables)
    if status:
        raise RuntimeError(f"accelerate launch ended with status {status}")
    return True


def _run(command: Sequence[str], variables: Mapping[str, str]) -> int:
    """The exit status of a launcher; after Ctrl-C, which it gets too, it has the time to end its processes.

    Raises:
        KeyboardInterrupt: after the launcher has ended.
    """
    with subprocess.Popen(command, env=os.environ | variables) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def config_file(name: str) -> str:
    """A file of accelerate's that exists, or that TRL ships under this name. ValueError for another name."""
    if Path(name).is_file():
        return name
    shipped = {Path(file.name).stem: file for file in importlib.resources.files("trl.accelerate_configs").iterdir()}
    if not name.isidentifier() or name not in shipped:
        names = ", ".join(sorted(stem for stem in shipped if not stem.startswith("_")))
        raise ValueError(f"accelerate_config must be a file that exists or one of {names}, got {name!r}")
    return str(shipped[name])


def command_line(method: str, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command that has started this run, up to its method, and the words after that, the launcher's included."""
    if _WORDS in os.environ:
        return ["fusedalign", method], shlex.split(os.environ[_WORDS])
    return [*started_by(method, argv), method], list(argv)


def _launch_options(flags: Sequence[str]) -> tuple[Any, Any]:
    """The options of `accelerate launch` with these flags, and the configuration of its file; None: it reads none."""
    from accelerate.commands.config import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args([*flags, "-m", "fusedalign"])
    has_file = options.config_file or (Path(default_config_file).is_file() and not options.cpu)
    return options, load_config_from_file(options.config_file) if has_file else None


def _is_alone(options: Any, config: Any) -> bool:
    """Whether `accelerate launch` starts a single process, whatever its number, unless it finds several GPUs."""
    engines = ("multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")
    kind = getattr(config, "distributed_type", "NO")
    return str(getattr(kind, "value", kind)) == "NO" and not any(getattr(options, name) for name in engines)


def _for_several(flags: Sequence[str]) -> list[str]:
    """`--multi_gpu` where `--num_processes` asks for several, but one would be started; they may run on the CPU.

    Raises:
        ValueError: several processes with `--cpu`, which accelerate starts with MPI only.
    """
    options, config = _launch_options(flags)
    if (options.num_processes or 1) <= 1 or not _is_alone(options, config) or options.mpirun_hostfile:
        return []
    if options.cpu:
        raise ValueError(
            f"num_processes must be 1 with --cpu, which starts one process, got {options.num_processes}: "
            "pass --use_cpu true instead of --cpu"
        )
    return ["--multi_gpu"]


def processes_here(flags: Sequence[str]) -> int:
    """The number of processes that `accelerate launch` with these flags is to start on this machine.

    Raises:
        ValueError: they need DeepSpeed, or GPUs, that this machine lacks.
    """
    options, config = _launch_options(flags)
    by_deepspeed = options.use_deepspeed or getattr(config, "distributed_type", None) == "DEEPSPEED"
    if by_deepspeed and not is_deepspeed_available():
        raise ValueError("ZeRO needs DeepSpeed, which is not installed: pip install deepspeed, or use fsdp2")
    machines = options.num_machines or getattr(config, "num_machines", None) or 1
    # TRL's single_gpu has num_processes 8, which accelerate ignores.
    named = 1 if _is_alone(options, config) else getattr(config, "num_processes", None) or 1
    processes = (options.num_processes or named) // machines
    gpus = torch.accelerator.device_count()  # without any the ranks run on the CPU
    if 0 < gpus < processes and not (options.cpu or getattr(config, "use_cpu", False)):
        raise ValueError(
            f"num_processes must be at most {gpus}, the GPUs of this machine, got {processes}: "
            f"add --num_processes {gpus * machines}"
        )
    return processes


def started_by(method: str, argv: Sequence[str]) -> list[str]:
    """The words before `method` in the command that started this process: `fusedalign`, or that of its launcher."""
    words = [method, *argv]
    try:
        line = psutil.Process(os.getppid()).cmdline() if "LOCAL_RANK" in os.environ else []
    except psutil.Error:
        line = []
    return line[: -len(words)] if line[-len(words) :] == words else ["fusedalign"]
