"""The adapters to other libraries: what they pass on, what they refuse and why, and how "auto" skips them.

Neither library's kernels run on a CPU: CCE is replaced by a stand-in with the interface of each version; of Liger
Kernel the plain PyTorch parts run, or its kernels in Triton's interpreter. Tests marked gpu run the real libraries.
"""

import importlib.machinery
import logging
import re
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ADAPTED,
    Case,
    assert_loss_within_budget,
    assert_within_budget,
    error,
    make_case,
    run,
    run_eager,
    run_loss,
    run_loss_exact,
)

from fusedalign import explain, impls, linear_cross_entropy, linear_logps
from fusedalign.impls import adapter, cce, liger
from fusedalign.problem import Problem

HALVES = [torch.bfloat16, torch.float16]
HIDDEN, WEIGHT = torch.randn(6, 8, dtype=torch.bfloat16), torch.randn(11, 8, dtype=torch.bfloat16)
TARGETS = torch.arange(6)


def problem(hidden=HIDDEN, weight=WEIGHT, **options):
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return Problem(hidden, weight, TARGETS[: len(hidden)], dtype, **options)


# CCE, a stand-in


def from_logits(e, c, targets, bias, softcap, reduction):
    z = e.float() @ c.float().T
    z = z if bias is None else z + bias.float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z, targets, reduction=reduction), z.logsumexp(-1)


def released(calls):
    """The interface of version 25.1.1."""

    def linear_cross_entropy(
        e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
    ):
        calls.append({"filter_eps": filter_eps, "impl": impl, "softcap": softcap, "e": e, "c": c})
        return from_logits(e, c, targets, None, softcap, reduction)[0]

    return linear_cross_entropy


def git_head(calls):
    """The interface of the repository's main branch."""

    def linear_cross_entropy(
        e,
        c,
        targets,
        bias=None,
        ignore_index=-100,
        softcap=None,
        reduction="mean",
        shift=0,
        return_lse=False,
        filter_eps="auto",
        accum_e_fp32=False,
        accum_c_fp32=False,
        filter_e_grad=True,
        filter_c_grad=True,
        impl="cce",
        vocab_parallel_options=None,
    ):
        calls.append({"filter_eps": filter_eps, "impl": impl, "softcap": softcap, "e": e, "c": c})
        out = from_logits(e, c, targets, bias, softcap, reduction)
        return out if return_lse else out[0]

    return linear_cross_entropy


@pytest.fixture(params=[released, git_head], ids=["released", "git head"])
def stand_in(request, monkeypatch):
    """Install a CPU stand-in for CCE with the version's interface; yields the version and the recorded calls."""
    calls = []
    module = types.ModuleType("cut_cross_entropy")
    module.__spec__ = importlib.machinery.ModuleSpec("cut_cross_entropy", None)
    module.linear_cross_entropy = request.param(calls)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    monkeypatch.setattr(cce, "_find", adapter.lazy_library("cut_cross_entropy", "", cce._load))
    monkeypatch.setattr(cce, "_device_refusal", lambda device: None)
    return request.param, calls


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head", [{}, {"softcap": 5.0}, {"scale": 2.0, "softcap": 3.0, "temperature": 0.5}])
@pytest.mark.parametrize("seed", [0, 1])
def test_cce_gives_exact_logps_and_gradients(stand_in, dtype, head, seed):
    case = make_case((3, 17), 23, 252, dtype=dtype, seed=seed, bias=False, **head)
    assert_within_budget(case, run(case, ("logps",), outputs=(), impl="cce"), ("logps",))
    assert_loss_within_budget(case, run_loss(case, impl="cce"))
    (call, *_) = stand_in[1]
    assert call["e"].dtype == call["c"].dtype == dtype
    if "softcap" in head:
        assert call["softcap"] == head["softcap"] / head.get("temperature", 1)


def test_cce_folds_unsupported_scales_into_the_hidden_states(stand_in):
    """They are rounded once, as if the caller had scaled the hidden states."""
    case = make_case((3, 17), 23, 252, dtype=torch.bfloat16, bias=False, scale=0.3, temperature=0.7)
    folded = Case((case.hidden.float() * (0.3 / 0.7)).bfloat16(), case.weight, case.targets)
    got, want = case.logps(impl="cce").logps, folded.to(torch.float64).logps(impl="reference").logps
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_cce_filters_only_on_request(stand_in):
    version, calls = stand_in
    linear_logps(HIDDEN, WEIGHT, TARGETS, impl="cce")
    linear_logps(HIDDEN, WEIGHT, TARGETS, impl="cce", filter_eps=1e-4)
    if version is released:
        assert [(call["impl"], call["filter_eps"]) for call in calls] == [("cce", None), ("cce", 1e-4)]
    else:  # the preset has no filter
        assert [(call["impl"], call["filter_eps"]) for call in calls] == [("cce_exact", "auto"), ("cce", 1e-4)]


