"""`accelerate launch` without its traceback after Ctrl-C: the processes that it has started say what they saved."""

from __future__ import annotations

import sys

from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.api import SignalException

if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, SignalException):
        sys.exit(130)
