"""Numerical edge cases that cost real projects digits or gave NaN."""

from dataclasses import replace

import pytest
import torch
from helpers import DEVICES, IMPLS, INTERPRETED, Case, finest, make_case, run, skip_where_interpreted

from fusedalign import linear_cross_entropy, linear_logps
from fusedalign.problem import OUTPUTS

pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.parametrize("impl", IMPLS)]


def logits_case(logits, targets, dtype=torch.float32, device="cpu"):
    """A case with given logits: hidden is one-hot, and the logits are the columns of weight."""
    n = logits.shape[0]
    hidden = torch.eye(n, dtype=dtype, device=device)
    return Case(hidden, logits.t().to(device=device, dtype=dtype), torch.as_tensor(targets, device=device))


@pytest.mark.parametrize("tiles", [{}, {"vocab_chunk": 3}])
@pytest.mark.parametrize("p", [0.999, 0.9999])
def test_the_gradient_of_a_confident_target_is_exact(impl, device, tiles, p):
    """bf16 logits or probabilities would round 1 - p to 0 or to a multiple of 1/256."""
    logits = torch.zeros(2, 5, dtype=torch.float64)
    logits[:, 1] = torch.tensor(p / (1 - p) * 4).log()
    case = logits_case(logits, [1, 1], torch.bfloat16, device)
    got = run(case, ("logps",), impl=impl, **tiles)
    want = run(case.to(torch.float64), ("logps",), impl="reference")
    for k in ("dhidden", "dweight"):
        relative = (got[k].double() - want[k]).abs().max() / want[k].abs().max()
        assert relative < 0.01, (k, relative)


@pytest.mark.parametrize("offset", [-50.0, 1e4, -1e4])
def test_a_common_logit_offset_changes_nothing(impl, device, offset):
    logits = torch.randn(4, 37, dtype=torch.float64).mul_(8).round().div_(8)  # the offset is exact in fp32
    for c in (0.0, offset):
        case = logits_case(logits + c, [0, 5, 36, 7], device=device)
        out = case.logps(impl=impl, outputs=OUTPUTS, vocab_chunk=5)
        want = logits.log_softmax(-1)[torch.arange(4), [0, 5, 36, 7]]
        # 1e4 + z in fp32: logits are exact here, only the reference's log_softmax may round sums
        torch.testing.assert_close(out.logps.double().cpu(), want, rtol=1e-5, atol=1e-5)
        assert (out.logps <= 0).all()
        grad = run(case, ("logps",), impl=impl, vocab_chunk=5)["dhidden"]
        assert torch.isfinite(grad).all()


def test_one_huge_logit_stays_finite(impl, device):
    logits = torch.randn(3, 11)
    logits[:, 4] = 3e4
    case = logits_case(logits, [4, 0, 10], device=device)
    out = case.logps(impl=impl, outputs=OUTPUTS, vocab_chunk=3)
    assert out.logps[0] == 0
    torch.testing.assert_close(out.logps[1:].cpu(), logits[[1, 2], [0, 10]] - 3e4)
    assert not out.entropy.any()
    assert out.is_top1.tolist() == [True, False, False]
    for k, x in run(case, impl=impl, vocab_chunk=3).items():
        assert torch.isfinite(x).all(), k


