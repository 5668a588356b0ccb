"""The reference of DPO and KTO is the model passed in; a precomputed one depends on the settings."""

import copy
import functools
import types

import peft
import pytest
import tiny
import torch
import transformers
import trl
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM

from fusedalign.trl.forward import fused_by
from fusedalign.trl.reference import reference_copy, reference_key


@pytest.fixture
def loaded(tiny_folder):
    """A model loaded from a folder."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder("qwen3"), attn_implementation="eager")


def _perturbed(model):
    """Change every trainable weight, as training does."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def _merged(model):
    model = _perturbed(peft.get_peft_model(model, tiny.lora())).merge_and_unload()
    return model.requires_grad_(True)


def _grown(model):
    torch.manual_seed(0)
    model.resize_token_embeddings(430)
    return _perturbed(model)


def _nameless(model):
    model.config._name_or_path = ""
    return model


def _user_defined_class(model):
    class Config(transformers.Qwen3Config):
        model_type = "of_a_user"

    class Model(transformers.Qwen3ForCausalLM):
        config_class = Config

    own = Model(Config(**tiny.SMALL, head_dim=8))
    own.config._name_or_path = model.config._name_or_path
    return own


def _compiled(model):
    return torch.compile(_perturbed(model), backend="eager")


def _lora(model, **options):
    config = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**config | options))


def _embedding_lora(model):
    return _perturbed(_lora(model, target_modules=["embed_tokens", "q_proj"], use_dora=True))


def _ia3(model):
    config = peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    return _perturbed(peft.get_peft_model(model, config))


def _prompt(model):
    return _perturbed(peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")))


def _two_adapters(model):
    model = _lora(model)
    model.add_adapter("other", _lora_config())
    return model


def _lora_config(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False} | options)


def _assert_starts_at_its_reference(build, kind, model, **options):
    """Assert that rewards are 0 at the first step, where policy and reference are equal, and not at the second."""
    trainer = build(kind, "fused", arguments=[("model", lambda: model)], max_steps=2, learning_rate=5e-2, **options)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    for name in ("rewards/chosen", "rewards/rejected"):
        assert first[name] == pytest.approx(0, abs=1e-5)
        assert abs(second[name]) > 1e-4
    assert first["loss"] == pytest.approx({"dpo": 0.693147, "kto": 0.5}[kind], abs=1e-5)
    return trainer


@pytest.mark.parametrize(
    ("kind", "change", "options"),
    [
        ("dpo", _merged, {}),
        ("dpo", _grown, {}),
        ("dpo", _nameless, {}),
        ("dpo", _user_defined_class, {}),
        ("dpo", _compiled, {}),
        ("dpo", _perturbed, {"bf16": True}),
        ("dpo", _perturbed, {"sync_ref_model": True, "ref_model_sync_steps": 2}),
        ("dpo", _grown, {"precompute_ref_log_probs": True}),
        ("kto", _merged, {}),
        ("kto", _nameless, {"precompute_ref_log_probs": True}),
        ("dpo", _embedding_lora, {}),
        ("dpo", _embedding_lora, {"precompute_ref_log_probs": True}),
        ("dpo", _ia3, {}),
        ("dpo", _prompt, {}),
        ("dpo", _two_adapters, {}),
        ("kto", _ia3, {}),
    ],
)
def test_the_reference_equals_the_model_passed_in(build, loaded, kind, change, options):
    _assert_starts_at_its_reference(build, kind, change(loaded), **options)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_the_reference_of_a_named_model_has_its_weights(build, tiny_folder, kind):
    trainer = build(kind, "fused", arguments=[("model", lambda: str(tiny_folder("qwen3")))])
    own, reference = trainer.model.state_dict(), trainer.ref_model.state_dict()
    assert all(torch.equal(own[name], reference[name]) for name in own)


@pytest.mark.parametrize("earlier", ["stock", "fused"])
def test_a_model_trained_by_another_trainer_is_its_own_reference(build, loaded, earlier):
    """Its forward is bound to the model by that trainer: a plain copy would run the policy as reference."""
    sft = build("sft", earlier, arguments=[("model", lambda: loaded)], max_steps=1, bf16=True)
    sft.train()
    trainer = _assert_starts_at_its_reference(build, "dpo", sft.model)
    ids = torch.tensor([[3, 5, 6]])
    assert not torch.equal(trainer.ref_model(ids).logits, trainer.model(ids).logits)
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())
    assert not trainer.ref_model.training


def test_a_reference_copy_is_in_eval_mode_and_keeps_ties(loaded):
    loaded.train()
    loaded.lm_head.weight = loaded.model.embed_tokens.weight
    copied = reference_copy(loaded)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.lm_head.weight is not loaded.lm_head.weight
    assert not copied.training
    assert loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def _with_own_forward(model):
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def _with_partial(model):
    model.model.forward = functools.partial(lambda forward, *a, **k: forward(*a, **k), forward=lambda: model.model.norm)


