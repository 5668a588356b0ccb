"""The command `lm_eval` with all its arguments, and `fusedalign` registered as a model."""

import logging
import sys

from lm_eval.__main__ import cli_evaluate

from fusedalign.commandline import one_line


def main() -> int:
    """Run the command; an invalid argument of the model or the task is one line on stderr and status 2."""
    try:
        cli_evaluate()
    except (ValueError, TypeError, OSError) as error:
        if logging.getLogger("lm_eval").isEnabledFor(logging.DEBUG):
            raise
        reason = one_line(error) or type(error).__name__
        print(f"fusedalign: error: {reason} (LMEVAL_LOG_LEVEL=DEBUG shows the traceback)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__" and (status := main()):
    sys.exit(status)
