"""Models, data, and builders of trainers that train a few steps."""

import functools
import gc

import pytest

pytest.importorskip("trl")

import plain
import tiny
import torch
from accelerate.utils import imports
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from fusedalign.embedded import build_embedded_model
from fusedalign.trl import attach

AUTO = {"t5": AutoModelForSeq2SeqLM, "qwen2_5_vl": AutoModelForImageTextToText}


@pytest.fixture(scope="session", autouse=True)
def _quick_garbage_collection():
    """Freeze imported objects: the garbage collection after each training would otherwise take half of its time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _cached_package_lookup():
    """Cache a package lookup that every training step repeats many times."""
    original = imports._is_package_available
    imports._is_package_available = functools.cache(original)
    yield
    imports._is_package_available = original


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """tiny_folder("qwen3") -> a folder with that model of `tiny.MODELS`, always with the same weights."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            tiny.save_model(name, folders[name])
        return folders[name]

    return folder


@pytest.fixture(scope="session")
def embedded_folder(tmp_path_factory):
    """A folder with the small model that the recipes train."""
    return build_embedded_model(tmp_path_factory.mktemp("embedded"))


@pytest.fixture(scope="session")
def build(tiny_folder, tmp_path_factory):
    """build("dpo", "stock" | "attach" | "fused" | "plain", model="qwen3", ..., **config) -> a trainer with fixed seeds.

    "plain" is the Fused trainer with log-probabilities from full logits, where stock TRL refuses.
    """
    output = str(tmp_path_factory.mktemp("runs"))
    tokenizer, datasets = tiny.tokenizer(), {}

    def dataset(kind, n):
        if (kind, n) not in datasets:
            datasets[kind, n] = tiny.data(kind, n)
        return datasets[kind, n]

    def make(
        kind, variant, model="qwen3", rows=12, cls=None, arguments=(), head=(), prepare=None, data=None, **options
    ):
        stock, fused, config_cls = tiny.classes(kind)
        config = {
            "output_dir": output,
            "max_steps": 5,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-3,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "seed": 0,
            "max_length": 64,
        }
        if kind in ("grpo", "rloo"):
            del config["max_length"]
        arguments = {name: make() for name, make in dict(arguments).items()}
        lm = arguments.pop("model", None)
        if lm is None:
            lm = AUTO.get(model, AutoModelForCausalLM).from_pretrained(tiny_folder(model), attn_implementation="eager")
        if prepare is not None:
            lm = prepare(lm)
        torch.manual_seed(0)
        if cls is None:
            cls = {"fused": fused, "plain": fused and plain.with_plain_head(fused)}.get(variant, stock)
        trainer = cls(
            model=lm,
            args=config_cls(**config | options),
            train_dataset=dataset(kind, rows) if data is None else data,
            **({} if kind in ("grpo", "rloo") or data is not None else {"eval_dataset": dataset(kind, 6)}),
            **({"processing_class": tokenizer} | arguments),
            **(dict(head) if variant == "fused" else {}),
        )
        return attach(trainer, **dict(head)) if variant == "attach" else trainer

    return make


@pytest.fixture(scope="session")
def stock_history(build):
    """stock_history(kind, **options) -> every logged row of stock TRL, cached for all tests."""
    histories = {}

    def history(kind, **options):
        key = repr((kind, sorted(options.items(), key=lambda item: item[0])))
        if key not in histories:
            histories[key] = tiny.history(build(kind, "stock", **options))
        return histories[key]

    return history
