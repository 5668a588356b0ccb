"""`fusedalign demo`: what this package changes in a training, and what it does not, on built-in data.

memory.py   the loss layer: measured in a step, computed for a model of common size
slots.py    token positions of padded and packed batches
command.py  the trainings, their progress and the table
plot.py     the picture
"""

from fusedalign.demo.command import demo

__all__ = ["demo"]
