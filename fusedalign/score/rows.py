"""Rows of a data set as examples to score: tokens, masks and truncation are those of TRL's trainers.

What counts in a row:

| columns | tokens of | that count | a row longer than max_length |
|---|---|---|---|
| chosen, rejected; perhaps prompt | `DPOTrainer` | both answers | cut as there |
| prompt, completion | `SFTTrainer` | the completion | cut as there |
| messages, or conversations | `SFTTrainer` | all, or the assistant's (assistant_only_loss) | cut as there |
| text | `SFTTrainer`, so its EOS too | all | windows |
| input_ids alone | the row | all | windows |
| input_ids with labels, completion_mask or assistant_masks | the row | as `SFTTrainer` masks them | cut as there |

Nothing predicts the first token, so it never counts; where the tokenizer puts a BOS first, that is the BOS. The bytes
of a text are all of its bytes, those of its first token too; the EOS adds none.

Windows hold max_length tokens and advance by `stride`. Each token counts once, in the first window that holds it, with
max_length - stride tokens or more before it but at the start of the text. (The same as "Perplexity of fixed-length
models" in the documentation of transformers.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusedalign.score.records import Answer, Example, RefusedRow, Window

if TYPE_CHECKING:
    from fusedalign.trl.encoding import PairEncoder, TextEncoder

IGNORED = -100
TRUNCATION_MODES = ("keep_start", "keep_end")


@dataclass(frozen=True)
class RowOptions:
    """How rows become tokens; what is not said here is as in TRL's configurations.

    Raises:
        ValueError: a value out of its range.
    """

    max_length: int | None = None
    """tokens of a sequence; None: rows are not cut"""
    truncation_mode: str = "keep_start"
    """what is kept of longer ones, or "keep_end"; not for text, see `stride`"""
    stride: int | None = None
    """for text and tokens that are longer: tokens from a window to the next; None: half of max_length"""
    completion_only_loss: bool | None = None
    """TRL's completion_only_loss, for prompts with completions; None: they count alone"""
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

    Rows are tokenised when they are asked for, quietly and without caches; the same rows give the same examples.

    Args:
        dataset: a `datasets.Dataset`, or a sequence of mappings.
        tokenizer: of transformers; a processor for rows of text alone.
        options: see `RowOptions`.

    Raises:
        TypeError: a data set without a length.
        ValueError: no rows; columns of no kind; options that its kind does not have; a tokenizer without the EOS or the
            chat template that its rows need.
    """

    def __init__(self, dataset: Any, tokenizer: Any, options: RowOptions) -> None:
        self.options, self.tokenizer = options, tokenizer
        columns = _columns(dataset)
        self.kind, self.fields = _kind(columns, options.dataset_text_field)
        """kind: "preference", "completion", "conversation" or "text" (tokens count as text)"""
        _check_options(self.kind, self.fields, options)
        self.dataset: Any = _readable(dataset, [name for name in (*self.fields, *_RENDERING) if name in columns])
        """the columns that are read"""
        self._vocabulary = len(getattr(tokenizer, "tokenizer", tokenizer))
        self._is_tokens = self.fields[0] == "input_ids"
        self._has_windows = self.kind == "text" and len(self.fields) == 1  # else masks say what counts
        self._check_tokenizer()
        self._pairs, self._texts = self._encoders()

    def __len__(self) -> int:
        return len(self.dataset)

    def examples(self, start: int, stop: int) -> tuple[list[Example], list[RefusedRow]]:
        """The rows from `start` to before `stop`, each either an example or refused."""
        examples, refused = [], []
        for number, row in enumerate(_read(self.dataset, start, stop), start):
            try:
                examples.append(Example(number, self._answers(row)))
            except MemoryError:
                raise
            except Exception as error:  # whatever a template, a tokenizer or TRL makes of such a row
                refused.append(RefusedRow(number, _reason(error)))
        return examples, refused

    def _answers(self, row: Any) -> tuple[Answer, ...]:
        if not isinstance(row, Mapping):
            raise ValueError(f"a row must be a mapping from columns to values, got {type(row).__name__}")
        needed = [name for name in self.fields if name != "prompt" or self.kind != "preference"]
        if not set(needed) <= row.keys():
            raise ValueError(f"a row must have the columns {', '.join(needed)}, got {', '.join(row) or 'none'}")
        if self._is_tokens:
            return (self._single(_checked_tokens(row, self.fields, self._vocabulary)),)
        shaped = self._shaped(row)
        return self._pair(shaped) if self.kind == "preference" else (self._single(shaped),)

    def _shaped(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row as TRL's trainer takes it, as the commands and the Fused trainers shape it."""
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
                raise ValueError(f"{name} must not be empty, got {_short(shaped[name])}")
        return {name: row[name] for name in _RENDERING if row.get(name) is not None} | shaped

    def _pair(self, row: dict[str, Any]) -> tuple[Answer, ...]:
        encoded = self._pairs.whole(row)
        prompt = len(encoded["prompt_ids"])
        answers = []
        for name, (input_ids, labels) in zip(("chosen", "rejected"), self._pairs.cut(encoded), strict=True):
            whole = [IGNORED] * prompt + encoded[f"{name}_ids"]
            answers.append(Answer(name, (self._window(name, input_ids, labels, whole),)))
        return tuple(answers)

    def _single(self, row: dict[str, Any]) -> Answer:
        field = "completion" if self.kind == "completion" else self.fields[0]
        name = "completion" if self.kind in ("completion", "conversation") else "text"
        input_ids, labels = self._texts.whole(row)
        if not self._has_windows:
            cut, limit = (input_ids, labels), self.options.max_length
            if limit is not None and len(input_ids) > limit:
                cut = self._texts.cut(input_ids, labels) or ([], [])
            return Answer(name, (self._window(field, *cut, labels),))
        parts = windows(input_ids, self.options.max_length, self.options.stride)
        if not parts:
            raise ValueError(f"{field} must have a token after the first, which nothing predicts, got {len(input_ids)}")
        return Answer(name, parts, None if self._is_tokens else len(row[field].encode()))

    def _window(self, field: str, input_ids: list[int], labels: list[int], whole: list[int]) -> Window:
        """The tokens with their labels, none at the first; `whole`: the labels before the row was cut."""
        labels = [IGNORED, *labels[1:]]
        if any(label != IGNORED for label in labels):
            return Window(input_ids, labels)
        counting = [i for i, label in enumerate(whole) if label != IGNORED and i]
        if not counting:
            raise ValueError(f"{field} must have a token to score after the first of the row, got none")
        raise ValueError(
            f"max_length={self.options.max_length} must leave a token of {field} to score, got them at "
            f"{counting[0] + 1} to {counting[-1] + 1} of {len(whole)} tokens"
        )

    def _check_tokenizer(self) -> None:
        """Before rows are read: what each of them would be refused for. The first one tells text from messages."""
        from fusedalign.trl.models import check_ends, check_has_template

        if self._is_tokens:
            return
        path = getattr(self.tokenizer, "name_or_path", "") or "the model"
        first = next(iter(_read(self.dataset, 0, 1)))
        values = [first.get(name) for name in self.fields] if isinstance(first, Mapping) else []
        if self.kind == "conversation" or any(isinstance(x, list) for x in values):
            check_has_template(self.tokenizer, path)
        else:
            check_ends(self.tokenizer, path, pads=False, ends=True)

    def _encoders(self) -> tuple[PairEncoder, TextEncoder]:
        from fusedalign.trl.encoding import PairEncoder, TextEncoder

        options = self.options
        cut: Any = {"max_length": options.max_length, "truncation_mode": options.truncation_mode}
        return PairEncoder(self.tokenizer, **cut), TextEncoder(
            self.tokenizer,
            **cut,
            completion_only_loss=options.completion_only_loss,
            assistant_only_loss=options.assistant_only_loss,
            text_field=options.dataset_text_field,
        )


