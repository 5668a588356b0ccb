"""A cached reference: the same metrics as a live one, no reference model, and refused where it is of anything else."""

import copy
import dataclasses
import json
import re

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM

from fusedalign.cli import main
from fusedalign.trl.digests import config_digest, template_digest, tokenizer_digest, weights_digest
from fusedalign.trl.kernels import liger_parts
from fusedalign.trl.ref_cache import About, about, read_cache, row_key, write_cache
from fusedalign.trl.ref_rows import reference_examples
from fusedalign.trl.reference import reference_copy

CONFIGS = {"dpo": trl.DPOConfig, "kto": trl.KTOConfig}


@pytest.fixture
def loaded(tiny_folder):
    return _load(tiny_folder)


def _load(tiny_folder, name="qwen3", **options):
    return AutoModelForCausalLM.from_pretrained(tiny_folder(name), attn_implementation="eager", **options)


def _args(kind, tmp_path, **options):
    options = {"max_length": 64, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True} | options
    return CONFIGS[kind](output_dir=str(tmp_path), report_to="none", **options)


def _sum_of_logps(model, row):
    ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels[1:])
    logps = model(ids).logits[0, :-1].float().log_softmax(-1)
    counted = labels != -100
    return logps[counted].gather(1, labels[counted, None]).sum().item()


@pytest.fixture
def cache(tmp_path, tiny_folder):
    """cache("dpo", ...) -> the path of a cache of the train and evaluation data of `build`."""
    numbers = iter(range(99))

    def write(kind, model=None, datasets=None, tokenizer=None, change=None, **options):
        args = _args(kind, tmp_path, **options)
        model = _load(tiny_folder).eval() if model is None else model.eval()
        tokenizer = tokenizer or tiny.tokenizer()
        datasets = [tiny.data(kind, 12), tiny.data(kind, 6)] if datasets is None else datasets
        rows = [row for dataset in datasets for row in reference_examples(kind, dataset, tokenizer, args)]
        with torch.no_grad():
            logps = [_sum_of_logps(model, row) for row in rows]
        record = about(model, tokenizer, args, "the-model")
        path = tmp_path / f"{next(numbers)}.parquet"
        write_cache(path, record if change is None else change(record), [row.key for row in rows], logps)
        return path

    return write


def _with(path, **head):
    return {"head": [("ref_logps", path), *head.items()]}


def _lora_config(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dpo", {}),
        ("dpo", {"max_length": 9, "packed": True}),
        ("dpo", {"max_length": 8, "truncation_mode": "keep_end"}),
        ("dpo", {"loss_type": ["ipo", "sft"], "f_divergence_type": "js_divergence"}),
        ("dpo", {"use_weighting": True, "loss_type": ["sigmoid", "hinge"]}),
        ("dpo", {"loss_type": ["aot"], "label_smoothing": 0.1}),
        ("kto", {}),
        ("kto", {"max_length": 9, "packed": True}),
        ("kto", {"loss_type": "apo_zero_unpaired"}),
    ],
)
def test_every_metric_is_that_of_the_live_and_of_the_precomputed_reference(build, cache, kind, options):
    head = {"packed": options.pop("packed", False)}
    scored = {name: x for name, x in options.items() if name in ("max_length", "truncation_mode", "loss_type")}
    trainer = build(kind, "fused", **options, **_with(cache(kind, **scored), **head))
    assert trainer.ref_model is None
    got = tiny.history(trainer)
    for reference in ({}, {"precompute_ref_log_probs": True}):
        want = build(kind, "fused", head=list(head.items()), **options, **reference)
        tiny.assert_same(got, tiny.history(want))
        if reference:
            for column in set(want.train_dataset.column_names) - set(tiny.data(kind, 1).column_names):
                assert trainer.train_dataset.features[column] == want.train_dataset.features[column]
                assert trainer.train_dataset[column][:] == (
                    pytest.approx(want.train_dataset[column][:], abs=1e-4, rel=1e-6)
                    if column.endswith("logps")
                    else want.train_dataset[column][:]
                )


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_new_adapter_has_the_base_model_as_its_reference(build, cache, loaded, kind):
    arguments = [("peft_config", lambda: tiny.lora())]
    trainer = build(kind, "fused", arguments=arguments, **_with(cache(kind, loaded)))
    assert list(trainer.model.peft_config) == ["default"]
    tiny.assert_same(tiny.history(trainer), tiny.history(build(kind, "fused", arguments=arguments)))


