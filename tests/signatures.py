"""Print, as JSON, the kernel signatures that the launcher makes Triton compile, without interpreter or GPU.

Tensors are on the meta device, block shapes are those of a GPU, and launches are bound but not run.
"""

import functools
import json
import random
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from fusedalign.impls import autograd
from fusedalign.impls import triton as impl
from fusedalign.impls.triton import ahead, kept, launch, plan
from fusedalign.impls.triton.dry import tokens_of_dry_runs
from fusedalign.problem import OUTPUTS, MemoryOptions, NeedsGrad, Problem, Upstream, as_head

GPUS = {
    "H100": launch.BlockShape(128, 256, 64, warps=8, stages=3, programs=132, descriptor=True, flatten=True),
    "A100": launch.BlockShape(128, 256, 32, warps=8, stages=3),
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: name -> (D of each part, V, dtype of hidden, of the head and of operands, bias, softcap).
HEADS = {
    "Qwen3": ([1024], 151936, BF16, BF16, BF16, False, None),
    "one column more than whole blocks": ([256], 128257, BF16, BF16, BF16, False, None),
    "nothing divides": ([123], 50257, BF16, BF16, BF16, True, None),
    "softcap, bias, mixed precision": ([512], 32003, FP32, FP32, BF16, True, 30.0),
    "fp32": ([64], 32005, FP32, FP32, FP32, False, None),
    "fp16": ([64], 32008, FP16, FP16, FP16, False, None),
    "parts": ([512, 9], 32000, BF16, BF16, BF16, False, None),
}
FEW, ALL = frozenset(), frozenset(OUTPUTS)
signatures: set = set()
backend = make_backend(GPUTarget("cuda", 90, 32))


@functools.cache
def binder(kernel):
    return jit.create_function_from_signature(kernel.signature, kernel.params, backend)


def note(kernel, *args, grid, warmup, **kwargs):
    _, specialization, options = binder(kernel)(*args, **kwargs)
    signatures.add((kernel.__name__, str(specialization), str(sorted(options.items()))))


def problem(head, n, trained, outputs):
    d, v, hidden, weight, operand, bias, softcap = HEADS[head]

    def empty(*shape, dtype=FP32, grad=True):
        return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(grad)

    parts = tuple(empty(v, x, dtype=weight, grad=trained) for x in d)
    return Problem(
        empty(n, sum(d), dtype=hidden),
        as_head(parts, weight),
        torch.empty(n, dtype=torch.int64, device="meta"),
        operand,
        empty(v, dtype=weight, grad=trained) if bias else None,
        softcap=softcap,
        outputs=outputs,
        memory=MemoryOptions(),
    )


def no_grad(p, needs):
    impl.IMPL.sweep(p, "nothing")


def logps(p, needs):
    out, saved = autograd.forward(impl.IMPL, p, needs)
    autograd.backward(impl.IMPL, p, saved, needs, Upstream(out.logps))


def entropy(p, needs):
    out, saved = autograd.forward(impl.IMPL, p, needs)
    autograd.backward(impl.IMPL, p, saved, needs, Upstream(out.logps, out.entropy, out.lse))


def one_pass(p, needs):
    results = impl.IMPL.one_pass(p, lambda logps, lse: (logps, logps, None), needs)
    impl.IMPL.scale_(p.hidden.new_empty(p.hidden.shape), p.hidden.new_empty(()))
    if results is None:
        logps(p, needs)


def variants(path, head, trained, outputs, numbers):
    signatures.clear()
    for n in numbers:
        p = problem(head, n, trained, outputs)
        needs = NeedsGrad(True, trained, trained and p.bias is not None)
        with torch.no_grad(), ahead.NoArithmetic():
            path(p, needs)
    return set(signatures)


def cases():
    for head in HEADS:
        yield no_grad, head, False, ALL
        yield logps, head, False, FEW
        yield logps, head, True, FEW
        yield one_pass, head, True, FEW
    yield no_grad, "Qwen3", False, FEW
    yield one_pass, "Qwen3", False, FEW
    yield logps, "Qwen3", True, ALL
    yield entropy, "Qwen3", False, ALL
    yield entropy, "Qwen3", True, ALL


def main(gpu):
    jit.JITFunction.run = note
    for module in (launch, plan, kept):
        module.block_shape = lambda device: GPUS[gpu]
    draw = random.Random(0)
    table = []
    for path, head, trained, outputs in cases():
        p = problem(head, 0, trained, outputs)
        first = variants(path, head, trained, outputs, tokens_of_dry_runs(p))
        if len(table) < 3:  # common heads, trained and not: not even parts of the compiler
            assert "torch.fx.experimental.symbolic_shapes" not in sys.modules, path
        random_sizes = 45 if head == "Qwen3" else 5
        numbers = [1, 15, 16, 17, 4096, *(draw.randint(1, 4 * p.hidden.shape[1] + 3000) for _ in range(random_sizes))]
        extra = variants(path, head, trained, outputs, numbers) - first
        table.append(
            {
                "case": f"{path.__name__}, {head}, trained={trained}, outputs={len(outputs)}",
                "first": sorted(name for name, *_ in first),
                "later": sorted(map(str, extra)),
            }
        )
    assert "torch._dynamo" not in sys.modules, "a dry run must not load the compiler"
    json.dump(table, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