def test_cce_supports_bias_and_lse_in_versions_with_them(stand_in):
    case = make_case((3, 17), 23, 252, dtype=torch.bfloat16, temperature=0.5)
    options = {"outputs": ("lse",), "impl": "cce"}
    if stand_in[0] is released:
        for less, name in ((case, "bias"), (Case(case.hidden, case.weight, case.targets), "return_lse")):
            with pytest.raises(ValueError, match=f"this release has no {name}, its git head has"):
                run(less, ("logps",), **options)
        with pytest.raises(ValueError, match="this release has no return_lse"):
            linear_cross_entropy(HIDDEN, WEIGHT, TARGETS, z_loss=0.1, impl="cce")
        return
    assert_within_budget(case, run(case, ("logps", "lse"), **options), ("logps", "lse"))
    assert_loss_within_budget(case, run_loss(case, impl="cce", z_loss=0.1), z_loss=0.1)


def test_cce_uses_the_autocast_dtype(stand_in):
    hidden, weight = HIDDEN.float().requires_grad_(), WEIGHT.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_logps(hidden, weight, TARGETS, impl="cce").logps.sum().backward()
    assert stand_in[1][0]["c"].dtype == torch.bfloat16
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_cce_is_not_called_without_tokens(stand_in):
    case = make_case((2, 5), 7, 11, dtype=torch.bfloat16, bias=False)
    result = run_loss(Case(case.hidden, case.weight, torch.full_like(case.targets, -100)), impl="cce")
    assert not any(x.any() for x in result.values())
    assert result.keys() == {"loss", "dhidden", "dweight"}
    assert not stand_in[1]


def test_cce_reports_a_caveat_if_it_is_not_exact(stand_in):
    exact = stand_in[0] is git_head
    for options, fits in (({}, True), ({"scale": 0.25}, True), ({"scale": 0.3}, False), ({"temperature": 3.0}, False)):
        row = next(v for v in explain(problem(**options)) if v.impl == "cce")
        assert row.reason is None
        assert (row.caveat is None) == (exact and fits), options
        if exact and not fits:
            assert "is folded into the hidden states, which rounds them" in row.caveat
        elif not exact:
            assert "rounds the target's logit" in row.caveat


# Refusals


CCE_REFUSALS = {
    "entropy": ({"outputs": frozenset(["entropy"])}, "it gives logps and, from its git head on, lse, but no entropy"),
    "top1": ({"outputs": frozenset(["is_top1", "lse"])}, "but no is_top1"),
    "fp32 hidden": ({"hidden": HIDDEN.float()}, "it takes bfloat16 and float16, hidden states and head here are"),
    "fp64": ({"hidden": HIDDEN.double(), "weight": WEIGHT.double()}, "are multiplied in float64"),
    "huge": ({"weight": torch.empty(1, dtype=torch.bfloat16).expand(2**29, 8)}, "fewer than 2**31 elements"),
}


@pytest.mark.parametrize("name", CCE_REFUSALS)
def test_cce_refuses_unsupported_problems(stand_in, name):
    options, reason = CCE_REFUSALS[name]
    assert reason in cce.IMPL.supports(problem(**options))


def test_cce_refuses_a_cpu():
    with pytest.raises(
        ValueError, match=r"impl='cce' cannot do this: it needs a CUDA device, got cpu; impls that can: "
    ):
        linear_logps(HIDDEN, WEIGHT, TARGETS, impl="cce")


LIGER_REFUSALS = {
    "filter_eps": ({"filter_eps": 1e-4}, "its gradients are always dense (filter_eps must be None)"),
    "fp64": ({"hidden": HIDDEN.double()}, "it computes in float32, bfloat16 and float16, not in float64"),
    "lse": ({"outputs": frozenset(["lse"])}, "it gives logps and entropy, but no lse"),
    "mean logit": ({"outputs": frozenset(["mean_logit", "is_top1"])}, "but no is_top1, mean_logit"),
    "bias": ({"bias": torch.zeros(11)}, "its function with a bias needs a GPU"),
    "softcap": ({"softcap": 3.0}, "its function with a softcap needs a GPU"),
}
needs_liger = pytest.mark.skipif("liger" not in ADAPTED, reason="liger-kernel is not installed")


