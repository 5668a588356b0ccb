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
        A `datasets.Dataset` with the columns of docs/scoring.md; rows that could not be scored are left out. With `out`
        and more than one process (`torchrun`) None on all ranks but the first.

    Raises:
        ValueError: no row can be scored, or `out` is of another model, other data or other settings.

    Example::

        pairs = score(model, tokenizer, dataset)
        good = pairs.filter(lambda row: row["margin"] > 0)
    """
    import datasets

    from fusedalign.score import identity
    from fusedalign.score.rows import RowOptions, Rows
    from fusedalign.score.run import POLICY, REFERENCE, Run, check_beta, evaluating, ranks_here, score_run
    from fusedalign.score.scorer import Scorer, check_per_token

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows = RowOptions(
        max_length=limit if max_length is None else max_length,
        truncation_mode=truncation_mode,
        stride=stride,
        completion_only_loss=completion_only_loss,
        assistant_only_loss=assistant_only_loss,
    )
    check_beta(beta)
    source = Rows(dataset, tokenizer, rows)
    per_token = check_per_token(per_token)
    scorer = {"packed": packed, "per_token": per_token, "max_tokens": max_tokens_per_batch, **options}
    models = {POLICY: model} | ({} if ref_model is None else {REFERENCE: ref_model})
    loaders = {name: lambda each=each: Scorer(each, **scorer) for name, each in models.items()}
    settings = {
        **{f"{name} weights": identity.model_digest(each) for name, each in models.items() if out is not None},
        "tokenizer": identity.tokenizer_digest(tokenizer),
        "dataset": None if out is None else identity.dataset_digest(source.dataset),
        **dataclasses.asdict(rows),
        "beta": None if ref_model is None else beta,
        "per_token": list(per_token),
        "max_tokens_per_batch": max_tokens_per_batch,
        "packed": packed,
        **{name: value if isinstance(value, (int, float)) else str(value) for name, value in options.items()},
    }
    rank, ranks, _ = ranks_here() if out is not None else (0, 1, 0)
    with tempfile.TemporaryDirectory() as folder, evaluating(models.values()):
        path = Path(folder) / "scores.parquet" if out is None else Path(out)
        reward = None if ref_model is None else beta
        finished = score_run(Run(source, path, settings, loaders, reward, rank, ranks))
        if finished is not None and not finished.scored:
            raise ValueError(
                f"expected a row that can be scored, got {finished.rows} that cannot, the first for: "
                f"{finished.refused[0].reason}"
            )
        return None if finished is None else datasets.Dataset.from_parquet(str(path), keep_in_memory=out is None)
