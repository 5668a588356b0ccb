"""A head in several column blocks equals their concatenation; each block has its gradient in its own dtype."""

from dataclasses import dataclass, replace

import pytest
import torch
from helpers import (
    DEVICES,
    IMPLS,
    Case,
    _assert_each,
    error,
    finest,
    leaf,
    make_case,
    run,
    run_eager,
    run_loss,
    run_loss_eager,
    run_loss_exact,
)

from fusedalign import linear_cross_entropy, linear_logps
from fusedalign.problem import OUTPUTS

impls = [pytest.mark.parametrize("device", DEVICES), pytest.mark.parametrize("impl", IMPLS)]


def each(test):
    for mark in impls:
        test = mark(test)
    return test


@dataclass
class PartsCase(Case):
    """A case with a tuple of weights; `trained`: which of them require a gradient."""

    trained: tuple = ()

    def leaves(self, hidden=True, weight=True, bias=True):
        parts = tuple(leaf(x, weight and t) for x, t in zip(self.weight, self.trained, strict=True))
        return replace(self, hidden=leaf(self.hidden, hidden), weight=parts, bias=leaf(self.bias, bias))

    def grads(self):
        other_grads = {"hidden": self.hidden.grad, "bias": None if self.bias is None else self.bias.grad}
        return other_grads | {f"weight{i}": x.grad for i, x in enumerate(self.weight)}

    def as_tensor(self, dtype):
        """The case with the concatenated weight."""
        return Case(self.hidden, torch.cat([x.to(dtype) for x in self.weight], 1), self.targets, self.bias, self.head)


def make_parts(leading, widths, v, *, dtypes, trained, **options) -> PartsCase:
    case = make_case(leading, sum(widths), v, dtype=dtypes[0], **options)
    weights = make_case(leading, sum(widths), v, dtype=torch.float64, **options).weight.split(widths, 1)
    parts = tuple(w.to(dtype) for w, dtype in zip(weights, dtypes, strict=True))
    return PartsCase(case.hidden, parts, case.targets, case.bias, case.head, trained)


def split(case: PartsCase, fields: dict) -> dict:
    """Split the gradient of the concatenated weight into those of the parts."""
    grads = fields.pop("dweight").split([x.shape[1] for x in case.weight], 1)
    return fields | {f"dweight{i}": g for i, g in enumerate(grads)}


def check(case: PartsCase, got, run_exact, run_rounded, roundings=1) -> None:
    """Assert the eager budget (with one tensor in the first part's dtype) and the dtypes of gradients."""
    grad_names = {f"dweight{i}" for i, t in enumerate(case.trained) if t}
    assert {k for k in got if k.startswith("dweight")} == grad_names
    assert all(got[f"dweight{i}"].dtype == x.dtype for i, x in enumerate(case.weight) if f"dweight{i}" in grad_names)
    exact = split(case, run_exact(case.as_tensor(torch.float64).to(torch.float64)))
    eager = split(case, run_rounded(case.as_tensor(case.weight[0].dtype)))
    if "is_top1" in got:
        assert torch.equal(got.pop("is_top1"), exact["is_top1"])
    _assert_each(case.as_tensor(case.weight[0].dtype), got, exact, eager, roundings)


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
#: dtypes of the parts; the first is also that of hidden
MIXES = [(F32, F32, F32), (BF16, BF16, BF16), (BF16, F32, F32), (F16, F32, F16)]
IDS = ["-".join(str(x)[6:] for x in mix) for mix in MIXES]
TRAINED = [(False, True, False), (False, True, True), (True, True, True), (True, False, False)]
TILES = [{}, {"token_chunk": 7, "vocab_chunk": 40}]


@each
@pytest.mark.parametrize("dtypes", MIXES, ids=IDS)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("head", [{}, {"scale": 0.7, "softcap": 4.0, "temperature": 1.3}])
def test_values_and_gradients_equal_the_concatenated_head(impl, device, dtypes, trained, head):
    options = {"dtypes": dtypes, "trained": trained, "device": device, "bias": bool(head), "seed": len(head)}
    case = make_parts((2, 5), (19, 5, 3), 73, **options, **head)
    got = run(case, impl=impl, **TILES[bool(head)])
    check(case, got, lambda c: run(c, impl="reference"), run_eager)


