"""Invalid numbers are refused, also as tensors, and valid ones are not rounded."""

import functools
import math
import re

import numpy as np
import pytest
import torch
from test_contracts import PAIRWISE, inputs

import fusedalign.checks
from fusedalign import (
    alphapo_rewards,
    cpo_loss,
    dpo_loss,
    kto_loss,
    ld_logps,
    linear_cross_entropy,
    linear_logps,
    orpo_loss,
    sft_loss,
    simpo_loss,
    tpo_loss,
    wpo_weights,
)
from fusedalign.losses import dpo

C, R = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -2.5])
GOOD = C > -1.5
ONES, LSE = torch.ones(2), torch.tensor([3.0, 4.0])
HIDDEN, WEIGHT, TARGETS = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])

PAIR = functools.partial(dpo_loss, C, R, C - 1, R - 1)
#: number name -> functions that take it.
NUMBERS = {
    "beta": [
        *(functools.partial(PAIR, loss_type=name) for name in dpo.LOSS_TYPES if name not in ("exo_pair", "robust")),
        functools.partial(cpo_loss, C, R),
        functools.partial(simpo_loss, C, R),
        functools.partial(tpo_loss, C, R),
        functools.partial(orpo_loss, C, R),
        functools.partial(kto_loss, C, R, GOOD, 0.0),
    ],
    "gamma": [functools.partial(simpo_loss, C, R), functools.partial(tpo_loss, C, R, loss_type="tpo-l")],
    "alpha": [functools.partial(alphapo_rewards, C)],
    "label_smoothing": [
        *(functools.partial(PAIR, loss_type=name) for name in ("exo_pair", "robust", "aot", "aot_unpaired")),
        functools.partial(cpo_loss, C, R),
        functools.partial(simpo_loss, C, R),
        functools.partial(tpo_loss, C, R),
        functools.partial(sft_loss, C, ONES, mean_logps=R),
    ],
    "f_alpha_divergence_coef": [functools.partial(PAIR, f_divergence_type="alpha_divergence")],
    "discopop_tau": [functools.partial(PAIR, loss_type="discopop")],
    "desirable_weight": [functools.partial(kto_loss, C, R, GOOD, 0.0)],
    "undesirable_weight": [functools.partial(kto_loss, C, R, GOOD, 0.0)],
    "kl": [functools.partial(kto_loss, C, R, GOOD)],
    "ld_alpha": [functools.partial(ld_logps, C, ONES, torch.tensor(1))],
    "z_loss": [
        functools.partial(sft_loss, C, ONES, lse=LSE),
        functools.partial(linear_cross_entropy, HIDDEN, WEIGHT, TARGETS),
    ],
    "num_items": [
        functools.partial(sft_loss, C, ONES),
        functools.partial(linear_cross_entropy, HIDDEN, WEIGHT, TARGETS),
    ],
    "scale": [functools.partial(linear_logps, HIDDEN, WEIGHT, TARGETS)],
    "softcap": [functools.partial(linear_logps, HIDDEN, WEIGHT, TARGETS)],
    "temperature": [functools.partial(linear_logps, HIDDEN, WEIGHT, TARGETS)],
    "filter_eps": [functools.partial(linear_logps, HIDDEN, WEIGHT, TARGETS)],
}
LENGTHS = {"chosen_lengths": ONES, "rejected_lengths": ONES}
EACH_NUMBER = pytest.mark.parametrize(("name", "f"), [(name, f) for name, fs in NUMBERS.items() for f in fs])


def with_lengths(f):
    return functools.partial(f, **LENGTHS) if f.keywords.get("loss_type") in ("ipo", "sigmoid_norm", "sft") else f


