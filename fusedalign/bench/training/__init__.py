"""`fusedalign bench trl`: whole training steps on rows of uneven length, stock TRL beside the Fused trainers.

    settings.py   what can be measured: trainings, models, mixes of lengths, the rows of a table
    data.py       rows of random words with the lengths of a mix
    worker.py     one training in this process, measured; as a program, into a JSON file
    processes.py  the same in a process of its own, with kernels that are not compiled yet
    table.py      the text: a header, a table for each training, model and mix, notes
    plot.py       the same as bars
    quiet.py      trainers without their own output
    command.py    the words on the command line

The model is built on the device from a configuration, the data on the spot: nothing is loaded or saved.
"""
