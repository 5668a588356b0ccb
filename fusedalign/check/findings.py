"""What to look at before a training: rows and settings that train, but hardly as they were meant to."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from fusedalign.check.rows import Row
from fusedalign.check.weightless import Sample
from fusedalign.commandline import one_line
from fusedalign.trl import lengths
from fusedalign.trl.refusals import unwrapped
from fusedalign.trl.train import tokenizer_of

#: Share of cut rows from which on they are a finding.
MANY_CUT = 0.05
#: Last trained tokens of an answer among which its end is expected: a template may close a turn with a line break.
_LAST = 4


def find(sample: Sample, rows: list[Row]) -> list[str]:
    """The findings, each as one sentence without its full stop."""
    trainer, count = sample.trainer, len(rows)
    ends = _ends(trainer)
    tokenizer, config = tokenizer_of(trainer), unwrapped(trainer, trainer.model).config.get_text_config()
    bos, vocabulary = tokenizer.bos_token_id, getattr(config, "vocab_size", None)
    positions = getattr(config, "max_position_embeddings", None)
    limit = f"max_length={getattr(trainer, 'max_length', None) or trainer.args.max_length}"

    def has_open_end(row: Row) -> bool:
        answers = [[x for x, trained in zip(s.ids, s.trained, strict=True) if trained] for s in row.whole]
        return any(answer and not ends & set(answer[-_LAST:]) for answer in answers)

    def begins_twice(row: Row) -> bool:
        return bos is not None and any(s.ids[:2] == [bos, bos] for s in row.whole)

    def exceeds(limit: int | None, measure: Callable[[list[int]], int]) -> Callable[[Row], bool]:
        return lambda row: limit is not None and any(s.ids and measure(s.ids) > limit for s in row.kept)

    claims: list[tuple[Callable[[Row], bool], str]] = [
        (lambda row: row.is_lost, f"lose all trained tokens of an answer to {limit}: raise it, or shorten the prompts"),
        (lambda row: any(s.targets == 0 for s in row.whole), "have an answer without a token to train on"),
        (_is_indifferent, "have equal chosen and rejected answers, from which nothing can be learned"),
        (has_open_end, f"do not end in {tokenizer.eos_token}: the model does not learn where to stop"),
        (begins_twice, f"begin with {tokenizer.bos_token} twice: the text and the tokenizer each add one"),
        (exceeds(positions, len), f"are longer than the {positions or 0:,} positions of the model"),
        (
            exceeds(None if vocabulary is None else vocabulary - 1, max),
            f"have tokens beyond the model's vocabulary of {vocabulary or 0:,}, with which the training fails",
        ),
    ]
    found = []
    cut = sum(row.is_cut for row in rows)
    if cut > MANY_CUT * count:
        found.append(f"{cut:,} of {count:,} rows are cut by {limit}")
    for holds, claim in claims:
        numbers = [number for number, row in enumerate(rows, 1) if holds(row)]
        if numbers:
            known = not sample.is_partial and not getattr(trainer.args, "shuffle_dataset", False)
            first = f" (the first is row {numbers[0]:,})" if known and count == sample.total else ""
            found.append(f"{len(numbers):,} of {count:,} rows {claim}{first}")
    copies = count - len(Counter(tuple((s.name, *s.ids) for s in row.whole) for row in rows))
    if copies:
        found.append(f"{copies:,} of {count:,} rows are copies of another row")
    if _trains_on_questions(sample, rows):
        found.append("questions are trained too, not only answers: assistant_only_loss: true leaves them out")
    labels = {s.name for row in rows for s in row.whole} & {"good answer", "bad answer"}
    if len(labels) == 1:
        found.append(f"all rows have a {labels.pop()}: KTO needs good and bad ones")
    return found


def _trains_on_questions(sample: Sample, rows: list[Row]) -> bool:
    """Whether all tokens of conversations are trained."""
    is_conversation = {"messages", "conversations"} & set(next(iter(sample.dataset)))
    return sample.method == "sft" and bool(is_conversation) and all(all(s.trained) for row in rows for s in row.whole)


def _is_indifferent(row: Row) -> bool:
    return len(row.whole) == 2 and row.whole[0].ids == row.whole[1].ids


def _ends(trainer: Any) -> set[int]:
    """Tokens that end an answer: the EOS, and those that a chat template closes a turn with."""
    tokenizer = tokenizer_of(trainer)
    special = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    return special | {i for i in [tokenizer.eos_token_id] if i is not None}


@contextlib.contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """Collect what libraries warn of in logs, instead of printing it; each text once.

    What `check_lengths` warns of is left out: `find` counts it for each answer.
    """
    texts: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = one_line(record.getMessage()).removeprefix("[RANK 0] ")
            if text not in texts and record.name != lengths.__name__:
                texts.append(text)

    known = [x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger) and x.handlers]
    loggers = [logging.root, *known]
    handlers = [logger.handlers for logger in loggers]
    for logger in loggers:
        logger.handlers = [Recorder(logging.WARNING)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield texts
    finally:
        for logger, previous in zip(loggers, handlers, strict=True):
            logger.handlers = previous
