"""Every loss against hand-computed values; the arithmetic is in the comments."""

import math

import pytest
import torch

from fusedalign import (
    alphapo_rewards,
    cpo_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    ld_logps,
    orpo_loss,
    sft_loss,
    simpo_loss,
    tpo_loss,
    wpo_weights,
)
from fusedalign.losses import cpo, dpo, kto


def s(x):
    return 1 / (1 + math.exp(-x))


def ls(x):
    return math.log(s(x))


# chosen: -10 against the reference's -12, so a = 2; rejected: -15 against -14, so b = -1; d = 3.
# With beta = 0.5: beta a = 1, beta b = -0.5, beta d = 1.5. Lengths 4 and 2: mean d = 2/4 - -1/2 = 1.
LOGPS = [torch.tensor([x]) for x in (-10.0, -15.0, -12.0, -14.0)]
LENGTHS = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([2])}
DPO = {
    "sigmoid": ({}, -ls(1.5)),
    "hinge": ({}, 0.0),  # 1 - 1.5 < 0
    "ipo": (LENGTHS, 0.0),  # (1 - 1 / (2 * 0.5))**2
    "exo_pair": (
        {"label_smoothing": 0.1},
        s(1.5) * (ls(1.5) - math.log(0.9)) + s(-1.5) * (ls(-1.5) - math.log(0.1)),
    ),
    "nca_pair": ({}, -ls(1) - ls(-1) / 2 - ls(0.5) / 2),
    "robust": ({"label_smoothing": 0.1}, (-0.9 * ls(1.5) + 0.1 * ls(-1.5)) / 0.8),
    "bco_pair": ({}, -ls(1) - ls(0.5)),
    "sppo_hard": ({}, 1.0),  # (2 - 1)**2 + (-1 + 1)**2
    "aot": ({}, -ls(1.5)),  # one pair: sorting changes nothing
    "aot_unpaired": ({"label_smoothing": 0.2}, -0.8 * ls(1.5) - 0.2 * ls(-1.5)),
    "apo_zero": ({}, 1 - s(1) + s(-0.5)),
    "apo_down": ({}, s(1) + 1 - s(1.5)),
    "discopop": ({"discopop_tau": 0.5}, -ls(1.5) * (1 - s(3)) + math.exp(-1.5) * s(3)),
    "sft": ({"chosen_lengths": torch.tensor([4])}, 2.5),  # 10 / 4
    "sigmoid_norm": (LENGTHS, -ls(0.5)),  # beta * 1
}


@pytest.mark.parametrize("loss_type", dpo.LOSS_TYPES)
def test_dpo_equals_hand_computed_values(loss_type):
    options, expected = DPO[loss_type]
    out = dpo_loss(*LOGPS, beta=0.5, loss_type=loss_type, **options)
    assert out.losses.tolist() == pytest.approx([expected], abs=1e-6)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == pytest.approx((1, -0.5))


def test_aot_sorts_the_batch():
    # c - r: 5, 1 -> sorted 1, 5; c0 - r0: 0, 3 -> 0, 3; margins 1, 2
    args = [torch.tensor(x) for x in ([-5.0, -9.0], [-10.0, -10.0], [-7.0, -4.0], [-7.0, -7.0])]
    losses = dpo_loss(*args, beta=1.0, loss_type="aot").losses
    assert losses.tolist() == pytest.approx([-ls(1), -ls(2)])
    # a: 2, -5 -> -5, 2; b: -3, -3; margins -2, 5
    losses = dpo_loss(*args, beta=1.0, loss_type="aot_unpaired").losses
    assert losses.tolist() == pytest.approx([-ls(-2), -ls(5)])


