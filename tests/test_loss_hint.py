"""`loss_hint`: the forward computes gradients for the expected loss; any other loss still gets exact ones."""

import pytest
import torch
from helpers import (
    DEVICES,
    HEADS,
    IMPLS,
    RAGGED,
    Case,
    assert_loss_within_budget,
    assert_within_budget,
    finest,
    make_case,
    run,
)

from fusedalign import linear_logps, sft_loss
from fusedalign.impls import pytorch

LOSSES = ["nll", "dft"]
OUTPUTS = ("entropy", "is_top1")  # the outputs that TRL logs for SFT


@pytest.fixture
def calls(monkeypatch):
    """The names of the pytorch impl's gradient paths that were called."""
    made = []
    for name in ("one_pass", "two_pass_grads"):
        original = getattr(pytorch.IMPL, name)
        monkeypatch.setattr(pytorch.IMPL, name, lambda *a, _f=original, _n=name, **k: made.append(_n) or _f(*a, **k))
    return made


def train(case, loss_type="nll", *, hint="same", num_items=None, needs=(True, True, True), factor=1.0, **options):
    """Per-token outputs with loss_hint, and loss and gradients of a trainer's reduction, named as in `run`."""
    case = case.leaves(*needs)
    hint = loss_type if hint == "same" else hint
    out = case.logps(outputs=OUTPUTS, loss_hint=hint, **options)
    loss = sft_loss(out.logps, case.valid, loss_type=loss_type, num_items=num_items)
    (loss * factor).backward()
    grads = {f"d{name}": g for name, g in case.grads().items() if g is not None}
    return out, {"loss": loss.detach()} | grads


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize(("seed", "num_items"), [(0, None), (1, 1000)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("leading", "d", "v", "head"), [(*s, h) for s, h in zip(RAGGED, [*HEADS, {}], strict=True)])
def test_the_expected_loss_gets_exact_gradients(calls, leading, d, v, head, dtype, num_items, loss_type, seed):
    """Normalised by the batch or by an accumulation window: equal to fp64; outputs equal those without a hint."""
    case = make_case(leading, d, v, dtype=dtype, seed=seed, **head)
    out, got = train(case, loss_type, num_items=num_items, impl="pytorch")
    assert calls == ["one_pass"]
    assert_loss_within_budget(case, got, loss_type=loss_type, num_items=num_items)
    want, _ = train(case, loss_type, hint=None, impl="pytorch")
    assert out.entropy.requires_grad
    for name in ("logps", "entropy", "is_top1"):
        torch.testing.assert_close(getattr(out, name), getattr(want, name), rtol=1e-6, atol=1e-6)
    assert out.lse is None


@pytest.mark.parametrize("hint", LOSSES)
@pytest.mark.parametrize("names", [("logps",), ("entropy",), ("logps", "entropy", "lse")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_loss_gets_exact_gradients(calls, dtype, names, hint):
    """Upstream gradients that differ between tokens or belong to other outputs."""
    case = make_case((3, 17), 23, 252, dtype=dtype, softcap=5.0)
    got = run(case, names, loss_hint=hint, impl="pytorch")
    assert calls == ["one_pass", "two_pass_grads"]
    assert_within_budget(case, got, names)


@pytest.mark.parametrize("options", ["entropy", "lse"])
def test_the_expected_loss_plus_another_term_gets_exact_gradients(calls, options):
    case = make_case((3, 17), 23, 252, dtype=torch.float64)

    def grads(hint):
        leaves = case.leaves()
        out = leaves.logps(outputs=[options], loss_hint=hint, impl="pytorch")
        (sft_loss(out.logps, case.valid) + 1e-3 * getattr(out, options).mean()).backward()
        return leaves.grads()

    got, want = grads("nll"), grads(None)
    assert calls == ["one_pass", "two_pass_grads", "two_pass_grads"]
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("names", [("logps",), ("logps", "entropy", "lse")])
@pytest.mark.parametrize("impl", sorted(set(IMPLS) - {"pytorch"}))
def test_other_impls_ignore_the_hint(impl, names):
    case = make_case((2, 5), 16, 123, dtype=finest(impl))
    outputs = ("entropy", "lse") if impl in ("triton", "reference") else ()
    names = names if outputs else ("logps",)
    want = run(case, names, outputs=outputs, impl=impl)
    got = run(case, names, outputs=outputs, impl=impl, loss_hint="nll")
    assert all(torch.equal(got[name], x) for name, x in want.items())


def test_the_mean_over_the_batch_needs_no_scaling(calls, monkeypatch):
    factors = []
    monkeypatch.setattr(pytorch.IMPL, "scale_", lambda x, factor: factors.append(factor.item()) or x)
    train(make_case((65,), 48, 401), impl="pytorch")
    assert calls == ["one_pass"]
    assert factors == [1.0] * 3


EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)}


@pytest.mark.parametrize("by", [30, 100, 5000, 1e6])
@pytest.mark.parametrize("token", [0, 131])
@pytest.mark.parametrize("dtype", EPS)
def test_one_token_with_another_weight_gets_its_own_gradient(calls, dtype, token, by):
    """A weight that differs by slightly more than rounding (`by` units of eps) is not taken for the expected loss."""
    case = make_case((4, 50), 8, 61, dtype=dtype, ignored=0.0)
    weights = torch.ones(200, dtype=dtype)
    weights[token] += by * EPS[dtype]

    def grads(hint):
        leaves = case.leaves()
        leaves.logps(impl="pytorch", loss_hint=hint).logps.backward(weights.view(4, 50))
        return leaves.grads()

    got, want = grads("nll"), grads(None)
    assert calls == ["one_pass", "two_pass_grads", "two_pass_grads"]
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("dtype", EPS)
def test_rounding_differences_count_as_the_expected_loss(calls, dtype, loss_type):
    """The expected loss in another order of operations: each token's weight is off by at most 2 eps."""
    case = make_case((4, 50), 8, 61, dtype=dtype)
    rounding = 2 * EPS[dtype] * torch.randint(-1, 2, (4, 50), generator=torch.Generator().manual_seed(0))

    def grads(hint):
        leaves = case.leaves()
        logps = leaves.logps(impl="pytorch", loss_hint=hint).logps
        weights = logps.detach().exp() if loss_type == "dft" else torch.ones_like(logps)
        logps.backward(-0.37 * weights * (1 + rounding))
        return leaves.grads()

    got, want = grads(loss_type), grads(None)
    assert calls == ["one_pass", "two_pass_grads"]
    for name in want:
        size = want[name].abs().max().item()
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=50 * EPS[dtype] * size)


