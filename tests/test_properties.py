"""Properties of every problem, over random problems from hypothesis."""

import torch
from helpers import Case, make_case, run
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedalign import linear_cross_entropy, linear_logps

settings.register_profile("fusedalign", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("fusedalign")

shapes = st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 20), st.integers(1, 60))
heads = st.fixed_dictionaries(
    {},
    optional={
        "scale": st.floats(0.1, 4),
        "softcap": st.floats(1, 50),
        "temperature": st.floats(0.3, 3),
    },
)
tiles = st.fixed_dictionaries(
    {},
    optional={
        "token_chunk": st.integers(1, 70),
        "vocab_chunk": st.integers(1, 70),
        "workspace": st.integers(1, 100_000),
    },
)
seeds = st.integers(0, 2**31)


def case_of(shape, head, seed) -> Case:
    leading, d, v = shape
    return make_case(leading, d, v, dtype=torch.float64, seed=seed, bias=seed % 2 == 0, **head)


@given(shapes, heads, seeds, tiles)
def test_tiles_do_not_change_the_result(shape, head, seed, tiling):
    case = case_of(shape, head, seed)
    want, got = run(case, impl="reference"), run(case, impl="pytorch", **tiling)
    assert want.keys() == got.keys()
    for k in want:
        torch.testing.assert_close(got[k], want[k], rtol=1e-9, atol=1e-9, msg=k)


@given(shapes, heads, seeds, tiles, st.sampled_from(["nll", "dft"]), st.sampled_from([0.0, 0.1]))
def test_the_scalar_loss_is_the_sum_of_the_per_token_losses(shape, head, seed, tiling, loss_type, z_loss):
    case = case_of(shape, head, seed).leaves()
    out = case.logps(impl="reference", outputs=["lse"])
    factor = out.logps.detach().exp() if loss_type == "dft" else 1
    want = (-factor * out.logps + z_loss * out.lse.square()).sum()
    options = {"loss_type": loss_type, "z_loss": z_loss, "reduction": "sum", **tiling}
    got = linear_cross_entropy(case.hidden, case.weight, case.targets, bias=case.bias, **case.head, **options)
    torch.testing.assert_close(got, want)
    inputs = [x for x in (case.hidden, case.weight, case.bias) if x is not None]
    for g, w in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


@given(shapes, heads, seeds, tiles)
def test_probabilities_of_all_targets_sum_to_one(shape, head, seed, tiling):
    case = case_of(shape, head, seed)
    v = case.weight.shape[0]
    total = 0
    for t in range(v):
        targets = torch.full_like(case.targets, t)
        out = linear_logps(case.hidden, case.weight, targets, bias=case.bias, **case.head, **tiling)
        total = total + out.logps.exp()
    torch.testing.assert_close(total, torch.ones_like(total))


@given(shapes, heads, seeds, tiles)
def test_masking_a_token_equals_dropping_it(shape, head, seed, tiling):
    case = case_of(shape, head, seed)
    dropped = Case(case.hidden[case.valid], case.weight, case.targets[case.valid], case.bias, case.head)
    masked = run(case, ("logps",), impl="pytorch", **tiling)
    leaves = dropped.leaves()
    out = leaves.logps(impl="pytorch", **tiling)
    torch.testing.assert_close(masked["logps"][case.valid], out.logps.detach(), rtol=1e-9, atol=1e-9)
    upstream = torch.randn(case.targets.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    (out.logps * upstream[case.valid]).sum().backward()
    torch.testing.assert_close(masked["dweight"], leaves.weight.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(masked["dhidden"][case.valid], leaves.hidden.grad, rtol=1e-9, atol=1e-9)


@given(shapes, heads, seeds, tiles)
def test_the_order_of_tokens_does_not_change_the_result(shape, head, seed, tiling):
    case = case_of(shape, head, seed)
    flat = Case(case.hidden.flatten(0, -2), case.weight, case.targets.flatten(), case.bias, case.head)
    order = torch.randperm(len(flat.targets), generator=torch.Generator().manual_seed(seed))
    permuted = Case(flat.hidden[order], flat.weight, flat.targets[order], flat.bias, flat.head)
    options = {"impl": "pytorch", "outputs": ("entropy", "lse"), **tiling}
    for x, y in zip(flat.logps(**options)[:3], permuted.logps(**options)[:3], strict=True):
        torch.testing.assert_close(x[order], y, rtol=1e-9, atol=1e-9)
