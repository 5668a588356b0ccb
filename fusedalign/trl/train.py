"""The training commands: build the Fused trainer, train, save."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc
import torch
import transformers
import trl
from jinja2 import TemplateError

import fusedalign.trl
from fusedalign.commandline import one_line
from fusedalign.losses import cpo, dpo, kto
from fusedalign.losses.common import check_loss_type
from fusedalign.methods import METHODS
from fusedalign.reports import plot_failure, silence_bars
from fusedalign.trl.adapters import Adapter, find_adapter, load_adapter, merge
from fusedalign.trl.arguments import Arguments, is_experimental, parse, trl_class
from fusedalign.trl.card import Card
from fusedalign.trl.contents import left_out
from fusedalign.trl.data import load_data
from fusedalign.trl.description import changed_fields, describe, progress
from fusedalign.trl.files import is_local
from fusedalign.trl.folder import RunFolder, claimed
from fusedalign.trl.launch import command_line
from fusedalign.trl.lengths import check_lengths
from fusedalign.trl.models import (
    check_ends,
    check_has_head,
    check_has_template,
    check_template,
    load_processing_class,
    model_path,
    refused_row,
    unanswered_row,
)
from fusedalign.trl.record import MetricsFile, Written, plot_metrics
from fusedalign.trl.redaction import Redactor
from fusedalign.trl.ref_cache import read_cache
from fusedalign.trl.reference import keyed
from fusedalign.trl.refusals import unwrapped
from fusedalign.trl.run_file import RunFile, read_previous
from fusedalign.trl.steps import show_steps, shows_bars
from fusedalign.trl.suggestions import suggest
from fusedalign.trl.trackers import check_trackers
from fusedalign.trl.trainers import Fused

_logger = logging.getLogger(__name__)


def build(method: str, arguments: Arguments, *, fused: bool = True) -> Any:
    """The trainer on the model and data that `arguments` name: the Fused one, or stock TRL's with nothing attached.

    Raises:
        ValueError: no model or data named, a data set without the split or columns, a model without an LM head.
        FileNotFoundError: a folder without a model.
    """
    if fused and arguments.fused.ref_logps is not None:
        read_cache(arguments.fused.ref_logps)  # fails before data and model are loaded
    name = METHODS[method].trainer
    cls = getattr(fusedalign.trl, f"Fused{name}") if fused else keyed(trl_class(name))
    trainer = assemble(method, arguments, cls, *load_data(method, arguments))
    _check_vocabulary(trainer)
    return trainer


def _check_vocabulary(trainer: Any) -> None:
    """Raise ValueError for tokens in the data that the model does not have; on a GPU they would end the process."""
    dataset, size = trainer.train_dataset, unwrapped(trainer, trainer.model).config.get_text_config().vocab_size
    if "input_ids" not in (dataset.column_names or ()) or not hasattr(dataset, "__len__") or not len(dataset):
        return
    largest = pc.max(pc.list_flatten(dataset.with_format("arrow").select_columns("input_ids")[:]["input_ids"])).as_py()
    if largest is not None and largest >= size:
        raise ValueError(f"input_ids must be below {size}, the model's vocabulary, got {largest}")


def assemble(method: str, arguments: Arguments, cls: Any, train_dataset: Any, eval_dataset: Any) -> Any:
    """The trainer of the class `cls` on the model that `arguments` name and on data of `load_data`; see `build`."""
    script, training, model, *_ = arguments
    fused = issubclass(cls, Fused)
    _check_loss_types(method, training)
    _check_evaluated(script, training, eval_dataset)
    path, adapter, training.model_init_kwargs, processing_class = find_model(method, arguments)
    options: dict[str, Any] = {"quantization_config": trl.get_quantization_config(model)}
    if is_experimental(method):
        # These trainers load the model with model_init_kwargs only, and by default spread it over devices.
        training.model_init_kwargs |= {"device_map": None, **options}
        options = {}
    _check_tokens(method, training, processing_class, path, train_dataset)
    if is_experimental(method):  # these trainers read `pad_token` before setting it
        processing_class.pad_token = processing_class.pad_token or processing_class.eos_token
    instance: Any = path
    if adapter is not None:
        instance = load_adapter(adapter, {**training.model_init_kwargs, **options})
        training.model_init_kwargs, options = None, {}
    try:
        trainer = cls(
            model=instance,
            args=training,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=trl.get_peft_config(model),
            **options,
            **(arguments.fused.trainer_options if fused else {}),
        )
    except (TemplateError, TypeError, AttributeError, RuntimeError) as error:
        splits = {script.dataset_train_split: train_dataset, script.dataset_test_split: eval_dataset}
        reason = _row_fault(error, splits, processing_class, path)
        if reason is None:
            raise
        raise ValueError(reason.format(script.dataset_name or "datasets")) from error
    if training.process_index == 0:
        for role, text in left_out(train_dataset, trainer.processing_class).items():
            _logger.warning(
                "the chat template of %s leaves out messages of %r, such as %r: the model does not see them",
                *(getattr(training, "chat_template_path", None) or path, role, text[:60]),
            )
    if not fused:  # the Fused trainers check lengths themselves
        for split, dataset in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
            if dataset is not None:
                check_lengths(dataset, training, split)
    if script.ignore_bias_buffers:  # DDP cannot broadcast boolean buffers
        buffers = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = buffers
    return trainer


def _row_fault(error: Exception, splits: dict[str, Any], processing_class: Any, path: str) -> str | None:
    """Which row a chat template or TRL cannot use, if that is why a trainer was not built; {} stands for the data."""
    if isinstance(error, RuntimeError) and not isinstance(error, TemplateError):
        row = unanswered_row(splits) if "no assistant tokens" in str(error) else None
        return row and f"assistant_only_loss needs a message of the assistant in each row, got {{}}, {row}"
    row = refused_row(processing_class, splits)
    reason = one_line(error).replace("{", "{{").replace("}", "}}")
    return row and f"expected conversations that the chat template of {path} accepts, got {{}}, {row}: {reason}"


class FoundModel(NamedTuple):
    """The model that a command names, before its weights are loaded."""

    path: str
    """folder or Hub name"""
    adapter: Adapter | None
    """the adapter that `path` holds, to be trained further"""
    options: dict[str, Any]
    """of `from_pretrained`"""
    processing_class: Any
    """processor, or tokenizer"""


def find_model(method: str, arguments: Arguments) -> FoundModel:
    """The model that a training's arguments name, and its tokenizer.

    Raises:
        ValueError: no model named, or one without an LM head or a tokenizer.
        FileNotFoundError: a folder without a model.
    """
    training, model = arguments.training, arguments.model
    trust, revision = getattr(training, "trust_remote_code", False), model.model_revision
    path, adapter = _find_path(arguments, trust)
    if adapter is None:
        check_has_head(path, "model_name_or_path", revision=revision, trust_remote_code=trust)
    options = {
        "revision": revision,
        "trust_remote_code": trust,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    load = functools.partial(load_processing_class, path) if adapter is None else adapter.processing_class
    auto = transformers.AutoTokenizer if is_experimental(method) else transformers.AutoProcessor
    return FoundModel(path, adapter, options, load(auto=auto, revision=revision, trust_remote_code=trust))


def _find_path(arguments: Arguments, trust_remote_code: bool) -> tuple[str, Adapter | None]:
    """The folder or Hub name, and the adapter in it if that is to be trained further.

    With merge_adapter, or for a new adapter on top, the adapter is merged into `OUTPUT_DIR/merged-model` first; a new
    adapter's configuration names that folder.
    """
    training, model, merges = arguments.training, arguments.model, arguments.fused.merge_adapter
    path = model_path(model.model_name_or_path, training)
    adapter = find_adapter(path, model.model_revision, trust_remote_code=trust_remote_code)
    if adapter is None and merges:
        raise ValueError(f"merge_adapter must be false where model_name_or_path is no adapter, got true with {path}")
    if adapter is None or not (merges or model.use_peft):
        return path, adapter
    folder = Path(training.output_dir) / "merged-model"
    with training.main_process_first(desc="merging the adapter"):
        if training.process_index == 0:
            merge(adapter, folder, dtype=model.dtype, trust_remote_code=trust_remote_code)
    return str(folder), None


def _check_tokens(method: str, training: Any, processing_class: Any, path: str, train_dataset: Any) -> None:
    """Raise where the tokenizer or chat template lacks what these training data need."""
    template = getattr(training, "chat_template_path", None)
    check_template(template)
    example: dict[str, Any] = next(iter(train_dataset), {})
    if template is None and trl.is_conversational(example):
        check_has_template(processing_class, path)
    if getattr(training, "eos_token", None) is not None:  # TRL sets it
        return
    # TRL appends an EOS to answers in plain text; the template ends a conversation.
    is_plain = not (trl.is_conversational(example) or "input_ids" in example)
    pads = getattr(training, "pad_token", None) is None
    check_ends(processing_class, path, pads=pads, ends=is_plain or is_experimental(method))


def _check_loss_types(method: str, training: Any) -> None:
    """Raise ValueError for an unknown loss; TRL raises in the first step, after an earlier run was removed."""
    known = {"dpo": dpo.LOSS_TYPES, "kto": kto.LOSS_TYPES}
    if method in known:
        names = training.loss_type
        for name in [names] if isinstance(names, str) else names:
            check_loss_type(name, known[method])
    elif method in ("cpo", "simpo"):
        check_loss_type(training.loss_type, (*cpo.LOSS_TYPES, "simpo"))


def _check_evaluated(script: Any, training: Any, eval_dataset: Any) -> None:
    """Raise ValueError for settings that need an evaluation where the data have no split for it."""
    if eval_dataset is not None:
        return
    for name, needs_evaluation in (
        ("load_best_model_at_end", training.load_best_model_at_end),
        ("lr_scheduler_type", training.lr_scheduler_type == "reduce_lr_on_plateau"),
    ):
        if needs_evaluation:
            raise ValueError(
                f"{name}={getattr(training, name)} needs an evaluation, got data without a split for it: "
                f"add the split {script.dataset_test_split}, or leave {name} out"
            )


class Extras(NamedTuple):
    """What a command writes in addition to model, metrics and plot."""

    record: RunFile
    card: Card


def run(trainer: Any, folder: RunFolder, extras: Extras | None = None) -> Written:
    """Train, then save model, metrics and plot into the trainer's output directory, held by `folder.claimed`."""
    metrics = MetricsFile(folder.metrics)
    trainer.add_callback(metrics)
    if extras:
        extras.card.attach(trainer)
    folder.begin()
    with extras.record if extras else contextlib.nullcontext():
        _keep_token_out_of_files(trainer.args)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.save_model(str(folder.path))
        written = _written(trainer, folder, metrics, extras)
        if extras:
            extras.record.finish()
            written = written._replace(record=folder.record if extras.record.complete else None)
        if trainer.args.push_to_hub:
            trainer.push_to_hub()
    return written


