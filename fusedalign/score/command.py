"""The command `fusedalign score`: its arguments, the run that they describe, and the printed summary."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusedalign.commandline import argument
from fusedalign.reports import check_writable, plot_failure, silence_bars, warn
from fusedalign.score import columns, identity, summary
from fusedalign.score.models import ModelNames
from fusedalign.score.reference import FLAG, reference_command
from fusedalign.score.rows import RowOptions, Rows
from fusedalign.score.run import POLICY, REFERENCE, Finished, Ranks, Run, check_beta, refused_path, score_run
from fusedalign.score.scorer import AUTO, BETA, Scorer, check_per_token

#: The exit status with `--strict` if rows were refused.
STRICT_STATUS = 3


@dataclass
class ScoreArguments:
    """The arguments of the command, in addition to TRL's."""

    out: str | None = argument(None, "The file to write, NAME.parquet.")
    adapter: str | None = argument(None, "Folder or Hub name of an adapter to apply to the model.")
    ref_model: str | None = argument(None, "A second model: implicit rewards beta * (logps - its logps) are added.")
    beta: float = argument(BETA, "Of the implicit rewards.")
    max_length: int | None = argument(None, "Tokens per row, truncated as in training; default: the model's limit.")
    truncation_mode: str = argument(RowOptions().truncation_mode, "keep_start or keep_end, as in TRL.")
    stride: int | None = argument(None, "Tokens between the starts of windows, for plain text longer than max_length.")
    completion_only_loss: bool | None = argument(
        None, "As in TRL's SFTConfig: whether a prompt is only context; default: yes if there is one."
    )
    assistant_only_loss: bool = argument(
        False, "As in TRL's SFTConfig: score only the assistant's turns of a conversation."
    )
    dataset_text_field: str = argument(RowOptions().dataset_text_field, "The column of plain text.")
    max_tokens_per_batch: str = argument(
        AUTO, "Token positions that run together; auto: what fits, halved when memory runs out."
    )
    per_token: list[str] = field(
        default_factory=list, metadata={"help": "Also write lists with a value per token: logps, entropy, ranks."}
    )
    accelerate_config: str | None = argument(
        None, "Start through `accelerate launch`, as in training: a file, or a name such as multi_gpu."
    )
    trust_remote_code: bool = argument(False, "Run code that comes with the model or its tokenizer.")
    strict: bool = argument(False, "End with status 3 if a row could not be scored.")


def score_command(argv: list[str]) -> int:
    """Run `fusedalign score`; returns the exit status. Errors, of arguments, model or data set, are one line."""
    from fusedalign.trl.launch import launched_elsewhere

    if any(word.partition("=")[0] == FLAG for word in argv):
        reference_command(argv)
        return 0
    parser = _parser()
    if launched_elsewhere("score", parser, argv):
        return 0
    script, model, head, own = _parse(parser, argv)
    if not sys.stderr.isatty():
        silence_bars()
    out = _out(own)
    run, kind = _run(script, model, head, own, out)
    try:
        finished = score_run(run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"what is scored lies in {run.store.folder}: the same command goes on from there"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"--out must be on a disk with space left, got {out} on a full one: what is scored lies in "
            f"{run.store.folder}, and the same command goes on from there"
        ) from error
    return 0 if finished is None else _report(finished, kind, own)


def _report(finished: Finished, kind: str, own: ScoreArguments) -> int:
    """Print the summary, save the histogram, and warn of refused rows; returns the exit status."""
    import pyarrow.parquet

    names = pyarrow.parquet.read_schema(finished.out).names
    per_token = tuple(columns.TOKENS)  # columns of lists, much larger than the others
    table = pyarrow.parquet.read_table(finished.out, columns=[name for name in names if not name.endswith(per_token)])
    about = {"out": str(finished.out), "kind": kind, "refused": finished.refused}
    print(summary.summary(table, about))
    plot = finished.out.with_suffix(".png")
    files = [str(finished.out)]
    if finished.scored:
        reason = plot_failure(functools.partial(summary.histogram, table), plot)
        if reason is None:
            files.append(str(plot))
        else:
            warn(reason)
    print("\n" + "\n".join(f"wrote {name}" for name in files))
    if finished.refused:
        path = refused_path(finished.out)
        warn(f"{len(finished.refused)} of {finished.rows} rows could not be scored: their reasons are in {path}")
        return STRICT_STATUS if own.strict else 0
    return 0


