"""The command `fusedalign check`; the modules that do the work are imported once its help is ruled out."""

from __future__ import annotations

from fusedalign.commandline import calm_threads, fit, terminal_width
from fusedalign.methods import METHODS
from fusedalign.recipes import config_path

USAGE = """\
usage: fusedalign check METHOD --config CONFIG [--field VALUE ...]
       fusedalign check CONFIG [--field VALUE ...]

Shows what a training command would do, without the weights of its model: three rows as the model will \
see them, lengths, what is cut, batches, memory, what was decided, and what to look at.

METHOD is one of {methods}; the words after it are those of `fusedalign METHOD`, which does \
the same with --dry_run. CONFIG is a YAML file, or the name of a recipe. \
Where neither its name, its keys nor the columns of its data tell the method, name it."""


def check_command(argv: list[str]) -> None:
    """Run `fusedalign check` with the words that follow it; raises as the training command would."""
    if {"-h", "--help"} & set(argv):
        print(fit(USAGE.format(methods=", ".join(METHODS)), terminal_width()))
        return
    if not argv:
        raise ValueError("check needs METHOD --config CONFIG, or CONFIG, got nothing")
    first, *words = argv
    config = None
    if first == "--config" or first.startswith("--config="):
        config, words = first.partition("=")[2] or (words or [""])[0], argv
    elif first not in METHODS or not words:
        config, words = first, ["--config", first, *words]
    if config is not None:
        config_path(config)  # raises before torch is imported
    calm_threads()
    from fusedalign.check.training import check_training, find_method

    check_training(first if config is None else find_method(config), words)
