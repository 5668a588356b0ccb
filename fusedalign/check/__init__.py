"""`fusedalign check`: what a training command would do, without the weights of its model.

weightless.py  the trainer of a command, built without weights and on a sample of its data
rows.py        the rows of the data as token sequences, before and after truncation
batches.py     the slots of batches, padded and packed
findings.py    what to look at
memory.py      the plan of the largest batch
decisions.py   what was decided for the run
text.py        the text of it all
training.py    all of it for a training command, printed
command.py     the command line
"""
