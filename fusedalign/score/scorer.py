"""Scores of examples: batches under a budget of tokens, which halves where memory runs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fusedalign.score.batch import SelectedLogps, causal_lm, packing_refusal, select_logps
from fusedalign.score.records import Example, Score, Window

AUTO = "auto"

#: Values of each token that counts, in addition to the sums.
PER_TOKEN = ("logps", "entropy", "ranks")

#: Tokens a batch on a CPU, and the most that "auto" takes on a GPU, which is busy with fewer.
CPU_TOKENS, MOST_TOKENS = 4096, 32_768

#: Tokens of the trial from which "auto" learns what a token takes, and the share of the free memory that it plans with.
_TRIAL_TOKENS, _SHARE = 2048, 0.7

#: Tokens of a prompt from which on examples that have the same one run together, and how many answers at most.
_LEAST_SHARED, _MOST_SHARING = 8, 8


class _Unit(NamedTuple):
    """Windows that run together because they share a prompt, and the (example, answer, window) of each."""

    windows: tuple[Window, ...]
    places: tuple[tuple[int, int, int], ...]


class _Pending(NamedTuple):
    """A batch that the device may still be computing."""

    windows: list[Window]
    places: list[tuple[int, int, int]]
    selected: SelectedLogps


class Scorer:
    """A model that scores examples.

    Args:
        model: a causal LM of transformers, or a `PeftModel` around one; put it into eval mode before.
        packed: as in `sequence_logps`.
        max_tokens: token positions of a batch; "auto" takes what fits.
        autocast: the dtype of a mixed-precision forward, as a training has it; None: the weights' own.
        per_token: which of `PER_TOKEN` each `Score` has in addition.
        options: of `fusedalign.linear_logps`, such as `impl`.

    Raises:
        LayoutError (a ValueError): packed=True, and the model would go wrong in packed batches.
        ValueError: another word than those; prompt learning.
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
        """Where the model takes its token ids."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @torch.no_grad()
    def scores(
        self, examples: Sequence[Example], advance: Callable[[int, int], object] = lambda rows, tokens: None
    ) -> list[tuple[Score, ...] | str]:
        """What the model says of each answer of each example; of an example that cannot be scored the reason.

        Args:
            examples: of any number and length.
            advance: is told the examples and tokens of each batch, once it is done.
        """
        parts: dict[tuple[int, int, int], Score | str] = {}
        vocab = self.model.get_input_embeddings().weight.shape[0]
        reasons = {i: reason for i, x in enumerate(examples) if (reason := _vocabulary_refusal(x, vocab)) is not None}
        fitting = [(i, x) for i, x in enumerate(examples) if i not in reasons]
        waiting = list(reversed(list(batches(self._units(fitting), self.max_tokens, packed=self.packed))))
        pending: _Pending | None = None
        while waiting:
            batch = waiting.pop()
            launched = self._launch(batch)
            if launched is None:  # out of memory
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                if sum(len(unit.windows) for unit in batch) == 1:
                    tokens = len(batch[0].windows[0].input_ids)
                    parts[batch[0].places[0]] = f"out of memory with this row's {tokens} tokens alone"
                else:
                    waiting += reversed(_halves(batch))
                    self.max_tokens = max(1, min(self.max_tokens, sum(map(_packed_tokens, batch)) // 2))
                continue
            if pending is not None:
                parts.update(self._collect(pending, advance))
            pending = launched
        if pending is not None:
            parts.update(self._collect(pending, advance))
        return [reasons.get(i) or _merged(i, example, parts) for i, example in enumerate(examples)]

    def _units(self, examples: Iterable[tuple[int, Example]]) -> Iterator[_Unit]:
        """Answers of one example together, and examples with the same prompt, so that it is computed once."""
        by_prompt: dict[tuple[int, ...], list[tuple[Window, tuple[int, int, int]]]] = {}
        for i, example in examples:
            windows = [
                (window, (i, j, k))
                for j, answer in enumerate(example.answers)
                for k, window in enumerate(answer.windows)
            ]
            shares = self.packed and len(windows) == len(example.answers)
            prompt = _prompt(windows[0][0]) if shares and windows else ()
            if len(prompt) >= _LEAST_SHARED:
                by_prompt.setdefault(prompt, []).extend(windows)
            else:
                for group in [windows] if shares else [[each] for each in windows]:
                    yield _Unit(*zip(*group, strict=True))
        for windows in by_prompt.values():
            for start in range(0, len(windows), _MOST_SHARING):
                yield _Unit(*zip(*windows[start : start + _MOST_SHARING], strict=True))

    def _launch(self, batch: Sequence[_Unit]) -> _Pending | None:
        """Start a batch; None where memory runs out."""
        groups = len(batch[0].windows)
        rows = [(unit.windows[g], unit.places[g]) for g in range(groups) for unit in batch]
        windows, places = [window for window, _ in rows], [place for _, place in rows]
        ids, labels, mask = _padded(windows)
        try:
            outputs = ("is_top1", *({"entropy"} & set(self.per_token)))
            ranks = "ranks" in self.per_token
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                selected = select_logps(
                    self.model,
                    ids,
                    labels,
                    mask,
                    packed=self.packed,
                    groups=groups,
                    ranks=ranks,
                    outputs=outputs,
                    **self.options,
                )
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return None
        return _Pending(windows, places, selected)

    def _collect(
        self, pending: _Pending, advance: Callable[[int, int], object]
    ) -> Iterator[tuple[tuple[int, int, int], Score | str]]:
        """The score of each window of a batch; waits for the device, then tells `advance`."""
        tokens, ranks, _ = pending.selected
        assert tokens.is_top1 is not None
        columns = {"logps": tokens.logps.tolist(), "top1": tokens.is_top1.tolist()}
        if tokens.entropy is not None:
            columns["entropy"] = tokens.entropy.tolist()
        if ranks is not None:
            columns["ranks"] = ranks.tolist()
        start = 0
        for window, place in zip(pending.windows, pending.places, strict=True):
            stop = start + sum(label != -100 for label in window.labels[1:])
            own = {name: values[start:stop] for name, values in columns.items()}
            total = math.fsum(own["logps"])
            if math.isfinite(total):
                kept = {name: own[name] for name in PER_TOKEN if name in self.per_token}
                yield place, Score(total, stop - start, all(own["top1"]), kept)
            else:
                yield place, f"the model's log-probability is {total}"
            start = stop
        first = sum(place[1:] == (0, 0) for place in pending.places)
        advance(first, sum(len(window.input_ids) for window in pending.windows))

    @torch.no_grad()
    def _fitting_tokens(self) -> int:
        """What a batch may have on this device, by the memory that a trial takes."""
        if self.device.type != "cuda":
            return CPU_TOKENS
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device)
        limit = getattr(self.model.config, "max_position_embeddings", None) or _TRIAL_TOKENS
        length = min(256, limit)
        window = Window([0] * length, [0] * length)
        count = _TRIAL_TOKENS // length
        if self._launch([_Unit((window,), ((0, 0, 0),))] * count) is None:
            torch.cuda.empty_cache()
            return length
        taken = max(1, torch.cuda.max_memory_allocated(self.device) - held)
        free = torch.cuda.mem_get_info(self.device)[0]
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return max(length, min(MOST_TOKENS, int(_SHARE * free / taken * length * count)))


def check_per_token(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each of `PER_TOKEN`, in its order.

    Raises:
        ValueError: another name.
    """
    given = [names] if isinstance(names, str) else [*names]
    for name in given:
        if name not in PER_TOKEN:
            raise ValueError(f"per_token must be of {', '.join(PER_TOKEN)}, got {name!r}")
    return tuple(name for name in PER_TOKEN if name in given)


