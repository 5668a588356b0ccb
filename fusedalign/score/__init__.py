"""Log-probabilities of a batch or of a data set; files of scores survive interruptions."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from fusedalign.score.batch import SequenceLogps, sequence_logps
from fusedalign.score.scorer import AUTO, BETA

__all__ = ["SequenceLogps", "score", "sequence_logps"]


def score(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    *,
    ref_model: Any = None,
    beta: float = BETA,
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
    """Log-probabilities of a data set under a model. Needs TRL, which tokenizes the rows.

    Args:
        model: a causal LM of transformers, or a `PeftModel` around one, on its device.
        tokenizer: the tokenizer of the model.
        dataset: a `datasets.Dataset` of pairs (chosen, rejected), prompts with completions, conversations (messages)
            or plain text (text).
        ref_model: a reference model; implicit rewards beta * (logps - its logps) are added.
        beta: of the implicit rewards.
        out: a file NAME.parquet; repeating an interrupted call with the same file continues it. Default: none.
        max_length: tokens per row; default: the maximum sequence length of the model.
        truncation_mode: "keep_start" or "keep_end", as in TRL.
        stride: plain text longer than `max_length` is read in windows that start so many tokens apart.
        completion_only_loss, assistant_only_loss: as in TRL's `SFTConfig`.
        per_token: of "logps", "entropy", "ranks": lists with a value per token.
        max_tokens_per_batch: token positions that run together; "auto": what fits.
        packed: as in `sequence_logps`.
        options: further options of `fusedalign.linear_logps`, such as `impl`.

    Returns:
        A `datasets.Dataset` with the columns of docs/scoring.md, without rows that could not be scored. With `out` and
        several processes (`torchrun`) None on all ranks but the first.

    Raises:
        ValueError: no row can be scored, or `out` has another model, other data or other settings.

    Example::

        pairs = score(model, tokenizer, dataset)
        good = pairs.filter(lambda row: row["margin"] > 0)
    """
    import datasets

    from fusedalign.score import identity
    from fusedalign.score.rows import RowOptions, Rows
    from fusedalign.score.run import POLICY, REFERENCE, Ranks, Run, check_beta, evaluating, score_run
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
    loaders = {name: lambda module=module: Scorer(module, **scorer) for name, module in models.items()}
    settings = {
        **{f"{name} weights": identity.model_digest(module) for name, module in models.items() if out is not None},
        "tokenizer": identity.tokenizer_digest(tokenizer),
        "dataset": None if out is None else identity.dataset_digest(source.dataset),
        **dataclasses.asdict(rows),
        "beta": None if ref_model is None else beta,
        "per_token": list(per_token),
        "max_tokens_per_batch": max_tokens_per_batch,
        "packed": packed,
        **{name: value if isinstance(value, (int, float)) else str(value) for name, value in options.items()},
    }
    ranks = Ranks() if out is None else Ranks.from_environment()
    with tempfile.TemporaryDirectory() as folder, evaluating(models.values()):
        path = Path(folder) / "scores.parquet" if out is None else Path(out)
        reward_beta = None if ref_model is None else beta
        finished = score_run(Run(source, path, settings, loaders, reward_beta, ranks.rank, ranks.world_size))
        if finished is not None and not finished.scored:
            raise ValueError(
                f"expected a row that can be scored, got {finished.rows} that cannot, the first for: "
                f"{finished.refused[0].reason}"
            )
        return None if finished is None else datasets.Dataset.from_parquet(str(path), keep_in_memory=out is None)
