"""The scalar loss equals the loss of the per-token path in value and gradient, on every path."""

import pytest
import torch
from helpers import (
    DEVICES,
    DTYPES,
    IMPLS,
    LAYOUTS,
    Case,
    assert_loss_within_budget,
    error,
    finest,
    make_case,
    rounds_logit_grads,
    run_loss,
    run_loss_exact,
    strided_tokens,
)

from fusedalign import linear_cross_entropy, linear_logps, sft_loss

pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.parametrize("impl", IMPLS)]


def assert_close(got, want, dtype):
    """Assert closeness within what operands in the precision of the logits allow, tighter than eager's budget."""
    for k, x in got.items():
        # At most two roundings to the gradient's dtype, plus the fp32 sums inside.
        eps = torch.finfo(x.dtype).eps
        size = want[k].abs().max().item()
        bound = size * (eps + (0 if dtype == torch.float64 else 2e-6)) + (1e-15 if dtype == torch.float64 else 1e-8)
        assert error(x, want[k]) <= bound, f"{k}: {error(x, want[k]):.2e} > {bound:.2e}"


TILES = [{}, {"token_chunk": 4, "vocab_chunk": 30}, {"token_chunk": 1000, "vocab_chunk": 1000}, {"workspace": 20_000}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}, {"z_loss": 0.01}, {"num_items": 5}])
def test_value_and_gradients_are_within_the_eager_budget(impl, device, dtype, tiles, options):
    case = make_case((3, 11), 24, 203, dtype=dtype, device=device, scale=0.8, softcap=6.0)
    got = run_loss(case, impl=impl, **tiles, **options)
    assert_loss_within_budget(case, got, **options)
    if dtype != torch.bfloat16 or not rounds_logit_grads(impl, device):
        assert_close(got, run_loss_exact(case, **options), dtype)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
@pytest.mark.parametrize("tiles", TILES[:2])
def test_frozen_inputs_get_no_gradient(impl, device, needs, tiles):
    case = make_case((3, 11), 24, 203, dtype=finest(impl), device=device)
    got = run_loss(case, needs, impl=impl, **tiles)
    needed = {f"d{name}" for name, n in zip(("hidden", "weight", "bias"), needs, strict=True) if n}
    assert got.keys() == {"loss"} | needed
    assert_close(got, run_loss_exact(case), finest(impl))


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 0), (1, 1, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_without_ignored_tokens_give_the_same_result(impl, device, layout, needs):
    """Without ignored tokens nothing is gathered, so the views reach the impl."""
    case = strided_tokens(layout, dtype=finest(impl), device=device)
    assert_close(run_loss(case, needs, impl=impl), run_loss_exact(case), finest(impl))


def test_the_loss_may_be_changed_in_place(impl, device):
    """Training loops do that to accumulate gradients or to add an auxiliary loss."""
    case = make_case((2, 5), 16, 101, dtype=finest(impl), device=device)
    want = run_loss(case, impl=impl)
    leaves = case.leaves()
    loss = linear_cross_entropy(leaves.hidden, leaves.weight, leaves.targets, bias=leaves.bias, impl=impl)
    loss /= 4
    loss += 1
    loss.backward()
    torch.testing.assert_close(loss.detach(), want["loss"] / 4 + 1)
    for name, grad in leaves.grads().items():
        torch.testing.assert_close(grad, want[f"d{name}"] / 4)


def test_many_token_chunks_add_no_error_to_a_bf16_head_gradient(impl, device):
    """Summing 64 chunks in plain bf16 would round 64 times and make the error four times as large."""
    case = make_case((64,), 16, 51, dtype=torch.bfloat16, device=device, ignored=0.0)
    want = run_loss_exact(case)["dweight"]
    errors = {}
    for chunk in (64, 8, 1):
        got = run_loss(case, impl=impl, token_chunk=chunk)["dweight"]
        errors[chunk] = (got.double() - want).norm()
        assert errors[chunk] <= 1.05 * errors[64], chunk
        if not rounds_logit_grads(impl, device):
            wrong_share = (got != want.bfloat16()).float().mean()
            assert wrong_share < 0.02, chunk  # correctly rounded except for ties of the fp32 sums


def test_the_mean_is_the_sum_over_counted_tokens(impl, device):
    case = make_case((3, 11), 24, 203, device=device)
    mean, total = (run_loss(case, impl=impl, reduction=r) for r in ("mean", "sum"))
    for k in mean:
        torch.testing.assert_close(mean[k] * case.valid.sum(), total[k])


@pytest.mark.parametrize("num_items", [7, torch.tensor(7)])
def test_num_items_divides_the_sum(impl, device, num_items):
    case = make_case((3, 11), 24, 203, device=device)
    got, total = run_loss(case, impl=impl, num_items=num_items), run_loss(case, impl=impl, reduction="sum")
    for k in got:
        torch.testing.assert_close(got[k] * 7, total[k])


def test_all_tokens_ignored_gives_zero_with_zero_gradients(impl, device):
    case = make_case((2, 5), 7, 11, device=device)
    got = run_loss(Case(case.hidden, case.weight, torch.full_like(case.targets, -100), case.bias), impl=impl)
    assert set(got) == {"loss", "dhidden", "dweight", "dbias"}
    assert not any(x.any() for x in got.values())


def test_upstream_scales_gradients_and_backward_runs_twice(impl, device):
    case = make_case((3, 11), 24, 203, device=device).leaves()
    loss = linear_cross_entropy(case.hidden, case.weight, case.targets, bias=case.bias, impl=impl)
    (3 * loss).backward(retain_graph=True)
    three = {k: g.clone() for k, g in case.grads().items()}
    loss.backward(retain_graph=True)
    loss.backward()
    for k, g in case.grads().items():
        torch.testing.assert_close(g, three[k] * 5 / 3)


def test_no_grad_gives_the_same_loss(impl, device):
    case = make_case((3, 11), 24, 203, device=device).leaves()
    with torch.no_grad():
        loss = linear_cross_entropy(case.hidden, case.weight, case.targets, impl=impl)
    out = linear_logps(case.hidden, case.weight, case.targets, impl=impl)
    torch.testing.assert_close(loss, sft_loss(out.logps, case.valid).detach())


def test_accumulated_micro_batches_equal_one_batch(impl, device):
    case = make_case((8, 11), 24, 203, dtype=finest(impl), device=device, ignored=0.5)
    parts = [Case(case.hidden[i : i + 1], case.weight, case.targets[i : i + 1], case.bias) for i in range(8)]
    parts = [run_loss(part, impl=impl, num_items=case.valid.sum()) for part in parts]
    summed = {k: sum(part[k] for part in parts) for k in ("loss", "dweight", "dbias")}
    got = summed | {"dhidden": torch.cat([part["dhidden"] for part in parts])}
    assert_close(got, run_loss_exact(case), finest(impl))
