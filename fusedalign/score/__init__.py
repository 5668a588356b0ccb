"""Log-probabilities on their own: of a batch, of a data set, of a file that survives what interrupts it."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from fusedalign.score.batch import SequenceLogps, sequence_logps
from fusedalign.score.scorer import AUTO

__all__ = ["SequenceLogps", "score", "sequence_logps"]


def score(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    *,
    ref_model: Any = None,
    beta: float = 0.1,
    out: str | Path | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    stride: int | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    per_token: tuple[str, ...] = (),
    max_tokens_per_batch: int | str = AUTO,
    packed: bool | str = AUTO,
    **options: Any,
) -> Any:
    """Log-probabilities of a data set under a model. Needs TRL, whose functions make the tokens.

    Args:
        model: a causal LM of transformers, or a `PeftModel` around one, on its device.
        tokenizer: its tokenizer.
        dataset: a `datasets.Dataset` of pairs (chosen, rejected), prompts with completions, conversations (messages)
            or plain text (text).
        ref_model: another model; implicit rewards beta * (logps - its logps) are added.
        beta: of these rewards.
        out: a file NAME.parquet, written so that an interrupted call goes on when it is made again; default: none.
        max_length: tokens of a row; default: what the model takes.
        truncation_mode: "keep_start" or "keep_end", as TRL's.
        stride: plain text longer than `max_length` is read in windows this far apart.
        completion_only_loss, assistant_only_loss: as in TRL's `SFTConfig`.
        per_token: of "logps", "entropy", "ranks": lists of a value a token.
        max_tokens_per_batch: token positions that run together; "auto" takes what fits.
        packed: as in `sequence_logps`.
        options: more of `fusedalign.linear_logps`, such as `impl`.

    Returns:
        A `datasets.Dataset` with the columns of docs/scoring.md; rows that could not be scored are left out.

    Raises:
        ValueError: no row can be scored, or `out` is of another model, other data or other settings.

    Example::

        pairs = score(model, tokenizer, dataset)
        good = pairs.filter(lambda row: row["margin"] > 0)
    """
    import datasets

    from fusedalign.score import identity
    from fusedalign.score.rows import RowOptions, Rows
    from fusedalign.score.run import POLICY, REFERENCE, Run, evaluating, ranks_here, score_run
    from fusedalign.score.scorer import Scorer

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows = RowOptions(
        max_length=max_length or limit,
        truncation_mode=truncation_mode,
        stride=stride,
        completion_only=completion_only_loss,
        assistant_only=assistant_only_loss,
    )
    scorer = {"packed": packed, "per_token": list(per_token), "max_tokens": max_tokens_per_batch, **options}
    models = {POLICY: model} | ({} if ref_model is None else {REFERENCE: ref_model})
    loaders = {name: lambda each=each: Scorer(each, **scorer) for name, each in models.items()}
    settings = {
        **{f"{name} weights": identity.of_model(each) for name, each in models.items() if out is not None},
        "tokenizer": identity.of_tokenizer(tokenizer),
        "dataset": identity.of_dataset(dataset),
        "rows": dataclasses.asdict(rows),
        "beta": None if ref_model is None else beta,
        **{name: value if isinstance(value, (int, float, list)) else str(value) for name, value in scorer.items()},
    }
    rank, ranks, _ = ranks_here() if out is not None else (0, 1, 0)
    with tempfile.TemporaryDirectory() as folder, evaluating(models.values()):
        path = Path(folder) / "scores.parquet" if out is None else Path(out)
        source = Rows(dataset, tokenizer, rows)
        reward = None if ref_model is None else beta
        finished = score_run(Run(source, path, settings, loaders, reward, rank, ranks))
        return None if finished is None else datasets.Dataset.from_parquet(str(path), keep_in_memory=out is None)
