"""The command `fusedalign score`: its words, the model and the data that they name, and what it prints at the end."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusedalign.embedded import EMBEDDED_NAME, build_embedded_model
from fusedalign.reports import check_writable, plot_failure, warn
from fusedalign.score import columns, identity, summary
from fusedalign.score.reference import FLAG, reference_command
from fusedalign.score.rows import RowOptions, Rows
from fusedalign.score.run import POLICY, REFERENCE, Finished, Run, check_beta, ranks_here, score_run
from fusedalign.score.scorer import AUTO, PER_TOKEN, Scorer, check_per_token

#: The exit status where rows were refused and `--strict` is given.
STRICT_STATUS = 3

BETA = 0.1


@dataclass
class ScoreArguments:
    """The command's own flags, in TRL's style."""

    out: str | None = field(default=None, metadata={"help": "The file to write, NAME.parquet."})
    adapter: str | None = field(default=None, metadata={"help": "An adapter's folder or Hub name, put on the model."})
    ref_model: str | None = field(
        default=None, metadata={"help": "A second model: implicit rewards beta * (logps - its logps) are added."}
    )
    beta: float = field(default=BETA, metadata={"help": "Of the implicit rewards."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a row, as a trainer truncates it; the model's own limit if not given."},
    )
    truncation_mode: str = field(
        default=RowOptions().truncation_mode, metadata={"help": "keep_start or keep_end, as TRL's."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Plain text longer than max_length is read in windows this far apart."}
    )
    completion_only_loss: bool | None = field(
        default=None, metadata={"help": "As TRL's SFTConfig: whether a prompt is context alone; yes if there is one."}
    )
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "As TRL's SFTConfig: score the assistant's turns of a conversation alone."}
    )
    dataset_text_field: str = field(
        default=RowOptions().dataset_text_field, metadata={"help": "The column of plain text."}
    )
    max_tokens_per_batch: str = field(
        default=AUTO, metadata={"help": "Token positions that run together; auto takes what fits, and halves on need."}
    )
    per_token: list[str] = field(
        default_factory=list, metadata={"help": f"Also write lists of a value a token: {', '.join(PER_TOKEN)}."}
    )
    accelerate_config: str | None = field(
        default=None, metadata={"help": "Start through `accelerate launch`, as in training: a file, or multi_gpu, ..."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model or its tokenizer."}
    )
    strict: bool = field(
        default=False, metadata={"help": f"End with status {STRICT_STATUS} where a row could not be scored."}
    )


def score_command(argv: list[str]) -> int:
    """Run `fusedalign score` with the words that follow it.

    Returns:
        The exit status.

    Raises:
        ValueError, FileNotFoundError: words, a model or data that do not fit; one line.
    """
    from fusedalign.trl.launch import launched_elsewhere

    parser = _parser()
    if {"-h", "--help", "--help_all"} & set(argv):
        print(_help(parser))
        return 0
    if any(word.partition("=")[0] == FLAG for word in argv):
        reference_command(argv)
        return 0
    if launched_elsewhere("score", parser, argv):
        return 0
    script, model, head, own = _parse(parser, argv)
    _silence_bars()
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


def _silence_bars() -> None:
    """Leave out the libraries' progress bars where stderr is no terminal."""
    from datasets.utils import logging as datasets_logging
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        datasets_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()


def _report(finished: Finished, kind: str, own: ScoreArguments) -> int:
    """Print the summary, draw the histogram, and tell of refused rows."""
    import pyarrow.parquet

    names = pyarrow.parquet.read_schema(finished.out).names
    lists = tuple(columns.TOKENS)  # which may be many times as large as the rest
    table = pyarrow.parquet.read_table(finished.out, columns=[name for name in names if not name.endswith(lists)])
    about = {"out": str(finished.out), "kind": kind, "refused": finished.refused}
    print(summary.summary(table, about))
    picture = finished.out.with_suffix(".png")
    files = [str(finished.out)]
    if finished.scored:
        reason = plot_failure(functools.partial(summary.histogram, table), picture)
        if reason is None:
            files.append(str(picture))
        else:
            warn(reason)
    print("\n" + "\n".join(f"wrote {name}" for name in files))
    if finished.refused:
        side = finished.out.with_suffix(".refused.jsonl")
        warn(f"{len(finished.refused)} of {finished.rows} rows could not be scored: their reasons are in {side}")
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