def _with_a_result(model):
    model.model.last = model.lm_head.weight * 2


def _offloaded(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_own_forward, "got a model.forward bound to the model itself: pass another instance of it as ref_model"),
        (_with_partial, "got a model.forward bound to the model itself"),
        (_with_a_result, r"got Qwen3ForCausalLM \(.*\): pass another instance of it as ref_model"),
        (_offloaded, "with its weights in memory, got an offloaded Qwen3ForCausalLM: pass another instance"),
    ],
)
def test_a_model_that_cannot_be_copied_is_refused(loaded, change, message):
    change(loaded)
    with pytest.raises(ValueError, match=message):
        reference_copy(loaded)


def test_a_bound_forward_is_rebound_in_the_copy(loaded):
    forward = type(loaded.model).forward
    loaded.model.forward = types.MethodType(lambda self, *a, **k: forward(self, *a, **k), loaded.model)
    copied, ids = reference_copy(loaded), torch.tensor([[3, 5, 6]])
    want = copied(ids).logits
    _perturbed(loaded)
    assert torch.equal(copied(ids).logits, want)


def test_a_passed_reference_is_used_unchanged(build, loaded):
    reference = _perturbed(copy.deepcopy(loaded))
    arguments = [("model", lambda: loaded), ("ref_model", lambda: reference)]
    trainer = build("dpo", "fused", arguments=arguments)
    assert trainer.ref_model is reference
    assert fused_by(reference) == "fusedalign"


def _with_name(model, name):
    return peft.get_peft_model(model, _lora_config(), adapter_name=name)


def _other_active(model):
    model = _two_adapters(model)
    model.set_adapter("other")
    return model


def _both_active(model):
    model = _two_adapters(model)
    model.base_model.set_adapter(["default", "other"])
    return model


