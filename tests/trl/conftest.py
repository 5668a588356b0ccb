"""A model, data, and a way to train a few steps twice."""

import pytest

pytest.importorskip("trl")

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from fusedalign.embedded import build_embedded_model, data_directory

TRAINERS = {"sft": (SFTTrainer, SFTConfig, "sft"), "dpo": (DPOTrainer, DPOConfig, "preferences")}


@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    return build_embedded_model(tmp_path_factory.mktemp("embedded"))


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("datasets"))
    return {kind: load_dataset(str(data_directory() / kind), cache_dir=cache) for kind in ("sft", "preferences")}


@pytest.fixture
def make_trainer(embedded, datasets, tmp_path):
    """make_trainer("dpo", model=None, rows=24, peft_config=None, **config) -> a built trainer, always the same one."""
    count = 0

    def make(kind, model=None, rows=24, **options):
        nonlocal count
        count += 1
        cls, config_cls, data = TRAINERS[kind]
        peft_config = options.pop("peft_config", None)
        config = {
            "output_dir": str(tmp_path / f"run{count}"),
            "max_steps": 5,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "seed": 0,
        }
        path = embedded
        if model is not None:  # from a folder, where DPO looks for the reference
            path = tmp_path / f"model{count}"
            model().save_pretrained(path)
        torch.manual_seed(0)
        return cls(
            model=AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager"),
            args=config_cls(**config | options),
            train_dataset=datasets[data]["train"].select(range(rows)),
            eval_dataset=datasets[data]["test"].select(range(6)),
            processing_class=AutoTokenizer.from_pretrained(embedded),
            peft_config=peft_config,
        )

    return make