def _prompt(window: Window) -> tuple[int, ...]:
    """The tokens before the first that counts."""
    first = next((i for i, label in enumerate(window.labels) if label != -100), len(window.labels))
    return tuple(window.input_ids[:first])


def batches(units: Iterable[_Unit], max_tokens: int, *, packed: bool) -> Iterator[list[_Unit]]:
    """Units of equal width, longest first, as many together as `max_tokens` allow; at least one."""
    batch: list[_Unit] = []
    taken = 0
    for unit in sorted(units, key=lambda unit: (len(unit.windows), -_packed_tokens(unit), unit.places)):
        tokens = _packed_tokens(unit) if packed else max(len(window.input_ids) for window in unit.windows)
        longest = tokens if packed or not batch else max(len(window.input_ids) for window in batch[0].windows)
        total = taken + tokens if packed else longest * (len(batch) + 1)
        if batch and (total > max_tokens or len(unit.windows) != len(batch[0].windows)):
            yield batch
            batch, total = [], tokens
        batch.append(unit)
        taken = total
    if batch:
        yield batch


def _packed_tokens(unit: _Unit) -> int:
    """Without those that the later windows share with the first."""
    first, *others = (window.input_ids for window in unit.windows)
    total = len(first)
    for ids in others:
        same = next((i for i, (x, y) in enumerate(zip(first, ids, strict=False)) if x != y), min(len(first), len(ids)))
        total += len(ids) - same
    return total


def _halves(batch: Sequence[_Unit]) -> list[list[_Unit]]:
    """Two batches of a batch; of a single unit its windows alone."""
    if len(batch) > 1:
        return [list(batch[: len(batch) // 2]), list(batch[len(batch) // 2 :])]
    return [[_Unit((window,), (place,))] for window, place in zip(*batch[0], strict=True)]


def _padded(windows: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, labels and attention mask, [B, L], on the CPU, padded on the right."""

    def pad(rows: Iterable[Sequence[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(window.input_ids) for window in windows])
    ids = pad((window.input_ids for window in windows), 0)
    labels = pad((window.labels for window in windows), -100)
    return ids, labels, torch.arange(ids.shape[1])[None] < lengths[:, None]


def _vocabulary_refusal(example: Example, vocab: int) -> str | None:
    """Why an example's token ids do not fit the model; on a GPU the lookup would end the process."""
    largest = max((max(w.input_ids, default=0) for a in example.answers for w in a.windows), default=0)
    return None if largest < vocab else f"token id {largest} must be below the model's vocabulary of {vocab}"


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Of PyTorch's allocators, of the CUDA driver (a kernel's launch) and of cuBLAS (its workspace)."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _merged(i: int, example: Example, parts: dict[tuple[int, int, int], Score | str]) -> tuple[Score, ...] | str:
    """The scores of an example's answers, each over its windows; a reason where one of them has none."""
    answers: list[Score] = []
    for j, answer in enumerate(example.answers):
        windows: list[Score] = []
        for k in range(len(answer.windows)):
            part = parts[i, j, k]
            if isinstance(part, str):
                return f"{answer.name}: {part}" if len(example.answers) > 1 else part
            windows.append(part)
        answers.append(_sum(windows))
    return tuple(answers)


def _sum(windows: Sequence[Score]) -> Score:
    per_token = {name: [x for each in windows for x in each.per_token[name]] for name in windows[0].per_token}
    return Score(
        math.fsum(each.logps for each in windows),
        sum(each.tokens for each in windows),
        all(each.is_greedy for each in windows),
        per_token,
    )
