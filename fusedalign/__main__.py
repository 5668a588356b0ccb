"""`python -m fusedalign`, which `accelerate launch -m` can start on several devices."""

import sys

from fusedalign.cli import main

sys.exit(main())
