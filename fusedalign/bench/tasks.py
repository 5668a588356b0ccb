"""The four tasks: losses on top of the head."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A loss and the tensors that it trains."""

    name: str
    about: str
    trains_head: bool = True
    scalar: bool = False
    """the loss is the mean NLL, for which many libraries have a function"""
    scores: bool = False
    """the forward is timed without gradients, as in scoring, instead of as in training"""


TASKS = {
    task.name: task
    for task in (
        Task("logps", "an upstream gradient for each token; the forward is that of scoring", scores=True),
        Task("sft", "the mean NLL", scalar=True),
        Task("frozen", "as logps, the head needs no gradient; the forward is that of training", trains_head=False),
        Task("dpo", "sigmoid DPO on the summed logps of two pairs of N/4 tokens a sequence"),
    )
}
