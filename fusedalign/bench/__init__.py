"""`fusedalign bench`: time, memory and error of our impls and of other libraries, measured in one run.

    cases.py      the shapes
    data.py       inputs for them, random or like a trained model's, and their statistics
    tasks.py      the losses on top of the head, and their exact values
    peers.py      the rows: our impls and other implementations
    measure.py    time, memory, the rate of a large product
    runner.py     one table per case and task
    table.py      Markdown, JSON, plot
    profiling.py  the time of one row by kernel
    command.py    the command line
    microbatches.py  the command `microbatches`: a pipeline's last stage, with many forwards in flight
    training/        the command `trl`: whole training steps, stock TRL against the Fused trainers
    scoring.py       the command `score`: log-probabilities of preference pairs

To add a benchmark of another kind: a module with its function, and a row in `SUBCOMMANDS` of command.py.
"""

from fusedalign.bench.command import bench
from fusedalign.bench.runner import Report, Settings, run

__all__ = ["Report", "Settings", "bench", "run"]
