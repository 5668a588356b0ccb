"""A cached reference: the metrics of a live one without a reference model; caches of other settings are refused."""

import copy
import json
import re

import cached
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
from fusedalign.trl.ref_cache import About, read_cache, row_key, write_cache
from fusedalign.trl.ref_rows import reference_examples

CONFIGS = {"dpo": trl.DPOConfig, "kto": trl.KTOConfig}


@pytest.fixture
def loaded(tiny_folder):
    return _load(tiny_folder)


def _load(tiny_folder, name="qwen3", **options):
    return AutoModelForCausalLM.from_pretrained(tiny_folder(name), attn_implementation="eager", **options)


def _args(kind, tmp_path, **options):
    options = {"max_length": 64, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True} | options
    return CONFIGS[kind](output_dir=str(tmp_path), report_to="none", **options)


@pytest.fixture
def cache(tmp_path, tiny_folder):
    """cache("dpo", ...) -> path of a cache of `build`'s train and evaluation data."""
    numbers = iter(range(99))

    def write(kind, model=None, datasets=None, tokenizer=None, **options):
        path, model = tmp_path / f"{next(numbers)}.parquet", model or _load(tiny_folder)
        datasets = [tiny.data(kind, 12), tiny.data(kind, 6)] if datasets is None else datasets
        cached.write(path, kind, model, datasets, tokenizer or tiny.tokenizer(), _args(kind, tmp_path, **options))
        return path

    return write


def _ref_options(path, **head):
    return {"head": [("ref_logps", path), *head.items()]}


def _lora_config(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)


# Numbers


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dpo", {}),
        ("dpo", {"max_length": 9, "packed": True}),
        ("dpo", {"max_length": 8, "truncation_mode": "keep_end"}),
        ("dpo", {"loss_type": ["ipo", "sft"], "f_divergence_type": "js_divergence"}),
        ("dpo", {"use_weighting": True, "loss_type": ["sigmoid", "apo_zero"]}),
        ("dpo", {"loss_type": ["aot"], "label_smoothing": 0.1}),
        ("kto", {}),
        ("kto", {"max_length": 9, "packed": True}),
        ("kto", {"loss_type": "apo_zero_unpaired"}),
    ],
)
def test_metrics_equal_those_of_live_and_precomputed_references(build, cache, kind, options):
    head = {"packed": options.pop("packed", False)}
    scored = {name: x for name, x in options.items() if name in ("max_length", "truncation_mode", "loss_type")}
    trainer = build(kind, "fused", **options, **_ref_options(cache(kind, **scored), **head))
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
    trainer = build(kind, "fused", arguments=arguments, **_ref_options(cache(kind, loaded)))
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
def test_an_adapter_trained_further_is_its_own_reference(build, cache, loaded, config):
    torch.manual_seed(3)
    model = peft.get_peft_model(loaded, config())
    for name, parameter in model.named_parameters():
        if "default" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    path = cache("dpo", model)
    arguments = [("model", lambda: copy.deepcopy(model))]
    trainer = build("dpo", "fused", arguments=arguments, **_ref_options(path))
    assert list(trainer.model.peft_config) == ["default"]
    assert trainer.model.active_adapter == "default"
    assert any(parameter.requires_grad for parameter in trainer.model.parameters())
    tiny.assert_same(tiny.history(trainer), tiny.history(build("dpo", "fused", arguments=arguments)))
    with pytest.raises(ValueError, match="weights of the model as it is given"):
        build("dpo", "fused", arguments=[("model", lambda: model.get_base_model())], **_ref_options(path))


def test_a_prompt_tuning_adapter_is_trained_further(build, cache, loaded):
    torch.manual_seed(3)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(loaded, config)
    arguments = [("model", lambda: copy.deepcopy(model))]
    trainer = build("dpo", "fused", arguments=arguments, **_ref_options(cache("dpo", model)))
    assert list(trainer.model.peft_config) == ["default"]
    tiny.assert_same(tiny.history(trainer), tiny.history(build("dpo", "fused", arguments=arguments)))


