"""Double backward through the head gives the right number or an error, however it is requested."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, IMPLS, OURS, finest, make_case
from torch.multiprocessing.reductions import StorageWeakRef

from fusedalign import linear_cross_entropy, linear_logps

ROADS = {
    "backward": lambda total, leaves: total.backward(),
    "backward(inputs)": lambda total, leaves: total.backward(inputs=leaves),
    "grad": lambda total, leaves: torch.autograd.grad(total, leaves),
    "grad of one": lambda total, leaves: torch.autograd.grad(total, leaves[:1]),
    "grad of the factor": lambda total, leaves: torch.autograd.grad(total, leaves[-1:]),
}
CALLS = {
    "cross entropy": linear_cross_entropy,
    "logps": linear_logps,
    "hint": partial(linear_logps, loss_hint="nll"),
    "entropy": partial(linear_logps, outputs=["entropy"]),
}


def penalised(case, call, *, needs_weight=True, needs_factor=False):
    """The leaves, the gradient of a loss with respect to hidden, and the loss plus that gradient squared."""
    leaves = case.leaves(True, needs_weight, False)
    factor = torch.ones((), dtype=leaves.hidden.dtype, device=leaves.hidden.device, requires_grad=needs_factor)
    out = call(leaves.hidden, leaves.weight, leaves.targets)
    loss = factor * (out if isinstance(out, torch.Tensor) else -sum(x.mean() for x in out if x is not None))
    (grad,) = torch.autograd.grad(loss, leaves.hidden, create_graph=True)
    tensors = [x for x in (leaves.hidden, leaves.weight, factor) if x.requires_grad]
    return tensors, grad.detach(), loss + grad.square().sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs_weight", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_a_gradient_penalty_is_right_or_raises(impl, device, needs_weight, call):
    """The penalty's gradient is never silently dropped. create_graph=True alone does no harm."""
    case = make_case((2, 3), 16, 13, dtype=finest(impl), device=device, ignored=0.0, bias=False)
    _, exact_grad, exact_total = penalised(
        case.to(torch.float64), partial(CALLS[call], impl="reference"), needs_weight=needs_weight
    )
    for name, road in ROADS.items():
        options = {"needs_weight": needs_weight, "needs_factor": name == "grad of the factor"}
        leaves, grad, total = penalised(case, partial(CALLS[call], impl=impl), **options)
        tolerance = {"atol": 0.02, "rtol": 0.02} if impl == "cce" else {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(grad.double(), exact_grad, **tolerance)
        torch.testing.assert_close(total.detach().double(), exact_total.detach(), **tolerance)
        if impl != "reference":
            with pytest.raises(RuntimeError, match="differentiate twice"):
                road(total, leaves)
    if impl == "reference":
        got = torch.autograd.grad(total, leaves)
        eager_leaves, _, eager_total = penalised(case, eager_call(call), **options)
        for x, want in zip(got, torch.autograd.grad(eager_total, eager_leaves), strict=True):
            torch.testing.assert_close(x, want)


def eager_call(name):
    """`linear_logps` from full logits."""

    def call(hidden, weight, targets):
        logps = (hidden @ weight.T).log_softmax(-1)
        if name == "cross entropy":
            return F.nll_loss(logps.flatten(0, 1), targets.flatten())
        chosen = logps.gather(-1, targets[..., None]).squeeze(-1)
        return (chosen, -(logps.exp() * logps).sum(-1)) if name == "entropy" else (chosen,)

    return call


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("needs_weight", [False, True])
@pytest.mark.parametrize("call", ["cross entropy", "logps"])
def test_a_compiled_gradient_penalty_raises(backend, needs_weight, call):
    case = make_case((2, 3), 16, 13, ignored=0.0, bias=False)
    torch.compiler.reset()
    compiled = torch.compile(partial(CALLS[call], impl="pytorch"), backend=backend, fullgraph=True)
    for name, road in ROADS.items():
        options = {"needs_weight": needs_weight, "needs_factor": name == "grad of the factor"}
        leaves, _, total = penalised(case, compiled, **options)
        with pytest.raises(RuntimeError, match=r"differentiate twice|double backward"):
            road(total, leaves)


@pytest.mark.parametrize("impl", OURS)
def test_a_gradient_penalty_outside_the_head_is_right(impl):
    """A penalty on a gradient that does not pass through the head works, while one that does is refused."""
    case = make_case((2, 3), 16, 13, dtype=finest(impl), ignored=0.0, bias=False).leaves()
    extra = torch.ones(3, dtype=case.hidden.dtype, requires_grad=True)
    loss = linear_cross_entropy(case.hidden, case.weight, case.targets, impl=impl) + extra.pow(3).sum()
    d_hidden, d_extra = torch.autograd.grad(loss, (case.hidden, extra), create_graph=True)
    (got,) = torch.autograd.grad(d_extra.sum(), extra)
    torch.testing.assert_close(got, torch.full_like(got, 6))
    assert d_hidden.requires_grad


@pytest.mark.parametrize("call", ["cross entropy", "frozen head"])
def test_the_double_backward_check_holds_no_hidden_states(call):
    """The check that makes double backward raise keeps no hidden states alive."""
    case = make_case((2, 3), 16, 13, ignored=0.0, bias=False).leaves(True, call == "cross entropy", False)
    function = linear_cross_entropy if call == "cross entropy" else linear_logps
    hidden = case.hidden * 1
    out = function(hidden, case.weight, case.targets, impl="pytorch")
    storage = StorageWeakRef(hidden.untyped_storage())
    del hidden
    assert storage.expired()
    del out
