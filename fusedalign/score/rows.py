"""Rows of a data set as examples to score, with the tokens, masks and truncation of TRL's trainers.

Which tokens of a row are scored:

| columns | tokenized as by | scored | a row longer than max_length |
|---|---|---|---|
| chosen, rejected; optionally prompt | `DPOTrainer` | both answers | truncated as there |
| prompt, completion | `SFTTrainer` | the completion | truncated as there |
| messages, or conversations | `SFTTrainer` | all, or the assistant's (assistant_only_loss) | truncated as there |
| text | `SFTTrainer`, with its EOS | all | windows |
| input_ids only | | all | windows |
| input_ids with labels, completion_mask or assistant_masks | | as `SFTTrainer` masks them | truncated as there |

The first token (a BOS if the tokenizer adds one) has no prediction, so it is never scored. The bytes of a text include
those of its first token; the EOS adds none.

Windows have max_length tokens and advance by `stride`. Each token is scored once, in the first window that contains it,
with at least max_length - stride tokens before it except at the start of the text, as in "Perplexity of fixed-length
models" in the documentation of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusedalign.commandline import one_line
from fusedalign.score.dataset import column_names, find_kind, read_rows, read_tokens, select_columns, shorten
from fusedalign.score.records import IGNORED, Answer, Example, RefusedRow, Window

if TYPE_CHECKING:
    from fusedalign.trl.encoding import PairEncoder, TextEncoder

TRUNCATION_MODES = ("keep_start", "keep_end")
#: Columns with scored text, apart from that of plain text.
_ANSWERS = ("chosen", "rejected", "completion", "messages")
#: Columns that change how a chat template is rendered.
_RENDERING = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class RowOptions:
    """How rows become tokens; the defaults are those of TRL's configurations.

    Raises:
        ValueError: a value out of range.
    """

    max_length: int | None = None
    """tokens per sequence; None: rows are not truncated"""
    truncation_mode: str = "keep_start"
    """"keep_start" or "keep_end" of longer rows; text has windows instead, see `stride`"""
    stride: int | None = None
    """tokens between the starts of windows of text longer than max_length; None: half of max_length"""
    completion_only_loss: bool | None = None
    """TRL's completion_only_loss, for prompts with completions; None: only completions are scored"""
    assistant_only_loss: bool = False
    """TRL's assistant_only_loss, for conversations"""
    dataset_text_field: str = "text"
    """the column of plain text"""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length must be 2 or more, since nothing predicts a first token, got {self.max_length}"
            )
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(f"truncation_mode must be {' or '.join(TRUNCATION_MODES)}, got {self.truncation_mode!r}")
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"stride must be 1 or more, got {self.stride}")
        if self.stride is not None and self.max_length is not None and self.stride >= self.max_length:
            raise ValueError(
                f"stride must be less than max_length={self.max_length}, so that each token has one before it, got "
                f"{self.stride}"
            )