def test_a_named_model_and_several_evaluation_sets_work(build, cache, tiny_folder):
    """The cache is checked against the weights that TRL loads."""
    evaluations = {"first": tiny.data("dpo", 4), "second": tiny.data("dpo", 6)}
    arguments = [("model", lambda: str(tiny_folder("qwen3"))), ("eval_dataset", lambda: evaluations)]
    data = tiny.data("dpo", 12)
    trainer = build("dpo", "fused", data=data, arguments=arguments, **_ref_options(cache("dpo")))
    tiny.assert_same(tiny.history(trainer), tiny.history(build("dpo", "fused", data=data, arguments=arguments)))


def test_other_cached_data_are_evaluated_after_training(build, cache):
    """Without a reference model."""
    other, train = tiny.data("dpo", 9), tiny.data("dpo", 12)
    trainer = build("dpo", "fused", **_ref_options(cache("dpo", datasets=[other, train])), max_steps=2)
    live = build("dpo", "fused", max_steps=2)
    for each in (trainer, live):
        each.train()
    for data in (other, {"a": other, "b": train}):
        got, want = trainer.evaluate(data), live.evaluate(data)
        tiny.assert_same(*([{k: v for k, v in x.items() if not k.endswith(tiny.UNTIMED)}] for x in (got, want)))
    with pytest.raises(ValueError, match=r"every row of the eval data set, got .* the chosen answer of row 1 of"):
        trainer.evaluate(Dataset.from_list([{"prompt": "boats", "chosen": " short", "rejected": " on"}]))


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_resumed_training_uses_the_cache(build, cache, kind, tmp_path):
    options = {
        "output_dir": str(tmp_path / "out"),
        "save_strategy": "steps",
        "save_steps": 2,
        **_ref_options(cache(kind)),
    }
    uninterrupted = tiny.history(build(kind, "fused", **options), evaluate=False)
    trainer = build(kind, "fused", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    ignored = (*tiny.UNTIMED, "num_tokens")  # TRL counts it from 0 again
    uninterrupted, resumed = (
        [{k: v for k, v in row.items() if not k.endswith(ignored)} for row in rows[:5]]
        for rows in (uninterrupted, trainer.state.log_history)
    )
    tiny.assert_same(resumed, uninterrupted)
    trainer.save_model(str(tmp_path / "model"))
    files = [path.read_text() for path in (tmp_path / "model").glob("*.json")]
    assert files
    assert not any("ref_logps" in text or "parquet" in text for text in files)


def test_the_cache_works_without_a_configuration(build, cache, tiny_folder, monkeypatch, tmp_path):
    """TRL creates a default one."""
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


# Refusals


def _perturbed(model):
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


WEIGHTS = "with the weights of the model as it is given, .* made with others: pass the model the-model, or score"
CONFIG = "with the configuration of the model as it is given"
ROW = "every row of the train data set, got .* without the"


@pytest.mark.parametrize(
    ("kind", "scored", "settings", "message"),
    [
        ("dpo", {}, {"prepare": _perturbed}, WEIGHTS),
        ("kto", {}, {"prepare": _perturbed}, WEIGHTS),
        ("dpo", {}, {"prepare": _wider_rope}, CONFIG),
        ("dpo", {}, {"model": "mistral"}, CONFIG),
        (
            "dpo",
            {},
            {"prepare": lambda model: model.bfloat16()},
            "with weights in bfloat16, .* made with weights in float32: set dtype='float32', or score",
        ),
        (
            "dpo",
            {},
            {"tokenizer": _grown},
            "with the tokenizer of this training, got .* pass the tokenizer of the-model",
        ),
        ("kto", {}, {"tokenizer": _templated}, "with the chat template of this training"),
        ("dpo", {"max_length": 32}, {}, "with max_length=64, got .* made with max_length=32: set max_length=32, or"),
        ("kto", {"max_length": None}, {}, "with max_length=64, got .* made with max_length=None"),
        ("dpo", {"truncation_mode": "keep_end"}, {}, "with truncation_mode='keep_start', got .*='keep_end'"),
        ("kto", {}, {"per_device_train_batch_size": 3}, "with per_device_train_batch_size=3, .*: set .*=4, or"),
        ("kto", {"loss_type": "apo_zero_unpaired"}, {}, "for KTO with its KL term, got .* made without it: "),
        ("dpo", {}, {"rows": 13}, f"{ROW} (chosen|rejected) answer of row 13 of 13 after"),
        ("kto", {}, {"rows": 14}, f"{ROW} (mismatched )?completion of row 13 of 14 after"),
        ("dpo", {}, {"ref_model": True}, "takes the place of ref_model, got both"),
        ("dpo", {}, {"precompute_ref_log_probs": True}, "takes the place of precompute_ref_log_probs, got both"),
        ("dpo", {}, {"sync_ref_model": True}, "excludes sync_ref_model, got both"),
        ("dpo", {}, {"ld_alpha": 0.5}, "got ld_alpha=0.5, which weighs its tokens: leave one of them out"),
        ("dpo", {}, {"data": tiny.data("dpo", 12).to_iterable_dataset()}, "got a stream as the train data set: leave"),
        ("kto", {}, {"data": tiny.data("kto", 12).add_column("image", [None] * 12)}, "with the column image: leave"),
    ],
)
def test_a_cache_of_other_settings_is_refused(build, cache, tiny_folder, kind, scored, settings, message):
    settings, arguments = dict(settings), {}
    if settings.pop("ref_model", False):
        arguments["ref_model"] = lambda: _load(tiny_folder)
    if (change := settings.pop("tokenizer", None)) is not None:
        arguments["processing_class"] = lambda: change(tiny.tokenizer())
    path = cache(kind, **scored)
    with pytest.raises(ValueError, match=message) as caught:
        build(kind, "fused", arguments=arguments, **settings, **_ref_options(path))
    text = str(caught.value)
    assert "\n" not in text
    assert "ref_logps" in text
    assert len(text) < 400


def test_a_named_model_with_other_weights_is_refused(build, cache, tiny_folder, loaded, tmp_path):
    """It is refused before the data are read, which takes longer."""
    path = cache("dpo")
    _perturbed(loaded).save_pretrained(tmp_path / "moved")
    model = ("model", lambda: str(tmp_path / "moved"))
    with pytest.raises(ValueError, match="with the weights of the model as it is given"):
        build("dpo", "fused", data=Dataset.from_list([{"nothing": 1}]), arguments=[model], **_ref_options(path))


def test_a_cache_of_another_adapter_is_refused(build, cache, loaded):
    """Doubled, changed or replaced by a new one; a new one with no effect equals the base model."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(loaded, _lora_config(init_lora_weights=False))
    path = cache("dpo", adapted)

    def doubled(model):
        config = _lora_config(init_lora_weights=False, lora_alpha=16)
        other = peft.get_peft_model(copy.deepcopy(model).unload(), config)
        peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model))
        return other

    def moved(model):
        model = copy.deepcopy(model)
        model.base_model.model.model.layers[1].self_attn.v_proj.lora_B["default"].weight.data[0, 0] += 1e-3
        return model

    def new(model):
        return peft.get_peft_model(copy.deepcopy(model).unload(), _lora_config())

    for change in (doubled, moved, new):
        with pytest.raises(ValueError, match="with the weights of the model as it is given"):
            build("dpo", "fused", arguments=[("model", lambda change=change: change(adapted))], **_ref_options(path))
    base = copy.deepcopy(adapted).unload()
    assert weights_digest(new(adapted)) == weights_digest(base)
    build("dpo", "fused", arguments=[("model", lambda: new(adapted))], **_ref_options(cache("dpo", base)))


NAME = b"fusedalign.ref_cache"


def _cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def _text(path):
    path.write_text('{"key": "a", "logps": -1.0}')


def _other_table(path):
    pq.write_table(pa.table({"score": [1.0]}), path)


def _other_values(path):
    table = pq.read_table(path)
    values = table["logps"].to_pylist()
    table = table.set_column(1, "logps", pa.array([values[0] - 1, *values[1:]]))
    pq.write_table(table, path)


def _other_record(path):
    table = pq.read_table(path)
    metadata = {
        name: value.replace(b'"max_length": 64', b'"max_length": 32') for name, value in table.schema.metadata.items()
    }
    pq.write_table(table.replace_schema_metadata(metadata), path)


def _fewer_rows(path):
    pq.write_table(pq.read_table(path).slice(1), path)


def _later_format(path):
    table = pq.read_table(path)
    record = table.schema.metadata[NAME].replace(b'"format": 1', b'"format": 2')
    pq.write_table(table.replace_schema_metadata({NAME: record}), path)


def _no_record(path):
    pq.write_table(pq.read_table(path).replace_schema_metadata({NAME: b"{}"}), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "which cannot be read as Parquet"),
        (_text, "which cannot be read as Parquet"),
        (lambda path: path.write_bytes(b""), "which cannot be read as Parquet"),
        (_other_table, "which is another Parquet file"),
        (_other_values, "is damaged: its checksum is another one"),
        (_other_record, "is damaged: its checksum is another one"),
        (_fewer_rows, "is damaged: its checksum is another one"),
        (_no_record, "which is damaged"),
        (_later_format, "of format 1, got .* of format 2: score"),
    ],
)
def test_a_damaged_file_is_refused(cache, damage, message):
    path = cache("dpo", datasets=[tiny.data("dpo", 3)])
    assert len(read_cache(path).logps) == 6
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        read_cache(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_any_damaged_byte_is_detected(cache):
    path = cache("dpo", datasets=[tiny.data("dpo", 2)])
    content, before, unchanged = path.read_bytes(), read_cache(path), []
    for place in range(0, len(content), max(len(content) // 60, 1)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        try:
            after = read_cache(path)
        except ValueError as error:
            unchanged.append(str(error))
        else:
            assert after == before, place  # in bytes that do not affect the content
    assert len(unchanged) > 20
    assert all(text.startswith("ref_logps must be") and "\n" not in text for text in unchanged)


def test_a_path_that_is_not_a_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ref_logps must name a file .*, got .*absent.parquet \(no such file"):
        read_cache(tmp_path / "absent.parquet")
    with pytest.raises(FileNotFoundError, match=r"got .* \(a folder"):
        read_cache(tmp_path)
    with pytest.raises(TypeError, match="ref_logps must be the path of a file, got int"):
        read_cache(3)


# The file

ABOUT = About(64, "keep_start", None, "t", "c", "float32", "f", "w", "the-model", {"trl": "1"})


def test_a_written_cache_is_read_back_unchanged(tmp_path):
    path = tmp_path / "cache.parquet"
    write_cache(path, ABOUT, ["a", "b", "a"], [-1.5, torch.tensor(-0.1), -1.5])
    cache = read_cache(str(path))
    assert cache.about == ABOUT
    assert dict(cache.logps) == {"a": -1.5, "b": float(torch.tensor(-0.1))}
    assert [file.name for file in tmp_path.iterdir()] == ["cache.parquet"]


def test_a_failed_write_keeps_the_existing_file(tmp_path, monkeypatch):
    path = tmp_path / "cache.parquet"
    write_cache(path, ABOUT, ["a"], [-1.0])

    def full(table, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        write_cache(path, ABOUT, ["b"], [-2.0])
    assert dict(read_cache(path).logps) == {"a": -1.0}
    assert [file.name for file in tmp_path.iterdir()] == ["cache.parquet"]


def test_unwritable_values_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected finite log-probabilities, got nan for the sequence b"):
        write_cache(tmp_path / "x", ABOUT, ["a", "b"], [-1.0, float("nan")])
    with pytest.raises(ValueError, match="shorter"):
        write_cache(tmp_path / "x", ABOUT, ["a", "b"], [-1.0])
    assert not list(tmp_path.iterdir())


def test_a_key_depends_on_the_tokens_and_the_completion_start():
    keys = [
        row_key([1, 2, 3], [-100, 2, 3]),
        row_key([1, 2, 3], [-100, -100, 3]),
        row_key([1, 2, 4], [-100, 2, 4]),
        row_key([1, 2], [-100, 2]),
        row_key([1, 2, -100], [2, 3, 3]),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == row_key(torch.tensor([1, 2, 3]), torch.tensor([-100, 2, 3]).int())
    assert keys[0] == "e0d562fac24d530adad3102e07398323"


# Sequences and digests


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dpo", {"max_length": 7}),
        ("dpo", {"max_length": 7, "truncation_mode": "keep_end"}),
        ("dpo", {"max_length": None}),
        ("kto", {"max_length": 7}),
        ("kto", {"max_length": 7, "loss_type": "apo_zero_unpaired"}),
    ],
)
def test_the_sequences_equal_those_scored_by_stock_trl(build, kind, options, tmp_path):
    """Checks the attributes and collators of TRL that the cache relies on."""
    trainer = build(kind, "stock", rows=21, **options)
    want = set()
    for batch in trainer.get_train_dataloader():
        for prefix in ("", "KL_"):
            if f"{prefix}input_ids" in batch:
                for ids, valid, counted in zip(
                    *(batch[prefix + name] for name in ("input_ids", "attention_mask", "completion_mask")), strict=True
                ):
                    length = int(valid.sum())
                    want.add((tuple(ids[:length].tolist()), tuple(counted[:length].tolist())))
    want = {(ids, counted) for ids, counted in want if any(counted[1:])}
    rows = reference_examples(kind, tiny.data(kind, 21), tiny.tokenizer(), _args(kind, tmp_path, **options))
    got = [(tuple(row.input_ids), tuple(int(label != -100) for label in row.labels)) for row in rows]
    assert len(set(got)) == len(got)
    assert set(got) == want
    for row in rows:
        assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))
        assert row.key == row_key(row.input_ids, row.labels)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_conversations_in_pairs_are_cached(build, cache, kind):
    """KTO splits them; the prompt is the common beginning."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}</s>"
    data = Dataset.from_list(
        [
            {
                side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
                for side in ("chosen", "rejected")
            }
            for row in tiny.rows(6)
        ]
    )
    path = cache(kind, datasets=[data], tokenizer=tokenizer)
    arguments = [("processing_class", lambda: tokenizer)]
    trainer = build(kind, "fused", data=data, arguments=arguments, max_steps=1, **_ref_options(path))
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx({"dpo": 0.693147, "kto": 0.5}[kind], abs=1e-5)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)


