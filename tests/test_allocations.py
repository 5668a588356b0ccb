"""No path allocates the logits or a wide copy of the head; each takes the documented number of products."""

import gc

import pytest
import torch
from helpers import DEVICES, IMPLS, INTERPRETED, Allocations, Case, make_case, peak_memory
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from fusedalign import linear_cross_entropy

N, D, V = 96, 33, 601  # a tile of logits is an eighth of N * V at most, well below V * D
ALL = ("entropy", "lse", "mean_logit", "log_sum_sq_probs", "is_top1")


def per_token(case: Case, **options):
    out = case.logps(outputs=ALL, **options)
    (out.logps.sum() + out.entropy.sum() + out.lse.sum()).backward()


def logps_alone(case: Case, **options):
    case.logps(**options).logps.sum().backward()


def no_grad(case: Case, **options):
    with torch.no_grad():
        case.logps(outputs=ALL, **options)


def scalar(case: Case, **options):
    args = (case.hidden, case.weight, case.targets)
    linear_cross_entropy(*args, bias=case.bias, **case.head, **options).backward()


def expected(case: Case, **options):
    out = case.logps(outputs=ALL, loss_hint="nll", **options)
    (-out.logps.sum() / 1000).backward()


PATHS = {
    "no grad": (no_grad, (1, 1, 1)),
    "frozen head": (logps_alone, (1, 0, 0)),
    "frozen head, all outputs": (per_token, (1, 0, 0)),
    "two passes": (per_token, (1, 1, 1)),
    "frozen hidden": (per_token, (0, 1, 1)),
    "one pass": (scalar, (1, 1, 1)),
    "one pass, expected": (expected, (1, 1, 1)),
    "one pass, frozen head": (scalar, (1, 0, 0)),
}


def trace(path, impl, dtype=torch.bfloat16, device="cpu", n=N, v=V, **options) -> Allocations:
    f, needs = PATHS[path]
    case = make_case((n,), D, v, dtype=dtype, device=device, ignored=0.0, softcap=9.0).leaves(*needs)
    with Allocations() as allocations:
        f(case, impl=impl, **options)
    return allocations


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_path_allocates_the_logits(path, dtype):
    assert trace(path, "pytorch", dtype).largest() < N * V


@pytest.mark.parametrize("path", PATHS)
def test_no_path_allocates_an_fp32_copy_of_a_bf16_head_or_its_gradient(path):
    assert trace(path, "pytorch").largest(torch.float32, torch.float64) < V * D


@pytest.mark.parametrize("path", PATHS)
def test_the_reference_allocates_logits_and_fp32_copies(path):
    allocations = trace(path, "reference")
    assert allocations.largest() >= N * V
    assert (V * D, torch.float32) in allocations.sizes


def test_one_pass_accumulates_a_bf16_head_gradient_in_two_bf16_halves():
    """The documented accumulator: in addition to the gradient one tensor of its size and dtype."""
    sizes = trace("one pass", "pytorch").sizes
    assert sizes.count((V * D, torch.bfloat16)) == 2
    assert trace("one pass", "pytorch", torch.float32).sizes.count((V * D, torch.float32)) == 1


def test_a_small_workspace_selects_two_passes():
    """Without room for the low half, the path with 4 products is taken, which needs no second [V, D]."""
    sizes = trace("one pass", "pytorch", workspace=60_000).sizes
    assert sizes.count((V * D, torch.bfloat16)) == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("workspace", [30_000, 120_000])
def test_tiles_fit_the_workspace(path, workspace):
    """Tiles of logits, the largest allocations except gradients and results, fit the workspace."""
    allocations = trace(path, "pytorch", workspace=workspace)
    results = {V * D, N * D, N, V, N * 1}
    tiles = [n * dtype.itemsize for n, dtype in allocations.sizes if n not in results]
    assert max(tiles) <= workspace


