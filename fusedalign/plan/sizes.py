"""Bytes of each component of a plan, with formulas; pure arithmetic on the records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from fusedalign.plan.shape import ADAPTER_ITEM, OPTIMISERS, Model, Step, Trace
from fusedalign.problem import DEFAULT_WORKSPACE

MIB = 2**20

#: cuBLAS workspaces on Hopper: 32 MiB for each of the two threads of forward and backward.
LIBRARIES = 2 * 32 * MIB
#: Memory of the CUDA context and the loaded kernels, which PyTorch does not count.
CONTEXT = 512 * MIB

#: The tile of logits of TRL's fused head, tokens x columns.
TRL_TILE = (4096, 32768)
#: Bytes per logit at the peak of TRL's CPO and ORPO: an fp32 copy (4), its gradient (4) and, with an NLL term, the
#: log-softmax of the chosen half (2). Fitted to measured peaks, see docs/plan.md.
LOGIT_BYTES = {"cpo": 10, "orpo": 10, "simpo": 8}
#: Tokens per chunk of logits in Liger's per-token function.
LIGER_TOKENS = 512

OURS, STOCK = "triton", "stock TRL"
HEADS = (OURS, "pytorch", "liger", "cce", STOCK)


@dataclass(frozen=True)
class Component:
    """A named amount of memory, with its formula."""

    name: str
    bytes: int
    formula: str


def total_of(name: str, parts: list[Component]) -> Component:
    """The sum of the parts that are not empty."""
    parts = [part for part in parts if part.bytes]
    return Component(name, sum(part.bytes for part in parts), " + ".join(part.formula for part in parts) or "nothing")


def held(model: Model, step: Step) -> list[Component]:
    """Memory that is held between steps."""
    p, item, adapters = model.parameters, model.item, model.adapters
    parts = [Component("weights", p * item, f"{p:,} parameters x {item} B")]
    if adapters:
        text = f"LoRA r={step.lora_r} on all linear layers: {adapters:,} x {ADAPTER_ITEM} B"
        parts.append(Component("adapters", adapters * ADAPTER_ITEM, text))
    if step.live_reference and not adapters:
        parts.append(Component("reference model", p * item, f"{p:,} parameters x {item} B; none if precomputed"))
    elif step.live_reference:
        parts.append(Component("reference model", 0, "the weights without their adapters"))
    elif step.precomputed:
        parts.append(Component("reference model", 0, "precomputed"))
    optimiser, trained = OPTIMISERS[step.optimiser], model.trained
    state_bytes = 2 * model.trained_item if optimiser.state_bytes is None else optimiser.state_bytes
    text = f"{trained:,} x {state_bytes:.4g} B; {step.optimiser}, {optimiser.about}"
    parts.append(Component("optimiser", round(trained * state_bytes), text))
    parts.append(Component("libraries", LIBRARIES, "cuBLAS, 32 MiB for each of 2 threads"))
    return parts


def gradients(model: Model) -> Component:
    """The gradients after a backward."""
    n, item = model.trained, model.trained_item
    return Component("gradients", n * item, f"{n:,} x {item} B, at the end of the backward")


def activations(trace: Trace) -> list[Component]:
    """Tensors saved for the backward, with and without gradient checkpointing, and the peak of one layer."""
    layers, tokens = trace.layers, f"{trace.tokens:,} tokens"
    around, n = trace.before + trace.after, len(trace.order)
    around_text = f"{_per_token(trace, around)} around them"
    inputs, saved = sum(layer.checkpoint for layer in layers), sum(layer.kept for layer in layers)
    one = max(layer.recompute_peak for layer in layers)
    inputs_text = f"{tokens} x ({_per_token(trace, inputs)} inputs of {n} layers + {around_text})"
    one_text = f"{tokens} x {_per_token(trace, one)}, its weights' gradients included"
    saved_text = f"{tokens} x ({_per_token(trace, saved)} that {n} layers save + {around_text})"
    return [
        Component("with checkpointing", inputs + around, inputs_text),
        Component("  and one layer at a time", one, one_text),
        Component("without checkpointing", saved + around, saved_text),
    ]


def _per_token(trace: Trace, size: int) -> str:
    return f"{size / trace.tokens:,.0f} B"


def head_gradient(model: Model) -> Component:
    """The gradient of the head's weight, allocated in the forward of the loss; empty if the head is frozen."""
    size = 0 if model.adapters else model.head * model.item
    return Component("gradient of the head", size, f"gradient {model.vocab:,} x {model.width:,} x {model.item} B")