@each
@pytest.mark.parametrize("dtypes", MIXES, ids=IDS)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("tiles", TILES)
def test_the_scalar_loss_equals_the_concatenated_head(impl, device, dtypes, trained, tiles):
    options = {"dtypes": dtypes, "trained": trained, "device": device}
    case = make_parts((2, 6), (17, 4, 8), 71, **options, softcap=6.0)
    got = run_loss(case, z_loss=0.01, impl=impl, **tiles)
    check(case, got, lambda c: run_loss_exact(c, z_loss=0.01), lambda c: run_loss_eager(c, z_loss=0.01), roundings=2)


@each
@pytest.mark.parametrize("dtypes", MIXES, ids=IDS)
@pytest.mark.parametrize("outputs", [(), ("entropy", "lse")])
def test_all_frozen_parts_give_the_hidden_gradient(impl, device, dtypes, outputs):
    """The saved Jacobian covers all columns of hidden."""
    case = make_parts((2, 6), (16, 8, 5), 103, dtypes=dtypes, trained=(False,) * 3, device=device, softcap=3.0)
    names = ("logps", *outputs)
    got = run(case, names, (True, False, False), outputs, impl=impl, vocab_chunk=64)
    check(case, got, lambda c: run(c, names, impl="reference"), lambda c: run_eager(c, names))
    loss = run_loss(case, (True, False, False), impl=impl, vocab_chunk=64)
    check(case, loss, run_loss_exact, run_loss_eager, roundings=2)


@each
def test_only_the_parts_get_gradients_when_hidden_and_bias_are_frozen(impl, device):
    dtype = finest(impl)
    case = make_parts((3, 7), (19, 5), 123, dtypes=(dtype, dtype), trained=(False, True), device=device)
    got = run(case, needs=(False, True, False), impl=impl)
    assert {k for k in got if k.startswith("d")} == {"dweight1"}
    check(case, got, lambda c: run(c, impl="reference"), run_eager)


@each
def test_all_tokens_ignored_gives_zero_gradients(impl, device):
    case = make_parts((3, 4), (8, 3), 31, dtypes=(F32, F32), trained=(False, True), device=device).leaves()
    case.targets.fill_(-100)
    for loss in (case.logps(impl=impl).logps.sum(), linear_cross_entropy(*args(case), impl=impl)):
        case.weight[1].grad = case.hidden.grad = None
        loss.backward()
        assert loss == 0
        assert not case.weight[1].grad.any()
        assert not case.hidden.grad.any()
        assert case.weight[0].grad is None


def args(case):
    return case.hidden, case.weight, case.targets


@each
def test_autocast_rounds_only_the_operands(impl, device):
    case = make_parts((3, 9), (16, 8), 67, dtypes=(F32, F32), trained=(True, True), device=device, bias=False)
    rounded = Case(case.hidden.bfloat16().double(), case.as_tensor(F32).weight.bfloat16().double(), case.targets)
    want = rounded.logps(impl="reference").logps
    with torch.autocast(device, dtype=BF16):
        got = case.leaves().logps(impl=impl).logps
    assert error(got, want) < 1e-5


@each
def test_an_fp32_part_next_to_a_bf16_part_is_not_rounded(impl, device):
    """With fp32 hidden states products are in fp32, whatever the dtypes of the parts."""
    case = make_parts((3, 9), (16, 8, 4), 67, dtypes=(BF16, F32, BF16), trained=(False, True, True), device=device)
    case = replace(case, hidden=case.hidden.float() + 1e-3, bias=case.bias.float())
    want = split(case, run(case.as_tensor(F64).to(F64), ("logps",), impl="reference"))
    got = run(case, ("logps",), impl=impl)
    for name in ("logps", "dhidden", "dweight1", "dbias"):
        assert got[name].dtype == F32
        assert error(got[name], want[name]) < 1e-5, name
    assert error(got["dweight2"], want["dweight2"]) <= 2**-8 * want["dweight2"].abs().max()


