"""The tokens of a preference pair as in TRL's DPO, and each answer with one EOS.

TRL's CPO and ORPO append an EOS to answers that a chat template has closed already (the template's `<|im_end|>\\n` does
not end in the EOS) and add a BOS to prompts where the tokenizer adds none, so methods would train on different tokens.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import ProcessorMixin

from fusedalign.trl.lengths import check_lengths
from fusedalign.trl.stock import maybe_apply_chat_template, maybe_extract_prompt

_logger = logging.getLogger(__name__)

#: The columns of a row that change how its chat template is rendered.
OPTIONS = ("tools", "chat_template_kwargs")


class OneEnd:
    """A tokenizer that leaves at most one EOS at the end of a text, since trainers append one to text that has it.

    It drops the EOS that the tokenizer adds by itself, and an EOS that follows another with only white space between.
    Everything else is the tokenizer's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        eos = tokenizer.eos_token
        self._twice = re.compile(rf"({re.escape(eos)}\s*){re.escape(eos)}\Z") if eos else None
        self.adds_end = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """The tokenizer's encoding of one text."""
        if self._twice is not None:
            text = self._twice.sub(r"\1", text)
        encoded = self.tokenizer(text, **options)
        return {name: x[:-1] for name, x in encoded.items()} if self.adds_end else encoded


def one_end(processing_class: Any) -> Any:
    """`OneEnd` of a tokenizer; a processor unchanged."""
    return processing_class if isinstance(processing_class, (ProcessorMixin, OneEnd)) else OneEnd(processing_class)


def pair_ids(row: Mapping[str, Any], processing_class: Any) -> tuple[list[int], list[int], list[int]]:
    """The tokens of prompt, chosen and rejected, as in TRL's DPO.

    Args:
        row: prompt, chosen, rejected, all text or all messages; tools and chat_template_kwargs as TRL takes them.
        processing_class: the tokenizer.

    Returns:
        Prompt, chosen and rejected answer. An answer begins where the tokens of prompt and answer differ from those of
        the prompt, and ends as the chat template ends a turn; text ends with an EOS.
    """
    prompt, answers = row["prompt"], [row["chosen"], row["rejected"]]
    if isinstance(prompt, str):
        tokenizer, eos = one_end(processing_class), processing_class.eos_token
        prompt_ids = tokenizer(prompt)["input_ids"]
        both = [tokenizer(prompt + (x if x.endswith(eos) else x + eos))["input_ids"] for x in answers]
    else:
        tools = row.get("tools")
        options = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
            "tokenize": True,
            "return_dict": True,
        }
        render = processing_class.apply_chat_template
        prompt_ids = render(prompt, add_generation_prompt=True, **options)["input_ids"]
        both = [render(prompt + x, **options)["input_ids"] for x in answers]
        if not processing_class.added_tokens_decoder.keys() & set(both[0][len(prompt_ids) :]):
            _warn_once(
                "the chat template ends no answer with a special token, so the model does not learn where to stop: "
                "let it end the assistant's turns with %s",
                processing_class.eos_token,
            )
    n = min(_shared(prompt_ids, ids) for ids in both)
    chosen_ids, rejected_ids = (ids[n:] for ids in both)
    return prompt_ids[:n], chosen_ids, rejected_ids


@functools.cache
def _warn_once(message: str, *args: Any) -> None:
    _logger.warning(message, *args)


def _shared(ids: list[int], others: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))


class PairSource:
    """A data set for CPO's and ORPO's constructors, which only call its `map`.

    They would first extract the prompt and apply the chat template, after which text and conversations look alike. Here
    the rows reach `tokenize_row` unchanged. Streams, with a `map` that takes no processes, work too.
    """

    def __init__(self, dataset: Any, trainer: Any, args: Any, name: str) -> None:
        self.dataset, self.trainer, self.args, self.name = dataset, trainer, args, name

    def map(self, function: Callable[..., Any], num_proc: int | None = None, **options: Any) -> Any:
        """The tokenised data set if the function is the one that tokenises, else this object."""
        if function in (maybe_extract_prompt, maybe_apply_chat_template):
            return self
        unused = self.dataset.column_names or list(next(iter(self.dataset), {}))
        if hasattr(self.dataset, "__len__"):
            options["num_proc"] = num_proc
            # A stream drops all other columns too: accelerate takes the length of the first entry of its batches.
            unused = [name for name in ("prompt", "chosen", "rejected", *OPTIONS) if name in unused]
        tokenised = self.dataset.map(function, remove_columns=unused, **options)
        return check_lengths(tokenised, self.args, self.name, max_length=self.trainer.max_length)


def rendered(row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A row as text, for encoder-decoders, without the template's EOS where the tokenizer adds one by itself."""
    tools = row.get("tools")
    row = maybe_apply_chat_template(dict(row), tokenizer, json.loads(tools) if isinstance(tools, str) else tools)
    if OneEnd(tokenizer).adds_end:
        end = re.compile(rf"{re.escape(tokenizer.eos_token)}\s*\Z")
        row = row | {name: end.sub("", row[name]) for name in ("chosen", "rejected")}
    return row