def _keep_token_out_of_files(args: Any) -> None:
    """Move the Hub's token to HF_TOKEN: transformers saves all arguments in training_args.bin, which a push uploads."""
    if args.hub_token:
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None


def _written(trainer: Any, folder: RunFolder, metrics: MetricsFile, extras: Extras | None) -> Written:
    """Draw the plot and write the card, in the first process."""
    failures = [] if metrics.complete else [f"{folder.metrics} lacks lines that could not be written"]
    plot, card = None, None
    if trainer.is_world_process_zero():
        failure = plot_failure(lambda path: plot_metrics(trainer.state.log_history, path), folder.plot)
        plot = folder.plot if failure is None else None
        failures += [failure] if failure else []
        if extras:
            failure = extras.card.failure(trainer)
            card = extras.card.path if failure is None else None
            failures += [failure] if failure else []
    return Written(folder.path, folder.metrics if metrics.complete else None, plot, tuple(failures), card=card)


def train(method: str, argv: Sequence[str]) -> tuple[Any, Written]:
    """The whole command: parse, claim the output directory, build, run. Returns the trainer and the written files.

    Raises:
        KeyboardInterrupt: its text names the saved files and the command that resumes the run.
    """
    arguments = parse(method, argv)
    redactor = Redactor(*arguments)  # before `build` clears fields
    check_trackers(arguments.training.report_to)
    if not shows_bars(arguments.training):
        silence_bars()
    with claimed(arguments) as folder:
        try:
            trainer = build(method, arguments)
            is_main = trainer.is_world_process_zero()
            if is_main:
                print(trainer.layouts, flush=True)
            changed = changed_fields(method, argv)
            extras = Extras(_record(method, argv, arguments, changed, trainer, folder, redactor), _card(arguments))
            written = run(trainer, folder, extras)
            suggestions = suggest(method, arguments, changed, trainer) if is_main else ()
            return trainer, written._replace(
                suggestions=tuple(x._replace(words=tuple(redactor.words(x.words))) for x in suggestions)
            )
        except KeyboardInterrupt:
            is_main = arguments.training.process_index == 0
            command, words = map(redactor.words, command_line(method, argv))
            raise KeyboardInterrupt(folder.kept(command, words) if is_main else "") from None


def _record(
    method: str,
    argv: Sequence[str],
    arguments: Arguments,
    changed: Sequence[str],
    trainer: Any,
    folder: RunFolder,
    redactor: Redactor,
) -> RunFile:
    """The record of a run, in which its steps are shown as lines of a table."""
    throughput = show_steps(trainer, counts=is_experimental(method))
    return RunFile(
        folder.record if folder.lock else None,
        shlex.join(redactor.words(["fusedalign", method, *argv])),
        lambda: describe(method, arguments, changed, trainer, folder),
        lambda: progress(trainer, throughput),
        read_previous(folder.record) if folder.continues else [],
        redactor,
    )


def _card(arguments: Arguments) -> Card:
    name = None if arguments.mixture.datasets else arguments.script.dataset_name
    on_hub = name if name and not is_local(name) else None
    return Card(Path(arguments.training.output_dir), str(arguments.model.model_name_or_path), on_hub)


def tokenizer_of(trainer: Any) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer, also where the processing class is a processor that holds one."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
