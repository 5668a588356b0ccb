"""The harness' `hf` model, in which log-probabilities come from packed batches and without logits."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from fusedalign.compaction import send
from fusedalign.harness.rows import Group, Row, batch_cost, shared_groups, single_groups, take_batch, unique_rows
from fusedalign.head import lm_head
from fusedalign.ops import linear_logps
from fusedalign.packing import LayoutError, enable, pack_rows, packed_hidden

logger = logging.getLogger(__name__)

#: Tokens of a batch with batch_size=auto: enough to keep a GPU busy, few enough to leave most of its memory free.
AUTO_TOKENS = 32_768

_INSTEAD = "use --model hf"

#: What the harness asks for: the strings to cache it under (None: part of a text), context and continuation.
Request = tuple[Any, list[int], list[int]]


class _Running(NamedTuple):
    """A batch that the device is at work on, its tokens one continuation after another."""

    rows: list[Row]
    logps: Tensor
    is_top1: Tensor
    arrived: torch.cuda.Event | None
    """when both may be read; None: now"""


@register_model("fusedalign")
class FusedLM(HFLM):
    """`hf` with `loglikelihood` and `loglikelihood_rolling` on packed batches, without logits; the rest is its own.

    Its arguments are those of `hf`. `batch_size` bounds the tokens of a batch: N stands for those of N rows as long as
    the longest, "auto" for `AUTO_TOKENS`. When memory runs out, batches are halved.

    Raises:
        ValueError, TypeError: encoder-decoders, heads that `fusedalign.head` cannot read, prompt learning.
    """

    def __init__(self, pretrained: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(pretrained, *args, **kwargs)
        model = self.model
        _refuse(model)
        self._transformer = model.get_base_model() if hasattr(type(model), "get_base_model") else model
        self._rows_per_batch = self.batch_size
        self._most_tokens = math.inf  # that have fitted into memory
        self._packs = self._enable()

    def _get_backend(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super()._get_backend(config, *args, **kwargs)
        if self.backend != "causal":
            raise ValueError(f"expected a decoder-only model, got the encoder-decoder {config.model_type}: {_INSTEAD}")

    def _enable(self) -> bool:
        """Whether batches may be packed."""
        try:
            with self._calling():
                enable(self._transformer, training=False)
        except LayoutError as error:
            logger.warning("fusedalign pads its batches: %s", error)
            return False
        return True

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        """As the harness calls its model."""
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            yield

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """As `hf`, with the windows of all texts in one call of `_loglikelihood_tokens`, which makes the batches."""
        batch_size = self.batch_size
        self.batch_size_per_gpu = sys.maxsize
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]
        finally:
            self.batch_size_per_gpu = batch_size

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each request the sum of its log-probabilities, nats, and whether greedy decoding would give it.

        Args:
            requests: any number.
            disable_tqdm: no progress bar.
            override_bs: not used, as batches are bounded by their tokens.
        """
        limit = self.max_length
        rows = unique_rows((request[1:] for request in requests), limit)
        cut = sum(len(context) + len(continuation) > limit + 1 for _, context, continuation in requests)
        if cut:
            logger.warning("%d of %d requests are cut from the left to max_length=%d", cut, len(requests), limit)
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        silent = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=silent, desc="Running loglikelihood requests") as bar:
            for running in self._run(rows):
                for number, answer in _read(running):
                    answers[number] = answer
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                    bar.update()
        return answers

    def _run(self, rows: list[Row]) -> Iterator[_Running]:
        """All rows in batches. The device is given the next one before the results of one are waited for."""
        queue = deque(shared_groups(rows) if self._packs else single_groups(rows))
        by_rows = self._rows_per_batch != "auto"
        budget = self._rows_per_batch * max(map(len, rows), default=0) if by_rows else AUTO_TOKENS
        before = None
        while queue:
            batch = take_batch(queue, min(budget, self._most_tokens), padded=not self._packs)
            running = self._attempt(batch)
            if running is None:
                queue.extendleft(reversed(batch))
                continue
            if before is not None:
                yield before
            before = running
        if before is not None:
            yield before

    def _attempt(self, batch: list[Group]) -> _Running | None:
        """None: memory has run out, and batches are smaller from now on."""
        try:
            return self._start(batch)
        except torch.OutOfMemoryError:
            if sum(map(len, batch)) == 1:
                raise
        # Below the `except`, which keeps the tensors of the failed batch alive.
        self._most_tokens = batch_cost(batch, padded=not self._packs) / 2
        logger.warning("out of memory: batches of at most %d tokens from here on", self._most_tokens)
        torch.cuda.empty_cache()
        return None

    def _start(self, batch: list[Group]) -> _Running:
        with self._calling():
            rows, hidden, places = (self._packed if self._packs else self._padded)(batch)
            head = lm_head(self.model)
            weight = head.weight[0] if isinstance(head.weight, tuple) else head.weight
            index, targets = _tokens(rows, places)
            hidden = hidden.to(weight.device).index_select(0, send(index, weight.device))
            out = linear_logps(
                head.expand(hidden),
                head.weight,
                targets,
                bias=head.bias,
                scale=head.scale,
                softcap=head.softcap,
                outputs=("is_top1",),
            )
        assert out.is_top1 is not None
        logps, is_top1 = (x.to("cpu", non_blocking=True) for x in (out.logps, out.is_top1))
        arrived = torch.cuda.current_stream(weight.device).record_event() if weight.is_cuda else None
        return _Running(rows, logps, is_top1, arrived)

    def _packed(self, batch: list[Group]) -> tuple[list[Row], Tensor, Tensor]:
        """The rows, hidden states [S, D], and of each row where its tokens are among them, [rows, length]."""
        answers = max(map(len, batch))
        slots = [group[i] if i < len(group) else None for i in range(answers) for group in batch]
        packed = pack_rows([row.input_ids if row else () for row in slots], groups=answers)
        hidden = packed_hidden(self._transformer, packed)
        used = torch.tensor([row is not None for row in slots])
        return [row for row in slots if row], hidden, packed.token_index[used]

    def _padded(self, batch: list[Group]) -> tuple[list[Row], Tensor, Tensor]:
        """As `_packed`, of rows padded on the right: attention is causal and needs no mask, as in `hf`."""
        rows = [row for group in batch for row in group]
        input_ids = pad_sequence([torch.tensor(row.input_ids) for row in rows], batch_first=True)
        device = self._transformer.get_input_embeddings().weight.device
        hidden = self._transformer.base_model(input_ids=send(input_ids, device), use_cache=False).last_hidden_state
        return rows, hidden.flatten(0, 1), torch.arange(input_ids.numel()).view(input_ids.shape)


