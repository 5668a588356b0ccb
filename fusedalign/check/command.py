"""The command `fusedalign check`; the modules that do the work are imported once its help is ruled out."""

from __future__ import annotations

from fusedalign.commandline import calm_threads
from fusedalign.methods import METHODS

USAGE = """\
usage: fusedalign check METHOD --config CONFIG [--field VALUE ...]
       fusedalign check CONFIG [--field VALUE ...]

Shows what a training command would do, without the weights of its model: three rows as the model
will see them, lengths, what is cut, batches, memory, what was decided, and what to look at.

METHOD is one of {methods}; the words after it are those of
`fusedalign METHOD`, which does the same with --dry_run. CONFIG is a YAML file, or the name of a
recipe. Where neither its name, its keys nor the columns of its data tell the method, name it."""


def check_command(argv: list[str]) -> None:
    """Run `fusedalign check` with the words that follow it; raises as the training command would."""
    if {"-h", "--help"} & set(argv):
        print(USAGE.format(methods=", ".join(METHODS)))
        return
    if not argv:
        raise ValueError("check needs METHOD --config CONFIG, or CONFIG, got nothing")
    calm_threads()
    from fusedalign.check.training import check_training, find_method

    first, *words = argv
    if first in METHODS and words:
        check_training(first, words)
    elif first == "--config" or first.startswith("--config="):
        check_training(find_method(first.partition("=")[2] or (words or [""])[0]), argv)
    else:
        check_training(find_method(first), ["--config", first, *words])