@pytest.mark.parametrize("name", LIGER_REFUSALS)
def test_liger_refuses_unsupported_problems(name, monkeypatch):
    monkeypatch.setattr(liger, "_find", lambda: adapter.Library(None, None))  # refusals do not read any tensor
    options, reason = LIGER_REFUSALS[name]
    assert reason in liger.IMPL.supports(problem(**options))


def test_liger_has_no_entropy_with_a_bias_or_softcap(monkeypatch):
    monkeypatch.setattr(liger, "_find", lambda: adapter.Library(None, None))
    monkeypatch.setattr(liger, "_runs_triton", lambda device: True)
    entropy = frozenset(["entropy"])
    assert liger.IMPL.supports(problem(outputs=entropy)) is None
    reason = liger.IMPL.supports(problem(outputs=entropy, softcap=2.0, bias=torch.zeros(11)))
    assert reason == "its entropy knows no bias and no softcap"
    monkeypatch.setattr(liger, "_is_hopper", lambda device: True)
    assert "nvidia-cutlass-dsl" in liger.IMPL.supports(problem(outputs=entropy))


def test_liger_reports_its_rounding(monkeypatch):
    monkeypatch.setattr(liger, "_find", lambda: adapter.Library(None, None))
    assert "512 tokens" in liger.IMPL.caveat(problem())
    monkeypatch.setattr(liger, "_runs_triton", lambda device: True)
    assert "logits are rounded" in liger.IMPL.caveat(problem())
    assert liger.IMPL.caveat(problem(HIDDEN.float(), WEIGHT.float())) is None
    monkeypatch.setattr(liger, "_has_cute", lambda problem: True)
    assert liger.IMPL.caveat(problem()) is None
    assert "entropy is rounded" in liger.IMPL.caveat(problem(outputs=frozenset(["entropy"])))
    assert "scale = 0.3" in liger.IMPL.caveat(problem(scale=0.3))
    assert "logits are rounded" in liger.IMPL.caveat(problem(softcap=1.0))
    many = Problem(HIDDEN, WEIGHT.clone().requires_grad_(), torch.zeros(1025, dtype=torch.int64), torch.bfloat16)
    assert "1024 tokens at a time" in liger.IMPL.caveat(many)


# Liger


@needs_liger
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("head", [{}, {"scale": 0.5, "temperature": 0.25}])
@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 1), (0, 1, 1)])
def test_liger_per_token_logps_are_exact(dtype, head, needs):
    case = make_case((3, 17), 23, 252, dtype=dtype, bias=False, **head)
    assert_within_budget(case, run(case, ("logps",), needs, (), impl="liger"), ("logps",))
    names = ("logps", "entropy")
    assert_within_budget(case, run(case, names, needs, ("entropy",), impl="liger"), names)


@pytest.fixture
def interpreted(monkeypatch):
    """Run Liger's Triton kernels in the interpreter, as on a GPU before Hopper."""
    if "liger" not in ADAPTED or torch.cuda.is_available():
        pytest.skip("for Liger Kernel on a machine without a GPU")
    monkeypatch.setattr(liger, "_runs_triton", lambda device: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 0, 1)])
def test_liger_with_a_bias_is_exact(interpreted, dtype, needs):
    case = make_case((3, 7), 23, 101, dtype=dtype, scale=0.5, temperature=0.25)
    got = run(case, ("logps",), needs, (), impl="liger")
    assert {k for k in got if k[0] == "d"} == {
        f"d{k}" for k, n in zip(("hidden", "weight", "bias"), needs, strict=True) if n
    }
    assert_within_budget(case, got, ("logps",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"num_items": 5}, {"num_items": torch.tensor(7)}, {"loss_type": "dft"}])
def test_liger_scalar_loss_is_exact(interpreted, dtype, options):
    case = make_case((3, 7), 23, 101, dtype=dtype, temperature=0.7)
    for needs in ((1, 1, 1), (1, 0, 0), (0, 1, 1)):
        assert_loss_within_budget(case, run_loss(case, needs, impl="liger", **options), **options)


