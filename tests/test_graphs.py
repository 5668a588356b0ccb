"""`torch.compile(fullgraph=True)`: operators equal the functions, and fake outputs match the real ones."""

import itertools

import pytest
import torch
from helpers import DEVICES, IMPLS

from fusedalign import graphs, linear_cross_entropy, linear_logps
from fusedalign.problem import OUTPUTS, MemoryOptions, NeedsGrad, Spec

IN_GRAPHS = [impl for impl in IMPLS if impl in graphs.NAMES]
NEEDS = [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 0)]
TARGETS = torch.randint(0, 101, (3, 7), generator=torch.Generator().manual_seed(0)).index_fill(
    1, torch.tensor([0]), -100
)


def tensors(device, dtype, needs):
    g = torch.Generator().manual_seed(1)
    inputs = [torch.randn(*shape, generator=g).to(device, dtype) for shape in ((3, 7, 16), (101, 16), (101,))]
    return [x.requires_grad_(bool(n)) for x, n in zip(inputs, needs, strict=True)]


def all_outputs(hidden, weight, bias, impl):
    out = linear_logps(
        torch.tanh(hidden), weight, TARGETS.to(hidden.device), bias=bias, softcap=4.0, outputs=OUTPUTS, impl=impl
    )
    ramp = torch.arange(7, device=hidden.device)
    return (out.logps * ramp).sum() + out.entropy.sum() + 0.1 * out.lse.sum() + out.is_top1.sum() + out.mean_logit.sum()


def scalar_without_keeping(hidden, weight, bias, impl):
    targets = TARGETS.to(hidden.device)
    return linear_cross_entropy(torch.tanh(hidden), weight, targets, bias=bias, z_loss=0.1, impl=impl, keep_head=False)


def logps_alone(hidden, weight, bias, impl):
    out = linear_logps(torch.tanh(hidden), weight, TARGETS.to(hidden.device), bias=bias, impl=impl, scale=0.5)
    return (out.logps * torch.arange(7, device=hidden.device)).sum()


def scalar(hidden, weight, bias, impl):
    return linear_cross_entropy(
        torch.tanh(hidden), weight, TARGETS.to(hidden.device), bias=bias, z_loss=0.1, num_items=5, impl=impl
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IN_GRAPHS)
@pytest.mark.parametrize("f", [all_outputs, logps_alone, scalar, scalar_without_keeping])
@pytest.mark.parametrize("needs", NEEDS)
def test_fullgraph_compilation_gives_the_same_numbers(impl, device, f, needs):
    results = []
    for call in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        inputs = tensors(device, torch.float32, needs)
        loss = call(*inputs, impl)
        if any(needs):
            loss.backward()
        results.append([loss.detach(), *(x.grad for x in inputs)])
    for eager, compiled in zip(*results, strict=True):
        assert (eager is None) == (compiled is None)
        if eager is not None:
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


#: The traced graph does not depend on the impl, which is a constant argument of the operator. So impls after the first
#: are tested with one call, where all sizes are symbolic.
@pytest.mark.parametrize(
    ("impl", "dynamic"),
    [(impl, dynamic) for impl in IN_GRAPHS for dynamic in (None, True) if dynamic or impl == IN_GRAPHS[0]],
)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": (0.7, 0.8), "scale": (0.7, 0.8), "softcap": (3.0, 4.0)},
        {"workspace": (3000, 4000), "ignore_index": (-1, 3)},
    ],
    ids=["numbers", "integers"],
)
def test_one_compiled_function_takes_different_shapes_and_options(impl, dynamic, options):
    def f(hidden, weight, targets, **options):
        logps = linear_logps(hidden, weight, targets, impl=impl, **options).logps
        return linear_cross_entropy(hidden, weight, targets, impl=impl, **options) + logps.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, values in zip((7, 5), zip(*options.values(), strict=True), strict=True):
        results = []
        for call in (f, compiled):
            hidden, weight, _ = tensors("cpu", torch.float32, (1, 1, 0))
            loss = call(hidden[:, :n], weight, TARGETS[:, :n].clamp(min=0), **dict(zip(options, values, strict=True)))
            loss.backward()
            results.append([loss.detach(), hidden.grad, weight.grad])
        for eager, got in zip(*results, strict=True):
            torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-5)


def make_call(impl, dtype, needs, outputs, **options):
    spec = Spec(dtype, scale=0.5, temperature=0.7, outputs=frozenset(outputs), **{"softcap": 3.0, **options})
    return graphs.Call(spec, -100, impl, NeedsGrad(*map(bool, needs)))


def test_a_call_survives_the_operator_schema():
    memories = (MemoryOptions(), MemoryOptions(5, None, 7, keep_head=False))
    for memory, filter_eps, softcap in itertools.product(memories, (None, 0.0, 0.1), (None, 2.0)):
        options = {"memory": memory, "filter_eps": filter_eps, "softcap": softcap}
        call = make_call("auto", torch.bfloat16, (1, 0, 1), OUTPUTS[:2], **options)
        assert graphs.Call.unpack(call.pack()) == call


@pytest.mark.parametrize("impl", IN_GRAPHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("outputs", [(), ("lse",), OUTPUTS])
def test_fake_outputs_have_the_real_shapes_and_dtypes(impl, dtype, needs, outputs):
    inputs = tensors("cpu", dtype, (0, 0, 0))
    packed = make_call(impl, dtype, needs, outputs).pack()
    hidden, weight, bias = inputs
    arguments = hidden, weight, TARGETS, bias
    real, fake = graphs._logps(*arguments, *packed), graphs._logps_fake(*arguments, *packed)
    assert [(x.shape, x.dtype) for x in real] == [(x.shape, x.dtype) for x in fake]


@pytest.mark.parametrize("needs", NEEDS[:2])
def test_operators_pass_opcheck(needs):
    """PyTorch's `opcheck`: schema, autograd registration and fake outputs."""
    hidden, weight, bias = tensors("cpu", torch.float32, needs)
    arguments = hidden, weight, TARGETS, bias
    packed = make_call("pytorch", torch.float32, needs, ("lse",)).pack()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(graphs._logps, (*arguments, *packed), test_utils=checks)
    torch.library.opcheck(graphs._cross_entropy, (*arguments, None, 0.1, "nll mean", *packed), test_utils=checks)


def test_a_target_out_of_range_raises_in_a_graph():
    f = torch.compile(logps_alone, fullgraph=True, backend="aot_eager")
    hidden, weight, bias = tensors("cpu", torch.float32, (0, 0, 0))
    with pytest.raises(ValueError, match=r"targets must be in \[0, 50\)"):
        f(hidden, weight[:50], bias[:50], "pytorch")
