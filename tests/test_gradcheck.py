"""fp64 finite differences of every differentiable output, with everything requiring grad and with parts frozen."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import IMPLS, OURS, finest, make_case

from fusedalign import linear_cross_entropy, linear_logps

IMPLS = [impl for impl in IMPLS if finest(impl) == torch.float64]
NEEDS = [n for n in itertools.product((True, False), repeat=3) if any(n)]


def _inputs(needs, **head):
    case = make_case((2, 3), 5, 13, dtype=torch.float64, ignored=0.2, **head)
    tensors = [x.requires_grad_(need) for x, need in zip((case.hidden, case.weight, case.bias), needs, strict=True)]
    return case, tensors


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("output", ["logps", "entropy", "lse", "all"])
def test_linear_logps(impl, needs, output):
    case, tensors = _inputs(needs, scale=0.7, softcap=4.0, temperature=1.3)

    def f(hidden, weight, bias):
        options = {"outputs": ("entropy", "lse"), "impl": impl, "token_chunk": 2, "vocab_chunk": 4}
        out = linear_logps(hidden, weight, case.targets, bias=bias, **case.head, **options)
        return (out.logps, out.entropy, out.lse) if output == "all" else getattr(out, output)

    assert torch.autograd.gradcheck(f, tensors)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"reduction": "sum"}, {"num_items": 3, "z_loss": 0.2}])
@pytest.mark.parametrize("token_chunk", [None, 2, 100])
def test_linear_cross_entropy(impl, needs, options, token_chunk):
    """nll; "dft" has a constant factor that finite differences would move, its test is elsewhere."""
    case, tensors = _inputs(needs, scale=0.7, softcap=4.0)

    def f(hidden, weight, bias):
        tiles = {"token_chunk": token_chunk, "vocab_chunk": 4}
        return linear_cross_entropy(hidden, weight, case.targets, bias=bias, impl=impl, **case.head, **options, **tiles)

    assert torch.autograd.gradcheck(f, tensors)


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("needs_weight", [False, True])
@pytest.mark.parametrize("call", [linear_cross_entropy, linear_logps, partial(linear_logps, loss_hint="nll")])
def test_a_gradient_penalty_is_right_or_raises(impl, needs_weight, call):
    """Never the loss's gradient alone. A graph of the backward that nobody differentiates does no harm."""
    case = make_case((2, 3), 5, 13, dtype=finest(impl), ignored=0.0)

    def penalised(loss_of):
        leaves = case.leaves(True, needs_weight, False)
        loss = loss_of(leaves)
        (grad,) = torch.autograd.grad(loss, leaves.hidden, create_graph=True)
        return leaves.hidden, grad.detach(), loss + grad.square().sum()

    def ours(leaves):
        out = call(leaves.hidden, leaves.weight, leaves.targets, impl=impl)
        return out if isinstance(out, torch.Tensor) else -out.logps.mean()

    def eager(leaves):
        return F.cross_entropy((leaves.hidden @ leaves.weight.T).flatten(0, 1), leaves.targets.flatten())

    (hidden, grad, got), (exact_hidden, exact_grad, exact) = penalised(ours), penalised(eager)
    torch.testing.assert_close(grad, exact_grad)
    torch.testing.assert_close(got.detach(), exact.detach())
    if impl == "reference":
        got.backward()
        exact.backward()
        torch.testing.assert_close(hidden.grad, exact_hidden.grad)
    else:
        with pytest.raises(RuntimeError, match="differentiate twice"):
            got.backward()