@pytest.mark.parametrize("keep_head", [True, False])
def test_liger_scalar_backward_twice_is_exact(interpreted, keep_head):
    """Liger's own backward scales saved gradients in place, so a second one would be wrong."""
    case = make_case((3, 7), 23, 101).leaves()
    loss = linear_cross_entropy(
        case.hidden, case.weight, case.targets, bias=case.bias, impl="liger", keep_head=keep_head
    )
    (3 * loss).backward(retain_graph=True)
    loss.backward()
    want = run_loss_exact(case)
    for name, grad in case.grads().items():
        torch.testing.assert_close(grad.double(), 4 * want[f"d{name}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keep_head", [True, False])
def test_liger_computes_gradients_in_the_forward_unless_disabled(interpreted, keep_head):
    saved = []
    case = make_case((3, 7), 23, 101).leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        linear_cross_entropy(case.hidden, case.weight, case.targets, impl="liger", keep_head=keep_head)
    assert (case.weight.data_ptr() in saved) == (not keep_head)


# Auto


def test_auto_skips_inexact_impls_and_logs_it_once(monkeypatch, stand_in, caplog):
    impls._log_once.cache_clear()
    monkeypatch.setattr(impls, "considered", lambda: ("cce", "pytorch"))
    with caplog.at_level(logging.INFO, logger="fusedalign"):
        for _ in range(3):
            linear_logps(HIDDEN, WEIGHT, TARGETS)
        messages = [record.getMessage() for record in caplog.records]
        if stand_in[0] is git_head:
            assert messages == ["impl='auto' takes cce"]
            assert stand_in[1]
        else:
            (message,) = messages
            assert message.startswith("impl='auto' takes pytorch (cce: not exact: this release rounds the target's")
            assert not stand_in[1]
        linear_logps(HIDDEN.float(), WEIGHT, TARGETS)  # another reason is logged again
        assert len(caplog.records) == 2


def test_auto_on_a_cpu_loads_neither_library():
    script = """
import sys, torch, fusedalign
hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    fusedalign.linear_logps(hidden.to(dtype), weight.to(dtype), targets)
print([m for m in sys.modules if m in ("liger_kernel", "cut_cross_entropy")])
"""
    env = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(sys.path)}
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert process.stdout.strip() == "[]", process.stderr


@pytest.mark.parametrize("impl", impls.impl_names("adapter"))
def test_an_import_error_deep_inside_a_library_is_reported(monkeypatch, tmp_path, impl):
    module = {"liger": liger, "cce": cce}[impl]
    name = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}[impl]
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("from . import linear_cross_entropy, ops")
    for part in ("ops", "linear_cross_entropy"):
        (tmp_path / name / f"{part}.py").write_text("raise OSError('libcuda.so.1: cannot open')")
    for loaded in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "_find", adapter.lazy_library(name, "", module._load))
    monkeypatch.setattr(cce, "_device_refusal", lambda device: None)
    reason = rf"{name} cannot be imported \(OSError: libcuda.so.1: cannot open\)"
    assert re.fullmatch(reason, next(v.reason for v in explain(problem()) if v.impl == impl))
    with pytest.raises(ValueError, match=f"impl='{impl}' cannot do this: {reason}"):
        linear_logps(HIDDEN, WEIGHT, TARGETS, impl=impl)
    assert linear_logps(HIDDEN, WEIGHT, TARGETS).logps.isfinite().all()  # "auto" takes the next impl
    for module_name in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module_name]


def test_a_library_that_is_missing_says_how_to_get_it():
    library = adapter.lazy_library("a_package_that_nobody_has", "pip install it", lambda: None)()
    assert library.reason == "a_package_that_nobody_has is not installed: pip install it"


# The libraries, on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("impl", ADAPTED)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [((3, 17), 23, 252), ((2, 5, 13), 64, 1001), ((300,), 128, 5003)])
@pytest.mark.parametrize("head", [{}, {"softcap": 5.0}, {"scale": 0.5, "temperature": 0.25}])
def test_libraries_on_a_gpu_are_within_budget(impl, dtype, shape, head):
    """Ragged shapes with ignored tokens: within twice eager's error plus what the caveat allows."""
    case = make_case(*shape, dtype=dtype, device="cuda", bias=False, **head)
    flat = case.hidden.flatten(0, -2), case.weight, case.targets.clamp(min=0).flatten()
    verdict = next(v for v in explain(Problem(*flat, dtype, **head)) if v.impl == impl)
    assert verdict.reason is None
    partial_sums = 0 if verdict.caveat is None else max(case.weight.shape[0], case.targets.numel()) / 128
    walk = partial_sums**0.5  # the sum of that many roundings, each up or down
    assert_within_budget(case, run(case, ("logps",), outputs=(), impl=impl), ("logps",), roundings=1 + walk)
    for needs in ((1, 1, 1), (1, 0, 1)):
        got = run_loss(case, needs, impl=impl)
        if verdict.caveat is not None:
            # Eager's token errors may cancel in the sum by chance; the library's need not.
            exact, eager = run(case.to(torch.float64), ("logps",), impl="reference"), run_eager(case, ("logps",))
            mean_error = (eager["logps"] - exact["logps"]).abs().sum() / case.valid.sum()
            assert error(got.pop("loss"), run_loss_exact(case)["loss"]) <= 2 * mean_error
        assert_loss_within_budget(case, got, roundings=2 + walk)
