"""The command `lm_eval`, with all of its arguments, once `fusedalign` is among its models."""

import logging
import sys

from lm_eval.__main__ import cli_evaluate


def main() -> int:
    """Run the command; wrong arguments of the model or the task are one line on stderr, and the status is 2."""
    try:
        cli_evaluate()
    except (ValueError, TypeError, OSError) as error:
        if logging.getLogger("lm_eval").isEnabledFor(logging.DEBUG):
            raise
        reason = " ".join(f"{error}".split()) or type(error).__name__
        print(f"fusedalign: error: {reason} (LMEVAL_LOG_LEVEL=DEBUG shows the traceback)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__" and (status := main()):
    sys.exit(status)