@EACH_NUMBER
def test_numbers_not_finite_in_fp32_are_refused(name, f):
    for bad in (math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf"), 1e39, 10**40):
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got {re.escape(str(bad))}$"):
            with_lengths(f)(**{name: bad})


@EACH_NUMBER
def test_values_that_are_not_numbers_are_refused(name, f):
    for bad in ("1", 1j, [1.0], np.ones(2), *([] if name in ("num_items", "kl") else [ONES, torch.tensor(0.5)])):
        with pytest.raises(TypeError, match=rf"^{name} must be a number, got {type(bad).__name__}$"):
            with_lengths(f)(**{name: bad})


@EACH_NUMBER
def test_bools_and_0d_arrays_are_refused(name, f):
    """Arithmetic of tensors with bools or 0-d arrays raises unclear errors or changes types."""
    for bad in (True, np.array(0.5)):
        with pytest.raises(TypeError, match=rf"^{name} must be a number, got {type(bad).__name__}$"):
            with_lengths(f)(**{name: bad})


@pytest.mark.parametrize("name", ["beta", "discopop_tau", "softcap", "temperature", "num_items"])
@pytest.mark.parametrize("bad", [5e-324, 1e-310, 1e-39])
def test_divisors_without_a_finite_reciprocal_are_refused(name, bad):
    """1 / 5e-324 is inf in fp64, 1 / 1e-39 in fp32."""
    for f in NUMBERS[name]:
        with pytest.raises(ValueError, match=f"^{name} must be at least 1.2e-38, .*, got {bad}$"):
            with_lengths(f)(**{name: bad})


@pytest.mark.parametrize("name", ["beta", "discopop_tau", "softcap", "temperature"])
@pytest.mark.parametrize("bad", [0, 0.0, -1])
def test_divisors_that_are_not_positive_are_refused(name, bad):
    for f in NUMBERS[name]:
        with pytest.raises(ValueError, match=f"^{name} must be > 0(| or None), got {bad}$"):
            with_lengths(f)(**{name: bad})


@pytest.mark.parametrize(
    ("options", "quotient"),
    [
        ({"scale": 1e30, "temperature": 1e-30}, "scale / temperature must be finite in fp32, got 1e[+]30 / 1e-30"),
        ({"scale": -1e30, "softcap": 1e-30}, "scale / softcap must be finite in fp32, got -1e[+]30 / 1e-30"),
        ({"temperature": 1e30, "softcap": 1e-30}, "temperature / softcap must be finite in fp32, got 1e[+]30 / 1e-30"),
    ],
)
@pytest.mark.parametrize("f", [linear_logps, linear_cross_entropy])
def test_infinite_quotients_in_the_logits_are_refused(f, options, quotient):
    with pytest.raises(ValueError, match=quotient):
        f(HIDDEN, WEIGHT, TARGETS, **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_each_loss_weight_is_finite(bad):
    with pytest.raises(ValueError, match=rf"^loss_weights\[1\] must be finite, got {bad}$"):
        PAIR(loss_type=["sigmoid", "hinge"], loss_weights=[1.0, bad])


def test_an_alpha_that_fp32_cannot_hold_is_simpo():
    assert torch.equal(alphapo_rewards(C, alpha=1e-320), C)
    small = alphapo_rewards(C.double(), alpha=1e-12)
    torch.testing.assert_close(small, C.double(), rtol=1e-11, atol=0)


# Numbers passed as tensors

#: name -> (a function of the tensor, valid values, invalid values)
NOT_FINITE = (math.nan, math.inf, -math.inf)
TENSORS = {
    "kl": (lambda x: kto_loss(C, R, GOOD, x).losses, torch.tensor(0.5), NOT_FINITE),
    "pair_weights": (lambda x: PAIR(pair_weights=x).losses, ONES, NOT_FINITE),
    "chosen_lengths": (
        lambda x: PAIR(loss_type="ipo", chosen_lengths=x, rejected_lengths=ONES).losses,
        ONES,
        (*NOT_FINITE, -1.0),
    ),
    "rejected_lengths": (
        lambda x: PAIR(loss_type="sigmoid_norm", chosen_lengths=ONES, rejected_lengths=x).losses,
        ONES,
        (*NOT_FINITE, -1.0),
    ),
    "chosen_lengths of sft": (
        lambda x: PAIR(loss_type="sft", chosen_lengths=x).losses,
        ONES,
        (*NOT_FINITE, -3.0),
    ),
    "shared_lengths": (
        lambda x: ld_logps(C.expand(2, 2), torch.ones(2, 2), x, ld_alpha=0.5),
        ONES,
        (*NOT_FINITE, -1.0),
    ),
    "num_items": (lambda x: sft_loss(C, ONES, num_items=x), torch.tensor(3.0), (*NOT_FINITE, -1.0)),
    "num_items of the head": (
        lambda x: linear_cross_entropy(HIDDEN, WEIGHT, TARGETS, num_items=x),
        torch.tensor(3.0),
        (*NOT_FINITE, -1.0),
    ),
}
EACH_TENSOR = pytest.mark.parametrize(
    ("name", "bad", "dtype"),
    [
        (name, bad, dtype)
        for name in TENSORS
        for bad in TENSORS[name][2]
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ],
)


def with_bad_value(name, bad, dtype):
    f, good, _ = TENSORS[name]
    x = good.to(dtype).clone()
    x.view(-1)[-1] = bad
    return f, x


@EACH_TENSOR
def test_bad_cpu_tensor_values_raise(name, bad, dtype):
    f, x = with_bad_value(name, bad, dtype)
    with pytest.raises(ValueError, match=rf"^{name.partition(' ')[0]} must be finite(| and >= 0), got {bad}$"):
        f(x)


@EACH_TENSOR
def test_bad_values_in_unread_tensors_give_nan(monkeypatch, name, bad, dtype):
    """On a GPU (reading would synchronise) and in graphs a bad value gives NaN, never a plausible number."""
    monkeypatch.setattr(fusedalign.checks, "has_values", lambda x: False)
    f, x = with_bad_value(name, bad, dtype)
    out = f(x)
    assert out.flatten()[-1].isnan()
    good = TENSORS[name][1]
    assert torch.isfinite(f(good)).all()
    if out.ndim and "sft" not in name and name != "kl":
        assert torch.isfinite(out[0]), "the other pair has nothing to do with it"


def test_bad_tensor_values_in_a_graph_give_nan():
    @functools.partial(torch.compile, backend="eager", fullgraph=True)
    def f(kl, lengths):
        losses = kto_loss(C, R, GOOD, kl).losses
        return losses, PAIR(loss_type="ipo", chosen_lengths=lengths, rejected_lengths=ONES).losses

    kto, ipo = f(torch.tensor(math.inf), torch.tensor([1.0, -2.0]))
    assert kto.isnan().all()
    assert ipo.isnan().tolist() == [False, True]


@pytest.mark.parametrize("f", NUMBERS["num_items"])
@pytest.mark.parametrize("items", [0.25, 3, 1e-3, np.float32(0.5), np.int64(7)])
def test_num_items_divides_without_rounding(f, items):
    """Fractions too: a count averaged over ranks may be fractional."""
    total = f(num_items=1)
    for num_items in (items, torch.tensor(float(items)), torch.tensor([float(items)], dtype=torch.float64)):
        out = f(num_items=num_items)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, total / float(items))


@pytest.mark.parametrize("f", NUMBERS["num_items"])
def test_num_items_of_zero_divides_by_one(f):
    for none in (0, 0.0, torch.tensor(0), torch.tensor(0.0)):
        assert torch.equal(f(num_items=none), f(num_items=1))


def test_num_items_works_in_a_graph():
    hidden = HIDDEN.clone().requires_grad_()
    compiled = torch.compile(linear_cross_entropy, backend="eager", fullgraph=True)
    for items in (0.5, 3, torch.tensor(0.5), torch.tensor(4)):
        got = compiled(hidden, WEIGHT, TARGETS, num_items=items, impl="pytorch")
        torch.testing.assert_close(got, linear_cross_entropy(hidden, WEIGHT, TARGETS, num_items=items, impl="pytorch"))
    assert compiled(hidden, WEIGHT, TARGETS, num_items=torch.tensor(-2.0), impl="pytorch").isnan()


# PyTorch's default


@pytest.fixture
def default_bf16():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def other_losses():
    """Losses and helpers missing in PAIRWISE, and PAIRWISE ones with numbers that half precision cannot hold."""
    x, y = inputs(2, 4)
    mask, desirable = torch.ones(4), torch.tensor([True, False, True, False])
    weights = {"desirable_weight": 1.1, "undesirable_weight": 0.9}
    lengths = {"chosen_lengths": torch.tensor([1, 0, 3, 300]), "rejected_lengths": torch.tensor([2, 7, 257, 1])}
    return {
        "kto": lambda: kto_loss(x, y, desirable, 0.3, beta=0.7, **weights).losses,
        "kto tensor": lambda: kto_loss(x, y, desirable, torch.tensor(0.3, dtype=torch.float64), **weights).losses,
        "alphapo": lambda: alphapo_rewards(x, alpha=0.3),
        "dpo weights": lambda: dpo_loss(x, y, y, x, loss_type=["sigmoid", "ipo"], loss_weights=[0.3, 0.7], **lengths)[
            0
        ],
        "dpo alpha": lambda: (
            dpo_loss(x, y, y, x, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3).losses
        ),
        "dpo pair weights": lambda: dpo_loss(x, y, y, x, pair_weights=x.exp()).losses,
        "discopop": lambda: dpo_loss(x, y, y, x, loss_type="discopop", discopop_tau=0.3).losses,
        "sft": lambda: sft_loss(x, mask, num_items=0.3, label_smoothing=0.3, mean_logps=y, z_loss=0.3, lse=y),
        "sft tensor": lambda: sft_loss(x, mask, num_items=torch.tensor(257)),
        "sft count": lambda: sft_loss(x.repeat(100), mask.repeat(100)),
        "ld": lambda: ld_logps(x, mask, torch.tensor(3), ld_alpha=0.3),
        "wpo": lambda: wpo_weights(x, y, mask),
    } | {name: functools.partial(losses_of, f(4), inputs(n, 4)) for name, (n, f) in PAIRWISE.items()}


def losses_of(f, xs):
    return f(*xs).losses


@pytest.mark.parametrize("name", other_losses())
def test_fp64_is_exact_under_any_default_dtype(name, request):
    loss = other_losses()[name]
    want = loss()
    request.getfixturevalue("default_bf16")
    got = loss()
    assert got.dtype == want.dtype == torch.float64
    assert torch.equal(got, want)


def test_kto_weights_and_kl_enter_in_fp64():
    """They are not rounded to fp32, where 0.1 differs."""
    x = torch.zeros(2, dtype=torch.float64)
    out = kto_loss(x, x, GOOD, 0.1, beta=1.0, desirable_weight=0.1, undesirable_weight=0.3).losses
    exact = [0.1 / (1 + math.exp(-0.1)), 0.3 / (1 + math.exp(0.1))]
    torch.testing.assert_close(out, torch.tensor(exact, dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("impl", ["pytorch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_head_is_exact_under_any_default_dtype(request, impl, dtype):
    hidden, weight = HIDDEN.to(dtype).requires_grad_(), WEIGHT.to(dtype).requires_grad_()
    bias = torch.randn(5, dtype=dtype)

    def run():
        options = {"impl": impl, "bias": bias, "scale": 0.3, "softcap": 3.3, "temperature": 0.7}
        out = linear_logps(hidden, weight, TARGETS, outputs=["entropy", "lse", "mean_logit"], **options)
        loss = linear_cross_entropy(hidden, weight, TARGETS, num_items=257, z_loss=0.3, **options)
        grads = torch.autograd.grad(loss + out.logps.sum() + out.entropy.sum(), (hidden, weight))
        return *(x for x in out if x is not None), loss, *grads

    want = run()
    request.getfixturevalue("default_bf16")
    for got, expected in zip(run(), want, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