@pytest.mark.parametrize(
    "config",
    [
        lambda: tiny.lora(),
        lambda: _lora_config(init_lora_weights=False, modules_to_save=["norm"], use_dora=True),
        lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
    ],
)
def test_an_adapter_that_is_trained_further_is_the_reference(build, cache, loaded, config):
    torch.manual_seed(3)
    model = peft.get_peft_model(loaded, config())
    for name, parameter in model.named_parameters():
        if "default" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    path = cache("dpo", model)
    given = [("model", lambda: copy.deepcopy(model))]
    trainer = build("dpo", "fused", arguments=given, **_with(path))
    assert list(trainer.model.peft_config) == ["default"]
    assert trainer.model.active_adapter == "default"
    assert any(parameter.requires_grad for parameter in trainer.model.parameters())
    tiny.assert_same(tiny.history(trainer), tiny.history(build("dpo", "fused", arguments=given)))
    with pytest.raises(ValueError, match="expected|weights of the model as it is given"):
        build("dpo", "fused", arguments=[("model", lambda: model.get_base_model())], **_with(path))


def test_an_adapter_by_prompts_is_trained_further(build, cache, loaded):
    torch.manual_seed(3)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(loaded, config)
    path = cache("dpo", change=lambda record: dataclasses.replace(record, weights=weights_digest(model)))
    trainer = build("dpo", "fused", arguments=[("model", lambda: model)], **_with(path))
    assert list(trainer.model.peft_config) == ["default"]
    trainer.train()


def test_a_named_model_and_a_dictionary_of_evaluations(build, cache, tiny_folder):
    """The configuration is not changed, the weights that TRL loads are looked at, and one reference is not loaded."""
    evaluations = {"first": tiny.data("dpo", 4), "second": tiny.data("dpo", 6)}
    arguments = [("model", lambda: str(tiny_folder("qwen3"))), ("eval_dataset", lambda: evaluations)]
    data = tiny.data("dpo", 12)
    trainer = build("dpo", "fused", data=data, arguments=arguments, **_with(cache("dpo")))
    tiny.assert_same(tiny.history(trainer), tiny.history(build("dpo", "fused", data=data, arguments=arguments)))