def head_layer(name: str, model: Model, step: Step) -> Component:
    """The peak of the loss layer beyond the gradient of the head's weight and the last hidden states."""
    v, d, item = model.vocab, model.width, model.item
    if name == STOCK and step.method in LOGIT_BYTES:
        tokens, logit_bytes = step.padded, LOGIT_BYTES[step.method]
        return Component(name, tokens * v * logit_bytes, f"full logits {tokens:,} x {v:,} x {logit_bytes} B")
    n = step.rows * (step.length - step.prompt) if name == STOCK else step.scored
    hidden = Component("", 2 * n * d * item, f"{n:,} tokens x {d:,} x {2 * item} B")  # and their gradient
    if name in ("triton", "pytorch"):
        size = min(DEFAULT_WORKSPACE, 6 * n * v)
        return total_of(name, [hidden, Component("", size, f"workspace {size / MIB:.4g} MiB")])
    if name == "liger":
        rows = min(LIGER_TOKENS, n)
        return total_of(name, [hidden, Component("", rows * v * 4, f"logits {rows:,} x {v:,} x 4 B")])
    rows = n if model.adapters else n + v
    parts = [hidden, Component("", rows * d * 4, f"fp32 sums {rows:,} x {d:,} x 4 B")]
    if name == STOCK:
        rows, columns = min(TRL_TILE[0], n), min(TRL_TILE[1], v)
        parts.append(Component("", 2 * rows * columns, f"tile {rows:,} x {columns:,} x 2 B"))
    return total_of(name, parts)


def head_layers(model: Model, step: Step) -> list[Component]:
    """The peak of the loss layer of each implementation, with the gradient of the head's weight."""
    return [total_of(name, [head_gradient(model), head_layer(name, model, step)]) for name in HEADS]


@dataclass(frozen=True)
class Moment:
    """A moment of a step, with the memory of forward and backward beyond what is held between steps."""

    name: str
    parts: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        """The sum of the parts."""
        return sum(size for _, size in self.parts)


def moments(model: Model, step: Step, trace: Trace, head: int) -> Iterator[Moment]:
    """Yield the moments at which a step may reach its peak.

    `trace` is of the packed or padded batch, `head` the bytes of the loss layer without the gradient of its weight.
    """
    layers, head_grad = trace.layers, head_gradient(model).bytes
    saved = [layer.checkpoint if step.checkpointing else layer.kept for layer in layers]
    saved_name = "inputs of layers" if step.checkpointing else "what layers save"
    all_grads = gradients(model).bytes
    # With accumulation, the gradients of earlier micro-batches are held during the whole step.
    earlier = (("gradients of earlier micro-batches", all_grads),) if step.accumulation > 1 else ()
    forward = (
        *earlier,
        (saved_name, trace.before + sum(saved) + trace.after),
        ("gradient of the head", head_grad),
        ("weights in bf16", sum(layer.casts for layer in layers)),
    )
    yield Moment("head", (*forward, ("loss layer", head)))
    hidden = trace.tokens * trace.width * trace.item
    if step.live_reference:
        layer_peak = max(layer.forward_peak for layer in layers) + 2 * hidden
        yield Moment("forward of the reference", (*forward, ("one layer", layer_peak)))
    saved_below, grads_so_far = [0, *accumulate(saved)], head_grad
    for i, layer in reversed(list(enumerate(layers))):
        layer_peak = layer.recompute_peak if step.checkpointing else layer.backward_peak
        grads = earlier or (("gradients so far", grads_so_far),)
        saved_part = (saved_name, trace.before + saved_below[i])  # without the layer's own, which are in its peak
        yield Moment(f"backward of layer {i + 1}", (*grads, saved_part, ("one layer", layer_peak)))
        grads_so_far += layer.grads
    if not model.adapters:
        # The gradient of the embedding is a dense matrix, which is then added to an existing one.
        embedding_grad = model.head * model.item if model.tied or earlier else 0
        parts = (("gradients", all_grads), ("that of the embedding", embedding_grad + hidden))
        yield Moment("backward of the embedding", parts)
    yield Moment("step of the optimiser", (("gradients", all_grads),))


def largest(model: Model, step: Step, trace: Trace, head: int) -> Moment:
    """The moment with most memory."""
    return max(moments(model, step, trace, head), key=lambda moment: moment.bytes)


def peak(model: Model, step: Step, trace: Trace, head: int) -> int:
    """The peak of PyTorch's allocator, in bytes, in a step after the first."""
    return sum(part.bytes for part in held(model, step)) + largest(model, step, trace, head).bytes