def test_streams_and_methods_without_a_reference_are_refused(tmp_path):
    args = _args("dpo", tmp_path)
    with pytest.raises(ValueError, match="a method with a reference model, dpo or kto, got orpo"):
        reference_examples("orpo", tiny.data("dpo", 2), tiny.tokenizer(), args)
    with pytest.raises(ValueError, match="got a stream as the eval data set"):
        reference_examples("dpo", tiny.data("dpo", 2).to_iterable_dataset(), tiny.tokenizer(), args, "eval")


def test_the_digest_depends_on_weights_not_on_their_execution(build, tiny_folder, loaded, tmp_path):
    want, config = weights_digest(loaded), config_digest(loaded)
    build("sft", "fused", arguments=[("model", lambda: loaded)], head=[("packed", True)])
    assert weights_digest(loaded) == want
    assert config_digest(loaded) == config
    assert weights_digest(torch.compile(loaded, backend="eager")) == want
    loaded.save_pretrained(tmp_path / "again")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", attention_dropout=0.1)
    assert (weights_digest(reloaded), config_digest(reloaded)) == (want, config)
    for name, tensor in loaded.state_dict().items():
        before = tensor.clone()
        tensor.flatten()[-1].mul_(2).add_(1e-3)
        assert weights_digest(loaded) != want, name
        tensor.copy_(before)
    assert weights_digest(loaded) == want
    loaded.lm_head.weight = torch.nn.Parameter(loaded.lm_head.weight.to("meta"))
    with pytest.raises(ValueError, match=r"weights in memory, got lm_head.weight offloaded"):
        weights_digest(loaded)


