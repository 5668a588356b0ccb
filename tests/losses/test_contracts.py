"""Contracts of every loss: gradients, finite extremes, at least fp32, no broadcasting, no ignored options."""

import functools
import math
import re

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
from fusedalign.losses import cpo, dpo
from fusedalign.losses.orpo import log1mexp

SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
WITH_SCORES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")


def dpo_options(loss_type, b):
    options = {"loss_type": loss_type}
    if loss_type in SMOOTHED:
        options["label_smoothing"] = 0.1
    if loss_type in ("ipo", "sigmoid_norm", "sft"):
        options |= {"chosen_lengths": torch.arange(b), "rejected_lengths": torch.arange(b).flip(0)}  # includes 0
    return options


def pairwise():
    """The pairwise losses: name -> (number of [B] inputs, batch size -> loss function of the inputs)."""
    table = {
        f"dpo {name}": (4, lambda b, name=name: functools.partial(dpo_loss, **dpo_options(name, b)))
        for name in dpo.LOSS_TYPES
    }
    for name in ("forward_kl", "js_divergence", "alpha_divergence"):
        table[f"dpo {name}"] = (4, lambda b, name=name: functools.partial(dpo_loss, f_divergence_type=name))
        table[f"dpo ipo {name}"] = (
            4,
            lambda b, name=name: functools.partial(dpo_loss, f_divergence_type=name, **dpo_options("ipo", b)),
        )
    for name in cpo.LOSS_TYPES:
        table[f"cpo {name}"] = (2, lambda b, name=name: functools.partial(cpo_loss, loss_type=name))
    for name in (*cpo.LOSS_TYPES, "tpo-l"):
        table[f"tpo {name}"] = (2, lambda b, name=name: functools.partial(tpo_loss, loss_type=name))
    table["simpo"] = (2, lambda b: simpo_loss)
    table["simpo smoothed"] = (2, lambda b: functools.partial(simpo_loss, label_smoothing=0.2))
    table["alphapo"] = (2, lambda b: lambda c, r: simpo_loss(alphapo_rewards(c), alphapo_rewards(r)))
    table["alphapo < 0"] = (
        2,
        lambda b: lambda c, r: simpo_loss(alphapo_rewards(c, alpha=-0.25), alphapo_rewards(r, alpha=-0.25)),
    )
    table["orpo"] = (2, lambda b: orpo_loss)
    for kl in (0.0, 2.0):
        table[f"kto {kl}"] = (2, lambda b, kl=kl: lambda x, y: kto_loss(x, y, torch.arange(b) % 2 == 0, kl))
    table["kto apo"] = (
        2,
        lambda b: lambda x, y: kto_loss(x, y, torch.arange(b) % 2 == 0, None, loss_type="apo_zero_unpaired"),
    )
    return table


PAIRWISE = pairwise()
EACH = pytest.mark.parametrize("name", PAIRWISE)


def inputs(n, b, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(-4 * torch.rand(b, generator=g) - 0.05).to(dtype) for _ in range(n)]


@EACH
@pytest.mark.parametrize("b", [1, 2, 7])
def test_every_gradients_are_exact_and_dft_weights_constant(name, b):
    n, make = PAIRWISE[name]
    assert torch.autograd.gradcheck(lambda *x: make(b)(*x).losses, [x.requires_grad_() for x in inputs(n, b)])


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(name, dtype):
    n, make = PAIRWISE[name]
    xs = inputs(n, 5, dtype)
    out, exact = make(5)(*xs), make(5)(*(x.double() for x in xs))
    assert {x.dtype for x in out} == {torch.float32}
    torch.testing.assert_close(out.losses.double(), exact.losses, rtol=1e-5, atol=1e-6)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_stay_finite_in_value_and_gradient(name, dtype):
    """Margins of +-1e4 and more, log-probabilities from -1e5 to -0.0, empty completions."""
    n, make = PAIRWISE[name]
    grid = torch.tensor([-1e5, -1e4, -100.0, -1.0, -1e-4, -1e-9, -1e-38, -0.0])
    xs = [x.flatten().to(dtype).requires_grad_() for x in torch.meshgrid(grid, grid, indexing="ij")]
    for others in ((0.0, 0.0), (-1e4, -3.0), (-3.0, -1e5)) if n == 4 else ((),):
        args = [*xs, *(torch.full_like(xs[0], x) for x in others)]
        out = make(len(xs[0]))(*args)
        for x in out:
            assert torch.isfinite(x).all()
        for grad in torch.autograd.grad(out.losses.sum(), xs, allow_unused=True):
            assert grad is None or torch.isfinite(grad).all()


