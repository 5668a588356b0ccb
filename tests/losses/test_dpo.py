"""`dpo_loss`: hand-computed values, extreme margins and refused inputs."""

import math
import re

import pytest
import torch

from fusedalign import dpo_loss


def random_logps(b=3, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [-20 * torch.rand(b, generator=g).to(dtype) for _ in range(4)]


def test_loss_equals_hand_computed_values():
    # a = -10 - -12 = 2, b = -15 - -14 = -1, beta (a - b) = 0.1 * 3 = 0.3, -log sigmoid(0.3) = log(1 + e^-0.3)
    out = dpo_loss(*(torch.tensor([x]) for x in (-10.0, -15.0, -12.0, -14.0)))
    assert out.losses.item() == pytest.approx(math.log(1 + math.exp(-0.3)))
    assert out.chosen_rewards.item() == pytest.approx(0.2)
    assert out.rejected_rewards.item() == pytest.approx(-0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_first_step_is_log_2(dtype):
    c, r, *_ = random_logps(dtype=dtype)
    out = dpo_loss(c, r, c, r)
    assert out.losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.losses, torch.full_like(out.losses, math.log(2)))


@pytest.mark.parametrize("b", [1, 2, 7])
def test_gradients_equal_the_closed_form(b):
    c, r, rc, rr = random_logps(b, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: dpo_loss(*x, beta=0.3).losses, [x.requires_grad_() for x in (c, r, rc, rr)]
    )
    margin = 0.3 * ((c - rc) - (r - rr))
    (grad,) = torch.autograd.grad(dpo_loss(c, r, rc, rr, beta=0.3).losses.sum(), c)
    torch.testing.assert_close(grad, (-0.3 * torch.sigmoid(-margin)).detach())  # the gradient of equation 7


def test_rewards_carry_no_gradient():
    out = dpo_loss(*(x.requires_grad_() for x in random_logps()))
    assert out.losses.requires_grad
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad


def test_swapping_chosen_and_rejected_flips_the_margin():
    c, r, rc, rr = random_logps()
    forth, back = dpo_loss(c, r, rc, rr), dpo_loss(r, c, rr, rc)
    torch.testing.assert_close(back.chosen_rewards, forth.rejected_rewards)
    margin = forth.chosen_rewards - forth.rejected_rewards
    torch.testing.assert_close(back.losses - forth.losses, margin)  # -log s(-m) + log s(m) = m


def test_losses_do_not_depend_on_the_other_pairs():
    order = torch.tensor([2, 0, 1])
    args = random_logps()
    torch.testing.assert_close(dpo_loss(*(x[order] for x in args)).losses, dpo_loss(*args).losses[order])


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_stay_finite(margin):
    c = torch.tensor([margin, -1e5], requires_grad=True)
    out = dpo_loss(c, *torch.zeros(3, 2), beta=1.0)
    out.losses.sum().backward()
    assert torch.isfinite(out.losses).all()
    assert torch.isfinite(c.grad).all()
    assert out.losses[0].item() == pytest.approx(max(-margin, 0))


def test_an_empty_batch_gives_empty_losses():
    assert dpo_loss(*torch.zeros(4, 0)).losses.shape == (0,)


ONE = torch.zeros(2)
BAD = [
    ((ONE, ONE, ONE[:1], ONE), {}, ValueError, "ref_chosen_logps must have shape (2,) to match chosen_logps, got (1,)"),
    (
        (ONE, ONE[:, None], ONE, ONE),
        {},
        ValueError,
        "rejected_logps must have shape [B], one value a sequence, got (2, 1)",
    ),
    ((ONE[0], ONE, ONE, ONE), {}, ValueError, "chosen_logps must have shape [B], one value a sequence, got ()"),
    (
        (ONE, ONE.long(), ONE, ONE),
        {},
        TypeError,
        "rejected_logps must be a floating-point tensor of shape [B], got torch.int64",
    ),
    ((ONE, ONE, ONE, 0.0), {}, TypeError, "ref_rejected_logps must be a floating-point tensor of shape [B], got float"),
    ((ONE,) * 4, {"beta": 0.0}, ValueError, "beta must be > 0, got 0.0"),
    ((ONE,) * 4, {"beta": float("nan")}, ValueError, "beta must be > 0, got nan"),
    ((ONE,) * 4, {"loss_type": "sigmod"}, ValueError, "apo_down, discopop, sft, sigmoid_norm, got 'sigmod'"),
    ((ONE,) * 4, {"label_smoothing": 0.1}, ValueError, "aot_unpaired only, with sigmoid it must be 0.0, got 0.1"),
]


@pytest.mark.parametrize(("args", "options", "kind", "message"), BAD)
def test_bad_input_raises(args, options, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        dpo_loss(*args, **options)
