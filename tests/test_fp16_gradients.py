"""fp16 gradients of a scalar loss are as exact as eager code's, whatever factor scales the loss.

A gradient computed before that factor is known must not be stored in fp16, whose range is 6e-8 to 65504.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import DEVICES, IMPLS, Case, assert_loss_within_budget, make_case, run_loss

from fusedalign import LinearCrossEntropyLoss, linear_cross_entropy

FP16, FP32 = torch.float16, torch.float32
HEADS = [FP32, FP16]
NEEDS = [(1, 1, 1), (1, 0, 0), (0, 1, 0), (1, 0, 1)]
#: (loss options, factor): gradients that underflow fp16 before the factor is applied, and that overflow it.
SMALL = [
    ({"num_items": 2**18}, 65536.0),
    ({"num_items": 2**20}, 65536.0),
    ({"num_items": 2**20, "loss_type": "dft"}, 2.0**17),
]
LARGE = [({"reduction": "sum", "z_loss": 0.5}, upstream) for upstream in (1e-3, 0.0)]


def fp16_case(device, head=FP32, *, seed=0) -> Case:
    case = make_case((2, 9), 8, 61, dtype=FP16, device=device, seed=seed)
    return replace(case, weight=case.weight.to(head), bias=case.bias.to(head))


def steep_case(device, head=FP32) -> Case:
    """One column's bias makes the lse 8000 nats at every token, so gradients summed over tokens exceed fp16's range."""
    case = fp16_case(device, head)
    case.bias[7] = 8000
    return case


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("needs", NEEDS)
def test_gradients_that_underflow_before_the_factor_are_exact(impl, device, head, needs):
    for seed, (options, upstream) in enumerate(SMALL):
        case = fp16_case(device, head, seed=seed)
        got = run_loss(case, needs, upstream=upstream, impl=impl, **options)
        assert_loss_within_budget(case, got, upstream=upstream, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("needs", NEEDS)
def test_gradients_that_overflow_before_the_factor_are_exact(impl, device, head, needs):
    for options, upstream in LARGE:
        case = steep_case(device, head)
        got = run_loss(case, needs, upstream=upstream, impl=impl, **options)
        assert_loss_within_budget(case, got, upstream=upstream, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("needs", NEEDS[:2])
def test_compiled_gradients_are_exact(device, backend, head, needs):
    torch.compiler.reset()
    call = torch.compile(partial(linear_cross_entropy, impl="pytorch"), backend=backend, fullgraph=True)
    for options, upstream in (SMALL[1], LARGE[0], LARGE[1]):
        case = steep_case(device, head) if "z_loss" in options else fp16_case(device, head)
        got = run_loss(case, needs, upstream=upstream, call=call, **options)
        assert_loss_within_budget(case, got, upstream=upstream, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_module_gradients_are_exact(device, head):
    options, upstream = SMALL[1]
    case = fp16_case(device, head)
    layer = torch.nn.Linear(16, 211, device=device, dtype=head)
    layer.weight, layer.bias = torch.nn.Parameter(case.weight.clone()), torch.nn.Parameter(case.bias.clone())
    hidden = case.hidden.clone().requires_grad_()
    loss = LinearCrossEntropyLoss(layer)(hidden, case.targets, options["num_items"])
    (loss * upstream).backward()
    got = {"loss": loss.detach(), "dhidden": hidden.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad}
    assert_loss_within_budget(case, got, upstream=upstream, **options)
