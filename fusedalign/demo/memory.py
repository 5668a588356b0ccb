"""Memory of the loss layer: measured in a training step, and computed for a model of common size.

The loss layer is everything between the last hidden states and their gradient; the gradient of the head is part of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedalign.bench.cases import CASES, Case
from fusedalign.plan import sizes
from fusedalign.plan.shape import ITEM, Model, Step
from fusedalign.plan.simulation import LiveStorages

#: The head for which memory is computed: that of Qwen3-1.7B, for 4,096 tokens.
CASE = CASES["qwen3-1.7b"]
#: Bytes per logit at the peak of `F.cross_entropy`, in its backward: the log-softmax that the forward saves, its
#: gradient, and the gradient of the logits, in fp32. The gradient of the head comes later and takes less.
LOGIT_BYTES = 12


class LossMemory(NamedTuple):
    """Bytes at the peak of the loss layer of three ways to compute the same log-probabilities."""

    full_logits: int
    stock: int
    """TRL's own fused head"""
    fused: int


class Peaks(NamedTuple):
    """Bytes at the peak of the loss layer for one batch."""

    trainer: int
    full_logits: int
    """of `F.cross_entropy` on the logits of the same hidden states"""
    tokens: int
    """token positions that have logits there"""


def computed(case: Case = CASE) -> LossMemory:
    """The peaks for a bf16 head, by the formulas of `fusedalign plan`; the hidden states are counted too."""
    item = ITEM["bfloat16"]
    model = Model(case.name, case.vocab * case.hidden_size, item, case.vocab, case.hidden_size)
    step = Step("sft", batch=1, length=case.tokens)
    by_name = {part.name: part.bytes for part in sizes.head_layers(model, step)}
    hidden = 2 * case.tokens * case.hidden_size * item
    full_logits = case.tokens * case.vocab * LOGIT_BYTES + hidden
    return LossMemory(full_logits, by_name[sizes.STOCK], by_name[sizes.OURS])


def measure(trainer: Any) -> Peaks:
    """Run forward and backward of one training batch and measure its loss layer; no weight changes.

    Measured are the tensors that PyTorch's operators allocate, from the backbone's output to the end of the model's
    forward, and from the start of the backward to the gradient of the hidden states.
    """
    model, live = trainer.model.train(), LiveStorages()
    batch = next(iter(trainer.get_train_dataloader()))
    peaks: list[int] = []
    hidden_states: list[Tensor] = []
    held = 0

    def record(*_: object) -> None:
        peaks.append(live.peak - held)

    def begin(module: object, args: object, output: Any) -> None:
        nonlocal held
        hidden = output.last_hidden_state
        held = live.peak = live.bytes
        hidden.register_hook(record)
        hidden_states.append(hidden.detach())

    hooks = [model.base_model.register_forward_hook(begin), model.register_forward_hook(record)]
    # In this thread also on a GPU: the backward would run in another one, where nothing is counted.
    with torch.autograd.set_multithreading_enabled(False), live:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, batch)
        live.peak = live.bytes
        loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    (hidden,) = hidden_states
    weight, hidden = model.get_output_embeddings().weight, hidden[:, :-1].flatten(0, 1)
    return Peaks(max(peaks), full_logits_peak(hidden, weight, batch["input_ids"][:, 1:].flatten()), len(hidden))


def full_logits_peak(hidden: Tensor, weight: Tensor, targets: Tensor) -> int:
    """Bytes at the peak of `F.cross_entropy` on full logits: [N, D], [V, D] and [N] int64."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    with torch.autograd.set_multithreading_enabled(False), LiveStorages() as live:
        F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none").sum().backward()
    return live.peak
