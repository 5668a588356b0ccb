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
    sharded.py       the command `sharded`: a head sharded over GPUs
    scaling.py       the command `scaling`: a head on many GPUs, calculated
    scoring.py       the command `score`: log-probabilities of preference pairs

To add a benchmark of another kind: a module with its function, and a row in `SUBCOMMANDS`.
"""

from fusedalign.commandline import Command

SUBCOMMANDS = {
    "microbatches": Command(
        "fusedalign.bench.microbatches:microbatches",
        "a pipeline's last stage, with many forwards in flight",
        "--count 8",
    ),
    "trl": Command(
        "fusedalign.bench.training.command:trainings",
        "whole training steps, stock TRL against the Fused trainers",
        "dpo --sizes 0.6b",
    ),
    "sharded": Command(
        "fusedalign.bench.sharded:sharded", "a head sharded over the GPUs of this machine, against one GPU", "--ranks 2"
    ),
    "scaling": Command(
        "fusedalign.bench.scaling:scaling",
        "a head on 8 to 1,024 GPUs, calculated: memory, compute, communication",
        "--ranks 8,64",
    ),
    "score": Command(
        "fusedalign.bench.scoring:scoring",
        "log-probabilities of preference pairs, against other ways to score",
        "--size 0.6b",
    ),
}