@pytest.mark.parametrize(
    ("path", "products"),
    [
        ("no grad", 1),
        ("frozen head", 2),
        ("frozen head, all outputs", 4),
        ("two passes", 4),
        ("frozen hidden", 3),
        ("one pass", 3),
        ("one pass, expected", 3),
        ("one pass, frozen head", 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_each_path_takes_its_documented_number_of_products(path, products, dtype, ignored):
    """Multiply-adds in units of the product of the valid tokens with the head; ignored ones cost nothing."""
    f, needs = PATHS[path]
    case = make_case((N,), D, V, dtype=dtype, ignored=ignored).leaves(*needs)
    with FlopCounterMode(display=False) as counter:
        f(case, impl="pytorch")
    assert counter.get_total_flops() == products * 2 * int(case.valid.sum()) * D * V


def test_the_backward_does_not_read_a_frozen_head():
    """The kept Jacobian needs neither head nor hidden states."""
    case = make_case((N,), D, V, ignored=0.0).leaves(1, 0, 0)
    loss = case.logps().logps.sum()
    with torch.no_grad():
        case.weight.fill_(torch.nan)
    loss.backward()
    assert torch.isfinite(case.hidden.grad).all()


def saved_sizes_and_grads(f, impl, **options) -> tuple[list[int], dict]:
    """Elements of the tensors saved for the backward except the inputs, and the gradients."""
    case = make_case((N // 4,), D, V, dtype=torch.bfloat16, ignored=0.3).leaves()
    sizes, inputs = [], {x.untyped_storage().data_ptr() for x in (case.hidden, case.weight, case.bias, case.targets)}

    def pack(x):
        if x.untyped_storage().data_ptr() not in inputs:
            sizes.append(x.untyped_storage().nbytes() // x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = f(case, impl=impl, **options)
    loss.backward()
    return sizes, case.grads()


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl in ("triton", "pytorch")])
@pytest.mark.parametrize("loss", ["logps", "cross_entropy"])
def test_keep_head_false_saves_nothing_of_head_size_for_the_backward(impl, loss):
    """The last stage of a pipeline needs it: many of its forwards are in flight at once."""

    def f(case, **options):
        if loss == "logps":
            return -case.logps(**options).logps.sum()
        return linear_cross_entropy(case.hidden, case.weight, case.targets, bias=case.bias, reduction="sum", **options)

    sizes, grads = saved_sizes_and_grads(f, impl)
    lean_sizes, lean_grads = saved_sizes_and_grads(f, impl, keep_head=False)
    assert max(lean_sizes) <= N * D
    if impl == "triton" or loss == "cross_entropy":  # otherwise nothing of head size is saved anyway
        assert max(sizes) >= V * D
    for name, grad in lean_grads.items():
        difference = (grad.double() - grads[name].double()).norm()
        assert difference <= 2**-7 * grads[name].double().norm(), name


# Triton does not tile problems that fit the workspace, so the workspace is small here.

#: Triton computes no gradient before the loss is known.
TRITON_PATHS = [path for path in PATHS if path != "one pass, expected"]

triton = [
    pytest.mark.skipif("triton" not in IMPLS, reason="triton is not installed"),
    pytest.mark.parametrize("impl", ["triton"]),
    pytest.mark.parametrize("device", DEVICES),
]


def each(marks):
    def mark(test):
        for m in marks:
            test = m(test)
        return test

    return mark


@pytest.fixture
def _as_on_a_gpu(monkeypatch):
    """Exclude the interpreter's fp32 operand copies and the memory that its reference cycles keep alive."""
    if not INTERPRETED:
        yield
        return
    from fusedalign.impls.triton import launch

    original = launch.TokenBatch.launch_args

    def launch_args(batch, *args):
        gc.collect()
        if batch.problem.operand_dtype == torch.float32:
            return original(batch, *args)
        with _disable_current_modes():
            return original(batch, *args)

    monkeypatch.setattr(launch.TokenBatch, "launch_args", launch_args)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def sizes_of_triton(device) -> tuple[int, int, int]:
    """Tokens, columns, and a workspace that holds part of the columns; smaller for the interpreter."""
    return (40, 401, 27_000) if device == "cpu" else (40, V, 40_000)


@each(triton)
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("path", TRITON_PATHS)
def test_triton_allocates_no_logits_or_fp32_head_beyond_the_workspace(impl, device, path):
    n, v, workspace = sizes_of_triton(device)
    allocations = trace(path, impl, device=device, n=n, v=v, workspace=workspace)
    assert n * v > v * D
    assert allocations.largest() <= v * D
    assert allocations.largest(torch.float32, torch.float64) < v * D
    assert allocations.sizes.count((v * D, torch.bfloat16)) == (1 if "dweight" in results(path) else 0)


@each(triton)
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("path", [logps_alone, scalar], ids=lambda f: f.__name__)
@pytest.mark.parametrize("trained", [True, False])
def test_triton_allocates_nothing_of_the_size_of_a_frozen_part(impl, device, path, trained):
    """With a thin second part such as an adapter: no full copy of the frozen part, no gradient, no logits."""
    n, v, workspace = sizes_of_triton("cpu") if device == "cpu" else (600, 4001, 2**20)
    d, thin = (D, 4) if device == "cpu" else (512, 8)
    case = make_case((n,), d + thin, v, dtype=torch.bfloat16, device=device, ignored=0.0).leaves(1, 0, 0)
    case.weight = (case.weight[:, :d].contiguous(), case.weight[:, d:].float().requires_grad_(trained))
    with Allocations() as allocations:
        path(case, impl=impl, workspace=workspace)
    assert v < allocations.largest() < v * d < n * v
    assert allocations.sizes.count((v * thin, torch.float32)) == trained
    assert (case.weight[1].grad is not None) == trained


def results(path) -> set[str]:
    """The gradients that a path computes."""
    if path == "no grad":
        return set()
    return {name for name, needed in zip(("dhidden", "dweight", "dbias"), PATHS[path][1], strict=True) if needed}


#: On a CPU half-precision operands are copied to fp32 for the products.
NOT_WIDENED = [torch.float32] + [torch.bfloat16, torch.float16] * (not INTERPRETED)


@each(triton)
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("dtype", NOT_WIDENED)
@pytest.mark.parametrize("path", TRITON_PATHS)
def test_peak_memory_stays_within_the_workspace(impl, device, path, dtype):
    """In addition to results and saved tensors; vectors of one number per token are not counted."""
    n, d, v, workspace = (24, 16, 600, 40_000) if device == "cpu" else (4096, 512, 32_000, 64 * 2**20)
    f, needs = PATHS[path]

    def call():
        case = make_case((n,), d, v, dtype=dtype, device=device, ignored=0.0, softcap=9.0).leaves(*needs)

        def measured():
            f(case, impl=impl, workspace=workspace)
            return case.grads()

        return peak_memory(measured, device)

    if device == "cuda":
        call()  # CUDA libraries allocate workspaces at their first product
    sizes = {"dhidden": n * d, "dweight": v * d, "dbias": v}
    expected = sum(sizes[name] for name in results(path)) * dtype.itemsize
    if path.startswith("frozen head"):
        expected += n * d * dtype.itemsize  # the Jacobian
    vectors = 48 * n * 4
    assert vectors < workspace / 8
    assert call() <= expected + workspace + vectors


@each(triton)
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("path", ["two passes", "one pass"])
def test_a_small_token_chunk_does_not_widen_gradient_tiles(impl, device, path):
    """Gradient tiles hold all tokens, so a small token chunk leaves no room for more columns."""
    n, v, workspace = sizes_of_triton(device)
    allocations = trace(path, impl, device=device, n=n, v=v, workspace=workspace, token_chunk=2)
    assert allocations.largest() <= v * D
