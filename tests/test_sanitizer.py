"""NVIDIA's compute-sanitizer on one small problem per kernel: no access out of bounds, no shared-memory race."""

import shutil
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import torch
from fusedalign import linear_cross_entropy, linear_logps
from fusedalign.problem import OUTPUTS

def run(d, dtype):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, d, generator=g).to("cuda", dtype) for n in (150, 1003))
    targets = torch.randint(0, 1003, (150,), generator=g).cuda()
    bias = torch.randn(1003, generator=g).to("cuda", dtype)
    head = {"impl": "triton", "softcap": 9.0, "workspace": 300_000}
    trained = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    with torch.no_grad():  # sums_kernel and fold_kernel with every output
        linear_logps(hidden, weight, targets, bias=bias, outputs=OUTPUTS, **head)
    # sums_kernel with KEEP "reference", target_logit_kernel, target_rows_kernel
    linear_logps(trained[0], weight, targets, **head).logps.sum().backward()
    linear_logps(trained[0], 30 * weight, targets, impl="triton").logps.sum().backward()  # far_rows_kernel
    # sums_kernel with KEEP "half", kept_grads_kernel, grads_kernel, scale_kernel
    loss = linear_cross_entropy(*trained[:2], targets, bias=trained[2], **head)
    (2 * loss).backward()
    out = linear_logps(*trained[:2], targets, bias=trained[2], outputs=["entropy", "lse"], **head)
    (out.logps + out.entropy + out.lse).sum().backward()
    torch.cuda.synchronize()

run(72, torch.bfloat16)  # through tensor descriptors
run(33, torch.bfloat16)  # through pointers
run(33, torch.float32)  # from the library's products
print("done")
"""


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="for a GPU")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on the PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool, monkeypatch):
    monkeypatch.setenv(
        "PYTORCH_NO_CUDA_MEMORY_CACHING", "1"
    )  # else one large cached allocation hides accesses beyond a tensor
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SCRIPT]
    process = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]
    assert "done" in process.stdout
