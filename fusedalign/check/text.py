"""The text of a check, in lines of at most 100 characters."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from fusedalign.check.batches import Slots
from fusedalign.check.memory import Memory
from fusedalign.check.rows import Row
from fusedalign.check.tokens import Style, render_tokens
from fusedalign.check.weightless import Sample
from fusedalign.commandline import fold, wrapped_table
from fusedalign.plan.sizes import CONTEXT
from fusedalign.plan.table import describe, size
from fusedalign.reports import text_table
from fusedalign.trl.train import tokenizer_of

_BAR, _BINS = 16, 10
_INDENT = "  "


class Check(NamedTuple):
    """What a check has found."""

    sample: Sample
    rows: list[Row]
    slots: list[Slots]
    memory: Memory | str
    """or why there is no plan"""
    decisions: list[tuple[str, str]]
    findings: list[str]


def render(check: Check, style: Style) -> str:
    """The text of a check."""
    sections = {
        f"what the model will see; {style.legend}": _shown_rows(check, style),
        "lengths in tokens": _histogram(check.rows),
        "truncation": _wrapped(_truncation(check)),
        "batches": _wrapped(_batches(check)),
        "memory of a step on one GPU": _memory(check),
        "what was decided": wrapped_table(check.decisions, indent=len(_INDENT)),
        "what to look at": [line for text in check.findings for line in _wrapped(text, "- ")] or [f"{_INDENT}nothing"],
    }
    parts = [_title(check), *("\n".join([title, *lines]) for title, lines in sections.items())]
    return "\n\n".join(parts)


def _title(check: Check) -> str:
    sample = check.sample
    script = sample.arguments.script
    name = script.dataset_name or "datasets"
    count = f"{sample.total:,} rows" if sample.total is not None else "a stream"
    text = f"{sample.method}: {count} of {name}, split {script.dataset_train_split}; no weights were loaded"
    if not sample.is_partial and len(check.rows) > (sample.total or 0):
        text += f"; {len(check.rows):,} with each pair as two rows"
    if sample.is_partial:
        which = "its first" if sample.total is None else "a random sample of"
        text += f"; what follows is of {which} {len(check.rows):,} rows"
    return "\n".join(fold(text))


def _shown_rows(check: Check, style: Style) -> list[str]:
    """The first rows and the longest one, three in all."""
    longest = max(range(len(check.rows)), key=lambda i: max(len(s.ids) for s in check.rows[i].whole))
    lines: list[str] = []
    tokenizer = tokenizer_of(check.sample.trainer)
    for number in sorted(list(dict.fromkeys([longest, *range(len(check.rows))]))[:3]):
        lines += [
            *([""] if lines else []),
            *_shown_row(check.rows[number], number, number == longest, tokenizer, style),
        ]
    return lines


def _shown_row(row: Row, number: int, is_longest: bool, tokenizer: Any, style: Style) -> list[str]:
    lines, first = [], row.kept[0]
    for i, (kept, whole) in enumerate(zip(row.kept, row.whole, strict=True)):
        name = f"row {number + 1:,}" + (f", {whole.name}" if whole.name != "row" else "")
        cut = f", cut from {len(whole.ids):,}" if len(kept.ids) < len(whole.ids) else ""
        longest = ", the longest row" if is_longest and i == 0 else ""
        lines.append(f"{name}: {len(kept.ids):,} tokens{cut}, {sum(kept.trained):,} of them trained{longest}")
        skip = first.prompt if i and kept.prompt and first.ids[: first.prompt] == kept.ids[: kept.prompt] else 0
        inner = style._replace(width=style.width - len(_INDENT))
        lines += [_INDENT + line for line in render_tokens(kept, whole, tokenizer, inner, skip)]
    return lines


def lengths(rows: list[Row]) -> dict[str, list[int]]:
    """Numbers of tokens before truncation, by what they are of."""
    if len(rows[0].whole) == 2:
        answers = {
            whole.name: [len(row.whole[i].ids) - row.whole[i].prompt for row in rows]
            for i, whole in enumerate(rows[0].whole)
        }
        return {"prompt": [row.whole[0].prompt for row in rows], **answers}
    whole = [row.whole[0] for row in rows]
    trained = [sum(s.trained) for s in whole]
    totals = [len(s.ids) for s in whole]
    if totals == trained:
        return {"row": totals}
    others = [a - b for a, b in zip(totals, trained, strict=True)]
    names = ("prompt", "answer") if others == [s.prompt for s in whole] else ("not trained", "trained")
    return {"row": totals, names[0]: others, names[1]: trained}


def _histogram(rows: list[Row]) -> list[str]:
    columns = lengths(rows)
    step = _step(max(map(max, columns.values())))
    counts = {name: [0] * _BINS for name in columns}
    for name, values in columns.items():
        for value in values:
            counts[name][value // step] += 1
    used = 1 + max(i for column in counts.values() for i, count in enumerate(column) if count)
    table = [["tokens", *columns]]
    for i in range(used):
        table.append([f"{i * step:,} - {(i + 1) * step - 1:,}", *(_bar(column, i) for column in counts.values())])
    table.append(["median", *(f"{statistics.median(values):,.0f}" for values in columns.values())])
    table.append(["longest", *(f"{max(values):,}" for values in columns.values())])
    return [_INDENT + line for line in text_table([[f"{cell:<{_BAR + 8}}" for cell in row] for row in table])]


def _bar(column: list[int], i: int) -> str:
    count, largest = column[i], max(column)
    return f"{'#' * -(-count * _BAR // largest)} {count:,}" if count else ""


def _step(longest: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... with which at most `_BINS` bins hold all lengths."""
    return next(n * 10**k for k in range(12) for n in (1, 2, 5) if longest // (n * 10**k) < _BINS)


def _truncation(check: Check) -> str:
    trainer, rows = check.sample.trainer, check.rows
    limit = getattr(trainer, "max_length", None) or trainer.args.max_length
    if getattr(trainer.args, "packing", False):
        return f"TRL packs rows to {limit:,} tokens, {trainer.args.packing_strategy}: its strategy decides what is cut"
    if limit is None:
        return "none: max_length is not set"
    tokens = sum(len(s.ids) for row in rows for s in row.whole)
    cut = tokens - sum(len(s.ids) for row in rows for s in row.kept)
    longest = max(len(s.ids) for row in rows for s in row.whole)
    if not cut:
        return f"none: max_length is {limit:,}, the longest sequence has {longest:,} tokens"
    count = sum(row.is_cut for row in rows)
    lost, shortened = sum(row.is_lost for row in rows), sum(row.is_shortened for row in rows)
    mode = getattr(trainer.args, "truncation_mode", "keep_start")
    return (
        f"max_length {limit:,} ({mode}) cuts {count:,} of {len(rows):,} rows ({count / len(rows):.1%}), "
        f"{cut:,} of {tokens:,} tokens ({cut / tokens:.1%}): "
        f"{lost:,} lose all of an answer, {shortened:,} a part of one"
    )


def _batches(check: Check) -> str:
    slots, args = check.slots, check.sample.trainer.args
    if not slots:
        return "none"
    unit = "pairs" if check.sample.trainer.layouts.groups > 1 else "rows"
    padded, tokens = sum(x.padded for x in slots), sum(x.tokens for x in slots)
    text = (
        f"the first {len(slots):,} of {args.per_device_train_batch_size} {unit}, with seed {args.seed}: "
        f"{padded:,} slots padded, {1 - tokens / max(1, padded):.0%} of them padding"
    )
    packed = [x.packed for x in slots if x.packed is not None]
    if len(packed) < len(slots):
        return f"{text}; they cannot be packed"
    shared = sum(x.shared for x in slots)
    prompts = f", prompts that rows share computed once ({shared:,} tokens less)" if shared else ""
    saving = 1 - sum(packed) / max(1, padded)
    return f"{text}; {sum(packed):,} packed on a GPU, {abs(saving):.0%} {'fewer' if saving >= 0 else 'more'}{prompts}"


def _memory(check: Check) -> list[str]:
    memory = check.memory
    if isinstance(memory, str):
        return _wrapped(f"not planned: {memory}")
    lines = _wrapped(f"the largest of these batches: {describe(memory.step)}")
    table = [["", "peak", "held between steps", "without checkpointing" if memory.step.checkpointing else "with it"]]
    for name, (on, off) in {"fusedalign": memory.totals[:2], "stock TRL": memory.totals[2:]}.items():
        used, other = (on, off) if memory.step.checkpointing else (off, on)
        table.append([name, size(used.bytes), size(used.held), size(other.bytes)])
    if not memory.step.checkpointing:
        table[0][3] = "with gradient checkpointing"
    lines += [_INDENT + line for line in text_table(table)]
    fits = ""
    if memory.card is not None:
        fits = f"; the card here has {size(memory.card)}: {'enough' if memory.needed <= memory.card else 'too little'}"
    lines += _wrapped(f"needs {size(memory.needed)} of a card, {size(CONTEXT)} for CUDA itself included{fits}")
    return lines + [line for note in memory.notes for line in _wrapped(note)]


def _wrapped(text: str, mark: str = "") -> list[str]:
    return fold(text, _INDENT + mark)