#: Losses with further per-row arguments, or that depend on the whole batch, have separate tests.
SEPARABLE = [name for name in PAIRWISE if not any(x in name for x in ("aot", "sft", "kto", "dpo ipo", "norm"))]


@pytest.mark.parametrize("name", SEPARABLE)
def test_losses_do_not_depend_on_the_other_pairs(name):
    n, make = PAIRWISE[name]
    order, xs = torch.tensor([4, 2, 0, 1, 3]), inputs(n, 5)
    torch.testing.assert_close(make(5)(*(x[order] for x in xs)).losses, make(5)(*xs).losses[order])


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_aot_does_not_depend_on_the_order_of_pairs(loss_type):
    order, xs = torch.tensor([4, 2, 0, 1, 3]), inputs(4, 5)
    f = functools.partial(dpo_loss, loss_type=loss_type)
    torch.testing.assert_close(f(*(x[order] for x in xs)).losses, f(*xs).losses)


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
def test_each_pair_uses_its_own_lengths(loss_type):
    order, xs = torch.tensor([2, 0, 1]), inputs(4, 3)
    lengths = [torch.tensor([1, 5, 2]), torch.tensor([4, 3, 7])]

    def f(xs, lengths):
        return dpo_loss(*xs, loss_type=loss_type, chosen_lengths=lengths[0], rejected_lengths=lengths[1]).losses

    torch.testing.assert_close(f([x[order] for x in xs], [x[order] for x in lengths]), f(xs, lengths)[order])


@pytest.mark.parametrize("name", ["dpo sigmoid", "cpo sigmoid", "orpo", "tpo sigmoid"])
def test_swapping_chosen_and_rejected_flips_the_margin(name):
    """-log s(m) and -log s(-m) differ by the margin m (times the weight in ORPO)."""
    n, make = PAIRWISE[name]
    xs = inputs(n, 5)
    forth, back = make(5)(*xs), make(5)(*(xs[i ^ 1] for i in range(n)))
    torch.testing.assert_close(back.chosen_rewards, forth.rejected_rewards)
    margin = forth.chosen_rewards - forth.rejected_rewards
    if name == "orpo":
        odds = [x - log1mexp(x) for x in xs]
        margin = 0.1 * (odds[0] - odds[1])
    torch.testing.assert_close(back.losses - forth.losses, margin)


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot", "aot_unpaired", "sigmoid_norm"])
@pytest.mark.parametrize("b", [1, 7])
def test_the_first_step_is_log_2(loss_type, b):
    c, r = inputs(2, b, torch.float32)
    options = dpo_options(loss_type, b)
    losses = dpo_loss(c, r, c, r, **options).losses
    torch.testing.assert_close(losses, torch.full((b,), math.log(2)))


@pytest.mark.parametrize("x", [-1e-38, -1e-9, -1e-4, -0.5, -math.log(2), -0.7, -5.0, -100.0, -1e5])
def test_log1mexp_is_exact(x):
    exact = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
    value = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    out = log1mexp(value)
    (grad,) = torch.autograd.grad(out, value)
    assert out.item() == pytest.approx(exact, rel=1e-12)
    assert grad.item() == pytest.approx(math.exp(x) / math.expm1(x), rel=1e-9)


def test_orpo_near_zero_has_the_right_gradient():
    """d loss / d c = -beta s(-log odds) / (1 - e**c); a naive log1p(-exp) gives NaN."""
    c, r = torch.tensor([-1e-9], requires_grad=True), torch.tensor([-1.0])
    (grad,) = torch.autograd.grad(orpo_loss(c, r, beta=1.0).losses.sum(), c)
    x, y = -1e-9, -1.0
    log_odds = (x - math.log(-math.expm1(x))) - (y - math.log(-math.expm1(y)))
    assert grad.item() == pytest.approx(-1 / (1 + math.exp(log_odds)) / -math.expm1(x), rel=1e-4)