def test_inactive_adapters_do_not_change_the_digest(loaded):
    plain = weights_digest(loaded)
    model = peft.get_peft_model(loaded, _lora_config(init_lora_weights=False))
    want = weights_digest(model)
    model.add_adapter("norm", _lora_config(init_lora_weights=False, target_modules=["k_proj"]))
    assert weights_digest(model) == want != plain
    _perturbed(model.base_model.model)
    assert weights_digest(model) != want


def test_digests_work_in_every_dtype_and_chunk_size(monkeypatch):
    from fusedalign.trl import digests

    class Config:
        def to_dict(self):
            return {}

    module = torch.nn.Module()
    module.config = Config()
    for i, dtype in enumerate((torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool)):
        module.register_buffer(f"x{i}", torch.arange(30).reshape(5, 6).t().to(dtype))
    module.register_buffer("scalar", torch.tensor(3.0))
    module.register_buffer("empty", torch.zeros(0, 4))
    digest = weights_digest(module)
    monkeypatch.setattr(digests, "_CHUNK", 7)
    assert weights_digest(module) == digest
    module.x1 = module.x1.to(torch.float16)
    assert weights_digest(module) != digest


def test_tokenizers_are_identified_by_their_output(tmp_path):
    tokenizer = tiny.tokenizer()
    want = tokenizer_digest(tokenizer)
    tokenizer("a good answer", padding="max_length", truncation=True, max_length=3)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer_digest(tokenizer) == want
    tokenizer.save_pretrained(tmp_path)
    reloaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_digest(reloaded) == want
    assert tokenizer_digest(_grown(reloaded)) != want
    tokenizer.eos_token = "<unk>"
    assert tokenizer_digest(tokenizer) != want
    assert template_digest(tokenizer) != template_digest(_templated(tokenizer))


