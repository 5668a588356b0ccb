"""The CUDA path of half-precision products, on a machine without CUDA.

On CUDA a product takes bf16 or fp16 operands and returns fp32. Here it is emulated: operands are rounded to half
precision and multiplied in fp32, as the hardware does up to the order of sums. Shapes and dtypes of the real calls are
checked with meta tensors.
"""

import pytest
import torch
from helpers import HEADS, OURS, Case, assert_within_budget, make_case, run
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedalign import linear_cross_entropy
from fusedalign.impls import pytorch, resolve
from fusedalign.impls.autograd import KeptExps, early_dtype
from fusedalign.impls.softmax import TokenGrads, ones_upstream
from fusedalign.problem import NeedsGrad, Problem

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def half_products(monkeypatch):
    calls = []

    def product(a, b):
        calls.append((a.dtype, b.dtype))
        return a.float() @ b.float() if a.dtype.itemsize == 2 else a @ b

    monkeypatch.setattr(pytorch, "_half_products", lambda problem: problem.operand_dtype.itemsize == 2)
    monkeypatch.setattr(pytorch, "_product", product)
    return calls


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 1)])
def test_errors_are_within_the_eager_budget(half_products, dtype, head, needs):
    for seed in (0, 1):
        case = make_case((3, 17), 33, 507, dtype=dtype, seed=seed, **head)
        got = run(case, needs=needs, impl="pytorch", token_chunk=20, vocab_chunk=100)
        assert_within_budget(case, got)
    assert set(half_products) == {(dtype, dtype)}


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0)])
def test_frozen_head_and_one_pass_are_within_budget(half_products, needs):
    for dtype in HALF:
        case = make_case((3, 17), 33, 507, dtype=dtype)
        assert_within_budget(case, run(case, ("logps",), needs, (), impl="pytorch"), ("logps",))
        exact, got = case.to(torch.float64).leaves(*needs), case.leaves(*needs)
        for c, impl in ((exact, "reference"), (got, "pytorch")):
            linear_cross_entropy(c.hidden, c.weight, c.targets, bias=c.bias, impl=impl, token_chunk=10).backward()
        for name, grad in got.grads().items():
            if grad is not None:
                size = exact.grads()[name].abs().max()
                assert (grad.double() - exact.grads()[name]).abs().max() <= 2 * size * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("upstream", [1e-6, 1.0, 65536.0])
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_fp16_gradients_of_logits_neither_overflow_nor_vanish(half_products, upstream, scale):
    """p of 1e-5 times an upstream of 1e-6 is far below fp16; a scale of 64 times 65536 far above."""
    case = make_case((4, 5), 16, 2000, dtype=torch.float16, bias=False, scale=scale)
    case.weight /= scale
    exact = case.to(torch.float64).leaves()
    (exact.logps(impl="reference").logps * upstream).sum().backward()
    got = Case(case.hidden.float(), case.weight.float(), case.targets, None, case.head).leaves()
    with torch.autocast("cpu", dtype=torch.float16):
        (got.logps(impl="pytorch").logps * upstream).sum().backward()
    for name in ("hidden", "weight"):
        want, grad = exact.grads()[name], got.grads()[name]
        assert (grad - want).norm() <= 2e-3 * want.norm(), name


@pytest.mark.parametrize("dtype", HALF)
def test_mm_calls_have_valid_shapes_and_dtypes_on_meta_tensors(monkeypatch, dtype):
    """Meta tensors check every call, including `torch.mm(..., out_dtype=)`, without computing values."""
    monkeypatch.setattr(pytorch, "_half_products", lambda problem: True)
    hidden = torch.empty(48, 32, dtype=dtype, device="meta")
    weight = torch.empty(200, 32, dtype=dtype, device="meta", requires_grad=True)
    bias, targets = weight.detach()[:, 0], torch.empty(48, dtype=torch.int64, device="meta")
    problem = Problem(hidden, weight, targets, dtype, bias, softcap=3.0, outputs=frozenset(["entropy", "lse"]))
    with torch.no_grad():
        sums, jacobian = pytorch.IMPL.sweep(problem, "jacobian")
        grads = TokenGrads(sums.max, sums.log_e(), sums.e, sums.e, (sums.e, sums.e))
        two_pass = pytorch.IMPL.two_pass_grads(problem, grads, NeedsGrad(True, True, True))
        _, loss, one_pass = pytorch.IMPL.one_pass(
            problem,
            lambda logps, lse: (lse - logps, -torch.ones_like(logps), torch.ones_like(lse)),
            NeedsGrad(True, True, True),
        )
    assert {x.dtype for x in [loss, *sums.results(problem)[:3]]} == {torch.float32}
    for (d_hidden, (d_weight,), d_bias), hidden_dtype in ((two_pass, dtype), (one_pass, early_dtype(dtype))):
        assert (d_hidden.shape, d_hidden.dtype) == (hidden.shape, hidden_dtype)
        for x, grad in ((weight, d_weight), (bias, d_bias)):
            assert (grad.shape, grad.dtype) == (x.shape, dtype)
    assert jacobian.rows.dtype == torch.float16


def test_cuda_tensors_use_half_products():
    with FakeTensorMode():
        hidden, targets = torch.empty(4, 8, device="cuda"), torch.empty(4, dtype=torch.int64, device="cuda")
        for dtype, expected in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
            assert pytorch._half_products(Problem(hidden, hidden, targets, dtype)) is expected


@pytest.mark.parametrize("impl", [name for name in OURS if name != "reference"])
@pytest.mark.parametrize("keep", ["nothing", "exps"])
def test_the_gradient_of_hidden_is_rounded_only_if_asked(impl, keep):
    case = make_case((6,), 16, 101, dtype=torch.bfloat16, ignored=0.0).leaves()
    problem = Problem(case.hidden, case.weight, case.targets, torch.bfloat16, case.bias)
    impl = resolve(impl, problem)
    with torch.no_grad():
        d_hidden = []
        for round_hidden in (True, False):
            stats, kept = impl.sweep(problem, keep)
            grads = ones_upstream(stats)
            kept = kept if isinstance(kept, KeptExps) else None
            needs = problem.requires_grad
            d_hidden.append(impl.two_pass_grads(problem, grads, needs, kept=kept, round_hidden=round_hidden)[0])
    assert [x.dtype for x in d_hidden] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(d_hidden[1].bfloat16(), d_hidden[0])