def test_other_data_are_evaluated_after_a_step_too(build, cache):
    """Where TRL has no reference model any more."""
    other, train = tiny.data("dpo", 9), tiny.data("dpo", 12)
    trainer = build("dpo", "fused", **_with(cache("dpo", datasets=[other, train])), max_steps=2)
    live = build("dpo", "fused", max_steps=2)
    for each in (trainer, live):
        each.train()
    for data in (other, {"a": other, "b": train}):
        got, want = trainer.evaluate(data), live.evaluate(data)
        tiny.assert_same(*([{k: v for k, v in x.items() if not k.endswith(tiny.UNTIMED)}] for x in (got, want)))
    with pytest.raises(
        ValueError, match="every row of the eval data set, got .* without the chosen answer of row 1 of"
    ):
        trainer.evaluate(Dataset.from_list([{"prompt": "boats", "chosen": " short", "rejected": " on"}]))


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_resumed_training_goes_on_with_the_cache(build, cache, kind, tmp_path):
    options = {"output_dir": str(tmp_path / "out"), "save_strategy": "steps", "save_steps": 2, **_with(cache(kind))}
    whole = tiny.history(build(kind, "fused", **options), evaluate=False)
    trainer = build(kind, "fused", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    rows = [{k: v for k, v in row.items() if not k.endswith(tiny.UNTIMED)} for row in trainer.state.log_history]
    tiny.assert_same(rows[:5], whole[:5])
    trainer.save_model(str(tmp_path / "model"))
    files = [path.read_text() for path in (tmp_path / "model").glob("*.json")]
    assert files
    assert not any("ref_logps" in text or "parquet" in text for text in files)


def test_without_a_configuration(build, cache, tiny_folder, monkeypatch, tmp_path):
    """TRL makes one by itself."""
    monkeypatch.chdir(tmp_path)
    path = cache("dpo", max_length=trl.DPOConfig("x", bf16=False).max_length)
    monkeypatch.setattr(trl.DPOConfig, "__init__", _with_defaults(trl.DPOConfig.__init__))
    from fusedalign.trl import FusedDPOTrainer

    trainer = FusedDPOTrainer(
        _load(tiny_folder), train_dataset=tiny.data("dpo", 12), processing_class=tiny.tokenizer(), ref_logps=path
    )
    assert trainer.ref_model is None
    assert "ref_chosen_logps" in trainer.train_dataset.column_names


def _with_defaults(original):
    def init(self, *args, **options):
        original(self, *args, **{"bf16": False, "use_cpu": True, "report_to": "none"} | options)

    return init


# ------------------------------------------------------------------------------------------------------------ refusals


def _moved(model):
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    return model


def _wider_rope(model):
    model.config.rope_parameters["rope_theta"] = 5e5
    return model


def _grown(tokenizer):
    tokenizer.add_tokens(["anything"])
    return tokenizer


def _templated(tokenizer):
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "scored", "trained", "message"),
    [
        ("dpo", {}, {"prepare": _moved}, "with the weights of the model as it is given, .* made with others: pass the model the-model"),
        ("kto", {}, {"prepare": _moved}, "with the weights of the model as it is given"),
        ("dpo", {}, {"prepare": _wider_rope}, "with the configuration of the model as it is given"),
        ("dpo", {}, {"prepare": lambda model: model.bfloat16()}, "with weights in bfloat16, .* with weights in float32: set dtype='float32'"),
        ("dpo", {}, {"model": "mistral"}, "with the configuration of the model as it is given"),
        ("dpo", {}, {"arguments": [("processing_class", lambda: _grown(tiny.tokenizer()))]}, "with the tokenizer of this"),
        ("kto", {}, {"arguments": [("processing_class", lambda: _templated(tiny.tokenizer()))]}, "with the chat template of"),
        ("dpo", {"max_length": 32}, {}, "with max_length=64, got .* made with max_length=32: set max_length=32, or score"),
        ("kto", {"max_length": None}, {}, "with max_length=64, got .* made with max_length=None"),
        ("dpo", {"truncation_mode": "keep_end"}, {}, "with truncation_mode='keep_start', got .* truncation_mode='keep_end'"),
        ("kto", {}, {"per_device_train_batch_size": 3}, "with per_device_train_batch_size=3, .* made with 4: score"),
        ("kto", {"loss_type": "apo_zero_unpaired"}, {}, "with per_device_train_batch_size=4, .* made with None: score"),
        ("dpo", {}, {"rows": 13}, "every row of the train data set, got .* without the .* answer of row 13 of 13 after"),
        ("kto", {}, {"rows": 14}, "every row of the train data set, got .* without the .*completion of row 1[23] of 14 after"),
        ("dpo", {}, {"arguments": [("ref_model", lambda: None)], "ref_model": True}, "takes the place of ref_model, got both"),
        ("dpo", {}, {"precompute_ref_log_probs": True}, "takes the place of precompute_ref_log_probs, got both"),
        ("dpo", {}, {"sync_ref_model": True}, "excludes sync_ref_model, got both"),
        ("dpo", {}, {"ld_alpha": 0.5}, "got ld_alpha=0.5, which weighs its tokens: leave one of them out"),
        ("dpo", {}, {"data": tiny.data("dpo", 12).to_iterable_dataset()}, "got a stream as the train data set: leave"),
        ("kto", {}, {"data": tiny.data("kto", 12).add_column("image", [None] * 12)}, "with the column image: leave"),
    ],
)  # fmt: skip
def test_a_cache_of_anything_else_is_refused(build, cache, tiny_folder, kind, scored, trained, message):
    if trained.pop("ref_model", False):
        trained["arguments"] = [("ref_model", lambda: _load(tiny_folder))]
    path = cache(kind, **scored)
    with pytest.raises(ValueError, match=message) as caught:
        build(kind, "fused", **trained, **_with(path))
    text = str(caught.value)
    assert "\n" not in text
    assert "ref_logps" in text
    assert len(text) < 400
