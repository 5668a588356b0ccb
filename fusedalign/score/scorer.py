"""Scores of examples, in batches under a token budget that is halved when memory runs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fusedalign.score.batch import SelectedLogps, causal_lm, packing_refusal, select_logps
from fusedalign.score.records import IGNORED, Example, Score, Window
from fusedalign.score.units import Unit, WindowKey, batches, halves, make_units, packed_tokens, padded_tensors

AUTO = "auto"
#: The default beta of implicit rewards.
BETA = 0.1

#: Values of each scored token, in addition to the sums.
PER_TOKEN = ("logps", "entropy", "ranks")

#: Tokens per batch on a CPU, and the most that "auto" uses on a GPU, which fewer already keep busy.
CPU_TOKENS, MOST_TOKENS = 4096, 32_768

#: "auto" measures the memory of a trial batch of so many tokens, and plans with this share of the free memory.
_TRIAL_TOKENS, _SHARE = 2048, 0.7


class _Pending(NamedTuple):
    """A launched batch, whose results the device may still be computing."""

    windows: list[Window]
    keys: list[WindowKey]
    selected: SelectedLogps


class Scorer:
    """A model that scores examples.

    Args:
        model: a causal LM of transformers, or a `PeftModel` around one, in eval mode.
        packed: as in `sequence_logps`.
        max_tokens: token positions per batch; "auto": what fits.
        autocast: dtype of a mixed-precision forward, as in training; None: the dtype of the weights.
        per_token: which of `PER_TOKEN` each `Score` has in addition.
        options: of `fusedalign.linear_logps`, such as `impl`.

    Raises:
        LayoutError: a ValueError; packed=True, and the model cannot run packed batches correctly.
        ValueError: an invalid option; prompt learning.
    """

    def __init__(
        self,
        model: Any,
        *,
        packed: bool | str = AUTO,
        max_tokens: int | str = AUTO,
        per_token: Iterable[str] = (),
        autocast: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        self.model, self.per_token, self.options = causal_lm(model), check_per_token(per_token), options
        self.autocast = autocast
        if packed not in (AUTO, True, False):
            raise ValueError(f"packed must be 'auto', True or False, got {packed!r}")
        self.refusal = "packed=False" if packed is False else packing_refusal(self.model, training=False)
        if packed is True and self.refusal is not None:
            raise ValueError(f"packed=True needs a model that can run packed: {self.refusal}")
        self.packed = self.refusal is None
        if max_tokens != AUTO and not (isinstance(max_tokens, int) and max_tokens > 0):
            raise ValueError(f"max_tokens must be 'auto' or a number of tokens above 0, got {max_tokens!r}")
        self.max_tokens = self._fitting_tokens() if max_tokens == AUTO else int(max_tokens)

    @property
    def device(self) -> torch.device:
        """The device of the model's input embeddings."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @torch.no_grad()
    def scores(
        self, examples: Sequence[Example], advance: Callable[[int, int], object] = lambda rows, tokens: None
    ) -> list[tuple[Score, ...] | str]:
        """For each example the scores of its answers, or the reason why it cannot be scored.

        Args:
            examples: any number, of any length.
            advance: called with the numbers of examples and tokens of each finished batch.
        """
        vocab = self.model.get_input_embeddings().weight.shape[0]
        reasons = {i: reason for i, x in enumerate(examples) if (reason := _vocabulary_refusal(x, vocab)) is not None}
        units = make_units(((i, x) for i, x in enumerate(examples) if i not in reasons), packed=self.packed)
        queue = list(reversed(list(batches(units, self.max_tokens, packed=self.packed))))
        results: dict[WindowKey, Score | str] = {}
        pending: _Pending | None = None
        while queue:
            batch = queue.pop()
            launched = self._launch(batch)
            if launched is None:
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                if sum(len(unit.windows) for unit in batch) == 1:
                    tokens = len(batch[0].windows[0].input_ids)
                    results[batch[0].keys[0]] = f"out of memory with this row's {tokens} tokens alone"
                else:
                    queue += reversed(halves(batch))
                    self.max_tokens = max(1, min(self.max_tokens, sum(map(packed_tokens, batch)) // 2))
                continue
            if pending is not None:  # read the results of a batch while the device computes the next one
                results.update(self._collect(pending, advance))
            pending = launched
        if pending is not None:
            results.update(self._collect(pending, advance))
        return [reasons.get(i) or _merged(i, example, results) for i, example in enumerate(examples)]

    def _launch(self, batch: Sequence[Unit]) -> _Pending | None:
        """Start computing a batch; None if memory runs out."""
        groups = len(batch[0].windows)
        rows = [(unit.windows[g], unit.keys[g]) for g in range(groups) for unit in batch]
        windows, keys = [window for window, _ in rows], [key for _, key in rows]
        try:
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                selected = select_logps(
                    self.model,
                    *padded_tensors(windows),
                    packed=self.packed,
                    groups=groups,
                    ranks="ranks" in self.per_token,
                    outputs=("is_top1", *({"entropy"} & set(self.per_token))),
                    **self.options,
                )
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return None
        return _Pending(windows, keys, selected)

    def _collect(
        self, pending: _Pending, advance: Callable[[int, int], object]
    ) -> Iterator[tuple[WindowKey, Score | str]]:
        """Yield the score of each window of a batch; waits for the device, then calls `advance`."""
        tokens, ranks, _ = pending.selected
        assert tokens.is_top1 is not None
        columns = {"logps": tokens.logps.tolist(), "top1": tokens.is_top1.tolist()}
        if tokens.entropy is not None:
            columns["entropy"] = tokens.entropy.tolist()
        if ranks is not None:
            columns["ranks"] = ranks.tolist()
        start = 0
        for window, key in zip(pending.windows, pending.keys, strict=True):
            stop = start + sum(label != IGNORED for label in window.labels[1:])
            values = {name: column[start:stop] for name, column in columns.items()}
            total = math.fsum(values["logps"])
            if math.isfinite(total):
                per_token = {name: values[name] for name in PER_TOKEN if name in self.per_token}
                yield key, Score(total, stop - start, all(values["top1"]), per_token)
            else:
                yield key, f"the model's log-probability is {total}"
            start = stop
        examples = sum(key.answer == key.window == 0 for key in pending.keys)
        advance(examples, sum(len(window.input_ids) for window in pending.windows))

    @torch.no_grad()
    def _fitting_tokens(self) -> int:
        """Tokens per batch that fit on this device, extrapolated from the memory of a trial batch."""
        if self.device.type != "cuda":
            return CPU_TOKENS
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        allocated = torch.cuda.memory_allocated(self.device)
        limit = getattr(self.model.config, "max_position_embeddings", None) or _TRIAL_TOKENS
        length = min(256, limit)
        window = Window([0] * length, [0] * length)
        count = _TRIAL_TOKENS // length
        if self._launch([Unit((window,), (WindowKey(0, 0, 0),))] * count) is None:
            torch.cuda.empty_cache()
            return length
        trial_bytes = max(1, torch.cuda.max_memory_allocated(self.device) - allocated)
        free = torch.cuda.mem_get_info(self.device)[0]
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return max(length, min(MOST_TOKENS, int(_SHARE * free / trial_bytes * length * count)))


def check_per_token(names: Iterable[str]) -> tuple[str, ...]:
    """The names in the order of `PER_TOKEN`. Raises ValueError for a name that is not in it."""
    requested = [names] if isinstance(names, str) else [*names]
    for name in requested:
        if name not in PER_TOKEN:
            raise ValueError(f"per_token must be of {', '.join(PER_TOKEN)}, got {name!r}")
    return tuple(name for name in PER_TOKEN if name in requested)


def _vocabulary_refusal(example: Example, vocab: int) -> str | None:
    """Why the token ids of an example are out of range; on a GPU their lookup would abort the process."""
    largest = max((max(w.input_ids, default=0) for a in example.answers for w in a.windows), default=0)
    return None if largest < vocab else f"token id {largest} must be below the model's vocabulary of {vocab}"


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator of PyTorch, the CUDA driver (kernel launch) or cuBLAS (workspace) ran out of memory."""
    messages = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)


def _merged(i: int, example: Example, results: dict[WindowKey, Score | str]) -> tuple[Score, ...] | str:
    """The scores of an example's answers, each summed over its windows; the reason if a window has none."""
    answers: list[Score] = []
    for j, answer in enumerate(example.answers):
        windows: list[Score] = []
        for k in range(len(answer.windows)):
            result = results[WindowKey(i, j, k)]
            if isinstance(result, str):
                return f"{answer.name}: {result}" if len(example.answers) > 1 else result
            windows.append(result)
        answers.append(_sum(windows))
    return tuple(answers)


def _sum(windows: Sequence[Score]) -> Score:
    per_token = {name: [x for score in windows for x in score.per_token[name]] for name in windows[0].per_token}
    return Score(
        math.fsum(score.logps for score in windows),
        sum(score.tokens for score in windows),
        all(score.is_greedy for score in windows),
        per_token,
    )
