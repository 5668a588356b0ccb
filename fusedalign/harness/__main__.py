"""The command `lm_eval`, with all of its arguments, once `fusedalign` is among its models."""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
