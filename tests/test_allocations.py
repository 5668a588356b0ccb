"""No path makes the logits, nor a wide copy of the head; and each path costs what the docs say, in products."""

import pytest
import torch
from helpers import Allocations, Case, make_case
from torch.utils.flop_counter import FlopCounterMode

from fusedalign import linear_cross_entropy

N, D, V = 96, 33, 601  # a tile of logits is an eighth of N * V at most, well below V * D
ALL = ("entropy", "lse", "mean_logit", "log_sum_sq_probs", "is_top1")


def per_token(case: Case, **options):
    out = case.logps(outputs=ALL, **options)
    (out.logps.sum() + out.entropy.sum() + out.lse.sum()).backward()


def logps_alone(case: Case, **options):
    case.logps(**options).logps.sum().backward()


def no_grad(case: Case, **options):
    with torch.no_grad():
        case.logps(outputs=ALL, **options)


def scalar(case: Case, **options):
    args = (case.hidden, case.weight, case.targets)
    linear_cross_entropy(*args, bias=case.bias, **case.head, **options).backward()


PATHS = {
    "no grad": (no_grad, (1, 1, 1)),
    "frozen head": (logps_alone, (1, 0, 0)),
    "frozen head, all outputs": (per_token, (1, 0, 0)),
    "two passes": (per_token, (1, 1, 1)),
    "frozen hidden": (per_token, (0, 1, 1)),
    "one pass": (scalar, (1, 1, 1)),
    "one pass, frozen head": (scalar, (1, 0, 0)),
}


def trace(path, impl, dtype=torch.bfloat16, **options) -> Allocations:
    f, needs = PATHS[path]
    case = make_case((N,), D, V, dtype=dtype, ignored=0.0, softcap=9.0).leaves(*needs)
    with Allocations() as allocations:
        f(case, impl=impl, **options)
    return allocations


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_path_makes_the_logits(path, dtype):
    assert trace(path, "pytorch", dtype).largest() < N * V


@pytest.mark.parametrize("path", PATHS)
def test_no_path_makes_a_wide_copy_of_a_bf16_head_or_of_its_gradient(path):
    assert trace(path, "pytorch").largest(torch.float32, torch.float64) < V * D


@pytest.mark.parametrize("path", PATHS)
def test_the_reference_makes_both_so_these_tests_can_fail(path):
    allocations = trace(path, "reference")
    assert allocations.largest() >= N * V
    assert (V * D, torch.float32) in allocations.made


def test_the_one_pass_gradient_of_a_bf16_head_is_two_halves_in_bf16():
    """The documented accumulator: beside the gradient itself one tensor of its size and dtype."""
    made = trace("one pass", "pytorch").made
    assert made.count((V * D, torch.bfloat16)) == 2
    assert trace("one pass", "pytorch", torch.float32).made.count((V * D, torch.float32)) == 1


def test_a_small_workspace_takes_two_passes_instead():
    """No room for the low half: the path of 4 products, without a second [V, D]."""
    made = trace("one pass", "pytorch", workspace=60_000).made
    assert made.count((V * D, torch.bfloat16)) == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("workspace", [30_000, 120_000])
def test_tiles_keep_to_the_workspace(path, workspace):
    """No tile of logits, the largest thing made, is bigger than the workspace allows; gradients and results aside."""
    allocations = trace(path, "pytorch", workspace=workspace)
    results = {V * D, N * D, N, V, N * 1}
    tiles = [n * dtype.itemsize for n, dtype in allocations.made if n not in results]
    assert max(tiles) <= workspace


@pytest.mark.parametrize(
    ("path", "products"),
    [
        ("no grad", 1),
        ("frozen head", 2),
        ("frozen head, all outputs", 4),
        ("two passes", 4),
        ("frozen hidden", 3),
        ("one pass", 3),
        ("one pass, frozen head", 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_products(path, products, dtype, ignored):
    """Multiply-adds in units of the product of the valid tokens with the head; ignored ones cost nothing."""
    f, needs = PATHS[path]
    case = make_case((N,), D, V, dtype=dtype, ignored=ignored).leaves(*needs)
    with FlopCounterMode(display=False) as counter:
        f(case, impl="pytorch")
    assert counter.get_total_flops() == products * 2 * int(case.valid.sum()) * D * V


def test_a_frozen_head_is_not_touched_by_the_backward():
    """The kept Jacobian needs neither head nor hidden states."""
    case = make_case((N,), D, V, ignored=0.0).leaves(1, 0, 0)
    loss = case.logps().logps.sum()
    with torch.no_grad():
        case.weight.fill_(torch.nan)
    loss.backward()
    assert torch.isfinite(case.hidden.grad).all()
