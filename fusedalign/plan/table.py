"""The text of a plan: a line per component, with its size and its formula."""

from __future__ import annotations

from fusedalign.commandline import fold
from fusedalign.plan.advice import Change
from fusedalign.plan.plan import Plan, Total
from fusedalign.plan.shape import Step
from fusedalign.plan.sizes import CONTEXT, Component
from fusedalign.reports import text_row

_NAME, _SIZE = 25, 11
_INDENT, _GAP = 2, 3


def size(number: int) -> str:
    """Format bytes as 3.21 GiB or 12.3 MiB."""
    gib = number / 2**30
    return f"{gib:.2f} GiB" if abs(gib) >= 0.995 else f"{number / 2**20:.1f} MiB"


def render(plan: Plan) -> str:
    """The text of a plan, in lines of at most 100 characters."""
    model = plan.model
    counts = f"{model.parameters:,} parameters, {plan.layers} layers, V = {model.vocab:,}, D = {model.width:,}"
    lines = [*_wrapped(f"{model.name}: {counts}"), *_wrapped(describe(plan.step))]
    lines += _section("held between steps", plan.held)
    lines += _section("in a step", [plan.gradients, *plan.activations])
    lines += _section("loss layer at its peak, with the gradient of the head", plan.heads)
    lines += ["", "peak of PyTorch's allocator", *(line for total in plan.totals for line in _total(plan, total))]
    lines += ["", *_verdict(plan)]
    if plan.changes:
        lines += ["", "changes that help, the best first", *(_change(plan, change) for change in plan.changes)]
    if plan.together and plan.memory is not None:
        changes = ", then ".join(change.about for change in plan.together)
        needed = plan.together[-1].bytes + CONTEXT
        title = "enough" if needed <= plan.memory else "not enough even"
        lines += ["", *_wrapped(f"{title} together: {changes}; {size(needed)}")]
    return "\n".join(lines)


def describe(step: Step) -> str:
    """Describe a step in one line."""
    unit = ("pair" if step.pairs else "row") + ("s" if step.batch > 1 else "")
    rows = f"{step.batch} {unit} of {step.length:,} tokens"
    prompt = f", of which {step.prompt:,} prompt" if step.prompt else ""
    hint = "" if step.tokens is not None or step.packed != step.padded else " (rows full; --tokens where they are not)"
    lora = f", LoRA r={step.lora_r}" if step.lora_r else ", all weights"
    accumulation = f", {step.accumulation} micro-batches a step" if step.accumulation > 1 else ""
    batch = f"{rows}{prompt}: {step.packed:,} packed tokens{hint}{accumulation}"
    return f"{step.method}{lora}, {step.dtype} weights, {batch}"


def _section(title: str, parts: list[Component]) -> list[str]:
    return ["", title, *(line for part in parts for line in _lines(part.name, part.bytes, part.formula))]


def _lines(name: str, number: int, text: str) -> list[str]:
    start = text_row(["", name, size(number), ""], [_INDENT, _NAME, -_SIZE, _GAP], gap="")
    return fold(text, start)


def _wrapped(text: str) -> list[str]:
    return fold(text, indent=_INDENT)


def _total(plan: Plan, total: Total) -> list[str]:
    has_checkpointing = plan.totals.index(total) % 2 == 0
    name = total.who if has_checkpointing else "  without checkpointing"
    parts = " + ".join(f"{name} {size(number)}" for name, number in total.moment.parts if number)
    return _lines(name, total.bytes, f"held {size(total.held)} + {total.moment.name}: {parts}")


def _verdict(plan: Plan) -> list[str]:
    needed = f"{size(plan.needed)} of a card, {size(CONTEXT)} for CUDA itself included"
    if plan.memory is None:
        return [f"needs {needed}; --memory 24GiB says what fits"]
    free = plan.memory - plan.needed
    if free >= 0:
        return _wrapped(f"fits on {size(plan.memory)}: yes, {size(free)} free; it needs {needed}")
    return _wrapped(f"fits on {size(plan.memory)}: no, {size(-free)} too little; it needs {needed}")


def _change(plan: Plan, change: Change) -> str:
    needed = change.bytes + CONTEXT
    fits = "" if plan.memory is None else ", fits" if needed <= plan.memory else ", does not fit"
    return f"{'':{_INDENT}}-{size(change.saved):<{_SIZE}} {change.about}: {size(needed)}{fits}"
