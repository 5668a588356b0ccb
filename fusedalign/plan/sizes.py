"""From the records of a plan to bytes, each figure with its formula. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from fusedalign.plan.shape import ADAPTER_ITEM, OPTIMISERS, Model, Step, Trace
from fusedalign.problem import DEFAULT_WORKSPACE

MIB = 2**20

#: cuBLAS takes 32 MiB on Hopper for each of two threads, that of the forward and that of the backward.
LIBRARIES = 2 * 32 * MIB
#: What CUDA and the loaded kernels take of a card, outside of PyTorch's count.
CONTEXT = 512 * MIB

#: The tile of logits of TRL's fused head, tokens x columns.
TRL_TILE = (4096, 32768)
#: What TRL's CPO and ORPO take of full logits at their peak, in bytes a logit: an fp32 copy (4), its gradient (4), and
#: with a likelihood term the log-softmax of the chosen half (2). Read off measured peaks, see docs/plan.md.
LOGIT_BYTES = {"cpo": 10, "orpo": 10, "simpo": 8}
#: Tokens of which Liger's per-token function makes the logits at once.
LIGER_TOKENS = 512

OURS, STOCK = "triton", "stock TRL"
HEADS = (OURS, "pytorch", "liger", "cce", STOCK)


@dataclass(frozen=True)
class Component:
    """Some memory, and how much it is."""

    name: str
    bytes: int
    formula: str


def total_of(name: str, parts: list[Component]) -> Component:
    """The sum of parts, without those that are empty."""
    there = [part for part in parts if part.bytes]
    return Component(name, sum(part.bytes for part in there), " + ".join(part.formula for part in there) or "nothing")


# ---------------------------------------------------------------------------------------------- held, and in a step


def held(model: Model, step: Step) -> list[Component]:
    """What is there from step to step."""
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
    each = 2 * model.trained_item if optimiser.state_bytes is None else optimiser.state_bytes
    text = f"{trained:,} x {each:.4g} B; {step.optimiser}, {optimiser.about}"
    parts.append(Component("optimiser", round(trained * each), text))
    parts.append(Component("libraries", LIBRARIES, "cuBLAS, 32 MiB for each of 2 threads"))
    return parts


def gradients(model: Model) -> Component:
    """What the backward leaves."""
    n, item = model.trained, model.trained_item
    return Component("gradients", n * item, f"{n:,} x {item} B, at the end of the backward")


def activations(trace: Trace) -> list[Component]:
    """What layers keep from the forward to the backward, with gradient checkpointing and without, and one at work."""
    layers, n, tokens = trace.layers, len(trace.order), f"{trace.tokens:,} tokens"
    ends = Component("", trace.before + trace.after, f"{_each(trace, trace.before + trace.after)} around them")
    saved, kept = (sum(layer.checkpoint for layer in layers), sum(layer.kept for layer in layers))
    one = max(layer.recompute_peak for layer in layers)
    return [
        Component(
            "with checkpointing",
            saved + ends.bytes,
            f"{tokens} x ({_each(trace, saved)} inputs of {n} layers + {ends.formula})",
        ),
        Component("  and one layer at a time", one, f"{tokens} x {_each(trace, one)}, its weights' gradients included"),
        Component(
            "without checkpointing",
            kept + ends.bytes,
            f"{tokens} x ({_each(trace, kept)} that {n} layers save + {ends.formula})",
        ),
    ]


def _each(trace: Trace, size: int) -> str:
    return f"{size / trace.tokens:,.0f} B"


# --------------------------------------------------------------------------------------------------------------- head


def head_gradient(model: Model) -> Component:
    """Of the head's weight, which is there from the head's forward on; nothing where the head is frozen."""
    size = 0 if model.adapters else model.head * model.item
    return Component("gradient of the head", size, f"gradient {model.vocab:,} x {model.width:,} x {model.item} B")


def head_layer(name: str, model: Model, step: Step) -> Component:
    """The loss layer at its peak, beyond the gradient of the head's weight and the model's last hidden states."""
    v, d, item = model.vocab, model.width, model.item
    if name == STOCK and step.method in LOGIT_BYTES:
        tokens, each = step.padded, LOGIT_BYTES[step.method]
        return Component(name, tokens * v * each, f"full logits {tokens:,} x {v:,} x {each} B")
    n = step.rows * (step.length - step.prompt) if name == STOCK else step.scored
    picked = Component("", 2 * n * d * item, f"{n:,} tokens x {d:,} x {2 * item} B")  # and their gradient
    if name in ("triton", "pytorch"):
        size = min(DEFAULT_WORKSPACE, 6 * n * v)
        return total_of(name, [picked, Component("", size, f"workspace {size / MIB:.4g} MiB")])
    if name == "liger":
        rows = min(LIGER_TOKENS, n)
        return total_of(name, [picked, Component("", rows * v * 4, f"logits {rows:,} x {v:,} x 4 B")])
    rows = n if model.adapters else n + v
    parts = [picked, Component("", rows * d * 4, f"fp32 sums {rows:,} x {d:,} x 4 B")]
    if name == STOCK:
        rows, columns = min(TRL_TILE[0], n), min(TRL_TILE[1], v)
        parts.append(Component("", 2 * rows * columns, f"tile {rows:,} x {columns:,} x 2 B"))
    return total_of(name, parts)


def head_layers(model: Model, step: Step) -> list[Component]:
    """Of each implementation, the gradient of the head's weight included."""
    return [total_of(name, [head_gradient(model), head_layer(name, model, step)]) for name in HEADS]


