"""The command `fusedalign support`; what it prints is found once its help is ruled out, which imports torch."""

from __future__ import annotations

from collections.abc import Sequence

from fusedalign.commandline import CommandParser


def support_command(argv: Sequence[str]) -> None:
    """Run `fusedalign support`. Raises ValueError, one line, for bad arguments or a model that cannot be built."""
    parser = CommandParser(
        "fusedalign support", "What works with a model, from its configuration; no weights are read: docs/models.md."
    )
    parser.add_argument(
        "--model_name_or_path", metavar="M", help="a folder with a config.json, a name of the Hub, or embedded"
    )
    options = parser.parse(argv)
    if options is None:
        return
    if options.model_name_or_path is None:
        raise ValueError(
            "support needs --model_name_or_path: a folder with a config.json, a name of the Hub, or embedded"
        )
    from fusedalign.plan.model import read_config
    from fusedalign.support import examine, render, small_model

    print(render(examine(small_model(read_config(options.model_name_or_path)))))