@pytest.mark.parametrize("scale", [1, 30, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logps_are_never_positive(impl, device, scale, dtype):
    case = make_case((8, 16), 24, 203, dtype=dtype, device=device, scale=float(scale))
    targets = (case.hidden.float() @ case.weight.float().t() + case.bias.float()).argmax(-1)  # the most likely column
    out = linear_logps(case.hidden, case.weight, targets, bias=case.bias, scale=scale, impl=impl, outputs=["entropy"])
    assert (out.logps <= 0).all()
    assert (out.entropy >= 0).all()


def test_minus_inf_bias_removes_columns_without_nan(impl, device):
    """A bias of -inf removes columns, also whole tiles, without a NaN elsewhere."""
    case = make_case((3, 7), 16, 40, device=device, ignored=0.0)
    allowed = torch.arange(40, device=device) % 2 == 1
    allowed[:10] = False
    targets = torch.randint(5, 20, (3, 7), device=device) * 2 + 1
    masked = Case(case.hidden, case.weight, targets, case.bias.masked_fill(~allowed, -torch.inf))
    small = Case(case.hidden, case.weight[allowed], (targets - 11) // 2, case.bias[allowed])
    got, want = run(masked, impl=impl, vocab_chunk=5), run(small, impl="reference")
    for k in ("logps", "entropy", "lse", "log_sum_sq_probs", "is_top1", "dhidden"):
        torch.testing.assert_close(got[k], want[k], rtol=1e-4, atol=1e-5, msg=k)
    torch.testing.assert_close(got["dweight"][allowed], want["dweight"], rtol=1e-4, atol=1e-5)
    assert not got["dweight"][~allowed].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_affect_only_their_token(impl, device, bad):
    case = make_case((2, 6), 16, 101, device=device, ignored=0.0)
    clean = case.logps(impl=impl, vocab_chunk=30).logps
    case.hidden[1, 2, 3] = bad
    # Triton's interpreter raises on the argmax of a row of NaN.
    outputs = OUTPUTS[:-1] if impl == "triton" and INTERPRETED else OUTPUTS
    out = case.logps(impl=impl, outputs=outputs, vocab_chunk=30)
    affected = torch.zeros(2, 6, dtype=torch.bool, device=device)
    affected[1, 2] = True
    for name in ("logps", "entropy", "log_sum_sq_probs"):
        assert torch.equal(getattr(out, name).isnan(), affected), name
    assert torch.equal(out.lse.isfinite(), ~affected)  # may be infinite for infinite logits
    torch.testing.assert_close(out.logps[~affected], clean[~affected])
    grad = run(case, ("logps",), impl=impl, outputs=outputs, vocab_chunk=30)["dhidden"]
    assert torch.isfinite(grad[~affected]).all()
    assert grad[1, 2].isnan().any()


def test_nan_in_weight_reaches_every_token(impl, device):
    """Then no token has a top-1 column, not even the largest of the other columns."""
    case = make_case((2, 6), 16, 101, device=device, ignored=0.0)
    case = replace(case, targets=logits_of(case).argmax(-1))
    assert case.logps(impl=impl, vocab_chunk=30, outputs=["is_top1"]).is_top1.all()
    for row in (50, 100):
        case.weight[row, 3] = torch.nan
        out = case.logps(impl=impl, vocab_chunk=30, outputs=["is_top1"])
        assert out.logps.isnan().all()
        assert not out.is_top1.any()


@pytest.mark.parametrize("size", [1e6, 1e9, 1e15])
@pytest.mark.parametrize("kind", ["frozen", "frozen, scalar loss", "trained", "trained, scalar loss"])
def test_gradients_stay_exact_for_logits_with_coarse_rounding(impl, device, size, kind):
    """At 1e9 an fp32 ulp is 64: two sums of one logit in different orders differ by that much."""
    case = make_case((6,), 16, 67, device=device, ignored=0.0, bias=False)
    case = replace(case, weight=case.weight * size)
    case.targets[1:] = logits_of(case).argmax(-1)[1:]
    needs = (True, kind.startswith("trained"), False)

    def grads(case, impl):
        leaves = case.leaves(*needs)
        if kind.endswith("scalar loss"):
            linear_cross_entropy(leaves.hidden, leaves.weight, leaves.targets, impl=impl, reduction="sum").backward()
        else:
            leaves.logps(impl=impl).logps.sum().backward()
        return leaves.grads()

    exact = grads(case.to(torch.float64), "reference")
    for name, x in grads(case, impl).items():
        if x is not None:
            atol = 1e-5 * exact[name].abs().max().item()
            torch.testing.assert_close(x.double(), exact[name], rtol=1e-5, atol=atol)


def logits_of(case):
    """The logits in fp64."""
    return case.hidden.double() @ case.weight.double().T + (0 if case.bias is None else case.bias.double())


@pytest.mark.parametrize("v", [5, 127, 129])
def test_softcap_adds_no_mass_from_tile_padding(impl, device, v):
    """Tile padding that becomes a finite logit through tanh would add probability mass."""
    hidden, weight = torch.randn(3, 16, device=device), -torch.rand(v, 16, device=device)
    targets = torch.arange(v, device=device)[:, None].expand(v, 3)
    out = linear_logps(hidden.expand(v, 3, 16), weight, targets, softcap=2.0, impl=impl, vocab_chunk=64)
    torch.testing.assert_close(out.logps.exp().sum(0), torch.ones(3, device=device))


def test_bias_scale_softcap_temperature_apply_in_this_order(impl, device):
    hidden, weight, bias = torch.tensor([[1.0]]), torch.tensor([[0.5], [-1.0]]), torch.tensor([0.25, 0.75])
    # raw: 0.75, -0.25; times scale 2: 1.5, -0.5; softcap 3: 3 tanh(0.5), 3 tanh(-1/6); over temperature 0.5
    logits = torch.tensor([3 * torch.tensor(0.5).tanh() / 0.5, 3 * torch.tensor(-0.5 / 3).tanh() / 0.5])
    args = (hidden.to(device), weight.to(device), torch.tensor([0], device=device))
    out = linear_logps(
        *args, bias=bias.to(device), scale=2.0, softcap=3.0, temperature=0.5, impl=impl, outputs=["lse", "mean_logit"]
    )
    torch.testing.assert_close(out.logps.cpu(), logits.log_softmax(0)[:1])
    torch.testing.assert_close(out.lse.cpu(), logits.logsumexp(0)[None])
    torch.testing.assert_close(out.mean_logit.cpu(), logits.mean()[None])


def test_is_top1_takes_the_first_of_equal_logits(impl, device):
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]]).repeat(3, 1)
    case = logits_case(logits, [1, 2, 4], device=device)
    for tiles in ({}, {"vocab_chunk": 2}, {"vocab_chunk": 1}):
        assert case.logps(impl=impl, outputs=["is_top1"], **tiles).is_top1.tolist() == [True, False, False]