# With beta 0.5 and scores instead of a = 2, b = -1:
DIVERGENCES = {
    "reverse_kl": ({}, 2 - -1),
    "forward_kl": ({}, (1 - math.exp(-2)) - (1 - math.exp(1))),
    "js_divergence": ({}, ls(2) - ls(-1)),  # log 2 cancels
    "alpha_divergence": ({}, (math.exp(-1) - 1) / -0.5 - (math.exp(0.5) - 1) / -0.5),  # al = 0.5
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_f_divergences_equal_hand_computed_values(name):
    options, d = DIVERGENCES[name]
    out = dpo_loss(*LOGPS, beta=0.5, f_divergence_type=name, **options)
    assert out.losses.item() == pytest.approx(-ls(0.5 * d), rel=1e-6)
    assert out.chosen_rewards.item() == 1  # rewards stay log-ratios


def test_several_losses_and_pair_weights_add_up():
    weights = torch.tensor([0.5])
    out = dpo_loss(
        *LOGPS, beta=0.5, loss_type=["sigmoid", "sft"], loss_weights=[2.0, 0.1], pair_weights=weights, **LENGTHS
    )
    assert out.losses.item() == pytest.approx((2 * -ls(1.5) + 0.1 * 2.5) * 0.5)


def test_wpo_weights_equal_hand_computed_values():
    logps, sums = torch.tensor([[-1.0, -2.0, 9.0]]), torch.tensor([[-2.0, -4.0, 9.0]])
    # (1 + 2) / 2 tokens
    assert wpo_weights(logps, sums, torch.tensor([[1, 1, 0]])).item() == pytest.approx(math.exp(1.5))
    assert wpo_weights(logps, sums, torch.zeros(1, 3)).item() == 1


def test_ld_logps_equal_hand_computed_values():
    logps = torch.tensor([[9.0, -1.0, -2.0, -3.0]])
    mask = torch.tensor([[0, 1, 1, 1]])
    assert ld_logps(logps, mask, torch.tensor([1]), ld_alpha=0.5).item() == -1 + 0.5 * -5
    assert ld_logps(logps, mask, torch.tensor([1]), ld_alpha=1.0).item() == -6
    assert ld_logps(logps, mask, torch.tensor([3]), ld_alpha=0.0).item() == -6


# c - r = 4; beta 0.5: 2
CPO = {
    "sigmoid": ({"label_smoothing": 0.1}, -0.9 * ls(2) - 0.1 * ls(-2)),
    "hinge": ({}, 0.0),
    "ipo": ({}, 9.0),  # (4 - 1)**2
}


@pytest.mark.parametrize("f", [cpo_loss, tpo_loss])
@pytest.mark.parametrize("loss_type", cpo.LOSS_TYPES)
def test_cpo_and_tpo_equal_hand_computed_values(f, loss_type):
    options, expected = CPO[loss_type]
    out = f(torch.tensor([-6.0]), torch.tensor([-10.0]), beta=0.5, loss_type=loss_type, **options)
    assert out.losses.item() == pytest.approx(expected)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (-3, -5)


def test_simpo_and_tpo_l_equal_hand_computed_values():
    # 2 (-1 - -1.5) - 0.4 = 0.6: gamma is not divided or multiplied by beta
    args = torch.tensor([-1.0]), torch.tensor([-1.5])
    out = simpo_loss(*args, beta=2.0, gamma=0.4, label_smoothing=0.25)
    assert out.losses.item() == pytest.approx(-0.75 * ls(0.6) - 0.25 * ls(-0.6))
    assert out.chosen_rewards.item() == -2
    assert tpo_loss(*args, beta=2.0, gamma=0.4, loss_type="tpo-l").losses.item() == pytest.approx(-ls(0.6))


@pytest.mark.parametrize(("alpha", "expected"), [(0.5, (1 - math.e) / 0.5), (-0.5, (1 - 1 / math.e) / -0.5), (0, -2)])
def test_alphapo_equals_hand_computed_values(alpha, expected):
    assert alphapo_rewards(torch.tensor([-2.0]), alpha=alpha).item() == pytest.approx(expected)


def test_alphapo_approaches_simpo():
    logps = torch.linspace(-8, -0.01, 9, dtype=torch.float64)
    torch.testing.assert_close(alphapo_rewards(logps, alpha=1e-9), logps)


def test_orpo_equals_hand_computed_values():
    # p = 1/2 has odds 1, p = 1/5 odds 1/4: log odds ratio log 4, s = 4/5
    out = orpo_loss(torch.tensor([0.5]).log(), torch.tensor([0.2]).log(), beta=0.3)
    assert out.losses.item() == pytest.approx(-0.3 * math.log(0.8), rel=1e-6)
    assert out.chosen_rewards.item() == pytest.approx(0.3 * math.log(0.5))


def test_kto_equals_hand_computed_values():
    # x = 2 and -1, kl = 1, beta = 0.5: 1 - s(0.5 (2 - 1)) and 1 - s(0.5 (1 - -1))
    logps, ref = torch.tensor([-10.0, -15.0]), torch.tensor([-12.0, -14.0])
    desirable = torch.tensor([True, False])
    out = kto_loss(logps, ref, desirable, 1.0, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    assert out.losses.tolist() == pytest.approx([2 * (1 - s(0.5)), 3 * (1 - s(1))])
    assert (out.chosen_rewards.tolist(), out.rejected_rewards.tolist()) == ([1.0], [-0.5])
    assert kto_loss(logps, ref, desirable, -4.0, beta=0.5).losses[0].item() == pytest.approx(1 - s(1))  # kl of 0
    out = kto_loss(logps, ref, desirable, None, beta=0.5, loss_type="apo_zero_unpaired")
    assert out.losses.tolist() == pytest.approx([1 - s(1), s(-0.5)])
    assert set(kto.LOSS_TYPES) == {"kto", "apo_zero_unpaired"}


def test_kto_kl_equals_hand_computed_values():
    kl = kto_kl(torch.tensor([-1.0, -8.0], requires_grad=True), torch.tensor([-4.0, -6.0]))
    assert kl.item() == 0.5  # (3 - 2) / 2
    assert not kl.requires_grad
    assert kto_kl(torch.tensor([-9.0]), torch.tensor([-4.0])) == 0
    assert kto_kl(torch.zeros(0), torch.zeros(0)) == 0


def test_sft_label_smoothing_and_z_loss_equal_hand_computed_values():
    logps, mask = torch.tensor([-1.0, -3.0, torch.nan]), torch.tensor([True, True, False])
    means, lse = torch.tensor([-5.0, -7.0, torch.nan]), torch.tensor([2.0, 4.0, torch.nan])
    # 0.9 * (1 + 3) / 2 + 0.1 * (5 + 7) / 2
    assert sft_loss(logps, mask, label_smoothing=0.1, mean_logps=means).item() == pytest.approx(2.4)
    # 2 + 0.01 * (4 + 16) / 2
    assert sft_loss(logps, mask, z_loss=0.01, lse=lse).item() == pytest.approx(2.1)


def test_sft_label_smoothing_equals_pytorch():
    logits, targets = torch.randn(5, 7, requires_grad=True), torch.randint(0, 7, (5,))
    all_logps = logits.log_softmax(-1)
    logps = all_logps.gather(-1, targets[:, None]).squeeze(-1)
    got = sft_loss(logps, torch.ones(5), label_smoothing=0.2, mean_logps=all_logps.mean(-1))
    want = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.2)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (got, want)))
