"""The columns of a file of scores: names, meanings, and the table built from scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedalign.score.records import Example, Score

if TYPE_CHECKING:
    import pyarrow

#: The meaning of each column. For pairs the names have a prefix: `chosen_logps`, `rejected_logps`.
PER_ANSWER = {
    "logps": "log-probability of the answer: the sum over its tokens, nats",
    "mean_logps": "logps / num_tokens, nats per token",
    "num_tokens": "scored tokens",
    "perplexity": "exp(-mean_logps)",
    "is_greedy": "whether greedy decoding gives this answer: each token is the most likely one in its context",
    "num_bytes": "UTF-8 bytes of plain text",
    "bits_per_byte": "-logps / (num_bytes ln 2)",
    "token_logps": "log-probability of each scored token, nats",
    "token_entropies": "entropy of the prediction of each scored token, nats",
    "token_ranks": "number of tokens more likely than each scored token",
}
#: Columns of every row, and of pairs.
PER_ROW = {
    "row": "number in the data set, from 0",
    "margin": "chosen_logps - rejected_logps, nats",
    "accuracy": "whether margin > 0",
}
#: Columns with a reference model; for pairs `ref_chosen_logps`, `chosen_reward` and so on.
WITH_REFERENCE = {
    "ref_logps": "logps of the reference model, nats",
    "reward": "implicit reward: beta (logps - ref_logps)",
    "reward_margin": "chosen_reward - rejected_reward",
    "reward_accuracy": "whether reward_margin > 0",
}
#: The names in `Score.per_token` of the columns of lists.
TOKENS = {"token_logps": "logps", "token_entropies": "entropy", "token_ranks": "ranks"}


def prefixed(answer: str, name: str) -> str:
    """The column of an answer for a name of `PER_ANSWER` or `WITH_REFERENCE`; a prefix for "chosen" and "rejected"."""
    if answer not in ("chosen", "rejected"):
        return name
    return f"ref_{answer}_{name[4:]}" if name.startswith("ref_") else f"{answer}_{name}"


def table(
    examples: Sequence[Example],
    scores: Sequence[tuple[Score, ...]],
    reference: Sequence[tuple[Score, ...]] | None = None,
    beta: float | None = None,
) -> pyarrow.Table:
    """Build a table from scores.

    Args:
        examples: of one kind, with the same answers.
        scores: for each example one per answer.
        reference: the scores of the reference model.
        beta: of the rewards; required with `reference`.

    Returns:
        A row for each example. The columns are int64, float64, bool, and lists of float32, in an order that depends
        only on the kind; without examples there is only `row`. Lists exist if the first score has them, bytes if the
        first example has them.

    Raises:
        ValueError: the numbers of scores and answers differ; a reference without beta.
    """
    import pyarrow as pa

    _check(examples, scores, "scores")
    if reference is not None:
        _check(examples, reference, "reference scores")
        if beta is None:
            raise ValueError("beta must be given with a reference, got None")
    columns: dict[str, Any] = {"row": pa.array([example.row for example in examples], pa.int64())}
    if not examples:
        return pa.table(columns)
    names = [answer.name for answer in examples[0].answers]
    for i, name in enumerate(names):
        text_bytes = [example.answers[i].text_bytes for example in examples]
        for column, values in _answer_columns([score[i] for score in scores], text_bytes).items():
            columns[prefixed(name, column)] = values
    is_pair = names == ["chosen", "rejected"]
    if is_pair:
        columns |= _margin_columns([_logps(scores, i) for i in (0, 1)], "margin", "accuracy")
    if reference is not None:
        references = [_logps(reference, i) for i in range(len(names))]
        rewards = [beta * (_logps(scores, i) - x) for i, x in enumerate(references)]
        columns |= {prefixed(name, "ref_logps"): pa.array(x) for name, x in zip(names, references, strict=True)}
        columns |= {prefixed(name, "reward"): pa.array(x) for name, x in zip(names, rewards, strict=True)}
        if is_pair:
            columns |= _margin_columns(rewards, "reward_margin", "reward_accuracy")
    return pa.table(columns)


def _check(examples: Sequence[Example], scores: Sequence[tuple[Score, ...]], name: str) -> None:
    counts, expected = [len(score) for score in scores], [len(example.answers) for example in examples]
    if counts != expected:
        raise ValueError(
            f"expected {name} of {len(expected)} examples, one an answer ({sum(expected)}), got {sum(counts)}"
        )


def _logps(scores: Sequence[tuple[Score, ...]], answer: int) -> np.ndarray:
    return np.array([score[answer].logps for score in scores], dtype=np.float64)


def _answer_columns(scores: list[Score], text_bytes: list[int | None]) -> dict[str, Any]:
    """The columns of `PER_ANSWER` for one answer of each example."""
    import pyarrow as pa

    logps = np.array([score.logps for score in scores], dtype=np.float64)
    tokens = np.array([score.tokens for score in scores], dtype=np.int64)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        mean = logps / tokens
        perplexity = np.exp(-mean)
    columns: dict[str, Any] = {
        "logps": pa.array(logps),
        "mean_logps": pa.array(mean),
        "num_tokens": pa.array(tokens),
        "perplexity": pa.array(perplexity),
        "is_greedy": pa.array([bool(score.is_greedy) for score in scores], pa.bool_()),
    }
    if text_bytes[0] is not None:
        bits = [None if not n else -x / (n * math.log(2)) for x, n in zip(logps.tolist(), text_bytes, strict=True)]
        columns |= {"num_bytes": pa.array(text_bytes, pa.int64()), "bits_per_byte": pa.array(bits, pa.float64())}
    for column, name in TOKENS.items():
        if name in scores[0].per_token:
            columns[column] = pa.array([score.per_token[name] for score in scores], pa.list_(pa.float32()))
    return columns


def _margin_columns(pair: list[np.ndarray], margin: str, accuracy: str) -> dict[str, Any]:
    import pyarrow as pa

    with np.errstate(invalid="ignore"):  # the difference of two infinities
        difference = pair[0] - pair[1]
        return {margin: pa.array(difference), accuracy: pa.array(difference > 0)}
