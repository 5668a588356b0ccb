"""The ways to score, and `python -m fusedalign.bench.scorers JOB FILE`, which measures one of them in its process."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fusedalign.bench.failures import in_short
from fusedalign.bench.measure import synchronize
from fusedalign.bench.scoring import Job, Measured, Pair, pairs
from fusedalign.bench.training.settings import MIXES, SIZES
from fusedalign.reports import replace_text
from fusedalign.score.records import Answer, Example, Window

#: The loop's batch size starts here and is halved until a batch of the longest rows fits.
_LARGEST_BATCH = 128


def measure(job: Job) -> Measured:
    """Build the model and score the rows of a mix with it in this process."""
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        config = transformers.Qwen3Config(**SIZES[job.size].config)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    data = pairs(job.mix, job.size, job.rows)
    longest = sorted(data, key=lambda pair: -len(pair.prompt) - max(map(len, pair.answers)))
    try:
        run = {"loop": _loop, "lm-eval": _lm_eval, "fusedalign": _ours}[job.side](model, longest, device)
        start = time.perf_counter()
        run(data[:16])
        synchronize(device)
        first = time.perf_counter() - start
        allocated = torch.cuda.memory_allocated() if device == "cuda" else 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        total = run(data)
        synchronize(device)
        seconds = time.perf_counter() - start
    except Exception as error:  # continue with the other sides
        return Measured(job.side, job.mix, reason=in_short(error))
    peak = torch.cuda.max_memory_allocated() - allocated if device == "cuda" else None
    count = sum(len(pair.prompt) + len(answer) for pair in data for answer in pair.answers)
    return Measured(job.side, job.mix, seconds, first, 2 * len(data), count, peak, total)


Runner = Callable[[Sequence[Pair]], float]


def _loop(model: Any, longest: Sequence[Pair], device: str) -> Runner:
    """The usual hand-written loop, with the largest batch size that fits the longest rows."""

    @torch.no_grad()
    def run(data: Sequence[Pair], size: int) -> float:
        rows = [(pair.prompt, answer) for pair in data for answer in pair.answers]
        total = 0.0
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            width = max(len(prompt) + len(answer) for prompt, answer in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.int64)
            mask, is_answer = torch.zeros_like(ids), torch.zeros_like(ids)
            for i, (prompt, answer) in enumerate(batch):
                n = len(prompt) + len(answer)
                ids[i, :n] = torch.tensor(prompt + answer)
                mask[i, :n] = 1
                is_answer[i, len(prompt) : n] = 1
            ids, mask, is_answer = ids.to(device), mask.to(device), is_answer.to(device)
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            total += (logps.double() * is_answer[:, 1:]).sum().item()
        return total

    size = _LARGEST_BATCH if device == "cuda" else 8
    while size > 1:
        try:
            run(longest[: max(1, size // 2)], size)
            break
        except torch.OutOfMemoryError:
            size //= 2
        torch.cuda.empty_cache()
    return lambda data: run(data, size)


def _lm_eval(model: Any, longest: Sequence[Pair], device: str) -> Runner:
    """The `hf` model of the lm-evaluation-harness on token ids."""
    from lm_eval.models.huggingface import HFLM

    from fusedalign.bench.training.data import tokenizer
    from fusedalign.bench.training.settings import Job as TrainingJob

    size = next(name for name, x in SIZES.items() if x.config["hidden_size"] == model.config.hidden_size)
    width = len(longest[0].prompt) + max(map(len, longest[0].answers))
    harness = HFLM(
        pretrained=model,
        tokenizer=tokenizer(TrainingJob("dpo", size, next(iter(MIXES)), "trl")),
        batch_size="auto",
        max_batch_size=256,
        max_length=width + 1,
    )

    def run(data: Sequence[Pair]) -> float:
        requests = [(None, pair.prompt, answer) for pair in data for answer in pair.answers]
        return sum(logps for logps, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True))

    return run


def _ours(model: Any, longest: Sequence[Pair], device: str) -> Runner:
    """The scorer of this package."""
    from fusedalign.score.scorer import Scorer

    scorer = Scorer(model)

    def run(data: Sequence[Pair]) -> float:
        examples = [
            Example(
                i,
                tuple(
                    Answer(name, (Window(pair.prompt + answer, [-100] * len(pair.prompt) + answer),))
                    for name, answer in zip(("chosen", "rejected"), pair.answers, strict=True)
                ),
            )
            for i, pair in enumerate(data)
        ]
        return sum(score.logps for scores in scorer.scores(examples) if not isinstance(scores, str) for score in scores)

    return run


if __name__ == "__main__":
    job, path = sys.argv[1:]
    replace_text(Path(path), json.dumps(dataclasses.asdict(measure(Job(*json.loads(job))))))