def _own_ref(model):
    model = _lora(model)
    model.add_adapter("ref", _lora_config())
    return model


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "dpo",
            lambda model: _with_name(model, "mine"),
            "the adapter 'default' to be active, .* got mine of mine: load",
        ),
        ("kto", _other_active, "the adapter 'default' to be active, .* got other of default, other: load"),
        ("dpo", _both_active, "the adapter 'default' to be active, .* got default and other of default, other: load"),
        ("kto", _own_ref, "expected no adapter called 'ref', .* got default, ref: delete or rename it"),
        ("dpo", lambda model: _lora(model, init_lora_weights="pissa"), "got init_lora_weights='pissa', which changes"),
    ],
)
def test_adapters_with_a_different_reference_in_trl_are_refused(build, loaded, kind, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(kind, "fused", arguments=[("model", lambda: change(loaded))])
    assert "\n" not in str(caught.value)


def test_an_initialisation_that_changes_the_base_weights_is_refused(build, loaded):
    config = _lora_config(init_lora_weights="olora", task_type="CAUSAL_LM")
    with pytest.raises(
        ValueError, match="got init_lora_weights='olora', which changes them: pass ref_model, merge the adapter first"
    ):
        build("dpo", "fused", arguments=[("model", lambda: loaded), ("peft_config", lambda: config)])


# Precomputed


@pytest.fixture
def precomputations(monkeypatch):
    """A list with the batch size of each computation of a reference."""
    batch_sizes = []
    for cls in (trl.DPOTrainer, trl.KTOTrainer):

        def recorded(self, model, inputs, original=cls.compute_ref_log_probs):
            batch_sizes.append(len(inputs["input_ids"]))
            return original(self, model, inputs)

        monkeypatch.setattr(cls, "compute_ref_log_probs", recorded)
    return batch_sizes


@pytest.fixture
def on_disk(tmp_path):
    """on_disk("dpo") -> data on disk, for which TRL caches preprocessing results (not for data in memory)."""

    def load(kind):
        if not (tmp_path / kind).exists():
            tiny.data(kind, 12).save_to_disk(tmp_path / kind)
        return load_from_disk(tmp_path / kind)

    return load


PRECOMPUTED = {"precompute_ref_log_probs": True, "truncation_mode": "keep_end", "max_steps": 1}


def test_a_precomputed_reference_depends_on_the_settings(build, on_disk, precomputations):
    """The first loss is ln 2 whatever max_length the previous precomputation used."""

    def first_loss(**options):
        before = len(precomputations)
        trainer = build("dpo", "fused", data=on_disk("dpo"), **PRECOMPUTED | options)
        trainer.train()
        return trainer.state.log_history[0]["loss"], len(precomputations) > before

    for options in (
        {"max_length": 64},
        {"max_length": 4},
        {"max_length": 4, "ld_alpha": 0.2},
        {"max_length": 4, "ld_alpha": 0.2, "bf16": True},
        {"max_length": 4, "head": [("impl", "reference")]},
        {"max_length": 4, "pad_to_multiple_of": 8},
    ):
        loss, computed = first_loss(**options)
        assert loss == pytest.approx(0.693147, abs=1e-5), options
        assert computed, options
    loss, computed = first_loss(max_length=4, learning_rate=3e-5, beta=0.3, seed=3, logging_steps=1)
    assert loss == pytest.approx(0.693147, abs=1e-5)
    assert not computed  # settings without influence do not recompute it


def test_kto_precomputes_its_kl_term(build, on_disk, precomputations):
    options = {"precompute_ref_log_probs": True, "max_length": None, "max_steps": 1, "data": on_disk("kto")}
    for bf16 in (False, True):
        before = len(precomputations)
        trainer = build("kto", "fused", bf16=bf16, **options)
        trainer.train()
        row = trainer.state.log_history[0]
        assert len(precomputations) > before
        assert row["kl"] == pytest.approx(0, abs=1e-6)
        assert row["rewards/chosen"] == pytest.approx(0, abs=1e-6)


def test_the_key_depends_on_all_relevant_settings(build, loaded):
    trainer = build("dpo", "fused", arguments=[("model", lambda: loaded)])
    keys = [reference_key(trainer)]

    def changed(holder, name, value):
        before = getattr(holder, name)
        setattr(holder, name, value)
        keys.append(reference_key(trainer))
        setattr(holder, name, before)

    for name, value in {
        "max_length": 9,
        "truncation_mode": "keep_end",
        "padding_free": True,
        "pad_to_multiple_of": 4,
        "ld_alpha": 0.5,
        "bf16": True,
        "fp16": True,
        "tf32": True,
        "use_liger_kernel": True,
        "model_init_kwargs": {"attn_implementation": "sdpa"},
    }.items():
        changed(trainer.args, name, value)
    settings = trainer.args.to_dict()
    changed(trainer.args, "to_dict", lambda: settings | {"a_field_of_a_later_version": 1})
    changed(trainer, "head_options", trainer.head_options._replace(impl="reference"))
    changed(trainer, "head_options", trainer.head_options._replace(filter_eps=1e-3))
    changed(trainer.data_collator, "pad_token_id", 1)
    changed(trainer, "data_collator", lambda examples: examples)
    changed(trainer.ref_model.config, "_attn_implementation", "sdpa")
    changed(trainer.ref_model.config, "rms_norm_eps", 0.5)
    torch.set_float32_matmul_precision("high")
    keys.append(reference_key(trainer))
    torch.set_float32_matmul_precision("highest")
    assert len(set(keys)) == len(keys)
    for name, value in {"output_dir": "elsewhere", "learning_rate": 1.0, "beta": 3.0, "max_steps": 99}.items():
        changed(trainer.args, name, value)
        assert keys[-1] == keys[0], name
    assert reference_key(trainer) == keys[0]


def test_the_key_depends_on_adapters(build, loaded):
    """With alpha doubled the weights are equal, only their scale differs."""
    keys = []
    for alpha in (8, 16):
        model = _lora(copy.deepcopy(loaded), lora_alpha=alpha)
        keys.append(reference_key(build("dpo", "fused", arguments=[("model", lambda model=model: model)])))
    assert keys[0] != keys[1]


def test_a_new_chat_template_recomputes_the_reference(build, tmp_path, precomputations):
    """The template changes the fingerprint of the tokenised data, which is part of TRL's key."""
    rows = [
        {side: [{"role": "user", "content": "a good"}, {"role": "assistant", "content": text}] for side, text in row}
        for row in [[("chosen", "answer is"), ("rejected", "boats")]] * 4
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path)
    data = load_from_disk(tmp_path)
    computed = []
    for template in (
        "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}",
        "{% for m in messages %}{{ 'short ' + m['content'] + ' ' }}{% endfor %}",
    ):
        tokenizer, before = tiny.tokenizer(), len(precomputations)
        tokenizer.chat_template = template
        arguments = {"processing_class": lambda tokenizer=tokenizer: tokenizer}
        trainer = build("dpo", "fused", data=data, arguments=arguments, **PRECOMPUTED)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
        computed.append(len(precomputations) > before)
    assert computed == [True, True]


def test_the_precomputed_reference_runs_without_dropout(build, tiny_folder):
    """Even if the model is passed in training mode with dropout kept for training."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder("qwen3"), attn_implementation="eager", attention_dropout=0.5
    )
    options = {**PRECOMPUTED, "disable_dropout": False, "max_length": 63}
    trainer = build("dpo", "fused", arguments=[("model", lambda: model.train())], **options)
    assert trainer.model.training
    want = build("dpo", "fused", arguments=[("model", lambda: model.eval())], **options | {"max_length": 62})
    assert trainer.train_dataset["ref_chosen_logps"][:] == want.train_dataset["ref_chosen_logps"][:]
