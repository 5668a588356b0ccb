"""The training commands: help and wrong flags without importing torch, then the training itself."""

from __future__ import annotations

from collections.abc import Callable

from fusedalign.commandline import calm_threads
from fusedalign.reports import warn
from fusedalign.trl.help import help_text


def training_command(method: str, argv: list[str], preview: Callable[[], None]) -> None:
    """Run the command of a training method, here or through `accelerate launch`; with `dry_run` only `preview`."""
    if {"-h", "--help", "--help_all"} & set(argv):
        print(help_text(method, everything="--help_all" in argv))
        return
    if not argv:
        raise ValueError(
            f"{method} needs a model and data, got nothing: `fusedalign {method} --config {method}` runs the recipe, "
            f"`fusedalign {method} --help` lists the flags"
        )
    from fusedalign.trl.arguments import method_parser, read_words
    from fusedalign.trl.launch import launched_elsewhere
    from fusedalign.trl.train import train

    calm_threads()
    if read_words(method_parser(method), argv).values.dry_run:
        preview()
        return
    if launched_elsewhere(method, method_parser(method), argv):
        return
    trainer, written = train(method, argv)
    if trainer.is_world_process_zero():
        print(written)
        for text in written.warnings:
            warn(text)
