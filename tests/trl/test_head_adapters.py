"""Adapters on the head of the Fused trainers, of which stock TRL refuses most.

The oracle is the same trainer with log-probabilities from the model's own forward, including PEFT's head
(tests/trl/plain.py).
"""

import itertools

import peft
import pytest
import tiny
import torch
from helpers import Allocations

KINDS = ("sft", "dpo", "kto", "cpo", "simpo", "orpo", "tpo")
LORA = {"r": 4, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
TOKENS = [3, 5, 8, 12]  # words of the data
ELSEWHERE = LORA | {"target_modules": ["q_proj"]}
ADAPTERS = {
    "lora": ("qwen3", lambda: peft.LoraConfig(**LORA)),
    "rslora": ("phi", lambda: peft.LoraConfig(**LORA, use_rslora=True, lora_alpha=3)),
    "tokens, tied": ("tied", lambda: peft.LoraConfig(**ELSEWHERE, trainable_token_indices=TOKENS)),
    "tokens, untied": (
        "qwen3",
        lambda: peft.LoraConfig(**ELSEWHERE, trainable_token_indices={"embed_tokens": [3, 4], "lm_head": TOKENS}),
    ),
    "softcap": ("gemma2", lambda: peft.LoraConfig(**ELSEWHERE, trainable_token_indices=TOKENS)),
    "head to save": ("qwen3", lambda: peft.LoraConfig(**ELSEWHERE, modules_to_save=["lm_head"])),
}


def options(kind, adapter, **extra):
    model, config = ADAPTERS[adapter]
    extra = {"model": model, "arguments": [("peft_config", config)], "learning_rate": 1e-2, **extra}
    if kind == "simpo":
        return "cpo", extra | {"loss_type": "simpo", "cpo_alpha": 0.5}
    return kind, extra


def assert_as_with_logits(build, kind, config):
    got, want = (tiny.history(build(kind, variant, **config)) for variant in ("fused", "plain"))
    tiny.assert_same(got, want)
    assert any(row.get("grad_norm", 0) > 0 for row in got)


def cases(kinds, adapters, quick):
    """All (kind, adapter) pairs; those without `quick` are marked slow."""
    for adapter, kind in itertools.product(adapters, kinds):
        marks = [] if quick(adapter, kind) else [pytest.mark.slow]
        yield pytest.param(kind, adapter, marks=marks, id=f"{kind}, {adapter}")


def is_quick(adapter, kind):
    """LoRA in every trainer, and every adapter in DPO and in two more trainers."""
    turn = list(ADAPTERS).index(adapter) % len(KINDS)
    return adapter == "lora" or kind in ("dpo", KINDS[turn], KINDS[(turn + 3) % len(KINDS)])


@pytest.mark.parametrize(("kind", "adapter"), cases(KINDS, list(ADAPTERS)[:-1], is_quick))
def test_head_adapters_train_like_full_logits(build, kind, adapter):
    """DPO and KTO use the model with disabled adapters as reference. "head to save": see test_trainer_settings."""
    assert_as_with_logits(build, *options(kind, adapter))


@pytest.mark.parametrize("kind", ["cpo", "orpo", "tpo"])
def test_prompt_tuning_trains_like_full_logits(build, kind):
    """Stock TRL fails with mismatched shapes here; test_trainer_settings compares the other trainers with it."""
    config = [("peft_config", lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))]
    assert_as_with_logits(build, kind, {"arguments": config})


@pytest.mark.parametrize(
    ("kind", "adapter"), cases(["dpo", "kto"], ADAPTERS, lambda a, k: (k == "dpo") == (a in ("lora", "tokens, tied")))
)
def test_a_precomputed_reference_equals_full_logits(build, kind, adapter):
    assert_as_with_logits(build, *options(kind, adapter, precompute_ref_log_probs=True))


@pytest.mark.parametrize(
    ("kind", "adapter"),
    cases(["dpo", "kto"], ["lora", "tokens, tied"], lambda a, k: (k == "dpo") == (a == "lora")),
)
def test_an_adapter_trained_further_equals_full_logits(build, kind, adapter):
    """Its reference is a copy as adapter "ref", which TRL switches to."""
    model, config = ADAPTERS[adapter]

    def with_adapter(lm):
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(lm, config())
        for name, x in wrapped.named_parameters():
            if "trainable_tokens" in name:
                torch.nn.init.normal_(x)
        return wrapped

    assert_as_with_logits(build, kind, {"model": model, "prepare": with_adapter, "learning_rate": 1e-2})


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_allocates_logits_or_anything_of_head_size(build, kind):
    """LoRA on the head, a complete training of one step including the optimiser: [V, D] is 6704, N * V is more."""

    def largest(variant):
        name, config_options = options(kind, "lora", max_steps=1, per_device_train_batch_size=2)
        trainer = build(name, variant, **config_options)
        config = trainer.model.config
        with Allocations() as allocations:
            trainer.train()
        return allocations.largest(), config.vocab_size * config.hidden_size

    allocated, head = largest("fused")
    assert allocated < head
    if kind == "sft":  # the check can fail: full logits
        allocated, head = largest("plain")
        assert allocated >= head


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "cpo", "orpo", "tpo"])
def test_dora_is_refused_at_construction(build, kind):
    name, config = options(kind, "lora", arguments=[("peft_config", lambda: peft.LoraConfig(**LORA, use_dora=True))])
    use = r"use LoRA \(also use_rslora=True\), trainable_token_indices or modules_to_save for the head"
    with pytest.raises(TypeError, match=rf"lm_head to have plain LoRA, got Dora\w* in adapter 'default'; {use}"):
        build(name, "fused", **config)