@pytest.mark.parametrize("side", [True, False])
def test_kto_works_with_one_side_absent(side):
    x = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    out = kto_loss(x, torch.zeros(3), torch.full((3,), side), 0.5)
    assert [len(out.chosen_rewards), len(out.rejected_rewards)] == ([3, 0] if side else [0, 3])
    out.losses.mean().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("tau", "d"), [(2.0, -200.0), (2.0, -1e4), (5.0, -1e5)])
def test_discopop_exponent_is_clamped(tau, d):
    """With tau > 1, m exp(-x) grows as exp(-x (1 - 1 / tau)) for x < 0; unclamped, it overflows fp32 near -178."""
    c = torch.tensor([d, 0.5], requires_grad=True)
    zero = torch.zeros(2)
    losses = dpo_loss(c, zero, zero, zero, beta=1.0, loss_type="discopop", discopop_tau=tau).losses
    (grad,) = torch.autograd.grad(losses.sum(), c)
    expected = [-d + math.exp(40.0), None]
    assert losses[0].item() == pytest.approx(expected[0], rel=1e-5)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(grad).all()
    assert losses.square().isfinite().all()  # as documented for the constant
    m = 1 / (1 + math.exp(-0.5 / tau))
    assert losses[1].item() == pytest.approx((1 - m) * math.log1p(math.exp(-0.5)) + m * math.exp(-0.5), rel=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_zero"])
def test_pair_weights_are_constants(loss_type):
    """WPO weights depend on the policy, but carry no gradient."""
    c, r, c0, r0 = (x.requires_grad_() for x in inputs(4, 3))
    weights = (c.exp() * torch.tensor([1.0, 2.0, 0.5])).float()
    options = dpo_options(loss_type, 3)
    got = dpo_loss(c, r, c0, r0, pair_weights=weights, **options).losses
    want = dpo_loss(c, r, c0, r0, **options).losses * weights.detach()
    torch.testing.assert_close(got, want)
    for x, y in zip(*(torch.autograd.grad(losses.sum(), (c, r)) for losses in (got, want)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("coef", [1 - 1e-12, 1 + 1e-12, 1.0])
def test_alpha_divergence_is_exact_near_reverse_kl(coef):
    """(exp((al - 1) x) - 1) / (al - 1) needs expm1: subtracting 1 from a rounded exponential leaves three digits."""
    xs = inputs(4, 5)
    got = dpo_loss(*xs, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coef).losses
    torch.testing.assert_close(got, dpo_loss(*xs).losses, rtol=1e-10, atol=0)


def test_kto_weights_do_not_enter_the_denominator():
    args = torch.tensor([-1.0, -2.0]), torch.zeros(2), torch.tensor([True, False]), 0.0
    double = kto_loss(*args, desirable_weight=2.0, undesirable_weight=2.0).losses.mean()
    torch.testing.assert_close(double, 2 * kto_loss(*args).losses.mean())


@EACH
def test_shapes_do_not_broadcast(name):
    n, make = PAIRWISE[name]
    for bad in (torch.zeros(3, 1), torch.zeros(1), torch.zeros(())):
        for i in range(n):
            args = [torch.zeros(3)] * n
            args[i] = bad
            with pytest.raises(ValueError, match="must have shape"):
                make(3)(*args)


X = torch.zeros(2)
M = torch.zeros(2, 3)
BAD = {
    "beta": (lambda: cpo_loss(X, X, beta=0), "beta must be > 0, got 0"),
    "beta simpo": (lambda: simpo_loss(X, X, beta=-1), "beta must be > 0, got -1"),
    "beta orpo": (lambda: orpo_loss(X, X, beta=0.0), "beta must be > 0"),
    "beta kto": (lambda: kto_loss(X, X, X > 0, 0.0, beta=0.0), "beta must be > 0"),
    "gamma": (lambda: simpo_loss(X, X, gamma=-0.1), "gamma must be >= 0, got -0.1"),
    "gamma tpo": (lambda: tpo_loss(X, X, gamma=0.7), "gamma is for loss_type tpo-l only, with sigmoid it must be 0.5"),
    "robust": (
        lambda: dpo_loss(X, X, X, X, loss_type="robust", label_smoothing=0.5),
        "label_smoothing must be in [0, 0.5) with loss_type='robust', got 0.5",
    ),
    "exo": (
        lambda: dpo_loss(X, X, X, X, loss_type="exo_pair"),
        "label_smoothing must be in (0, 1) with loss_type='exo_pair', got 0.0",
    ),
    "device": (lambda: cpo_loss(X, X.to("meta")), "rejected_logps must be on cpu like chosen_logps, got meta"),
    "smoothing": (lambda: dpo_loss(X, X, X, X, loss_type="aot", label_smoothing=-0.1), "must be in [0, 1) with"),
    "smoothing cpo": (
        lambda: cpo_loss(X, X, loss_type="ipo", label_smoothing=0.1),
        "label_smoothing is for loss_type sigmoid only",
    ),
    "weights": (
        lambda: dpo_loss(X, X, X, X, loss_weights=[1.0, 2.0]),
        "loss_weights must have one number for each of sigmoid",
    ),
    "none": (lambda: dpo_loss(X, X, X, X, loss_type=[]), "loss_type must name at least one loss, got none"),
    "lengths": (lambda: dpo_loss(X, X, X, X, loss_type="ipo"), "chosen_lengths is needed with loss_type ipo, got None"),
    "lengths shape": (
        lambda: dpo_loss(X, X, X, X, loss_type="ipo", chosen_lengths=X[:1], rejected_lengths=X),
        "chosen_lengths must have shape (2,) to match chosen_logps, got (1,)",
    ),
    "divergence": (
        lambda: dpo_loss(X, X, X, X, f_divergence_type="kl"),
        "f_divergence_type must be one of reverse_kl, forward_kl",
    ),
    "divergence unused": (
        lambda: dpo_loss(X, X, X, X, loss_type="apo_zero", f_divergence_type="forward_kl"),
        "f_divergence_type is for loss_type " + ", ".join(WITH_SCORES) + " only",
    ),
    "divergence unused beside another": (
        lambda: dpo_loss(X, X, X, X, loss_type=["sigmoid", "nca_pair"], f_divergence_type="forward_kl"),
        "only, with nca_pair it must be reverse_kl, got forward_kl",
    ),
    "divergence of sft": (
        lambda: dpo_loss(
            X, X, X, X, loss_type="sft", f_divergence_type="forward_kl", chosen_lengths=X, rejected_lengths=X
        ),
        "only, with sft it must be reverse_kl, got forward_kl",
    ),
    "pair weights of aot": (
        lambda: dpo_loss(X, X, X, X, loss_type="aot", pair_weights=X),
        "pair_weights must be None with aot",
    ),
    "coefficient unused": (lambda: dpo_loss(X, X, X, X, f_alpha_divergence_coef=2.0), "f_alpha_divergence_coef"),
    "tau unused": (lambda: dpo_loss(X, X, X, X, discopop_tau=1.0), "discopop_tau is for loss_type discopop only"),
    "tau": (lambda: dpo_loss(X, X, X, X, loss_type="discopop", discopop_tau=0.0), "discopop_tau must be > 0"),
    "pair weights": (lambda: dpo_loss(X, X, X, X, pair_weights=M), "pair_weights must have shape (2,)"),
    "cpo type": (
        lambda: cpo_loss(X, X, loss_type="simpo"),
        "loss_type must be one of sigmoid, hinge, ipo, got 'simpo'",
    ),
    "tpo type": (lambda: tpo_loss(X, X, loss_type="x"), "loss_type must be one of sigmoid, hinge, ipo, tpo-l, got 'x'"),
    "kto type": (lambda: kto_loss(X, X, X > 0, 0.0, loss_type="x"), "loss_type must be one of kto, apo_zero_unpaired"),
    "kto weight": (lambda: kto_loss(X, X, X > 0, 0.0, desirable_weight=-1), "desirable_weight must be >= 0, got -1"),
    "kto kl": (lambda: kto_loss(X, X, X > 0, None), "kl must be a scalar with loss_type='kto' (see kto_kl), got None"),
    "kto kl shape": (lambda: kto_loss(X, X, X > 0, X), "kl must be a scalar, got shape (2,)"),
    "kto apo kl": (lambda: kto_loss(X, X, X > 0, 0.0, loss_type="apo_zero_unpaired"), "kl must be None with"),
    "ld": (lambda: ld_logps(M, M, X, ld_alpha=1.5), "ld_alpha must be in [0, 1], got 1.5"),
    "ld shape": (
        lambda: ld_logps(M, M, X[:1], ld_alpha=0.5),
        "shared_lengths must have shape (2,) to match logps, got (1,)",
    ),
    "wpo shape": (lambda: wpo_weights(M, M, M[:1]), "mask must have shape (2, 3) to match logps, got (1, 3)"),
    "kto_kl shape": (lambda: kto_kl(X, X[:1]), "ref_kl_logps must have shape (2,)"),
    "sft smoothing": (
        lambda: sft_loss(X, X, label_smoothing=0.1),
        "mean_logps is needed with label_smoothing=0.1, got None",
    ),
    "sft dft": (
        lambda: sft_loss(X, X, label_smoothing=0.1, mean_logps=X, loss_type="dft"),
        "label_smoothing is for loss_type nll only",
    ),
    "sft z": (lambda: sft_loss(X, X, lse=X), "lse is for z_loss > 0 only"),
    "sft z shape": (lambda: sft_loss(X, X, z_loss=0.1, lse=M), "lse must have shape (2,) to match logps, got (2, 3)"),
}


@pytest.mark.parametrize("name", BAD)
def test_out_of_range_options_raise(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_sft_combines_with_a_divergence():
    lengths = {"chosen_lengths": X + 1, "rejected_lengths": X + 1}
    options = {"f_divergence_type": "forward_kl", **lengths}
    combined = dpo_loss(X - 1, X - 2, X, X, loss_type=["sigmoid", "sft"], **options).losses
    apart = [
        dpo_loss(X - 1, X - 2, X, X, loss_type="sigmoid", **options),
        dpo_loss(X - 1, X - 2, X, X, loss_type="sft", **lengths),
    ]
    torch.testing.assert_close(combined, sum(x.losses for x in apart))


WRONG_TYPES = {
    "desirable": (lambda: kto_loss(X, X, X, 0.0), "desirable must be bool, got torch.float32"),
    "desirable list": (lambda: kto_loss(X, X, [True, False], 0.0), "desirable must be a torch.Tensor, got list"),
    "sft logps": (lambda: sft_loss([1.0], X), "logps must be floating-point, got list"),
    "sft mask": (lambda: sft_loss(X, None), "mask must be a torch.Tensor, got NoneType"),
    "loss_type": (
        lambda: dpo_loss(X, X, X, X, loss_type=3),
        "loss_type must be a name or a sequence of names, got int",
    ),
    "lengths": (
        lambda: dpo_loss(X, X, X, X, loss_type="ipo", chosen_lengths=[1, 2], rejected_lengths=[1, 2]),
        "chosen_lengths must be a torch.Tensor, got list",
    ),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_types_raise(name):
    call, message = WRONG_TYPES[name]
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    "option", ["beta", "label_smoothing", "discopop_tau", "f_alpha_divergence_coef", "loss_weights"]
)
def test_every_option_changes_the_loss(option):
    xs = inputs(4, 5)
    base = {
        "beta": ({}, {"beta": 0.3}),
        "label_smoothing": ({"loss_type": "robust"}, {"loss_type": "robust", "label_smoothing": 0.2}),
        "discopop_tau": ({"loss_type": "discopop"}, {"loss_type": "discopop", "discopop_tau": 0.3}),
        "f_alpha_divergence_coef": (
            {"f_divergence_type": "alpha_divergence"},
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0},
        ),
        "loss_weights": ({"loss_type": ["hinge"]}, {"loss_type": ["hinge"], "loss_weights": [0.5]}),
    }[option]
    a, b = (dpo_loss(*xs, **options).losses for options in base)
    assert not torch.allclose(a, b)
