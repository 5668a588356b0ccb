"""`fusedalign bench`: our impls beside other libraries in one run, with time, memory and error of each.

    cases.py      the shapes
    data.py       inputs for them, random or like a trained model's, and their statistics
    tasks.py      the losses on top of the head, and the exact answer
    peers.py      the rows: our impls and what others have
    measure.py    time, memory, the rate of a large product
    runner.py     one table a case and task
    table.py      Markdown, JSON, plot
    profiling.py  where the time of one row goes
    microbatches.py  a pipeline's last stage, with many forwards in flight
    training/     whole training steps, stock TRL against the Fused trainers
    command.py    the words on the command line

A benchmark of another kind is a module or room of its own, chosen by its word in `command.bench`.
"""

from fusedalign.bench.command import bench
from fusedalign.bench.runner import Report, Settings, run

__all__ = ["Report", "Settings", "bench", "run"]
