"""The workspace of calls that name none: larger where that saves products and a GPU has the room."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedalign import linear_cross_entropy
from fusedalign.impls.triton import kept
from fusedalign.impls.triton import workspace as module
from fusedalign.impls.triton.workspace import fit_workspace, free_memory
from fusedalign.problem import DEFAULT_WORKSPACE, MemoryOptions, Problem

#: The tests of this package run with deterministic algorithms.
pytestmark = pytest.mark.usefixtures("any_algorithms")

N, D, V = 4096, 64, 100_000
GIB = 2**30


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def any_algorithms():
    was_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(was_on)


def problem(device="cuda", **memory):
    hidden = torch.empty(N, D, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.empty(V, D, dtype=torch.bfloat16, device=device, requires_grad=True)
    targets = torch.empty(N, dtype=torch.int64, device=device)
    return Problem(hidden, weight, targets, torch.bfloat16, memory=MemoryOptions(**memory))


def fitted(monkeypatch, free, needed, device="cuda", **memory):
    """The workspace on a device with `free` bytes, where `needed` bytes save all that can be saved."""
    monkeypatch.setattr(module, "free_memory", lambda device: free)
    with FakeTensorMode():
        asked = problem(device, **memory)
        return fit_workspace(asked, lambda p: (p.memory.workspace or DEFAULT_WORKSPACE) >= needed).memory.workspace


@pytest.mark.parametrize("needed", [DEFAULT_WORKSPACE + 1, GIB - 1, 3 * GIB])
def test_it_is_the_smallest_power_of_two_that_is_enough(monkeypatch, needed):
    assert fitted(monkeypatch, 80 * GIB, needed) == 2 ** math.ceil(math.log2(needed))


@pytest.mark.parametrize("free", [DEFAULT_WORKSPACE, GIB, 3 * GIB, 7 * GIB])
def test_it_is_at_most_half_of_what_the_gradients_leave(monkeypatch, free):
    workspace = fitted(monkeypatch, free, math.inf) or DEFAULT_WORKSPACE
    left = free - 2 * (N + V) * D
    assert workspace == DEFAULT_WORKSPACE or workspace <= left / 2 < 2 * workspace


def test_a_workspace_that_is_enough_or_named_or_on_a_cpu_stays(monkeypatch):
    assert fitted(monkeypatch, 80 * GIB, DEFAULT_WORKSPACE) is None
    assert fitted(monkeypatch, 80 * GIB, GIB, workspace=1000) == 1000
    assert fitted(monkeypatch, 80 * GIB, GIB, device="cpu") is None


def test_deterministic_algorithms_keep_the_default(monkeypatch):
    torch.use_deterministic_algorithms(True)
    assert fitted(monkeypatch, 80 * GIB, GIB) is None


def run(monkeypatch, **options):
    """Gradients of the mean NLL, and whether every token's exponentials were kept."""
    torch.manual_seed(0)
    asked = problem()
    for x in (asked.hidden, asked.weight):
        x.data.normal_(0, 0.1)
    targets, slots = torch.arange(N, device="cuda"), []
    original = kept.sweep_all
    monkeypatch.setattr(
        "fusedalign.impls.triton.paths.sweep_all",
        lambda p, s, stats: slots.extend([] if p.hidden.is_meta else s) or original(p, s, stats),
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(asked.hidden, asked.weight, targets, impl="triton", **options).backward()
    peak = torch.cuda.max_memory_allocated() - before
    return (asked.hidden.grad, asked.weight.grad), all(x.memory is not None for x in slots), peak


@pytest.mark.gpu
@needs_gpu
def test_a_free_gpu_keeps_all_exponentials_with_the_same_gradients(monkeypatch):
    torch.cuda.empty_cache()
    grads, keeps_all, peak = run(monkeypatch)
    default, keeps_all_by_default, default_peak = run(monkeypatch, workspace=DEFAULT_WORKSPACE)
    assert (keeps_all, keeps_all_by_default) == (True, False)
    assert default_peak < peak <= free_memory(grads[0].device) / 2
    for x, y in zip(grads, default, strict=True):
        assert (x - y).norm() <= 2.5e-3 * y.norm()


@pytest.mark.gpu
@needs_gpu
def test_a_limited_process_stays_at_the_default(monkeypatch):
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 3 * DEFAULT_WORKSPACE) / total)
    try:
        assert free_memory(torch.device("cuda", 0)) < 4 * DEFAULT_WORKSPACE
        assert not run(monkeypatch)[1]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@needs_gpu
def test_a_graph_is_captured_with_the_default():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert free_memory(torch.device("cuda", 0)) == 0
