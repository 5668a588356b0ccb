"""Rows of random words with the lengths of a mix, and a tokenizer that maps each word to one token."""

from __future__ import annotations

import random
from typing import Any

from fusedalign.bench.training.settings import ALL_MIXES, SIZES, TRAININGS, Job

_SPECIAL = ("<pad>", "<unk>", "</s>")


def examples(job: Job) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of all steps, and the number of tokens of each step.

    A prompt counts once per answer, and an answer includes its EOS token.
    """
    training, mix, size = TRAININGS[job.training], ALL_MIXES[job.mix], SIZES[job.size]
    generator, vocab = random.Random(0), size.config["vocab_size"]

    def text(length: int) -> str:
        return " ".join(f"w{generator.randrange(len(_SPECIAL), vocab)}" for _ in range(length))

    rows, tokens, batch = [], [0] * job.all_steps, job.batch * job.ranks
    for i in range(job.all_steps * batch):
        prompt, *answers = (x.draw(generator, size.shrink) for x in (mix.prompt, mix.chosen, mix.rejected))
        desirable = i % 2 == 0
        if not training.pairs:
            answers = answers[:1] if training.trainer != "KTO" or desirable else answers[1:]
        row: dict[str, Any] = {"prompt": text(prompt)}
        for name, length in zip(("chosen", "rejected") if training.pairs else ("completion",), answers, strict=True):
            row[name] = f" {text(length)}"
        if training.trainer == "KTO":
            row["label"] = desirable
        rows.append(row)
        tokens[i // batch] += sum(prompt + length + 1 for length in answers)
    return rows, tokens


def tokenizer(job: Job) -> Any:
    """A tokenizer that maps the words w3, w4, ... to the tokens 3, 4, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    first, vocab = len(_SPECIAL), SIZES[job.size].config["vocab_size"]
    words = {word: i for i, word in enumerate(_SPECIAL)} | {f"w{i}": i for i in range(first, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, unknown, end = _SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown, pad_token=pad, eos_token=end)
