"""The `hf` model of the harness with log-probabilities from packed batches, without materialized logits."""

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
from fusedalign.packing import LayoutError, enable, pack_rows, packed_hidden
from fusedalign.packing.model import head_logps
from fusedalign.score.batch import head_parts

logger = logging.getLogger(__name__)

#: Tokens per batch with batch_size=auto: enough to keep a GPU busy, and little memory.
AUTO_TOKENS = 32_768

_INSTEAD = "use --model hf"

#: A request of the harness: its cache key (None: part of a rolling text), context and continuation.
Request = tuple[Any, list[int], list[int]]


class _Running(NamedTuple):
    """A launched batch, whose results the device may still be computing."""

    rows: list[Row]
    logps: Tensor
    """[N] on the CPU, one continuation after another"""
    is_top1: Tensor
    """[N] bool on the CPU"""
    copied: torch.cuda.Event | None
    """recorded after both copies; None: they are complete"""


@register_model("fusedalign")
class FusedLM(HFLM):
    """`hf` with `loglikelihood` and `loglikelihood_rolling` on packed batches, without materialized logits.

    The arguments are those of `hf`. `batch_size` bounds the tokens of a batch: N means the tokens of N rows as long as
    the longest, "auto" means `AUTO_TOKENS`. When memory runs out, batches are halved.

    Raises:
        ValueError, TypeError: encoder-decoders, heads that `fusedalign.head` cannot read, prompt learning.
    """

    def __init__(self, pretrained: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(pretrained, *args, **kwargs)
        model = self.model
        _refuse(model)
        self._transformer = model.get_base_model() if hasattr(type(model), "get_base_model") else model
        self._rows_per_batch = self.batch_size
        self._most_tokens = math.inf  # of a batch; lowered when memory runs out
        self._packs = self._enable()

    def _get_backend(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super()._get_backend(config, *args, **kwargs)
        if self.backend != "causal":
            raise ValueError(f"expected a decoder-only model, got the encoder-decoder {config.model_type}: {_INSTEAD}")

    def _enable(self) -> bool:
        """Enable packed batches; returns whether the model supports them."""
        try:
            with self._inference_mode():
                enable(self._transformer, training=False)
        except LayoutError as error:
            logger.warning("fusedalign pads its batches: %s", error)
            return False
        return True

    @contextlib.contextmanager
    def _inference_mode(self) -> Iterator[None]:
        """The context in which the harness calls its model: no gradients, and autocast if configured."""
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            yield

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Like `hf`, with the windows of all texts in one call of `_loglikelihood_tokens`, which forms the batches."""
        batch_size = self.batch_size
        self.batch_size_per_gpu = sys.maxsize
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]
        finally:
            self.batch_size_per_gpu = batch_size

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each request the sum of its log-probabilities, nats, and whether greedy decoding would produce it.

        Args:
            requests: any number.
            disable_tqdm: show no progress bar.
            override_bs: unused, since batches are bounded by their tokens.
        """
        limit = self.max_length
        rows = unique_rows((request[1:] for request in requests), limit)
        truncated = sum(len(context) + len(continuation) > limit + 1 for _, context, continuation in requests)
        if truncated:
            logger.warning("%d of %d requests are cut from the left to max_length=%d", truncated, len(requests), limit)
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        is_silent = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=is_silent, desc="Running loglikelihood requests") as bar:
            for batch in self._run(rows):
                for number, answer in _read(batch):
                    answers[number] = answer
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                    bar.update()
        return answers

    def _run(self, rows: list[Row]) -> Iterator[_Running]:
        """Run all rows in batches; a batch is yielded after the next one is launched, to keep the device busy."""
        queue = deque(shared_groups(rows) if self._packs else single_groups(rows))
        is_auto = self._rows_per_batch == "auto"
        budget = AUTO_TOKENS if is_auto else self._rows_per_batch * max(map(len, rows), default=0)
        previous = None
        while queue:
            batch = take_batch(queue, min(budget, self._most_tokens), padded=not self._packs)
            running = self._try_launch(batch)
            if running is None:
                queue.extendleft(reversed(batch))
                continue
            if previous is not None:
                yield previous
            previous = running
        if previous is not None:
            yield previous

    def _try_launch(self, batch: list[Group]) -> _Running | None:
        """Launch a batch; if memory runs out, return None and limit later batches to half its size."""
        try:
            return self._launch(batch)
        except torch.OutOfMemoryError:
            if sum(map(len, batch)) == 1:
                raise
        # Outside of `except`, where the exception would keep the tensors of the failed batch alive.
        self._most_tokens = batch_cost(batch, padded=not self._packs) / 2
        logger.warning("out of memory: batches of at most %d tokens from here on", self._most_tokens)
        torch.cuda.empty_cache()
        return None

    def _launch(self, batch: list[Group]) -> _Running:
        """Start computing a batch and copying its results to the CPU."""
        with self._inference_mode():
            rows, hidden, positions = (self._run_packed if self._packs else self._run_padded)(batch)
            head = lm_head(self.model)
            device = head_parts(head)[0].device
            index, targets = _targets(rows, positions)
            hidden = head.expand(hidden.to(device).index_select(0, send(index, device)))
            out = head_logps(head, hidden, targets, outputs=("is_top1",))
        assert out.is_top1 is not None
        logps, is_top1 = (x.to("cpu", non_blocking=True) for x in (out.logps, out.is_top1))
        copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        return _Running(rows, logps, is_top1, copied)

    def _run_packed(self, batch: list[Group]) -> tuple[list[Row], Tensor, Tensor]:
        """The rows, hidden states [S, D], and for the tokens of each row their indices into S, [rows, length]."""
        answers = max(map(len, batch))
        slots = [group[i] if i < len(group) else None for i in range(answers) for group in batch]
        packed = pack_rows([row.input_ids if row else () for row in slots], groups=answers)
        hidden = packed_hidden(self._transformer, packed)
        is_used = torch.tensor([row is not None for row in slots])
        return [row for row in slots if row], hidden, packed.token_index[is_used]

    def _run_padded(self, batch: list[Group]) -> tuple[list[Row], Tensor, Tensor]:
        """Like `_run_packed`, for rows padded on the right: causal attention needs no mask, as in `hf`."""
        rows = [row for group in batch for row in group]
        input_ids = pad_sequence([torch.tensor(row.input_ids) for row in rows], batch_first=True)
        device = self._transformer.get_input_embeddings().weight.device
        hidden = self._transformer.base_model(input_ids=send(input_ids, device), use_cache=False).last_hidden_state
        return rows, hidden.flatten(0, 1), torch.arange(input_ids.numel()).view(input_ids.shape)


def _refuse(model: Any) -> None:
    """Raise for a model that cannot be scored without logits."""
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


def _targets(rows: list[Row], positions: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of the hidden states that predict the continuations, and their tokens; both [N] int64."""
    index: list[Tensor] = []
    targets: list[int] = []
    for row, row_positions in zip(rows, positions, strict=True):
        for continuation in row.continuations:
            index.append(row_positions[continuation.end - len(continuation.tokens) : continuation.end])
            targets += continuation.tokens
    return torch.cat(index), torch.tensor(targets)


def _read(batch: _Running) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Wait for a batch; yield the number and the answer of each request."""
    if batch.copied is not None:
        batch.copied.synchronize()
    continuations = [continuation for row in batch.rows for continuation in row.continuations]
    lengths = [len(continuation.tokens) for continuation in continuations]
    values = zip(batch.logps.double().split(lengths), batch.is_top1.split(lengths), strict=True)
    for continuation, (logps, is_top1) in zip(continuations, values, strict=True):
        yield continuation.request, (float(logps.sum()), bool(is_top1.all()))