def _refuse(model: Any) -> None:
    """Raises for what cannot be scored without logits."""
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.is_prompt_learning:
            raise ValueError(
                f"expected an adapter of weights, got {adapter.peft_type.value}, which puts virtual tokens before each "
                f"row: {_INSTEAD}"
            )
    try:
        lm_head(model)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}: {_INSTEAD}") from error


def _tokens(rows: list[Row], places: Tensor) -> tuple[Tensor, Tensor]:
    """Which hidden states predict the tokens of all continuations, and these tokens; both [N] int64."""
    index: list[Tensor] = []
    targets: list[int] = []
    for row, place in zip(rows, places, strict=True):
        for continuation in row.continuations:
            index.append(place[continuation.end - len(continuation.tokens) : continuation.end])
            targets += continuation.tokens
    return torch.cat(index), torch.tensor(targets)


def _read(running: _Running) -> Iterator[tuple[int, tuple[float, bool]]]:
    """The number and the answer of each request of a batch."""
    if running.arrived is not None:
        running.arrived.synchronize()
    continuations = [continuation for row in running.rows for continuation in row.continuations]
    lengths = [len(continuation.tokens) for continuation in continuations]
    values = zip(running.logps.double().split(lengths), running.is_top1.split(lengths), strict=True)
    for continuation, (logps, is_top1) in zip(continuations, values, strict=True):
        yield continuation.request, (float(logps.sum()), bool(is_top1.all()))