# ------------------------------------------------------------------------------------------------------------ moments


@dataclass(frozen=True)
class Moment:
    """A time in a step, and what forward and backward hold then beyond what is held between steps."""

    name: str
    parts: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        """All parts together."""
        return sum(size for _, size in self.parts)


def moments(model: Model, step: Step, trace: Trace, head: int) -> Iterator[Moment]:
    """When a step may be at its peak.

    Args:
        model, step: as in `held`.
        trace: of the batch as it is laid out.
        head: bytes of the loss layer, without the gradient of its weight.
    """
    layers, of_head = trace.layers, head_gradient(model).bytes
    saved = [layer.checkpoint if step.checkpointing else layer.kept for layer in layers]
    what = "inputs of layers" if step.checkpointing else "what layers save"
    every = gradients(model).bytes
    # With accumulation the gradients of earlier micro-batches are there all the time.
    earlier = (("gradients of earlier micro-batches", every),) if step.accumulation > 1 else ()
    forward = (
        *earlier,
        (what, trace.before + sum(saved) + trace.after),
        ("gradient of the head", of_head),
        ("weights in bf16", sum(layer.casts for layer in layers)),
    )
    yield Moment("head", (*forward, ("loss layer", head)))
    hidden = trace.tokens * trace.width * trace.item
    if step.live_reference:
        one = max(layer.forward_peak for layer in layers) + 2 * hidden
        yield Moment("forward of the reference", (*forward, ("one layer", one)))
    below, done = [0, *accumulate(saved)], of_head
    for i, layer in reversed(list(enumerate(layers))):
        one = layer.recompute_peak if step.checkpointing else layer.backward_peak
        grads = earlier or (("gradients so far", done),)
        # What the layer itself has saved is part of its peak.
        yield Moment(f"backward of layer {i + 1}", (*grads, (what, trace.before + below[i]), ("one layer", one)))
        done += layer.grads
    if not model.adapters:
        # The embedding's gradient is a whole matrix, which is then added to the one that is there.
        again = model.head * model.item if model.tied or earlier else 0
        yield Moment("backward of the embedding", (("gradients", every), ("that of the embedding", again + hidden)))
    yield Moment("step of the optimiser", (("gradients", every),))


def largest(model: Model, step: Step, trace: Trace, head: int) -> Moment:
    """The moment of the peak."""
    return max(moments(model, step, trace, head), key=lambda moment: moment.bytes)


def peak(model: Model, step: Step, trace: Trace, head: int) -> int:
    """Bytes of PyTorch's allocator at the peak of a step after the first."""
    return sum(part.bytes for part in held(model, step)) + largest(model, step, trace, head).bytes