_USUAL = (
    "model_name_or_path", "adapter", "dataset_name", "dataset_config", "dataset_train_split", "out", "ref_model",
    "beta", "max_length", "truncation_mode", "stride", "completion_only_loss", "assistant_only_loss",
    "dataset_text_field", "max_tokens_per_batch", "per_token", "strict", "dtype", "load_in_4bit", "load_in_8bit",
    "trust_remote_code", "fused_impl", "fused_packed", "accelerate_config",
)  # fmt: skip


def _help(parser: Any) -> str:
    from fusedalign.trl.help import help_line

    actions = {action.dest: action for action in parser._actions}
    lines = [help_line(actions[name]) for name in _USUAL if name in actions]
    return "\n".join([_ABOUT, "", *lines])


_ABOUT = """\
fusedalign score: log-probabilities of a data set under a model
usage: fusedalign score --model_name_or_path M --dataset_name D --out scores.parquet [--config FILE.yaml]

Pairs (chosen, rejected), prompts with completions, conversations (messages), or plain text (text);
tokens and truncation are those of TRL's trainers. A run that is interrupted goes on where it was when
the same command is given again. Rows that cannot be scored go to scores.refused.jsonl. Under `torchrun`
or `accelerate launch` the processes share the work.

       fusedalign score --ref_cache ref.parquet --method dpo --config recipes/dpo.yaml [--field VALUE ...]

The reference log-probabilities of a DPO or KTO training, given the training's own words: it then takes
--ref_logps ref.parquet and loads no reference model."""


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
    """The run that the words describe, and the kind of its rows; no weights are loaded yet."""
    rank, ranks, local = ranks_here()
    names = _Names.find(model, own, out)
    dataset = _dataset(script)
    tokenizer = names.tokenizer(model)
    options = RowOptions(
        max_length=names.limit(model) if own.max_length is None else own.max_length,
        truncation_mode=own.truncation_mode,
        stride=own.stride,
        completion_only_loss=own.completion_only_loss,
        assistant_only_loss=own.assistant_only_loss,
        dataset_text_field=own.dataset_text_field,
    )
    rows = Rows(dataset, tokenizer, options)
    scorer: dict[str, Any] = {
        "packed": head.packed,
        "per_token": own.per_token,
        "max_tokens": own.max_tokens_per_batch if own.max_tokens_per_batch == AUTO else int(own.max_tokens_per_batch),
        "impl": head.fused_impl,
        "workspace": head.fused_workspace,
    }
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
        "beta": own.beta if names.reference else None,
        "per_token": own.per_token,
        "max_tokens_per_batch": scorer["max_tokens"],
        "fused_packed": head.packed,
        "fused_impl": head.fused_impl,
    }
    loaders: dict[str, Callable[[], Scorer]] = {POLICY: lambda: Scorer(names.load(model, local), **scorer)}
    if names.reference is not None:
        loaders[REFERENCE] = lambda: Scorer(names.load(model, local, reference=True), **scorer)
    return Run(rows, out, settings, loaders, own.beta if names.reference else None, rank, ranks), rows.kind