@each
def test_backward_runs_twice_on_a_retained_graph(impl, device):
    case = make_parts((3, 9), (16, 8), 67, dtypes=(F32, F32), trained=(True, True), device=device).leaves()
    for loss in (case.logps(impl=impl).logps.sum(), linear_cross_entropy(*args(case), impl=impl)):
        first, second = (torch.autograd.grad(loss, [case.hidden, *case.weight], retain_graph=True) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b)


@each
def test_strided_parts_equal_contiguous_ones(impl, device):
    """Views with gaps between their elements, as inputs and as gradients."""
    case = make_parts((3, 7), (12, 4), 60, dtypes=(F32, F32), trained=(True, True), device=device)
    plain = run(case, impl=impl)
    storages = [torch.empty(60, 2 * x.shape[1], device=device) for x in case.weight]
    for x, y in zip(storages, case.weight, strict=True):
        x[:, ::2] = y
    leaves = [x.requires_grad_() for x in storages]
    strided = replace(case, weight=tuple(x[:, ::2] for x in leaves))
    out = strided.logps(impl=impl, outputs=OUTPUTS)
    torch.testing.assert_close(out.entropy, plain["entropy"])
    out.lse.sum().backward()
    assert all(x.grad is not None and not x.grad[:, 1::2].any() and x.grad[:, ::2].any() for x in leaves)


def test_a_single_part_equals_the_plain_head():
    case = make_case((3, 7), 16, 101).leaves()
    out = linear_logps(case.hidden, (case.weight,), case.targets, bias=case.bias, impl="pytorch")
    assert torch.equal(out.logps, case.logps(impl="pytorch").logps)


def test_gradcheck_passes():
    case = make_parts((2, 3), (4, 2), 11, dtypes=(F64, F64), trained=(True, True)).leaves()

    def f(hidden, first, second, bias):
        out = linear_logps(hidden, (first, second), case.targets, bias=bias, outputs=OUTPUTS, softcap=3.0)
        return out.logps, out.entropy, out.lse, linear_cross_entropy(hidden, (first, second), case.targets, bias=bias)

    assert torch.autograd.gradcheck(f, (case.hidden, *case.weight, case.bias))


@pytest.mark.parametrize("function", ["linear_logps", "linear_cross_entropy"])
def test_a_compiled_caller_breaks_the_graph_and_gets_the_same_result(function):
    case = make_parts((3, 7), (16, 4), 101, dtypes=(F32, F32), trained=(False, True))
    f = {"linear_logps": lambda *a: linear_logps(*a).logps.sum(), "linear_cross_entropy": linear_cross_entropy}[
        function
    ]

    def step(hidden, first, second, targets):
        return f(2 * hidden, (first, second), targets)

    grads = []
    for call in (step, torch.compile(step, backend="aot_eager")):
        leaves = case.leaves()
        loss = call(leaves.hidden, *leaves.weight, leaves.targets)
        grads.append((loss, *torch.autograd.grad(loss, [leaves.hidden, leaves.weight[1]])))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


H, W, T = torch.randn(2, 3, 8), torch.randn(5, 6), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("weight", "error_type", "match"),
    [
        ((), ValueError, "weight must have one part at least, got an empty tuple"),
        ((W, torch.randn(5, 3)), ValueError, r"\[V, D1\], .* of 8 columns to match hidden, got \[\(5, 6\), \(5, 3\)\]"),
        ((W, torch.randn(4, 2)), ValueError, r"got \[\(5, 6\), \(4, 2\)\]"),
        ((W, torch.randn(2)), ValueError, r"got \[\(5, 6\), \(2,\)\]"),
        ((W, torch.ones(5, 2, dtype=torch.int8)), TypeError, r"weight\[1\] must be float64, .* got torch.int8"),
        ((W, None), TypeError, r"weight\[1\] must be a torch.Tensor, got NoneType"),
        ((W, torch.empty(5, 2, device="meta")), ValueError, r"weight\[1\] must be on cpu like hidden, got meta"),
        ([W, torch.randn(5, 2)], TypeError, "weight must be a torch.Tensor, got list"),
    ],
)
def test_bad_parts_raise(weight, error_type, match):
    with pytest.raises(error_type, match=match):
        linear_logps(H, weight, T)
