"""From the records of a plan to bytes, each figure with its formula. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from fusedalign.plan.shape import OPTIMISERS, Model, Step, Trace
from fusedalign.problem import DEFAULT_WORKSPACE

MIB = 2**20

#: cuBLAS takes 32 MiB on Hopper for each of two threads, that of the forward and that of the backward.
LIBRARIES = 64 * MIB
#: What CUDA and the loaded kernels take of a card, outside of PyTorch's count.
CONTEXT = 512 * MIB

#: TRL's fused head: its tile of logits, in half precision.
TRL_TILE = 4096 * 32768
#: What TRL's CPO and ORPO take of full logits at their peak, in bytes a logit: the fp32 copy (4), its gradient (4), and with a
#: likelihood term the log-softmax of the chosen half (2). Read off measured peaks, see docs/plan.md.
LOGIT_BYTES = {"cpo": 10, "orpo": 10, "simpo": 8}
#: Tokens of which Liger's per-token function makes the logits at once.
LIGER_TOKENS = 512

OURS = "triton"


@dataclass(frozen=True)
class Component:
    """Some memory, and how much it is."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class Moment:
    """A time in a step, and what forward and backward hold then beyond what is held between steps."""

    name: str
    bytes: int
    formula: str


def held(model: Model, step: Step) -> list[Component]:
    """What is alive all the time."""
    p, item = model.parameters, model.item
    parts = [Component("weights", p * item, f"{p:,} parameters x {item} B")]
    if model.adapters:
        a = model.adapters
        parts.append(Component("adapters", a * 4, f"LoRA r={step.lora_r}, all linear layers: {a:,} x 4 B"))
    if step.live_reference and not model.adapters:
        parts.append(Component("reference model", p * item, "the weights again; none if precomputed"))
    elif step.live_reference:
        parts.append(Component("reference model", 0, "the same weights without their adapters"))
    elif step.precomputed:
        parts.append(Component("reference model", 0, "precomputed, none is loaded in the training"))
    optimiser, trained = OPTIMISERS[step.optimiser], model.trained
    each = 2 * model.trained_item if optimiser.state_bytes is None else optimiser.state_bytes
    text = f"{step.optimiser}, {optimiser.about}: {trained:,} x {each:.4g} B"
    parts.append(Component("optimiser", round(trained * each), text))
    parts.append(Component("libraries", LIBRARIES, "cuBLAS, 32 MiB x 2 threads"))
    return parts


def gradients(model: Model) -> Component:
    """What the backward leaves."""
    n, item = model.trained, model.trained_item
    return Component("gradients", n * item, f"{n:,} x {item} B at the end of the backward")


def activations(trace: Trace) -> list[Component]:
    """What layers keep from the forward to the backward, with gradient checkpointing and without, and one at work."""
    layers, n, tokens = trace.layers, len(trace.order), f"{trace.tokens:,} tokens"
    ends = trace.before + trace.after
    around = f"embeddings, positions and last norm {tokens} x {_each(trace, ends)}"
    saved = sum(layer.checkpoint for layer in layers)
    text = f"inputs of {n} layers: {tokens} x {_each(trace, saved)} + {around}"
    parts = [Component("with checkpointing", saved + ends, text)]
    one = max(layer.recompute_peak for layer in layers)
    text = f"forward again and backward: {tokens} x {_each(trace, one)}, the gradients of its weights included"
    parts.append(Component("  and one layer at a time", one, text))
    kept = sum(layer.kept for layer in layers)
    text = f"what {n} layers save: {tokens} x {_each(trace, kept)} + {around}"
    return [*parts, Component("without checkpointing", kept + ends, text)]


def _each(trace: Trace, size: int) -> str:
    return f"{size / trace.tokens:,.0f} B"


# ------------------------------------------------------------------------------------------------------------------ head


def head_layers(model: Model, step: Step) -> list[Component]:
    """What each implementation of the head takes, the gradient of the head included."""
    n, tokens = step.scored, step.padded
    v, d = model.vocab, model.width
    parts = []
    for name in ("triton", "pytorch", "liger", "cce"):
        parts.append(Component(name, _gradient_of_head(model) + extra(name, model, n), _formula(name, model, n)))
    if step.method in LOGIT_BYTES:
        each = LOGIT_BYTES[step.method]
        text = f"full logits of {tokens:,} positions x {v:,} x {each} B"
        parts.append(Component("stock TRL", _gradient_of_head(model) + tokens * v * each, text))
    else:
        text = _formula("trl", model, n)
        parts.append(Component("stock TRL", _gradient_of_head(model) + extra("trl", model, n), text))
    return parts


