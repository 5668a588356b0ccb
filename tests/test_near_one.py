"""If the target has nearly all probability, its gradient 1 - p needs expm1: 1 minus a rounded p loses digits."""

import pytest
import torch
from helpers import DEVICES, OURS, Case, run, run_loss, run_loss_exact

#: 1 + 2**-k is exact in fp32, so that only the difference from 1 can be rounded.
POWERS = range(6, 15)


def two_columns(dtype, device):
    """p = 1 / (1 + 2**-k) for column 0; the last hidden dimension meets only its row, so its gradient is 1 - p."""
    n = len(POWERS)
    others = torch.tensor([-k * 0.6931471805599453 for k in POWERS], dtype=torch.float64).float()
    hidden = torch.zeros(n, n + 1)
    hidden[:, :n] = torch.eye(n)
    weight = torch.zeros(2, n + 1)
    weight[1, :n] = others
    weight[0, n] = 1
    targets = torch.zeros(n, dtype=torch.int64, device=device)
    return Case(hidden.to(device, dtype), weight.to(device, dtype), targets)


def relative_error(got, want):
    return ((got[:, -1].double() - want[:, -1]) / want[:, -1]).abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", [impl for impl in OURS if impl != "reference"])
@pytest.mark.parametrize("tiles", [{}, {"vocab_chunk": 1}, {"token_chunk": 4}])
def test_frozen_head_gradients_keep_1_minus_p_exact(impl, device, tiles):
    """A rounded p is off by half an ulp, 3e-8, which is up to 5e-4 of 1 - p here."""
    case, exact = two_columns(torch.float32, device), two_columns(torch.float64, "cpu")
    frozen = {"needs": (True, False, False)}
    want = run(exact, ("logps",), impl="reference", outputs=(), **frozen)["dhidden"]
    got = run(case, ("logps",), impl=impl, outputs=(), **frozen, **tiles)["dhidden"].cpu()
    assert relative_error(got, want) < 3e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["frozen head", "one pass", "kept"])
def test_triton_keeps_1_minus_p_exact_in_scalar_loss_and_kept_logits(device, path):
    if "triton" not in OURS:
        pytest.skip("triton is not installed")
    case, exact = two_columns(torch.float32, device), two_columns(torch.float64, "cpu")
    needs = (True, path != "frozen head", False)
    if path == "kept":
        want = run(exact, ("logps",), impl="reference", outputs=(), needs=needs)["dhidden"]
        got = run(case, ("logps",), impl="triton", outputs=(), needs=needs)["dhidden"].cpu()
    else:
        want = run_loss_exact(exact)["dhidden"]
        got = run_loss(case, needs, impl="triton")["dhidden"].cpu()
    assert relative_error(got, want) < 3e-6
