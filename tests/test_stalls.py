"""No step waits for a compiler: each kernel is compiled once, ahead of its launch, for any number of tokens."""

import collections
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedalign import linear_cross_entropy, linear_logps

pytest.importorskip("triton", reason="triton is not installed: it has nothing to compile")

#: Maximum variants of a kernel per path: with and without stored exponentials, each also for the last columns if V is
#: not a multiple of 16.
MOST = {"sums_kernel": 4, "grads_kernel": 2, "kept_grads_kernel": 2}


@pytest.mark.parametrize("gpu", ["H100", "A100"])
def test_no_signature_depends_on_the_number_of_tokens(gpu):
    """Two dry runs launch all signatures that 50 ragged numbers of tokens need."""
    script = Path(__file__).parent / "signatures.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(script.parents[1]), environment.get("PYTHONPATH", "")])
    process = subprocess.run([sys.executable, script, gpu], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    rows = json.loads(process.stdout)
    assert len(rows) > 30
    for row in rows:
        assert row["later"] == [], row["case"]
        assert {"sums_kernel", "fold_kernel"} <= set(row["first"]), row["case"]
        optional = "Qwen3" not in row["case"]
        for kernel, count in collections.Counter(row["first"]).items():
            assert count <= (MOST.get(kernel, 1) if optional or kernel == "sums_kernel" else 1), row["case"]
        if not optional:
            assert row["first"].count("sums_kernel") <= 2


def variants() -> dict[str, int]:
    """Number of compiled or loaded variants of each kernel in this process."""
    from fusedalign.impls.triton import kernels

    caches = {name: getattr(x, "device_caches", None) for name, x in vars(kernels).items() if name.endswith("_kernel")}
    return {name: sum(len(cache[0]) for cache in x.values()) for name, x in caches.items() if x is not None}


def no_grad(hidden, weight, targets):
    with torch.no_grad():
        linear_logps(hidden, weight, targets, impl="triton", outputs=["entropy", "mean_logit", "is_top1"])


def reference(hidden, weight, targets):
    with torch.no_grad():
        linear_logps(hidden, weight, targets, impl="triton")


def policy(hidden, weight, targets):
    outputs = ["entropy", "mean_logit", "log_sum_sq_probs", "is_top1"]
    linear_logps(hidden, weight, targets, impl="triton", outputs=outputs).logps.sum().backward()


def frozen(hidden, weight, targets):
    policy(hidden, weight.detach(), targets)


def hinted(hidden, weight, targets):
    linear_logps(hidden, weight, targets, impl="triton", loss_hint="nll").logps.mean().mul(-2).backward()


def scalar(hidden, weight, targets):
    linear_cross_entropy(hidden, weight, targets, impl="triton").mul(2).backward()


def scalar_frozen(hidden, weight, targets):
    scalar(hidden, weight.detach(), targets)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("v", [32000, 32001, 32003])
@pytest.mark.parametrize("path", [no_grad, reference, policy, frozen, hinted, scalar, scalar_frozen])
def test_nothing_is_compiled_after_the_second_call(path, v):
    """Over 50 numbers of tokens, the first two small: kernels for tokens not stored in dW are compiled ahead too."""
    draw = random.Random(0)
    weight = torch.randn(v, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    for i, n in enumerate([7, 33, 1, 16, 255, 4096, 9000, *(draw.randint(1, 3000) for _ in range(43))]):
        hidden = torch.randn(n, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
        targets = torch.randint(0, v, (n,), device="cuda")
        targets[1::7] = -100
        path(hidden, weight, targets)
        if i == 1:
            torch.cuda.synchronize()
            before = variants()
    assert variants() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prepared_kernels_are_loaded_at_the_first_call():
    from fusedalign.impls import triton as impl
    from fusedalign.impls.triton import ahead
    from fusedalign.problem import Problem

    weight = torch.randn(5000, 192, device="cuda", dtype=torch.bfloat16).requires_grad_()
    hidden = torch.empty(0, 192, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.empty(0, device="cuda", dtype=torch.int64)
    impl.IMPL.prepare(Problem(hidden, weight, targets, torch.bfloat16, outputs=frozenset(["entropy"])))
    ahead.wait_for_all()
    before = variants()
    for n in (5, 300):
        hidden = torch.randn(n, 192, device="cuda", dtype=torch.bfloat16).requires_grad_()
        targets = torch.randint(0, 5000, (n,), device="cuda")
        linear_logps(hidden, weight, targets, impl="triton", outputs=["entropy"]).logps.sum().backward()
        with torch.no_grad():
            linear_logps(hidden, weight, targets, impl="triton", outputs=["entropy"])
    assert variants() == before