def _gradient_of_head(model: Model) -> int:
    return 0 if model.adapters else model.head * model.item


def extra(impl: str, model: Model, tokens: int) -> int:
    """Bytes of a head for so many tokens at its peak, beyond the gradient of its weight and the model's hidden states."""
    v, d, trains = model.vocab, model.width, not model.adapters
    rows = tokens * d * 2  # hidden states that are picked, and their gradient, in half precision each
    if impl in ("triton", "pytorch"):
        return 2 * rows + min(DEFAULT_WORKSPACE, tokens * v * 6)
    if impl == "liger":
        return 2 * rows + min(LIGER_TOKENS, tokens) * v * 4
    wide = (v * d * 4 if trains else 0) + tokens * d * 4  # gradients are added up in fp32
    if impl == "cce":
        return 2 * rows + wide
    return 2 * rows + wide + min(TRL_TILE, tokens * v) * 2


def _formula(impl: str, model: Model, tokens: int) -> str:
    v, d = model.vocab, model.width
    rows = f"{tokens:,} tokens x {d:,} x 4 B"
    gradient = "" if model.adapters else f"gradient {v:,} x {d:,} x {model.item} B + "
    if impl in ("triton", "pytorch"):
        return f"{gradient}workspace {DEFAULT_WORKSPACE // MIB} MiB + {rows}"
    if impl == "liger":
        return f"{gradient}{min(LIGER_TOKENS, tokens)} x {v:,} logits x 4 B + {rows}"
    wide = f"fp32 sums ({tokens:,}{'' if model.adapters else f' + {v:,}'}) x {d:,} x 4 B"
    tile = "" if impl == "cce" else " + tile 4096 x 32768 x 2 B"
    return f"{gradient}{wide}{tile} + {rows}"


# --------------------------------------------------------------------------------------------------------------- moments


def moments(model: Model, step: Step, trace: Trace, head: int) -> Iterator[Moment]:
    """When a step may be at its peak.

    Args:
        model, step: as in `held`.
        trace: of the batch as it is laid out.
        head: bytes that the head takes beyond the gradient of its weight.
    """
    layers, own = trace.layers, _gradient_of_head(model)
    saved = [layer.checkpoint if step.checkpointing else layer.kept for layer in layers]
    grads = gradients(model).bytes
    # With accumulation the gradients of earlier micro-batches are there all the time.
    earlier = grads if step.accumulation > 1 else 0
    after_forward = trace.before + sum(saved) + trace.after
    casts = sum(layer.casts for layer in layers)
    name = "layers' inputs" if step.checkpointing else "what layers keep"
    yield Moment("head", earlier + after_forward + casts + own + head, f"{name} + head")
    if step.live_reference:
        forward = max(layer.forward_peak for layer in layers) + 2 * trace.tokens * trace.width * trace.item
        text = f"{name} + the reference's forward, one layer at a time"
        yield Moment("reference", earlier + after_forward + own + casts + forward, text)
    below = [0, *accumulate(saved)]
    above = own
    for i in reversed(range(len(layers))):
        layer = layers[i]
        peak = layer.recompute_peak if step.checkpointing else layer.backward_peak
        before = trace.before + below[i] + peak + (earlier or above)
        yield Moment(f"backward of layer {i + 1}", before, f"gradients so far + {name} below + one layer")
        above += layer.grads
    if not model.adapters:
        # The embedding's gradient is a whole matrix, which is then added to the head's.
        again = model.head * model.item if model.tied or earlier else 0
        hidden = trace.tokens * trace.width * trace.item
        yield Moment("embedding", grads + again + hidden, "all gradients + that of the embedding")
    yield Moment("optimiser's step", grads, "all gradients")


def largest(model: Model, step: Step, trace: Trace, head: int) -> Moment:
    """The moment of the peak."""
    return max(moments(model, step, trace, head), key=lambda moment: moment.bytes)


def total(model: Model, step: Step, trace: Trace, head: int) -> int:
    """Peak bytes of PyTorch's allocator in a step after the first."""
    return sum(part.bytes for part in held(model, step)) + largest(model, step, trace, head).bytes


def head_bytes(model: Model, step: Step) -> int:
    """Those of our head, for `moments`."""
    return extra(OURS, model, step.scored)


def stock_head_bytes(model: Model, step: Step) -> int:
    """Those of stock TRL's."""
    if step.method in LOGIT_BYTES:
        return step.padded * model.vocab * LOGIT_BYTES[step.method]
    return extra("trl", model, step.rows * (step.length - step.prompt))
