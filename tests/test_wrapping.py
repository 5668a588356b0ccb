"""Inside activation checkpointing, `torch.compile` and saved-tensor hooks: the same numbers."""

import functools

import pytest
import torch
from helpers import DEVICES, IMPLS
from torch.utils.checkpoint import checkpoint

from fusedalign import linear_cross_entropy, linear_logps

TARGETS = torch.randint(0, 101, (3, 7), generator=torch.Generator().manual_seed(0)).index_fill(
    1, torch.tensor([0]), -100
)


def per_token(hidden, weight, impl):
    out = linear_logps(torch.tanh(hidden), weight, TARGETS.to(hidden.device), outputs=["entropy"], impl=impl)
    return (out.logps * torch.arange(7, device=hidden.device)).sum() + out.entropy.sum()


def scalar(hidden, weight, impl):
    return linear_cross_entropy(torch.tanh(hidden), weight, TARGETS.to(hidden.device), impl=impl)


def offloaded(f, *args):
    with torch.autograd.graph.save_on_cpu():
        return f(*args)


WRAPPERS = {
    "checkpoint": functools.partial(checkpoint, use_reentrant=False),
    "reentrant checkpoint": functools.partial(checkpoint, use_reentrant=True),
    "compile": lambda f, *args: torch.compile(f, backend="aot_eager")(*args),
    "offload": offloaded,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("f", [per_token, scalar])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_calls_give_the_same_numbers(impl, device, f, frozen, name):
    g = torch.Generator().manual_seed(1)
    tensors = torch.randn(3, 7, 16, generator=g), torch.randn(101, 16, generator=g)
    results = []
    for call in (lambda f, *args: f(*args), WRAPPERS[name]):
        hidden, weight = (x.to(device, copy=True).requires_grad_() for x in tensors)
        loss = call(f, hidden, weight.requires_grad_(not frozen), impl)
        loss.backward()
        results.append([loss.detach(), hidden.grad] + [weight.grad] * (not frozen))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_compiling_the_model_does_not_trace_the_tiles():
    """The graph breaks at the call: only the code before and after is compiled."""
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounter()
    hidden, weight = torch.randn(3, 7, 16), torch.randn(101, 16)
    torch.compile(per_token, backend=counter)(hidden, weight, "pytorch")
    assert counter.op_count < 40  # traced tiles would give several times as many
