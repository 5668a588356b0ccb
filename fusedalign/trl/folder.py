"""The output directory of a run: earlier results are not overwritten, and a run can resume from a checkpoint."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusedalign.trl.lock import Lock, locked

METRICS, PLOT, RECORD = "metrics.jsonl", "metrics.png", "run.json"
_STATE = "trainer_state.json"
#: Files of a model or an adapter, with the weights in one file or several.
_MODEL = re.compile(
    r"adapter_config\.json|(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)
_LAST, _NONE = ("last", "true"), ("", "none", "null", "false", "no")


class Checkpoint(NamedTuple):
    """A checkpoint that a run can resume from."""

    path: Path
    step: int


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None if it is incomplete: the trainer writes its state last."""
    try:
        return Checkpoint(path, int(json.loads((path / _STATE).read_text(encoding="utf-8"))["global_step"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def last_checkpoint(output: Path) -> Checkpoint | None:
    """The latest complete checkpoint of an output directory."""
    checkpoints = [checkpoint for path in _checkpoint_folders(output) if (checkpoint := read_checkpoint(path))]
    return max(checkpoints, key=lambda checkpoint: checkpoint.step, default=None)


def find_checkpoint(value: str | bool | None, output: Path) -> Checkpoint | None:
    """The checkpoint that the field `resume_from_checkpoint` names; None: a run from the start.

    Args:
        value: a folder; "last" or true for the latest one in the output directory; "false" or "none" for none.
        output: the output directory.

    Raises:
        ValueError: there is no such checkpoint.
    """
    word = str(value).lower()
    if word in _NONE:
        return None
    if word in _LAST:
        last = last_checkpoint(output)
        if last is None:
            raise ValueError(
                f"resume_from_checkpoint={word} must find a checkpoint in output_dir, got {output} without one; "
                "--save_strategy steps or epoch saves some"
            )
        return last
    checkpoint = read_checkpoint(Path(str(value)))
    if checkpoint is None:
        nested = last_checkpoint(Path(str(value)))
        hint = f"; the last one in there is {nested.path}" if nested else ""
        raise ValueError(
            f"resume_from_checkpoint must be last, or a checkpoint's folder with a {_STATE}, got {value}{hint}"
        )
    return checkpoint


class RunFolder:
    """An output directory while a run, which may resume from a checkpoint, holds it.

    `lock` is None in all processes but the first, the only one that writes.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint | None = None, lock: Lock | None = None) -> None:
        self.path, self.checkpoint, self.lock = path, checkpoint, lock
        self.begun = False
        self.metrics, self.plot, self.record = path / METRICS, path / PLOT, path / RECORD

    @property
    def continues(self) -> bool:
        """Whether the run resumes from a checkpoint of this directory."""
        return self.checkpoint is not None and self.checkpoint.path.resolve().parent == self.path.resolve()

    @property
    def has_metrics(self) -> bool:
        """Whether an earlier run has logged here."""
        return self.metrics.is_file() and self.metrics.stat().st_size > 0

    def superseded(self) -> list[Path]:
        """An earlier run's files that this run replaces; when it resumes, only later checkpoints."""
        checkpoints = _checkpoint_folders(self.path)
        if self.checkpoint is not None and self.continues:
            return [path for path in checkpoints if _step(path) > self.checkpoint.step]
        model = [path for path in sorted(self.path.iterdir()) if _MODEL.fullmatch(path.name)]
        return [*model, *checkpoints, *([self.metrics] if self.has_metrics else [])]

    def check(self, overwrite: bool, model: str | None) -> None:
        """Check that this run may start.

        Raises:
            ValueError: without `overwrite` it would replace files; it would replace the model that it starts from.
        """
        replaced = self.superseded()
        if self.continues:  # an incomplete checkpoint is no loss
            replaced = [path for path in replaced if read_checkpoint(path)]
        if replaced and not overwrite:
            names = ", ".join(path.name for path in replaced[:3]) + (", ..." if len(replaced) > 3 else "")
            latest = last_checkpoint(self.path)
            resume = f"--resume_from_checkpoint last goes on from {latest.path.name}, " if latest else ""
            kind = "no checkpoint later than the one to go on from" if self.continues else "no earlier run"
            raise ValueError(
                f"output_dir must hold {kind}, got {self.path} with {names}; "
                f"{resume}--overwrite_output_dir removes {'them' if len(replaced) > 1 else 'it'} first"
            )
        start, checkpoints = Path(model or "").resolve(), {path.resolve() for path in _checkpoint_folders(self.path)}
        if replaced and model and (start == self.path.resolve() or {start, *start.parents} & checkpoints):
            raise ValueError(f"output_dir must not hold the model that is trained, got {self.path} and {model}")

    def begin(self) -> None:
        """Remove the superseded files, right before the training."""
        if self.lock is None:
            return
        self.lock.check()
        self.begun = True
        for path in self.superseded():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if not self.continues:
            self.plot.unlink(missing_ok=True)

    def kept(self, command: Sequence[str], argv: Sequence[str]) -> str:
        """After an interruption: the saved files, and what resumes the run, `command` with its arguments `argv`."""
        if not self.begun:
            return f"nothing was trained yet, what was there is unchanged: {self.path}"
        last = last_checkpoint(self.path)
        saved = [f"{last.path} (step {last.step})"] if last else []
        saved += [str(self.metrics)] if self.has_metrics else []
        lines, words = [f"kept: {', '.join(saved) or 'nothing'}"], _without(argv, "--overwrite_output_dir")
        if last:
            words = [*_without(words, "--resume_from_checkpoint"), "--resume_from_checkpoint", "last"]
        else:
            words += ["--overwrite_output_dir"] if saved else []
            lines.append("no checkpoint was saved: --save_strategy steps --save_steps N saves one every N steps")
        return "\n".join([*lines, f"{'go on' if last else 'start anew'}: {shlex.join([*command, *words])}"])


def _checkpoint_folders(output: Path) -> list[Path]:
    if not output.is_dir():
        return []
    folders = [path for path in output.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(folders, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _without(words: Sequence[str], flag: str) -> list[str]:
    """The words without a flag and its value: `--flag`, `--flag value` or `--flag=value`."""
    others: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if name.replace("-", "_") != flag.replace("-", "_"):
            others.append(word)
        elif not equals and words and not words[0].startswith("--"):
            words.pop(0)
    return others


@contextlib.contextmanager
def claimed(arguments: Any) -> Iterator[RunFolder]:
    """Hold the output directory of a command's run, before model and data are loaded.

    `training.resume_from_checkpoint` becomes the checkpoint's folder, or None. Only the first process takes the lock
    and checks the directory; if it refuses, the launcher ends the others.

    Raises:
        ValueError: another run holds it, it holds a run that would be lost, or the checkpoint does not exist.
    """
    training, output = arguments.training, Path(arguments.training.output_dir)
    checkpoint = find_checkpoint(training.resume_from_checkpoint, output)
    training.resume_from_checkpoint = str(checkpoint.path) if checkpoint else None
    if training.process_index != 0:
        yield RunFolder(output, checkpoint)
        return
    with locked(output) as lock:
        folder = RunFolder(output, checkpoint, lock)
        folder.check(arguments.fused.overwrite_output_dir, arguments.model.model_name_or_path)
        yield folder
