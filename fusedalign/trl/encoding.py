"""Single rows, tokenised, masked and truncated by TRL's own trainers, without a model and without a data set's caches.

Uses `_prepare_dataset` of `SFTTrainer` and `DPOTrainer`, with what these read of the trainer and its configuration
(`_Encoder`), and `DataCollatorForPreference`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import trl
from transformers import tokenization_utils_base

from fusedalign.trl import stock
from fusedalign.trl.construction import replaced
from fusedalign.trl.shapes import Row
from fusedalign.trl.tokens import one_end


class OneRow:
    """A data set of at most one row, with the methods that TRL's `_prepare_dataset` calls."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    @property
    def column_names(self) -> list[str] | None:
        """The names of the row's fields."""
        return [*self.rows[0]] if self.rows else None

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def map(
        self,
        function: Callable[..., Row],
        fn_kwargs: dict[str, Any] | None = None,
        remove_columns: str | list[str] | None = None,
        **_: Any,
    ) -> OneRow:
        """The row updated by the function's result, as in `datasets`."""
        removed = {remove_columns} if isinstance(remove_columns, str) else set(remove_columns or ())
        results = [function(dict(row), **(fn_kwargs or {})) for row in self.rows]
        others = [{name: x for name, x in row.items() if name not in removed} for row in self.rows]
        return OneRow([row | result for row, result in zip(others, results, strict=True)])

    def filter(self, function: Callable[[Row], bool], **_: Any) -> OneRow:
        """The row if the function accepts it, else no row."""
        return OneRow([row for row in self.rows if function(row)])


class _SilentLogger:
    """A logger that discards messages, which TRL would otherwise repeat for each row."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: None


class _Encoder:
    """Base of the encoders: a trainer that is never constructed, with the attributes that `_prepare_dataset` reads."""

    def __init__(self, trainer: Any, config: Any, processing_class: Any, **options: Any) -> None:
        self.processing_class = one_end(processing_class)
        self.trainer = stock.trainer_without_model(trainer, processing_class)
        self.options = {field.name: _default(field) for field in dataclasses.fields(config)} | options

    def _prepared(self, row: Row, *rest: Any, max_length: int | None) -> Row | None:
        """The row as the trainer prepares it; None if it drops the row."""
        trainer = self.trainer
        arguments = SimpleNamespace(**self.options | {"max_length": max_length})
        module = sys.modules[type(trainer).__module__]
        silent = _SilentLogger()
        with (
            replaced(module, **stock.row_replacements(silent)),
            replaced(tokenization_utils_base, logger=silent),  # it warns of each row longer than the model takes
        ):
            rows = list(trainer._prepare_dataset(OneRow([row]), self.processing_class, arguments, *rest, "train"))
        return rows[0] if rows else None


class PairEncoder(_Encoder):
    """Encodes preference pairs as `DPOTrainer` does: `prompt`, `chosen`, `rejected`, all text or all messages."""

    def __init__(self, processing_class: Any, *, max_length: int | None, truncation_mode: str) -> None:
        super().__init__(trl.DPOTrainer, trl.DPOConfig, processing_class)
        self.collate = stock.DataCollatorForPreference(
            pad_token_id=0, max_length=max_length, truncation_mode=truncation_mode
        )

    def whole(self, row: Row) -> dict[str, list[int]]:
        """`prompt_ids`, `chosen_ids` and `rejected_ids`, before truncation."""
        encoded = self._prepared(row, max_length=None)
        assert encoded is not None
        return {name: encoded[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}

    def cut(self, encoded: dict[str, list[int]]) -> list[tuple[list[int], list[int]]]:
        """Tokens and labels of chosen and rejected, truncated by the collator; the label of the prompt is -100."""
        batch = {name: x.long() for name, x in self.collate([encoded]).items()}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        lengths = batch["attention_mask"].sum(1).tolist()
        return [
            (ids[:n].tolist(), label[:n].tolist())
            for ids, label, n in zip(batch["input_ids"], labels, lengths, strict=True)
        ]


class TextEncoder(_Encoder):
    """Encodes prompts with completions, conversations, text and tokens as `SFTTrainer` does.

    Raises:
        ValueError: `assistant_only_loss` with a chat template that does not mark the assistant's tokens.
    """

    def __init__(
        self,
        processing_class: Any,
        *,
        max_length: int | None,
        truncation_mode: str,
        completion_only_loss: bool | None,
        assistant_only_loss: bool,
        text_field: str,
    ) -> None:
        super().__init__(
            trl.SFTTrainer,
            trl.SFTConfig,
            processing_class,
            truncation_mode=truncation_mode,
            assistant_only_loss=assistant_only_loss,
            dataset_text_field=text_field,
        )
        self.max_length, self.completion_only_loss = max_length, completion_only_loss
        unmarked = assistant_only_loss and not stock.has_generation_markers(processing_class.chat_template)
        template = stock.get_training_chat_template(processing_class) if unmarked else None
        self.trainer.chat_template = template

    def whole(self, row: Row) -> tuple[list[int], list[int]]:
        """Tokens and labels, before truncation.

        Raises:
            ValueError: the template marks no token of the assistant's, and only these count.
        """
        has_completion = {"prompt", "completion"} <= row.keys()
        only = has_completion if self.completion_only_loss is None else self.completion_only_loss
        self.trainer.completion_only_loss = only
        try:
            encoded = self._prepared(row, False, None, max_length=None)
        except RuntimeError as error:
            if "no assistant tokens" not in str(error):
                raise
            raise ValueError(
                "the chat template must mark the assistant's tokens with {% generation %}, got none marked"
            ) from error
        assert encoded is not None
        return list(encoded["input_ids"]), list(encoded["labels"])

    def cut(self, input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]] | None:
        """At most max_length tokens and their labels; None if no token is left that counts."""
        row = self._prepared({"input_ids": input_ids, "labels": labels}, False, None, max_length=self.max_length)
        return None if row is None else (row["input_ids"], row["labels"])


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