def test_each_token_uses_its_own_upstream_gradient(impl, device):
    """Each token's gradient is its own: scaling one token's upstream scales that row alone."""
    case = make_case((8,), 16, 101, dtype=finest(impl), device=device, ignored=0.0)

    def d_hidden(upstream):
        leaves = case.leaves()
        (leaves.logps(impl=impl, vocab_chunk=30).logps * upstream).sum().backward()
        return leaves.hidden.grad

    ones, ramp = torch.ones(8, device=device), torch.arange(8.0, device=device)
    torch.testing.assert_close(d_hidden(ramp), d_hidden(ones) * ramp[:, None])


def test_error_does_not_grow_with_the_number_of_tiles(impl, device):
    v = 160 if impl == "triton" and INTERPRETED else 512
    case = make_case((24,), 32, v, dtype=torch.bfloat16, device=device)
    want = run(case.to(torch.float64), impl="reference")
    errors = []
    for tiles in (
        {"token_chunk": 24, "vocab_chunk": v},
        {"token_chunk": 24, "vocab_chunk": 2},
        {"token_chunk": 1, "vocab_chunk": 64},
    ):
        got = run(case, impl=impl, **tiles)
        errors.append(
            {k: (got[k].double() - want[k].double()).abs().max() for k in ("logps", "entropy", "dhidden", "dweight")}
        )
    for k in errors[0]:
        for e in errors[1:]:
            assert e[k] <= errors[0][k] + 1e-5, k


@pytest.mark.parametrize("loss", ["logps", "cross_entropy"])
def test_200_training_steps_match_full_logits(impl, device, loss):
    """A bf16 model trained with tiles ends with the loss and entropy of training with fp32 logits."""
    skip_where_interpreted(impl, device)

    def train(**options):
        g = torch.Generator().manual_seed(3)
        weight = (torch.randn(97, 16, generator=g) * 0.3).to(device).requires_grad_()
        inputs = torch.randn(64, 16, generator=g).to(device)
        targets = torch.randint(0, 97, (64,), generator=g).to(device)
        optimizer = torch.optim.AdamW([weight], lr=3e-2, weight_decay=0.0)
        for _ in range(200):
            hidden, head = inputs.bfloat16(), weight.bfloat16()
            if loss == "logps":
                value = -linear_logps(hidden, head, targets, **options).logps.mean()
            else:
                value = linear_cross_entropy(hidden, head, targets, **options)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        with torch.no_grad():
            out = linear_logps(inputs, weight, targets, impl="reference", outputs=["entropy"])
        return torch.stack([-out.logps.mean(), out.entropy.mean()])

    got, want = train(impl=impl, token_chunk=16, vocab_chunk=20), train(impl="reference")
    torch.testing.assert_close(got, want, rtol=2e-3, atol=0)


@pytest.mark.slow
def test_more_than_2_to_the_31_logits_work(impl, device):
    if impl == "reference":
        pytest.skip("its logits alone would take 9 GB")
    skip_where_interpreted(impl, device)
    n, v = 33_000, 66_000
    assert n * v > 2**31
    hidden, weight = torch.randn(n, 1, device=device), torch.randn(v, 1, device=device)
    targets = torch.randint(0, v, (n,), device=device)
    targets[-1] = v - 1
    logps = linear_logps(hidden, weight, targets, impl=impl).logps
    some = torch.tensor([0, 1, n // 2, n - 1], device=device)
    exact = (hidden[some].double() @ weight.double().T).log_softmax(-1).gather(-1, targets[some, None]).squeeze(-1)
    torch.testing.assert_close(logps[some].double(), exact, rtol=1e-5, atol=1e-5)


def test_more_tokens_than_a_grid_dimension_work(impl, device):
    skip_where_interpreted(impl, device)
    hidden, weight = torch.randn(70_000, 2, device=device), torch.randn(3, 2, device=device)
    targets = torch.randint(0, 3, (70_000,), device=device)
    got = linear_logps(hidden, weight, targets, impl=impl).logps
    torch.testing.assert_close(got, (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1))
