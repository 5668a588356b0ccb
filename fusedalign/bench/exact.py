"""The exact answer of a task, which every row is compared with, and the errors that count as exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fusedalign.bench.data import Data, capped
from fusedalign.bench.tasks import Task
from fusedalign.losses import dpo_loss

#: Relative errors of loss, dH and dW that still count as exact, by dtype. Half precision: gradients are rounded twice,
#: each time by about 1.1e-3 rms (the logits' gradient, an operand of a product; the result). fp32: room for long sums.
BUDGETS = {
    torch.float32: {"loss": 1e-5, "dH": 1e-5, "dW": 1e-5},
    torch.bfloat16: {"loss": 1e-5, "dH": 2.5e-3, "dW": 2.5e-3},
    torch.float16: {"loss": 1e-5, "dH": 2.5e-3, "dW": 2.5e-3},
}


class Reference(NamedTuple):
    """The exact loss and gradients of a task."""

    loss_of: Callable[[Tensor], Tensor]
    """maps logps [N] to the scalar loss of the task"""
    loss: float
    hidden_grad: Tensor
    """[N, D], fp32 or wider"""
    weight_grad: Tensor | None
    """[V, D], fp32 or wider; None if the head is frozen"""

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """Of hidden states and weight."""
        return self.hidden_grad, self.weight_grad


def reference(task: Task, data: Data, *, seed: int) -> Reference:
    """The loss in fp64 and gradients in fp32 (fp64 for fp32 data), from full logits of some tokens at a time.

    Uses none of the measured code, and no TF32. Takes 8 to 12 bytes per element of the head.
    """
    allow_tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        with torch.no_grad():
            return _reference(task, data, seed)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32


def _reference(task: Task, data: Data, seed: int) -> Reference:
    wide = torch.float64 if data.hidden.dtype == torch.float32 else torch.float32
    chunk = max(1, 2**28 // data.weight.shape[0])

    def chunks(weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for start in range(0, len(data.hidden), chunk):
            tokens = slice(start, start + chunk)
            z = capped(data.hidden[tokens].to(weight.dtype) @ weight.T, data.softcap)
            yield tokens, data.targets[tokens, None], z

    # In fp64: the rounding of fp32 logits of 20 nats, summed over a sequence, is as large as the errors to be measured.
    exact = chunks(data.weight.double())
    logps = torch.cat([z.gather(-1, t).squeeze(-1) - z.logsumexp(-1) for _, t, z in exact])
    del exact
    weight = data.weight.to(wide)
    loss_of = _loss_of(task, logps, seed)
    with torch.enable_grad():
        loss = loss_of(logps.requires_grad_())
        (upstream,) = torch.autograd.grad(loss, logps)
    upstream = upstream.to(wide)

    hidden_grad = torch.empty_like(data.hidden, dtype=wide)
    weight_grad = torch.zeros_like(weight) if task.trains_head else None
    for tokens, t, z in chunks(weight):
        slope = None if data.softcap is None else 1 - (z / data.softcap).square()
        dz = z.softmax(-1).mul_(-upstream[tokens, None])
        dz.scatter_add_(-1, t, upstream[tokens, None])
        if slope is not None:
            dz *= slope
        hidden_grad[tokens] = dz @ weight
        if weight_grad is not None:
            weight_grad.addmm_(dz.T, data.hidden[tokens].to(wide))
    return Reference(loss_of, loss.item(), hidden_grad, weight_grad)


def _loss_of(task: Task, logps: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """The loss as a function of logps [N]; DPO's reference log-probabilities are near the exact `logps`."""
    n, device = len(logps), logps.device
    g = torch.Generator(device).manual_seed(seed + 1)
    if task.scalar:
        return lambda x: -x.mean()
    if task.name == "dpo":
        sums = logps.double().view(4, -1).sum(-1)
        ref = sums + 3 * torch.randn(4, generator=g, device=device)

        def dpo(x: Tensor) -> Tensor:
            # Summed in fp64: fp32 rounding of sums of thousands of nats would hide the error of an implementation.
            chosen, rejected = x.double().view(4, -1).sum(-1).view(2, 2)
            return dpo_loss(chosen, rejected, *ref.view(2, 2)).losses.mean()

        return dpo
    # All of one sign, since with cancellation the error of the sum would not reflect that of its terms.
    upstream = -(0.5 + torch.rand(n, generator=g, device=device)) / n
    return lambda x: (upstream * x).sum()


def relative_error(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact||, Frobenius norms, summed in fp64 over chunks in fp32 or wider."""
    chunks = zip(x.split(16384), exact.split(16384), strict=True)
    sums = [((a.to(b.dtype) - b).double().square().sum(), b.double().square().sum()) for a, b in chunks]
    difference, norm = (torch.stack(column).sum() for column in zip(*sums, strict=True))
    return (difference / norm).sqrt().item()
