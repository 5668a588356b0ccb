"""Values and gradients of `linear_logps` against the fp64 reference, within the error budgets of eager code."""

import pytest
import torch
from helpers import (
    DEVICES,
    DIFFERENTIABLE,
    DTYPES,
    HEADS,
    IMPLS,
    LAYOUTS,
    RAGGED,
    Case,
    assert_within_budget,
    finest,
    make_case,
    rounds_logit_grads,
    run,
    strided_tokens,
)

from fusedalign import linear_logps
from fusedalign.problem import OUTPUTS, TokenLogps

pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.parametrize("impl", IMPLS)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", RAGGED)
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_and_gradients_are_within_the_eager_budget(impl, device, dtype, head, shape, seed):
    case = make_case(*shape, dtype=dtype, device=device, seed=seed, bias=seed == 0, **head)
    tiles = {"token_chunk": case.targets.numel() // 3, "vocab_chunk": shape[2] // 3} if seed == 1 else {}
    assert_within_budget(case, run(case, impl=impl, **tiles))


@pytest.mark.parametrize("head", HEADS)
def test_float16_is_within_the_eager_budget(impl, device, head):
    case = make_case((3, 17), 64, 303, dtype=torch.float16, device=device, **head)
    assert_within_budget(case, run(case, impl=impl, vocab_chunk=128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [("logps",), ("entropy",), ("lse",), ("entropy", "lse")])
def test_each_output_has_its_own_gradient(impl, device, dtype, names):
    case = make_case((3, 7), 16, 101, dtype=dtype, device=device, softcap=4.0)
    assert_within_budget(case, run(case, names, impl=impl, vocab_chunk=32), names)


@pytest.mark.parametrize("needs", [(h, w, b) for h in (0, 1) for w in (0, 1) for b in (0, 1)])
def test_frozen_inputs_get_no_gradient_and_the_others_are_exact(impl, device, needs):
    case = make_case((3, 7), 16, 101, dtype=finest(impl), device=device, scale=0.5, softcap=6.0)
    options = {"impl": impl, "outputs": ("entropy", "lse"), "vocab_chunk": 13}
    if not any(needs):
        assert not case.leaves(0, 0, 0).logps(**options).logps.requires_grad
        return
    got = run(case, needs=needs, **options)
    expected = {f"d{name}" for name, needed in zip(("hidden", "weight", "bias"), needs, strict=True) if needed}
    assert {name for name in got if name.startswith("d")} == expected
    assert_within_budget(case, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        ((), ("logps",)),
        (("entropy", "lse"), ("logps",)),
        (("lse",), ("logps", "lse")),
        (("entropy",), ("logps", "entropy")),
        (("entropy",), ("entropy",)),
    ],
)
def test_a_frozen_head_gives_the_hidden_gradient(impl, device, dtype, outputs, names):
    """The saved Jacobian gives the gradient of logps, whether other outputs are requested or used."""
    case = make_case((4, 9), 24, 203, dtype=dtype, device=device, softcap=3.0, temperature=0.8)
    frozen = (True, False, False)
    got = run(case, names, frozen, outputs, impl=impl, vocab_chunk=64)
    assert "dhidden" in got
    assert_within_budget(case, got, names)


@pytest.mark.parametrize("name", OUTPUTS)
def test_only_requested_outputs_are_computed(impl, device, name):
    out = make_case((2, 5), 7, 11, device=device).logps(impl=impl, outputs=[name])
    assert [k for k in OUTPUTS if getattr(out, k) is not None] == [name]
    assert isinstance(out, TokenLogps)
    assert getattr(out, name).shape == (2, 5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_results_have_the_documented_dtypes(impl, device, dtype):
    out = make_case((2, 5), 7, 11, dtype=dtype, device=device).logps(impl=impl, outputs=OUTPUTS)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in out[:-1]} == {expected}
    assert out.is_top1.dtype == torch.bool


@pytest.mark.parametrize("hidden_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mixed_dtypes_use_the_wider_one(impl, device, hidden_dtype, weight_dtype):
    case = make_case((3, 9), 24, 203, device=device)
    case = Case(case.hidden.to(hidden_dtype), case.weight.to(weight_dtype), case.targets, case.bias)
    got, exact = run(case, ("logps",), impl=impl, outputs=()), run(case.to(torch.float64), ("logps",), impl="reference")
    assert got["logps"].dtype == (torch.float64 if hidden_dtype == torch.float64 else torch.float32)
    for name in ("hidden", "weight", "bias"):
        assert got[f"d{name}"].dtype == getattr(case, name).dtype
    torch.testing.assert_close(got["logps"].double(), exact["logps"], rtol=1e-5, atol=1e-5)
    if hidden_dtype == weight_dtype == torch.bfloat16 and rounds_logit_grads(impl, device):
        assert_within_budget(case, got, ("logps",))
        return
    for name in ("dhidden", "dweight", "dbias"):
        eps = torch.finfo(got[name].dtype).eps
        torch.testing.assert_close(got[name].double(), exact[name], rtol=2 * eps, atol=2e-6, msg=name)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_only_the_operands(impl, device, weight_dtype):
    case = make_case((3, 9), 24, 203, device=device, bias=False)
    case = Case(case.hidden, case.weight.to(weight_dtype), case.targets).leaves()
    with torch.autocast(device, dtype=torch.bfloat16):
        out = case.logps(impl=impl)
        out.logps.sum().backward()  # autocast around the call only
    rounded = Case(case.hidden.bfloat16().double(), case.weight.bfloat16().double(), case.targets).leaves()
    exact = rounded.logps(impl="reference")
    exact.logps.sum().backward()
    torch.testing.assert_close(out.logps.double(), exact.logps, rtol=1e-5, atol=1e-5)
    eps = torch.finfo(torch.bfloat16).eps
    for name in ("hidden", "weight"):
        assert case.grads()[name].dtype == getattr(case, name).dtype
        torch.testing.assert_close(case.grads()[name].double(), rounded.grads()[name], rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("v", [1, 2, 3])
def test_tiny_shapes_work(impl, device, n, v):
    hidden = torch.randn(n, 4, device=device, requires_grad=True)
    weight = torch.randn(v, 4, device=device, requires_grad=True)
    out = linear_logps(hidden, weight, torch.zeros(n, dtype=torch.int64, device=device), impl=impl, outputs=OUTPUTS)
    out.logps.sum().backward()
    exact = (hidden @ weight.T).log_softmax(-1)[:, 0]
    torch.testing.assert_close(out.logps, exact)
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.shape == weight.shape
    if v == 1:
        assert not out.logps.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 7, 16, 33])
@pytest.mark.parametrize("tiles", [{}, {"vocab_chunk": 32}, {"workspace": 10_000}])
def test_a_half_precision_head_with_fp32_products_is_within_budget(impl, device, dtype, d, tiles):
    """Triton stores fp32 values in the gradient's memory, rows of D halves, which they fill only for even D."""
    case = make_case((3, 7), d, 333, dtype=dtype, device=device)
    case.weight = case.weight.half()
    assert_within_budget(case, run(case, ("logps",), impl=impl, **tiles), ("logps",))


@pytest.mark.parametrize(("softcap", "temperature"), [(1e3, 1.0), (1e7, 1.0), (30.0, 1e-3)])
def test_a_softcap_far_above_the_logits_adds_no_error(impl, device, softcap, temperature):
    """The softcap is computed in fp32: an absolute error of the tanh would be scaled by softcap / temperature."""
    case = make_case((3, 7), 16, 101, dtype=torch.bfloat16, device=device, softcap=softcap, temperature=temperature)
    case.hidden *= temperature
    exact = case.to(torch.float64).logps(impl="reference").logps
    torch.testing.assert_close(case.logps(impl=impl).logps.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_single_token_needs_no_leading_dims(impl, device):
    out = linear_logps(
        torch.randn(8, device=device), torch.randn(5, 8, device=device), torch.tensor(3, device=device), impl=impl
    )
    assert out.logps.shape == ()


def test_strided_inputs_equal_contiguous_ones(impl, device):
    case = make_case((6, 10), 16, 101, dtype=finest(impl), device=device)
    strided = Case(
        case.hidden.transpose(0, 1).contiguous().transpose(0, 1),
        case.weight.t().contiguous().t(),
        case.targets.t().contiguous().t(),
        torch.stack([case.bias, case.bias], 1)[:, 0],
    )
    for name in ("hidden", "weight", "targets", "bias"):
        assert not getattr(strided, name).is_contiguous(), name
    assert_within_budget(case, run(strided, impl=impl, vocab_chunk=30))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_without_ignored_tokens_give_the_same_result(impl, device, layout):
    """Without ignored tokens nothing is gathered, so the views reach the impl."""
    case = strided_tokens(layout, dtype=finest(impl), device=device)
    assert_within_budget(case, run(case, impl=impl, vocab_chunk=32))


def test_all_tokens_ignored_gives_zero_with_zero_gradients(impl, device):
    case = make_case((2, 5), 7, 11, device=device)
    case = Case(case.hidden, case.weight, torch.full_like(case.targets, -100), case.bias).leaves()
    out = case.logps(impl=impl, outputs=OUTPUTS)
    for x in out:
        assert not x.any()
    (out.logps.sum() + out.entropy.sum() + out.lse.sum()).backward()
    for name, grad in case.grads().items():
        assert grad is not None, name
        assert not grad.any(), name


def test_ignored_positions_are_zero_even_for_nan_inputs(impl, device):
    case = make_case((3, 9), 16, 101, device=device).leaves()
    with torch.no_grad():
        case.hidden[~case.valid] = torch.nan
    out = case.logps(impl=impl, outputs=OUTPUTS)
    for x in out:
        assert not x[~case.valid].any()
        assert torch.isfinite(x).all()
    out.logps.sum().backward()
    assert torch.isfinite(case.hidden.grad).all()
    assert not case.hidden.grad[~case.valid].any()


@pytest.mark.parametrize("ignore_index", [-1, 0, 3, 100])
def test_other_ignore_index_values_work(impl, device, ignore_index):
    """Out of range, or a token id: also the smallest and the largest target."""
    case = make_case((3, 9), 16, 101, device=device)
    targets = case.targets.masked_fill(case.targets == ignore_index, 5)
    expected = linear_logps(case.hidden, case.weight, targets, impl=impl).logps
    marked = targets.masked_fill(targets == -100, ignore_index)
    got = linear_logps(case.hidden, case.weight, marked, impl=impl, ignore_index=ignore_index).logps
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_backward_twice_gives_the_same_gradients(impl, device, frozen):
    case = make_case((3, 9), 16, 101, dtype=torch.bfloat16, device=device).leaves(weight=not frozen, bias=not frozen)
    loss = case.logps(impl=impl).logps.sum()
    loss.backward(retain_graph=True)
    first = {k: g.clone() for k, g in case.grads().items() if g is not None}
    loss.backward()
    for k, g in first.items():  # not bitwise: the last backward may consume what the forward saved
        second = case.grads()[k].double() - g.double()
        assert (second - g).norm() <= torch.finfo(torch.bfloat16).eps * g.double().norm(), k


def test_a_zero_upstream_gives_zero(impl, device):
    case = make_case((3, 9), 16, 101, device=device).leaves()
    (case.logps(impl=impl).logps * 0).sum().backward()
    for g in case.grads().values():
        assert not g.any()


def test_no_grad_builds_no_graph_and_gives_the_same_logps(impl, device):
    case = make_case((3, 9), 16, 101, device=device).leaves()
    with torch.no_grad():
        out = case.logps(impl=impl, outputs=DIFFERENTIABLE[1:])
    assert out.logps.grad_fn is None
    torch.testing.assert_close(out.logps, case.logps(impl=impl).logps.detach())
