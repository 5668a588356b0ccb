"""fp64 finite differences of every differentiable output, with everything requiring grad and with parts frozen."""

import itertools

import pytest
import torch
from helpers import IMPLS, finest, make_case

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
