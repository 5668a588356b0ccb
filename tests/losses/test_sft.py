"""`sft_loss`: hand-computed values, PyTorch's cross-entropy, and inputs that break averages."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from fusedalign import sft_loss


def test_loss_equals_hand_computed_values():
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    mask = torch.tensor([[True, False], [True, True]])
    assert sft_loss(logps, mask).item() == pytest.approx((1 + 3 + 4) / 3)
    assert sft_loss(logps, mask, num_items=10).item() == pytest.approx((1 + 3 + 4) / 10)
    dft = (math.exp(-1) * 1 + math.exp(-3) * 3 + math.exp(-4) * 4) / 3
    assert sft_loss(logps, mask, loss_type="dft").item() == pytest.approx(dft)


def test_loss_equals_cross_entropy():
    logits, targets = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    targets[0, :3] = -100
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(sft_loss(logps, targets != -100), want)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_masking_equals_dropping(loss_type):
    logps, mask = -torch.rand(3, 7), torch.rand(3, 7) > 0.5
    dropped = sft_loss(logps[mask], torch.ones(int(mask.sum()), dtype=torch.bool), loss_type=loss_type)
    torch.testing.assert_close(sft_loss(logps, mask, loss_type=loss_type), dropped)


def test_gradients_are_exact_and_dft_weights_constant():
    logps = -torch.rand(3, 4, dtype=torch.float64)
    mask = torch.rand(3, 4) > 0.4
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, mask), logps.requires_grad_())
    (grad,) = torch.autograd.grad(sft_loss(logps, mask, loss_type="dft"), logps)
    torch.testing.assert_close(grad, (-logps.exp() * mask / mask.sum()).detach())  # p is a constant


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_no_counted_token_gives_zero(loss_type):
    logps = torch.tensor([[torch.nan, -torch.inf]], requires_grad=True)
    loss = sft_loss(logps, torch.zeros(1, 2, dtype=torch.bool), loss_type=loss_type)
    loss.backward()
    assert loss == 0
    assert not logps.grad.any()


@pytest.mark.parametrize("num_items", [0, torch.tensor(0)])
def test_an_accumulation_window_without_tokens_gives_zero(num_items):
    assert sft_loss(-torch.ones(1, 2), torch.zeros(1, 2), num_items=num_items) == 0


def test_half_precision_is_summed_in_fp32():
    logps = torch.full((1, 5000), -1.0, dtype=torch.bfloat16)
    loss = sft_loss(logps, torch.ones(1, 5000), num_items=1)
    assert loss.dtype == torch.float32
    assert loss == 5000  # bf16 cannot hold it


@pytest.mark.parametrize(
    ("args", "options", "kind", "message"),
    [
        (
            (torch.ones(2, 3), torch.ones(2, 1)),
            {},
            ValueError,
            "mask must have shape (2, 3) to match logps, got (2, 1)",
        ),
        (
            (torch.ones(2), torch.ones(2)),
            {"loss_type": "sft"},
            ValueError,
            "loss_type must be one of nll, dft, got 'sft'",
        ),
        ((torch.ones(2), torch.ones(2)), {"num_items": -1}, ValueError, "num_items must be >= 0, got -1"),
        (
            (torch.ones(2), torch.ones(2)),
            {"num_items": torch.tensor([3, 4])},
            ValueError,
            "num_items must be one number, got a tensor of shape (2,)",
        ),
        ((torch.ones(2).long(), torch.ones(2)), {}, TypeError, "logps must be floating-point, got torch.int64"),
    ],
)
def test_bad_input_raises(args, options, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        sft_loss(*args, **options)