@pytest.mark.parametrize("factor", [0.0, -3.7, 65536.0, 1e-30, torch.inf, torch.nan])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_any_loss_scale_is_recognised(loss_type, factor):
    """A GradScaler factor, its overflow to inf, and a factor of 0."""
    case = make_case((3, 17), 23, 252)
    _, got = train(case, loss_type, factor=factor, impl="pytorch")
    _, want = train(case, loss_type, hint=None, factor=factor, impl="pytorch")
    for name, x in want.items():
        size = x.abs().max().item() if torch.isfinite(x).all() else 0.0
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-6 * size, equal_nan=True)


@pytest.mark.parametrize(("least", "expected"), [(0.0, 1), (60.0, 1), (95.0, 2)])
def test_dft_with_subnormal_weights_is_exact(calls, least, expected):
    """Weights below the smallest normal number have rounding errors as large as themselves; in the last case all do."""
    hidden = torch.linspace(least, 120, 300)[:, None]
    case = Case(hidden, torch.tensor([[0.0], [1.0]]), torch.zeros(300, dtype=torch.int64))
    _, got = train(case, "dft", num_items=1000, impl="pytorch")
    assert calls == ["one_pass", "two_pass_grads"][:expected]
    _, want = train(case, "dft", num_items=1000, hint=None, impl="pytorch")
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-40)


def test_dft_with_all_weights_zero_gives_zero_gradients():
    """0 / 0 gives no factor: the gradients are recomputed, and are 0."""
    case = make_case((7,), 5, 11, bias=False)
    case.targets = torch.full((7,), 3)
    case.hidden, case.weight = torch.ones(7, 5), torch.ones(11, 5) * 100
    case.weight[3] = -100.0
    _, got = train(case, "dft", impl="pytorch")
    assert not got["dhidden"].any()
    assert not got["dweight"].any()