def windows(input_ids: Sequence[int], max_length: int | None, stride: int | None = None) -> tuple[Window, ...]:
    """Tokens in windows, in which each but the first of all counts once.

    Args:
        input_ids: of a text.
        max_length: tokens of a window; None: one window.
        stride: tokens from the start of a window to that of the next, less than max_length; None: half of max_length.

    Returns:
        No window where no token counts.
    """
    n, ids = len(input_ids), list(input_ids)
    width = n if max_length is None else max_length
    stride = max(width // 2, 1) if stride is None else stride
    parts, done = [], 1
    for start in range(0, n, stride):
        if done >= n:
            break
        stop = min(start + width, n)
        parts.append(Window(ids[start:stop], [IGNORED] * (done - start) + ids[done:stop]))
        done = stop
    return tuple(parts)


#: The columns that hold what counts, but for text.
_ANSWERS = ("chosen", "rejected", "completion", "messages")
#: Columns that change how a chat template is rendered.
_RENDERING = ("tools", "chat_template_kwargs")
#: Columns that tell which of the row's own tokens count.
_MASKS = ("labels", "completion_mask", "assistant_masks")


def _kind(columns: Sequence[str], text_field: str) -> tuple[str, tuple[str, ...]]:
    """The kind of a data set and the columns that are read of it; the first that fits."""
    choices: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("preference", ("chosen", "rejected")),
        ("text", ("input_ids",)),
        ("completion", ("prompt", "completion")),
        ("conversation", ("messages",)),
        ("conversation", ("conversations",)),
        ("text", (text_field,)),
    )
    for kind, fields in choices:
        if set(fields) <= set(columns):
            if kind == "preference" and "prompt" in columns:
                fields = ("prompt", *fields)
            if fields == ("input_ids",):
                fields += tuple(name for name in _MASKS if name in columns)
            if "image" in columns or "images" in columns:
                raise ValueError("the data set must be of text alone, got a column of images")
            return kind, fields
    expected = " or ".join("+".join(fields) for _, fields in choices)
    raise ValueError(f"the data set must have the columns {expected}, got {', '.join(columns) or 'none'}")


