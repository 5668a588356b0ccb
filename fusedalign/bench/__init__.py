"""`fusedalign bench`: time, memory and error of our impls and of other libraries, measured in one run.

The command lines, and what they name; none of these imports torch before it measures:

    command.py       `bench`: one table per case and task
    microbatches.py  `bench microbatches`: a pipeline's last stage, with many forwards in flight
    training/        `bench trl`: whole training steps, stock TRL against the Fused trainers
    sharded.py       `bench sharded`: a head sharded over GPUs
    scaling.py       `bench scaling`: a head on many GPUs, calculated
    scoring.py       `bench score`: log-probabilities of preference pairs
    cases.py         the shapes, and the kinds of data
    tasks.py         the losses on top of the head
    peers.py         the rows: our impls and other implementations
    machine.py       the device, and the versions of what is compared
    failures.py      exceptions of rows in one line

What measures:

    data.py       inputs for a case, random or like a trained model's, and their statistics
    exact.py      the exact values of a task
    measure.py    time, memory, the rate of a large product
    runner.py     one table per case and task
    table.py      Markdown, JSON, plot
    profiling.py  the time of one row by kernel
    stage.py      the micro-batches of `bench microbatches`
    ranks.py      the ranks of `bench sharded`
    scorers.py    the sides of `bench score`

To add a benchmark of another kind: a module with its function, which imports torch after its arguments are checked, and
a row in `SUBCOMMANDS`.
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
