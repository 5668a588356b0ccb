"""`fusedalign plan`: the peak memory of a training step, from a model's configuration alone.

shape.py    the records: a layer, a backbone's trace, a model, a step
trace.py    one layer of each kind, run over tensors without memory
model.py    the records of a configuration
sizes.py    from records to bytes and formulas
advice.py   which change helps most
plan.py     all of it together
table.py    the text
command.py  the words on the command line
"""

from fusedalign.plan.command import plan_command

__all__ = ["plan_command"]
