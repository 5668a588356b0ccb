"""The trainer of a training command, built as the command builds it, but without weights and on a sample of its data.

The model is on the meta device, so everything that a constructor checks and decides is checked and decided by the
code that trains: values, columns, chat template, tokens, adapters, head, layout of batches.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import AutoConfig, PreTrainedModel

import fusedalign.trl
from fusedalign.methods import METHODS
from fusedalign.packing import LayoutError
from fusedalign.packing.proof import refusal, twin
from fusedalign.trl import stock, train
from fusedalign.trl.arguments import Arguments, parse
from fusedalign.trl.construction import replaced
from fusedalign.trl.data import load_data
from fusedalign.trl.folder import RunFolder, find_checkpoint
from fusedalign.trl.layouts import MASKED, models_of
from fusedalign.trl.ref_cache import read_cache
from fusedalign.trl.refusals import unwrapped
from fusedalign.trl.trackers import check_trackers

#: Most rows of a split that are tokenised; a larger split is sampled.
SAMPLE = 1000
#: Most rows of the evaluation data: they are only checked.
EVAL_SAMPLE = 100
#: Most parameters of a small model that is built to prove a layout where there is no GPU.
_PROVED_ON_CPU = 20_000_000


class Sample(NamedTuple):
    """A trainer without weights, and the rows that it was given."""

    method: str
    arguments: Arguments
    trainer: Any
    dataset: Any
    """the rows of the training split that the trainer was given, as `load_data` returns them"""
    total: int | None
    """rows of the whole split; None: a stream"""
    output: str
    """the output directory of the training"""
    obstacle: str | None
    """why the training would not start in its output directory as that is now"""

    @property
    def is_partial(self) -> bool:
        """Whether the split may have more rows."""
        return self.total is None or self.total > len(self.dataset)


@contextlib.contextmanager
def sampled_training(method: str, argv: list[str]) -> Iterator[Sample]:
    """Yield the sample of a training command; nothing is written but files in a temporary folder.

    Raises:
        ValueError, TypeError, OSError: as the command raises before its first step.
    """
    arguments = parse(method, argv)
    training, output = arguments.training, arguments.training.output_dir
    check_trackers(training.report_to)
    obstacle = _obstacle(arguments)
    if arguments.fused.ref_logps is not None:
        read_cache(arguments.fused.ref_logps)
    train_dataset, eval_dataset = load_data(method, arguments)
    total = len(train_dataset) if hasattr(train_dataset, "__len__") else None
    with tempfile.TemporaryDirectory() as folder, _without_weights():
        training.output_dir, training.push_to_hub = folder, False
        dataset = _sampled(train_dataset, SAMPLE, training.seed)
        evaluated = eval_dataset if eval_dataset is None else _sampled(eval_dataset, EVAL_SAMPLE, training.seed)
        trainer = train.assemble(method, arguments, weightless(method), dataset, evaluated)
        yield Sample(method, arguments, trainer, dataset, total, output, obstacle)


def weightless(method: str) -> Any:
    """The Fused class of a method's trainer, with `Weightless` before it."""
    cls = getattr(fusedalign.trl, f"Fused{METHODS[method].trainer}")
    return type(cls.__name__, (Weightless, cls), {"__doc__": cls.__doc__, "__module__": cls.__module__})