def _parser() -> Any:
    import trl

    from fusedalign.trl.arguments import HeadArguments, Parser

    types: Any = (trl.ScriptArguments, trl.ModelConfig, HeadArguments, ScoreArguments)
    parser = Parser(types, prog="fusedalign score", allow_abbrev=False)
    parser.owner = "fusedalign score"
    parser.set_defaults(dtype="auto")
    return parser


def _parse(parser: Any, argv: list[str]) -> tuple[Any, Any, Any, ScoreArguments]:
    from fusedalign.trl.arguments import read_words

    words = read_words(parser, argv)
    os.environ.update(words.env)
    script, model, head, own, *_ = parser.parse_dict(vars(words.values), allow_extra_keys=True)
    _ = head.packed  # raises
    budget = own.max_tokens_per_batch
    if budget != AUTO and not (budget.isdecimal() and int(budget)):
        raise ValueError(f"max_tokens_per_batch must be auto or a number of tokens, got {budget!r}")
    check_beta(own.beta)
    own.per_token = list(check_per_token(own.per_token))
    return script, model, head, own


def _out(own: ScoreArguments) -> Path:
    if own.out is None or Path(own.out).suffix != ".parquet":
        raise ValueError(f"--out must name the file to write, such as scores.parquet, got {own.out or 'nothing'}")
    check_writable(Path(own.out).absolute().parent, "--out")
    if Path(own.out).is_dir():
        raise ValueError(f"--out must name a file, got the folder {own.out}")
    return Path(own.out)


def _run(script: Any, model: Any, head: Any, own: ScoreArguments, out: Path) -> tuple[Run, str]:
    """The run that the arguments describe, and the kind of its rows; loads no weights."""
    ranks = Ranks.from_environment()
    names = ModelNames.find(model, own.adapter, own.ref_model, own.trust_remote_code, out)
    dataset = _dataset(script)
    tokenizer = names.tokenizer(model)
    row_options = {field.name: getattr(own, field.name) for field in dataclasses.fields(RowOptions)}
    if own.max_length is None:
        row_options["max_length"] = names.max_positions(model)
    options = RowOptions(**row_options)
    rows = Rows(dataset, tokenizer, options)
    scorer: dict[str, Any] = {
        "packed": head.packed,
        "per_token": own.per_token,
        "max_tokens": own.max_tokens_per_batch if own.max_tokens_per_batch == AUTO else int(own.max_tokens_per_batch),
        "impl": head.fused_impl,
        "workspace": head.head["workspace"],
    }
    beta = own.beta if names.reference else None
    settings = {
        "model": identity.files_digest(names.model, model.model_revision),
        "adapter": names.adapter and identity.files_digest(names.adapter, None),
        "ref_model": names.reference and identity.files_digest(names.reference, None),
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "load_in_8bit": model.load_in_8bit,
        "load_in_4bit": model.load_in_4bit and [model.bnb_4bit_quant_type, model.use_bnb_nested_quant],
        "tokenizer": identity.tokenizer_digest(tokenizer),
        "dataset": identity.dataset_digest(rows.dataset),
        **dataclasses.asdict(options),
        "beta": beta,
        "per_token": own.per_token,
        "max_tokens_per_batch": scorer["max_tokens"],
        "fused_packed": head.packed,
        "fused_impl": head.fused_impl,
    }
    loaders: dict[str, Callable[[], Scorer]] = {POLICY: lambda: Scorer(names.load(model, ranks.local_rank), **scorer)}
    if names.reference is not None:
        loaders[REFERENCE] = lambda: Scorer(names.load(model, ranks.local_rank, reference=True), **scorer)
    return Run(rows, out, settings, loaders, beta, ranks.rank, ranks.world_size), rows.kind


def _dataset(script: Any) -> Any:
    from fusedalign.trl.data import check_split, named_splits

    if script.dataset_name and script.dataset_streaming:
        raise ValueError("dataset_streaming must be false, since shards are read by number, got true")
    splits = named_splits(script)
    check_split("dataset_train_split", script.dataset_train_split, script.dataset_name, splits)
    return splits[script.dataset_train_split]
