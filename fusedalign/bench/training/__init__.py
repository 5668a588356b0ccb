"""`fusedalign bench trl`: whole training steps on rows of uneven length, stock TRL against the Fused trainers.

    settings.py   what can be measured: trainings, models, mixes of lengths, the rows of a table
    data.py       rows of random words with the lengths of a mix
    worker.py     build, run and measure one training in this process
    __main__.py   the same as a program that writes JSON
    processes.py  run that program once per row of a table
    table.py      the text: a header, a table for each training, model and mix, notes
    plot.py       bars of the same figures
    quiet.py      silence the trainers
    command.py    the command line

Models have random weights and data are generated: nothing is loaded or saved.
"""
