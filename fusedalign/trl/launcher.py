"""`accelerate launch` without its traceback after Ctrl-C or an error: its processes say what happened.

The traceback after an error would also show the command, with its access tokens.
"""

from __future__ import annotations

import subprocess
import sys

from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.api import SignalException

if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, SignalException):
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