class Rows:
    """A data set as examples (`records.Source`).

    Rows are tokenized on demand, without progress bars and caches; the same rows give the same examples.

    Args:
        dataset: a `datasets.Dataset`, or a sequence of mappings.
        tokenizer: of transformers; a processor too if rows have text only.
        options: see `RowOptions`.

    Raises:
        TypeError: the data set has no length.
        ValueError: no rows; unknown columns; an option that this kind of rows does not have; the tokenizer lacks the
            EOS or the chat template that the rows need.
    """

    def __init__(self, dataset: Any, tokenizer: Any, options: RowOptions) -> None:
        self.options, self.tokenizer = options, tokenizer
        columns = column_names(dataset)
        self.kind, self.fields = find_kind(columns, options.dataset_text_field)
        """kind: "preference", "completion", "conversation" or "text" (tokens count as text)"""
        _check_options(self.kind, self.fields, options)
        self.dataset: Any = select_columns(dataset, [name for name in (*self.fields, *_RENDERING) if name in columns])
        """the columns that are read"""
        self._vocabulary = len(getattr(tokenizer, "tokenizer", tokenizer))
        self._is_tokens = self.fields[0] == "input_ids"
        self._has_windows = self.kind == "text" and len(self.fields) == 1  # else masks select the scored tokens
        self._check_tokenizer()
        self._pairs, self._texts = self._encoders()

    def __len__(self) -> int:
        return len(self.dataset)

    def examples(self, start: int, stop: int) -> tuple[list[Example], list[RefusedRow]]:
        """The rows from `start` up to, but not including, `stop`: each is an example or refused."""
        examples, refused = [], []
        for number, row in enumerate(read_rows(self.dataset, start, stop), start):
            try:
                examples.append(Example(number, self._answers(row)))
            except MemoryError:
                raise
            except Exception as error:  # a template, a tokenizer or TRL may raise anything
                refused.append(RefusedRow(number, _reason(error)))
        return examples, refused

    def _answers(self, row: Any) -> tuple[Answer, ...]:
        if not isinstance(row, Mapping):
            raise ValueError(f"a row must be a mapping from columns to values, got {type(row).__name__}")
        needed = [name for name in self.fields if name != "prompt" or self.kind != "preference"]
        if not set(needed) <= row.keys():
            raise ValueError(f"a row must have the columns {', '.join(needed)}, got {', '.join(row) or 'none'}")
        if self._is_tokens:
            return (self._single(read_tokens(row, self.fields, self._vocabulary)),)
        shaped = self._shaped(row)
        return self._pair(shaped) if self.kind == "preference" else (self._single(shaped),)

    def _shaped(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row in the form of TRL's trainer, converted as in the training commands and the Fused trainers."""
        from fusedalign.trl import shapes

        shape = {
            "preference": shapes.preference,
            "completion": shapes.prompt_completion,
            "conversation": shapes.conversation,
            "text": shapes.text,
        }[self.kind]
        shaped = shape({name: row[name] for name in self.fields if name in row})
        is_chat = any(isinstance(x, list) for x in shaped.values())
        if is_chat and not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("the tokenizer must have a chat template for rows with messages, got none")
        if self.options.assistant_only_loss and not is_chat:
            raise ValueError("rows must hold messages for assistant_only_loss, got text")
        for name in (*_ANSWERS, self.options.dataset_text_field):
            if name in shaped and _is_empty(shaped[name]):
                raise ValueError(f"{name} must not be empty, got {shorten(shaped[name])}")
        return {name: row[name] for name in _RENDERING if row.get(name) is not None} | shaped

    def _pair(self, row: dict[str, Any]) -> tuple[Answer, ...]:
        """The two answers of a preference row."""
        encoded = self._pairs.whole(row)
        prompt = len(encoded["prompt_ids"])
        answers = []
        for name, (input_ids, labels) in zip(("chosen", "rejected"), self._pairs.cut(encoded), strict=True):
            all_labels = [IGNORED] * prompt + encoded[f"{name}_ids"]
            answers.append(Answer(name, (self._window(name, input_ids, labels, all_labels),)))
        return tuple(answers)

    def _single(self, row: dict[str, Any]) -> Answer:
        """The only answer of a row of another kind."""
        field = "completion" if self.kind == "completion" else self.fields[0]
        name = "completion" if self.kind in ("completion", "conversation") else "text"
        input_ids, labels = self._texts.whole(row)
        if not self._has_windows:
            truncated, limit = (input_ids, labels), self.options.max_length
            if limit is not None and len(input_ids) > limit:
                truncated = self._texts.cut(input_ids, labels) or ([], [])
            return Answer(name, (self._window(field, *truncated, labels),))
        text_windows = windows(input_ids, self.options.max_length, self.options.stride)
        if not text_windows:
            raise ValueError(f"{field} must have a token after the first, which nothing predicts, got {len(input_ids)}")
        return Answer(name, text_windows, None if self._is_tokens else len(row[field].encode()))

    def _window(self, field: str, input_ids: list[int], labels: list[int], all_labels: list[int]) -> Window:
        """A window of a truncated row, without a label at the first token; `all_labels` are those before truncation."""
        labels = [IGNORED, *labels[1:]]
        if any(label != IGNORED for label in labels):
            return Window(input_ids, labels)
        scored = [i for i, label in enumerate(all_labels) if label != IGNORED and i]
        if not scored:
            raise ValueError(f"{field} must have a token to score after the first of the row, got none")
        raise ValueError(
            f"max_length={self.options.max_length} must leave a token of {field} to score, got them at "
            f"{scored[0] + 1} to {scored[-1] + 1} of {len(all_labels)} tokens"
        )

    def _check_tokenizer(self) -> None:
        """Raise for a missing EOS or chat template; which of them is needed depends on the first row."""
        from fusedalign.trl.models import check_ends, check_has_template

        if self._is_tokens:
            return
        path = getattr(self.tokenizer, "name_or_path", "") or "the model"
        first = next(iter(read_rows(self.dataset, 0, 1)))
        values = [first.get(name) for name in self.fields] if isinstance(first, Mapping) else []
        if self.kind == "conversation" or any(isinstance(x, list) for x in values):
            check_has_template(self.tokenizer, path)
        else:
            check_ends(self.tokenizer, path, pads=False, ends=True)

    def _encoders(self) -> tuple[PairEncoder, TextEncoder]:
        from fusedalign.trl.encoding import PairEncoder, TextEncoder

        options = self.options
        truncation: Any = {"max_length": options.max_length, "truncation_mode": options.truncation_mode}
        return PairEncoder(self.tokenizer, **truncation), TextEncoder(
            self.tokenizer,
            **truncation,
            completion_only_loss=options.completion_only_loss,
            assistant_only_loss=options.assistant_only_loss,
            text_field=options.dataset_text_field,
        )


def windows(input_ids: Sequence[int], max_length: int | None, stride: int | None = None) -> tuple[Window, ...]:
    """Split a text into windows in which each token but the first one of the text is scored once.

    Args:
        input_ids: the tokens of the text.
        max_length: tokens per window; None: one window.
        stride: tokens between the starts of windows, less than max_length; None: half of max_length.

    Returns:
        The windows; none if no token can be scored.
    """
    n, ids = len(input_ids), list(input_ids)
    width = n if max_length is None else max_length
    stride = max(width // 2, 1) if stride is None else stride
    result, scored = [], 1  # tokens up to `scored` have their window
    for start in range(0, n, stride):
        if scored >= n:
            break
        stop = min(start + width, n)
        result.append(Window(ids[start:stop], [IGNORED] * (scored - start) + ids[scored:stop]))
        scored = stop
    return tuple(result)


def _check_options(kind: str, fields: tuple[str, ...], options: RowOptions) -> None:
    """Raise ValueError for an option that this kind of rows does not have."""
    actual = "a data set with the columns " + ", ".join(fields)
    if options.stride is not None and kind != "text":
        raise ValueError(f"stride is for plain text, whose windows it sets, got {actual}")
    if options.assistant_only_loss and kind in ("preference", "text"):
        raise ValueError(f"assistant_only_loss needs messages, or a prompt with a completion, got {actual}")
    if options.completion_only_loss is not None and kind != "completion":
        raise ValueError(f"completion_only_loss needs the columns prompt, completion, got {actual}")


def _is_empty(value: Any) -> bool:
    """Whether a text is empty, or messages have only roles."""
    if isinstance(value, str):
        return not value
    return not any(x for message in value for name, x in message.items() if name != "role")


def _reason(error: Exception) -> str:
    """Why a row is refused, in one line."""
    from jinja2 import TemplateError

    text = one_line(error)
    if isinstance(error, TemplateError):
        text = f"the chat template must render the row, got its error: {text}"
    elif not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}"
    return one_line(text, 300)


def reason_kind(reason: str) -> str:
    """A reason without the details of its row, so that rows can be counted by reason."""
    return re.sub(r"\[\d+\]", "[...]", reason.partition(", got ")[0])