def _check_options(kind: str, fields: tuple[str, ...], options: RowOptions) -> None:
    """Raises ValueError for an option that a data set of this kind does not have."""
    what = "a data set with the columns " + ", ".join(fields)
    if options.stride is not None and kind != "text":
        raise ValueError(f"stride is for plain text, whose windows it sets, got {what}")
    if options.assistant_only_loss and kind in ("preference", "text"):
        raise ValueError(f"assistant_only_loss needs messages, or a prompt with a completion, got {what}")
    if options.completion_only_loss is not None and kind != "completion":
        raise ValueError(f"completion_only_loss needs the columns prompt, completion, got {what}")


def _columns(dataset: Any) -> list[str]:
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"the data set must have a length (datasets.Dataset, or a sequence of rows), got {type(dataset).__name__}"
        )
    if not len(dataset):
        raise ValueError("the data set must have at least one row, got none")
    if hasattr(dataset, "column_names"):
        return list(dataset.column_names)
    return list({name: None for row in dataset if isinstance(row, Mapping) for name in row})


def _readable(dataset: Any, names: list[str]) -> Any:
    """The data set with these columns, as Python's own values."""
    if not hasattr(dataset, "select_columns"):
        return dataset
    if dataset.format["type"] == "custom":
        raise ValueError("the data set must be one without a transform, which could differ each time, got one with")
    return dataset.select_columns(names).with_format(None)


def _read(dataset: Any, start: int, stop: int) -> Iterator[Any]:
    part = dataset[start:stop]
    if not isinstance(part, Mapping):
        yield from part
        return
    yield from (dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True))


def _checked_tokens(row: Mapping[str, Any], fields: Sequence[str], vocabulary: int) -> dict[str, list[int]]:
    """The row's own tokens and masks as lists of ints.

    Raises:
        ValueError: other values, tokens that the tokenizer does not have, lengths that differ.
    """
    tokens = {}
    for name in fields:
        found = row[name].tolist() if hasattr(row[name], "tolist") else row[name]
        if not isinstance(found, (list, tuple)) or not all(type(x) is int for x in found):
            raise ValueError(f"{name} must be a list of integers, got {_short(found)}")
        if len(found) != len(row["input_ids"]):
            raise ValueError(f"{name} must be as long as input_ids ({len(row['input_ids'])}), got {len(found)}")
        least = IGNORED if name == "labels" else 0
        outside = [x for x in found if not 0 <= x < vocabulary and not x == IGNORED == least]
        if outside:
            raise ValueError(f"{name} must be tokens from 0 to {vocabulary - 1}, got {outside[0]}")
        tokens[name] = list(found)
    return tokens


def _is_empty(found: Any) -> bool:
    """Whether text is, or messages have nothing but their roles."""
    if isinstance(found, str):
        return not found
    return not any(x for message in found for name, x in message.items() if name != "role")


def _reason(error: Exception) -> str:
    """Why a row was refused, in one line."""
    from jinja2 import TemplateError

    text = " ".join(str(error).split())
    if isinstance(error, TemplateError):
        text = f"the chat template must render the row, got its error: {text}"
    elif not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else text[:297] + "..."


def reason_kind(reason: str) -> str:
    """A reason without what is the row's own in it, so that rows can be counted by it."""
    return re.sub(r"\[\d+\]", "[...]", reason.partition(", got ")[0])


def _short(found: Any) -> str:
    shown = repr(found)
    return shown if len(shown) <= 80 else shown[:77] + "..."
