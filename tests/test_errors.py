"""Wrong input raises one line that names what was expected and what was passed."""

import importlib
import re

import pytest
import torch

from fusedalign import explain, impls, linear_cross_entropy, linear_logps
from fusedalign.impls.autograd import OwnGradients
from fusedalign.impls.base import Impl
from fusedalign.problem import Problem

H, W, T = torch.randn(4, 6, 8), torch.randn(11, 8), torch.zeros(4, 6, dtype=torch.int64)

BAD = [
    ((H, W, T[:, :5]), {}, ValueError, "targets must have shape (4, 6) to match hidden, got (4, 5)"),
    ((H, W[:, :7], T), {}, ValueError, "weight must have shape [V, 8] to match hidden, got (11, 7)"),
    ((H, W[:0], T), {}, ValueError, "weight must have shape [V, 8] to match hidden, got (0, 8)"),
    ((H, W[:0], torch.full_like(T, -100)), {}, ValueError, "weight must have shape [V, 8] to match hidden, got (0"),
    ((H, (W[:0, :5], W[:0, 5:]), T), {}, ValueError, "of 8 columns to match hidden, got [(0, 5), (0, 3)]"),
    ((H, W[0], T), {}, ValueError, "weight must have shape [V, 8] to match hidden, got (8,)"),
    ((H[..., :0], W[:, :0], T), {}, ValueError, "hidden must have shape [..., D] with D > 0, got (4, 6, 0)"),
    ((H, W, T), {"bias": torch.zeros(10)}, ValueError, "bias must have shape (11,) to match weight, got (10,)"),
    ((H, W, T.int()), {}, TypeError, "targets must be int64, got torch.int32"),
    ((H.long(), W, T), {}, TypeError, "hidden must be float64, float32, bfloat16 or float16, got torch.int64"),
    ((H, W.to(torch.complex64), T), {}, TypeError, "weight must be float64"),
    ((H, W.to("meta"), T), {}, ValueError, "weight must be on cpu like hidden, got meta"),
    ((H, [[1.0]], T), {}, TypeError, "weight must be a torch.Tensor, got list"),
    ((H, W, T + 11), {}, ValueError, "targets must be in [0, 11) or ignore_index=-100, got 11"),
    ((H, W, T - 1), {}, ValueError, "targets must be in [0, 11) or ignore_index=-100, got -1"),
    ((H, W, T - 100), {"ignore_index": -1}, ValueError, "targets must be in [0, 11) or ignore_index=-1, got -100"),
    (
        (H, W, T),
        {"impl": "cuda"},
        ValueError,
        "impl must be one of auto, triton, liger, cce, pytorch, reference, got 'cuda'",
    ),
    ((H, W, T), {"softcap": 0.0}, ValueError, "softcap must be > 0 or None, got 0.0"),
    ((H, W, T), {"temperature": 0}, ValueError, "temperature must be > 0, got 0"),
    ((H, W, T), {"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
    ((H, W, T), {"temperature": -0.0}, ValueError, "temperature must be > 0, got -0.0"),
    ((H, W, T), {"temperature": -1}, ValueError, "temperature must be > 0, got -1"),
    ((H, W, T), {"temperature": float("nan")}, ValueError, "temperature must be > 0, got nan"),
    ((H, W, T), {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    ((H, W, T), {"scale": "2"}, TypeError, "scale must be a number, got str"),
    ((H, W, T), {"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
    ((H, W, T), {"scale": torch.tensor(2.0)}, TypeError, "scale must be a number, got Tensor"),
    ((H, W, T), {"ignore_index": None}, TypeError, "ignore_index must be an integer, got NoneType"),
    ((H, W, T), {"workspace": True}, ValueError, "workspace must be a positive integer or 'auto', got True"),
    ((H, W, T), {"workspace": 0}, ValueError, "workspace must be a positive integer or 'auto', got 0"),
    ((H, W, T), {"keep_head": None}, ValueError, "keep_head must be True or False, got None"),
    ((H, W, T), {"token_chunk": 1.5}, ValueError, "token_chunk must be a positive integer or None, got 1.5"),
]


@pytest.mark.parametrize("f", [linear_logps, linear_cross_entropy])
@pytest.mark.parametrize(("args", "options", "kind", "message"), BAD)
def test_bad_input_raises(f, args, options, kind, message):
    with pytest.raises(kind, match=re.escape(message)) as caught:
        f(*args, **options)
    assert "\n" not in str(caught.value)


def test_an_unknown_output_raises():
    names = "entropy, lse, mean_logit, log_sum_sq_probs, is_top1"
    with pytest.raises(ValueError, match=f"outputs must be among {names}, got 'logits'"):
        linear_logps(H, W, T, outputs=["entropy", "logits"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum' (per-token values: linear_logps), got 'none'"),
        ({"reduction": "sum", "num_items": 4}, "num_items must be None with reduction='sum'"),
        ({"loss_type": "focal"}, "loss_type must be one of nll, dft, got 'focal'"),
        ({"z_loss": -1.0}, "z_loss must be >= 0, got -1.0"),
        ({"num_items": -3}, "num_items must be >= 0, got -3"),
    ],
)
def test_bad_loss_options_raise(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_cross_entropy(H, W, T, **options)


@pytest.mark.parametrize("impl", ["pytorch", "reference", "auto"])
def test_impls_refuse_unsupported_problems(impl):
    """No silent fallback to another impl or to exact gradients."""
    with pytest.raises(ValueError, match=r"filter_eps must be None"):
        linear_logps(H, W, T, impl=impl, filter_eps=1e-4)


@pytest.mark.parametrize("name", impls.MODULES)
def test_the_table_describes_each_impl(name):
    impl = importlib.import_module(impls.MODULES[name].module).IMPL
    assert isinstance(impl, Impl)
    assert impl.about
    assert isinstance(impl, OwnGradients) == (impls.MODULES[name].kind == "own")
    assert (impl.package is not None) == (impls.MODULES[name].kind == "adapter")


def test_a_broken_impl_is_reported_not_raised(monkeypatch, tmp_path):
    (tmp_path / "broken_impl.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(impls, "MODULES", {"broken": impls.Entry("broken_impl", "own"), **impls.MODULES})
    assert linear_logps(H, W, T).logps.shape == (4, 6)  # auto takes the next impl
    with pytest.raises(
        ValueError, match=r"impl='broken' cannot do this: .*a_package_that_nobody_has.*pytorch, reference"
    ):
        linear_logps(H, W, T, impl="broken")
    rows = {v.impl: v for v in explain()}
    assert "a_package_that_nobody_has" in rows["broken"].reason
    assert rows["pytorch"].reason is None


def test_explain_gives_the_verdict_of_each_impl():
    problem = Problem(H.flatten(0, 1), W, T.flatten(), torch.float32, filter_eps=1e-5)
    assert {v.impl: v.reason is None for v in explain(problem)} == dict.fromkeys(impls.MODULES, False)
    assert [v.impl for v in explain() if v.auto and v.impl != "triton"] == ["liger", "cce", "pytorch"]
