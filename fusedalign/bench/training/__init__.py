"""`fusedalign bench trl`: whole training steps on rows of uneven length, stock TRL against the Fused trainers.

    settings.py   what can be measured: trainings, models, mixes of lengths, the rows of a table
    data.py       rows of random words with the lengths of a mix
    worker.py     one training in this process, measured
    __main__.py   the same as a program, which writes JSON
    processes.py  that program, once for each row of a table
    table.py      the text: a header, a table for each training, model and mix, notes
    plot.py       the same as bars
    quiet.py      trainers without their own output
    command.py    the words on the command line

The model is built on the device from a configuration, the data on the spot: nothing is loaded or saved.
"""
