"""fp64 finite differences of every differentiable output, with all inputs trained and with some frozen."""

import itertools

import pytest
import torch
from helpers import IMPLS, finest, make_case

from fusedalign import linear_cross_entropy, linear_logps

IMPLS = [impl for impl in IMPLS if finest(impl) == torch.float64]
#: The reference has no tile options.
CHUNKS = [(impl, chunk) for impl in IMPLS for chunk in (None, 2, 100) if impl != "reference" or chunk is None]
NEEDS = [n for n in itertools.product((True, False), repeat=3) if any(n)]


def _inputs(needs, **head):
    """One of 4 tokens is ignored and V is 7: chunks of 2 tokens and 3 columns leave a ragged last tile of each."""
    case = make_case((2, 2), 3, 7, dtype=torch.float64, seed=1, **head)
    assert case.valid.sum() == 3
    tensors = [x.requires_grad_(need) for x, need in zip((case.hidden, case.weight, case.bias), needs, strict=True)]
    return case, tensors


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("output", ["logps", "entropy", "lse", "all"])
def test_linear_logps_passes_gradcheck(impl, needs, output):
    case, tensors = _inputs(needs, scale=0.7, softcap=4.0, temperature=1.3)

    def f(hidden, weight, bias):
        options = {"outputs": ("entropy", "lse"), "impl": impl, "token_chunk": 2, "vocab_chunk": 3}
        out = linear_logps(hidden, weight, case.targets, bias=bias, **case.head, **options)
        return (out.logps, out.entropy, out.lse) if output == "all" else getattr(out, output)

    assert torch.autograd.gradcheck(f, tensors)


@pytest.mark.parametrize(("impl", "token_chunk"), CHUNKS)
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"reduction": "sum"}, {"num_items": 3, "z_loss": 0.2}])
def test_linear_cross_entropy_passes_gradcheck(impl, needs, options, token_chunk):
    """Only nll: the detached weight of "dft" is not constant under finite differences (tested elsewhere)."""
    case, tensors = _inputs(needs, scale=0.7, softcap=4.0)

    def f(hidden, weight, bias):
        tiles = {"token_chunk": token_chunk, "vocab_chunk": 3}
        return linear_cross_entropy(hidden, weight, case.targets, bias=bias, impl=impl, **case.head, **options, **tiles)

    assert torch.autograd.gradcheck(f, tensors)