@dataclass(frozen=True)
class _Names:
    """Folders or Hub names of what is loaded."""

    model: str
    adapter: str | None
    reference: str | None
    trust_remote_code: bool

    @classmethod
    def find(cls, model: Any, own: ScoreArguments, out: Path) -> _Names:
        """As the words say; an adapter's folder as the model is its base model and the adapter."""
        from fusedalign.trl.adapters import find_adapter
        from fusedalign.trl.models import check_folder, check_has_head

        trust, revision = own.trust_remote_code, model.model_revision
        name, adapter = model.model_name_or_path, own.adapter
        if not name:
            raise ValueError(
                f"model_name_or_path must name a model folder, a Hub model or {EMBEDDED_NAME!r}, got nothing"
            )
        path, reference = _embedded(name, out), own.ref_model and _embedded(own.ref_model, out)
        check_folder(path, "model_name_or_path", adapter=True)
        within = find_adapter(path, revision, trust_remote_code=trust)
        if within is not None:
            if adapter is not None:
                raise ValueError(
                    f"--adapter must be put on a model, got {adapter} on the adapter {path}: merge it first"
                )
            path, adapter = within.base, within.path
        elif adapter is not None and find_adapter(adapter, trust_remote_code=trust) is None:
            raise ValueError(f"--adapter must hold an adapter_config.json, got {adapter} without one")
        check_has_head(path, "model_name_or_path", revision=revision, trust_remote_code=trust)
        if reference:
            check_folder(reference, "ref_model")
            check_has_head(reference, "ref_model", trust_remote_code=trust)
        return cls(path, adapter, reference or None, trust)

    def tokenizer(self, model: Any) -> Any:
        """The tokenizer of the adapter or the model."""
        import transformers

        from fusedalign.trl.adapters import find_adapter
        from fusedalign.trl.models import load_processing_class

        trust, auto = self.trust_remote_code, transformers.AutoTokenizer
        if self.adapter is not None:
            found = find_adapter(self.adapter, trust_remote_code=trust)
            assert found is not None
            return found._replace(base=self.model).processing_class(auto=auto, trust_remote_code=trust)
        return load_processing_class(self.model, auto=auto, revision=model.model_revision, trust_remote_code=trust)

    def limit(self, model: Any) -> int | None:
        """The positions that the model has."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(
            self.model, revision=model.model_revision, trust_remote_code=self.trust_remote_code
        )
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def load(self, model: Any, local_rank: int, *, reference: bool = False) -> Any:
        """The model with its weights, in eval mode, on this rank's device."""
        import torch
        import trl

        from fusedalign.trl.adapters import find_adapter, load_adapter
        from fusedalign.trl.stock import create_model_from_path

        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        options = {
            "trust_remote_code": self.trust_remote_code,
            "attn_implementation": model.attn_implementation,
            "dtype": model.dtype,
            "device_map": {"": device} if device.type == "cuda" else None,
            "quantization_config": trl.get_quantization_config(model),
        }
        adapter = None if reference or self.adapter is None else find_adapter(self.adapter)
        if adapter is not None:
            return load_adapter(adapter._replace(base=self.model), options).eval()
        if reference:
            return create_model_from_path(str(self.reference), **options).eval()
        return create_model_from_path(self.model, **options, revision=model.model_revision).eval()


def _embedded(name: str, out: Path) -> str:
    """The folder of the embedded model, built in the folder of `out` where it is not there; any other name as it is."""
    if name != EMBEDDED_NAME:
        return name
    folder = out.absolute().parent / "embedded-model"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            built = build_embedded_model(Path(temporary) / "model")
            try:
                os.rename(built, folder)
            except OSError:  # another rank was first
                if not folder.is_dir():
                    raise
    return str(folder)


def _dataset(script: Any) -> Any:
    from fusedalign.trl.files import load_named

    name, split = script.dataset_name, script.dataset_train_split
    if not name:
        raise ValueError(
            "dataset_name must name a data set (Hub name, folder, .jsonl, .json, .parquet, .csv), got nothing"
        )
    if script.dataset_streaming:
        raise ValueError("dataset_streaming must be false, since shards are read by number, got true")
    splits = load_named(name, name=script.dataset_config)
    if split not in splits:
        raise ValueError(f"dataset_train_split must be a split of {name} ({', '.join(splits)}), got {split!r}")
    return splits[split]