@pytest.mark.parametrize("second", ["same", "uniform", "another"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_retained_graph_runs_backward_twice(second, device):
    case = make_case((3, 17), 23, 252, dtype=torch.float64, device=device)

    def backward_twice(hint):
        leaves = case.leaves()
        logps = leaves.logps(impl="pytorch", loss_hint=hint).logps
        upstream = torch.full_like(logps, -0.3)
        logps.backward(upstream, retain_graph=True)
        first = {name: x.clone() for name, x in leaves.grads().items()}
        if second == "another":
            upstream = torch.linspace(-1, 1, upstream.numel(), dtype=upstream.dtype, device=device).view_as(upstream)
        logps.backward(upstream * 7 if second == "uniform" else upstream)
        return first, leaves.grads()

    for got, want in zip(backward_twice("nll"), backward_twice(None), strict=True):
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_several_forwards_may_precede_their_backwards(device):
    case = make_case((3, 17), 23, 252, dtype=torch.float64, device=device)

    def accumulate(hint):
        leaves = case.leaves()
        outs = [leaves.logps(impl="pytorch", loss_hint=hint, temperature=t).logps for t in (1.0, 2.0)]
        sum(-out.sum() / 90 for out in outs).backward()
        return leaves.grads()

    got, want = accumulate("nll"), accumulate(None)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, 6])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_all_tokens_ignored_gives_zero_gradients(tokens, loss_type):
    hidden = torch.randn(2, tokens // 2, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=True)
    out = linear_logps(
        hidden, weight, torch.full(hidden.shape[:2], -100), outputs=OUTPUTS, loss_hint=loss_type, impl="pytorch"
    )
    sft_loss(out.logps, torch.zeros(hidden.shape[:2], dtype=torch.bool), loss_type=loss_type).backward()
    assert not hidden.grad.any()
    assert weight.grad is not None
    assert not weight.grad.any()


IGNORED = {
    "frozen head": ({"needs": (True, False, False)}, torch.float32, []),
    "frozen head, trained bias": ({"needs": (True, False, True)}, torch.float32, ["two_pass_grads"]),
    "keep_head": ({"keep_head": False}, torch.float32, ["two_pass_grads"]),
    "fp16, whose range the gradients could leave": ({}, torch.float16, ["two_pass_grads"]),
    "no room in the workspace": ({"workspace": 60_000}, torch.bfloat16, ["one_pass", "two_pass_grads"]),
}


@pytest.mark.parametrize("name", IGNORED)
def test_the_hint_is_ignored_if_it_saves_nothing(calls, name):
    options, dtype, expected = IGNORED[name]
    case = make_case((96,), 33, 601, dtype=dtype)
    _, got = train(case, impl="pytorch", **options)
    assert calls == expected
    _, want = train(case, hint=None, impl="pytorch", **options)
    assert all(torch.equal(got[key], x) for key, x in want.items())


def test_a_frozen_backbone_gets_exact_head_gradients(calls):
    """Only the head is trained."""
    case = make_case((65,), 48, 401)
    _, got = train(case, needs=(False, True, True), impl="pytorch")
    assert calls == ["one_pass"]
    assert "dhidden" not in got
    assert_loss_within_budget(case, got)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("trained", [(True, True), (False, True)])
def test_a_head_in_parts_gets_exact_gradients(calls, uniform, trained):
    case = make_case((3, 17), 24, 252, dtype=torch.float64)
    upstream = torch.linspace(-1, 1, 51, dtype=torch.float64).view(3, 17)
    upstream = torch.full_like(upstream, -0.2) if uniform else upstream

    def grads(hint):
        hidden = case.hidden.clone().requires_grad_()
        parts = [x.contiguous() for x in case.weight.split([20, 4], 1)]
        for part, needed in zip(parts, trained, strict=True):
            part.requires_grad_(needed)
        out = linear_logps(hidden, tuple(parts), case.targets, bias=case.bias, loss_hint=hint, impl="pytorch")
        (out.logps * upstream).sum().backward()
        return [x.grad for x in (hidden, *parts)]

    got, want = grads("nll"), grads(None)
    assert calls == ["one_pass", *["two_pass_grads"] * (1 if uniform else 2)]
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_hint_works_under_autocast(calls, loss_type):
    """The logits are recomputed in the backward, outside the autocast region."""
    case = make_case((3, 17), 23, 252)

    def grads(hint, upstream=None):
        leaves = case.leaves()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = leaves.logps(impl="pytorch", loss_hint=hint)
        if upstream is None:
            sft_loss(out.logps, case.valid, loss_type=loss_type).backward()
        else:
            out.logps.backward(upstream)
        return leaves.grads()

    slope = torch.linspace(-1, 1, 51).view(3, 17)
    for upstream in (None, slope):
        got, want = grads(loss_type, upstream), grads(None, upstream)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)
    assert calls == ["one_pass", "two_pass_grads", "one_pass", "two_pass_grads", "two_pass_grads"]


def test_the_hint_works_under_checkpointing(calls):
    """Checkpointing allows a single unpack of each saved tensor."""
    case = make_case((3, 7), 16, 101, bias=False).leaves(True, True, False)

    def loss(hidden):
        out = linear_logps(hidden, case.weight, case.targets, impl="pytorch", loss_hint="nll")
        return sft_loss(out.logps, case.valid)

    torch.utils.checkpoint.checkpoint(loss, case.hidden, use_reentrant=False).backward()
    assert set(calls) == {"one_pass"}
    _, want = train(case, hint=None, impl="pytorch", needs=(True, True, False))
    torch.testing.assert_close(case.hidden.grad, want["dhidden"])
    torch.testing.assert_close(case.weight.grad, want["dweight"])


def test_an_unknown_loss_raises():
    case = make_case((7,), 5, 11)
    with pytest.raises(ValueError, match=r"loss_hint must be one of nll, dft, or None, got 'dpo'"):
        case.logps(loss_hint="dpo")


def test_a_graph_ignores_the_hint(calls):
    """Custom operators return what they save, and their backward must not write into it."""
    case = make_case((3, 17), 23, 252)

    def loss(hidden, weight, hint):
        return -linear_logps(hidden, weight, case.targets, loss_hint=hint, impl="pytorch").logps.mean()

    def grads(f, hint):
        leaves = case.leaves()
        f(leaves.hidden, leaves.weight, hint).backward()
        return leaves.hidden.grad, leaves.weight.grad

    got = grads(torch.compile(loss, fullgraph=True, backend="aot_eager"), "nll")
    assert calls == ["two_pass_grads"]
    for a, b in zip(got, grads(loss, None), strict=True):
        torch.testing.assert_close(a, b)
