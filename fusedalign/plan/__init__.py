"""`fusedalign plan`: the peak memory of a training step, from a model's configuration alone.

shape.py       the records: a layer, the trace of a backbone, a model, a step
trace.py       runs one layer of each kind over tensors without memory
simulation.py  stand-ins for a GPU there: counted storages, autocast, attention
model.py       the records of a configuration
sizes.py       from records to bytes and formulas
advice.py      which change saves most memory
plan.py        the complete plan
table.py       its text
command.py     the command line
"""