# The command


@pytest.fixture
def words(tiny_folder, tmp_path):
    """words("dpo", ...) -> command arguments with the data and model of `build`."""
    folder = tmp_path / "model"
    _load(tiny_folder).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)

    def make(kind, **options):
        for split, n in (("train", 12), ("test", 6)):
            tiny.data(kind, n).to_json(tmp_path / "data" / f"{split}.jsonl")
        fields = {
            "model_name_or_path": folder,
            "dataset_name": tmp_path / "data",
            "output_dir": tmp_path / "out",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "max_length": 64,
            "report_to": "none",
            "use_cpu": "true",
            **options,
        }
        return [word for name, value in fields.items() for word in (f"--{name}", str(value))]

    return make


def _error(capsys, argv):
    assert main(argv) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("fusedalign: "))
    return line


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_command_trains_with_a_cache(cache, words, tmp_path, kind, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(f"ref_logps: {cache(kind)}\n")
    rows = []
    for flags in (["--config", str(config)], []):
        out = tmp_path / f"out{len(flags)}"
        assert main([kind, *words(kind, output_dir=out), *flags]) == 0, capsys.readouterr().err
        rows.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for got, want in zip(*rows, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/margins", "logps/chosen"):
            assert (name in got) == (name in want)
            assert got.get(name, 0) == pytest.approx(want.get(name, 0), abs=1e-5, rel=1e-5)


def test_bad_caches_are_one_line_errors_of_the_commands(cache, words, tmp_path, capsys):
    path = cache("dpo", max_length=32)
    line = _error(capsys, ["dpo", *words("dpo", ref_logps=path)])
    assert re.search("with max_length=64, got .* made with max_length=32: set max_length=32", line)
    line = _error(capsys, ["dpo", *words("dpo", ref_logps=tmp_path / "absent", dataset_name=tmp_path / "nowhere")])
    assert "ref_logps must name a file" in line
    for method in ("sft", "orpo", "cpo", "simpo"):
        line = _error(capsys, [method, *words("dpo", ref_logps=path)])
        assert f"ref_logps needs a method with a reference model, dpo or kto, got {method}: leave it out" in line
