"""The command `fusedalign env`; what it prints is gathered once its help is ruled out, which imports torch."""

from __future__ import annotations

from collections.abc import Sequence

from fusedalign.commandline import CommandParser
from fusedalign.reports import to_json


def env_command(argv: Sequence[str]) -> None:
    """Run `fusedalign env`."""
    parser = CommandParser("fusedalign env", "Versions, devices, and which impl can run here.")
    parser.add_argument("--json", action="store_true", help="print JSON, to be pasted into a bug report")
    options = parser.parse(argv)
    if options is None:
        return
    from fusedalign.environment import environment, environment_text

    print(to_json(environment(), indent=1) if options.json else environment_text())