class Weightless:
    """What a Fused trainer leaves out where its models have no weights; comes before its class among the bases."""

    @property
    def _head_device(self) -> Any:
        trainer: Any = self
        return trainer.args.device

    def _replacements(self) -> dict[str, Any]:
        """Leave out the digest of the weights too, a key of precomputed references."""
        parent: Any = super()
        return parent._replacements() | stock.hash_replacements()

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """Leave the model where it is."""

    def _settle(self) -> None:
        """Decide the layout, with a proof on a small model; on a CPU only if that is quick."""
        trainer: Any = self
        parent: Any = super()
        on_cpu = trainer.accelerator.device.type == "cpu"
        if trainer._packed is None or not on_cpu or all(map(_is_quickly_proved, models_of(trainer))):
            parent._settle()
            return
        trainer.layouts.groups = trainer._groups()
        reason = "packed='auto' packs on CUDA" if trainer._packed == "auto" else f"packed={trainer._packed}"
        trainer.layouts.kind, trainer.layouts.reason = MASKED, f"{reason}; the proof is made when the training starts"
        trainer._packed = None

    def _check_reference(self, model: Any) -> None:
        """Leave out the comparison of a cache with the weights."""

    def _precompute_ref_logps(self, dataset: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        """The columns of a cache, which is checked for the rows; else none."""
        trainer: Any = self
        parent: Any = super()
        return dataset if trainer._ref_cache is None else parent._precompute_ref_logps(dataset, name, *args, **kwargs)


def layout_refusal(trainer: Any) -> str | None:
    """Why the model cannot run packed on any device, as far as its configuration shows."""
    return refusal(unwrapped(trainer, trainer.model))


def _is_quickly_proved(model: Any) -> bool:
    try:
        small = twin(model, torch.device("meta"))
    except LayoutError:
        return True  # the proof fails at once
    return sum(parameter.numel() for parameter in small.parameters()) <= _PROVED_ON_CPU


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    """Within this context models of transformers are made on the meta device from their configuration alone."""
    with (
        mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(_from_configuration)),
        replaced(sys.modules[train.__name__], merge=_merge_nothing),
    ):
        yield


def _from_configuration(cls: Any, path: Any, *_: Any, config: Any = None, **options: Any) -> Any:
    """Stands for `PreTrainedModel.from_pretrained`."""
    dtype, attention = options.pop("dtype", None), options.pop("attn_implementation", None)
    for name in ("device_map", "quantization_config", "low_cpu_mem_usage", "use_safetensors", "weights_only"):
        options.pop(name, None)
    if config is None:
        config, _ = cls.config_class.from_pretrained(path, return_unused_kwargs=True, **options)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    if dtype in (None, "auto"):
        dtype = config.dtype or torch.float32
    with torch.device("meta"):
        model = cls._from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
    model.config.name_or_path = str(path)
    model.to = lambda *args, **kwargs: model  # there is nothing to move
    model.resize_token_embeddings = functools.partial(model.resize_token_embeddings, mean_resizing=False)  # no values
    return model.eval()


def _merge_nothing(original: Any, adapter: Any, folder: Path, *, trust_remote_code: bool = False, **_: Any) -> None:
    """Stands for `merge`: the configuration and the tokenizer of the merged model, without its weights."""
    options = {"revision": adapter.config.revision, "trust_remote_code": trust_remote_code}
    AutoConfig.from_pretrained(adapter.base, **options).save_pretrained(folder)
    adapter.processing_class(trust_remote_code=trust_remote_code).save_pretrained(folder)


def _sampled(dataset: Any, count: int, seed: int) -> Any:
    """At most `count` rows: the first ones of a stream, rows of all parts of another data set, in its order."""
    if not hasattr(dataset, "__len__"):
        return dataset.take(count)
    if len(dataset) <= count:
        return dataset
    return dataset.select(sorted(random.Random(seed).sample(range(len(dataset)), count)))


def _obstacle(arguments: Arguments) -> str | None:
    """Why the training would not start in its output directory: one that holds a run is no fault of the rest.

    Raises:
        ValueError: the checkpoint to resume from does not exist.
    """
    output = Path(arguments.training.output_dir)
    checkpoint = find_checkpoint(arguments.training.resume_from_checkpoint, output)
    if output.is_dir():
        folder = RunFolder(output, checkpoint)
        try:
            folder.check(arguments.fused.overwrite_output_dir, arguments.model.model_name_or_path)
        except ValueError as error:
            return f"the training would not start: {error}"
    return None
