"""attach(): every metric as stock TRL logs it, no logits, and no trace after detach()."""

import math

import pytest
import torch
import trl.trainer.utils as trl_utils
from helpers import Allocations
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fusedalign.trl import attach, detach
from fusedalign.trl import attachment as attach_module

SMALL = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
}
UNTIMED = ("_runtime", "_per_second")


def gemma2():
    torch.manual_seed(1)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=0.5))


def cohere():
    torch.manual_seed(1)
    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=3.0))


def qwen3_moe():
    torch.manual_seed(1)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **experts, output_router_logits=True, router_aux_loss_coef=0.1))


def history(trainer):
    trainer.train()
    trainer.evaluate()
    rows = trainer.state.log_history
    return [{k: v for k, v in row.items() if not k.endswith(UNTIMED) and k != "total_flos"} for row in rows]


def assert_same_metrics(got, want):
    assert [row.keys() for row in got] == [row.keys() for row in want]
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
CASES = {
    "sft": ("sft", {}),
    "sft dft": ("sft", {"loss_type": "dft"}),
    "sft packed": ("sft", {"packing": True, "max_length": 64}),
    "sft completions and prompts": ("sft", {"completion_only_loss": False}),
    "sft, softcap": ("sft", {"model": gemma2}),
    "sft, gradient checkpointing": ("sft", {"gradient_checkpointing": True}),
    "sft, mixture of experts": ("sft", {"model": qwen3_moe}),
    "sft, accumulation": ("sft", {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
    "dpo": ("dpo", {}),
    "dpo, scale": ("dpo", {"model": cohere}),
    "dpo, wpo weights": ("dpo", {"use_weighting": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_metric_equals_stock(make_trainer, name):
    kind, options = CASES[name]
    got = history(attach(make_trainer(kind, **options)))
    assert_same_metrics(got, history(make_trainer(kind, **options)))
    losses = [row["loss"] for row in got if "loss" in row]
    assert len(set(losses)) == 5  # it did train


def test_a_precomputed_reference(make_trainer):
    """It is computed while the trainer is built, before anything can be attached, so by TRL's own head.

    At step 0 policy and reference are one model: both rewards are rounding noise, and which is larger says nothing.
    """
    got, want = (
        history(f(make_trainer("dpo", precompute_ref_log_probs=True))) for f in (attach, lambda trainer: trainer)
    )
    for rows in (got, want):
        del rows[0]["rewards/accuracies"]
        assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert_same_metrics(got, want)


def test_the_expert_balancing_loss_is_in_the_total(make_trainer):
    trainer = attach(make_trainer("sft", model=qwen3_moe, max_steps=1))
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] > 0.5  # and part of "loss", which test_every_metric compares


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_model_that_takes_no_loss_arguments(make_trainer, kind):
    """Then the Trainer, and not the loss, divides by the number of accumulation steps."""

    def without(trainer):
        trainer.model_accepts_loss_kwargs = False
        return trainer

    options = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_steps": 3}
    got, want = (history(without(f(make_trainer(kind, **options)))) for f in (attach, lambda trainer: trainer))
    assert_same_metrics(got, want)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_lora_trains_with_a_frozen_head(make_trainer, kind):
    got, want = (
        history(f(make_trainer(kind, peft_config=LoraConfig(**LORA)))) for f in (attach, lambda trainer: trainer)
    )
    assert_same_metrics(got, want)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_bf16_autocast_is_as_near_to_fp32_as_stock(make_trainer, kind):
    """Each metric's largest distance over all batches is within twice that between stock TRL in bf16 and in fp32.

    With a learning rate of 0: weights that move drift apart in bf16 whatever the head does, and hide what it does.
    """
    fp32, stock, ours = (
        history(f(make_trainer(kind, bf16=bf16, learning_rate=0.0)))
        for f, bf16 in ((detach, False), (detach, True), (attach, True))
    )
    assert [row.keys() for row in ours] == [row.keys() for row in stock]
    for key in {key for row in fp32 for key in row}:

        def distance(rows, key=key):
            return max(abs(row[key] - exact[key]) for row, exact in zip(rows, fp32, strict=True) if key in row)

        assert distance(ours) <= 2 * distance(stock), key


def test_the_first_dpo_loss_is_log_2(make_trainer):
    trainer = attach(make_trainer("dpo", max_steps=1))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_accumulation_1x8_equals_8x1(make_trainer, kind):
    """Uneven lengths: for SFT every token of the window weighs the same, for DPO every pair."""
    runs = []
    for size in (1, 8):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 2}
        trainer = attach(make_trainer(kind, **options))
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        runs.append(([(row["loss"], row["grad_norm"]) for row in rows], trainer.model.state_dict()))
    (rows, weights), (other_rows, other_weights) = runs
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(other_rows), rtol=1e-4, atol=1e-5)
    for name, weight in weights.items():
        # Adam divides by the size of the gradient, which near 0 is rounding: a step of 1e-3 bounds what that can do.
        assert (weight - other_weights[name]).abs().mean() < 1e-5, name


def test_no_step_makes_the_logits(make_trainer):
    def largest(trainer):
        batch = next(iter(trainer.get_train_dataloader()))
        valid = int(batch["completion_mask"].sum())
        trainer.model.train()
        with Allocations() as allocations:
            trainer.compute_loss(trainer.model, batch).backward()
        return allocations.largest(), valid * trainer.model.config.vocab_size

    made, logits = largest(attach(make_trainer("dpo", per_device_train_batch_size=16)))
    assert made < logits
    made, logits = largest(make_trainer("dpo", per_device_train_batch_size=16))
    assert made > logits  # stock TRL's buffer: the check can fail


def test_only_the_attached_trainer_is_served(make_trainer, monkeypatch):
    calls = []
    original = attach_module.linear_logps
    monkeypatch.setattr(attach_module, "linear_logps", lambda *a, **k: calls.append(k["impl"]) or original(*a, **k))
    attached, other = attach(make_trainer("sft", max_steps=1), impl="pytorch"), make_trainer("sft", max_steps=1)
    other.train()
    assert not calls
    attached.train()
    assert calls == ["pytorch"]
    attach(attached, impl="reference")  # again: replaces the impl, and each forward is served once
    attached.train()
    assert calls == ["pytorch", "reference"]
    detach(attached)
    attached.train()
    assert calls == ["pytorch", "reference"]


def test_detach_leaves_no_trace(make_trainer):
    before = trl_utils._ChunkedLogProbFunction, getattr(trl_utils, "_use_triton", None)
    trainer, other = make_trainer("dpo"), make_trainer("sft")
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in (trainer.model, trainer.ref_model)]
    attach(trainer)
    attach(other)
    detach(trainer)
    assert isinstance(trl_utils._ChunkedLogProbFunction, attach_module._Switch)  # the other one still needs it
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in (trainer.model, trainer.ref_model)]
    detach(other)
    detach(other)  # harmless
    assert before == (trl_utils._ChunkedLogProbFunction, getattr(trl_utils, "_use_triton", None))
    assert_same_metrics(history(trainer), history(make_trainer("dpo")))


def test_generate_save_and_reload(make_trainer, tmp_path):
    trainer = attach(make_trainer("sft"))
    trainer.train()
    ids = torch.tensor([[1, 5, 6, 7]])
    answer = trainer.model.generate(ids, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > 4
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(reloaded(ids).logits, trainer.model(ids).logits)
    assert torch.equal(reloaded.generate(ids, max_new_tokens=5, do_sample=False), answer)


def test_a_forward_that_raises_does_not_stay_active(make_trainer):
    trainer = attach(make_trainer("sft"))
    with pytest.raises(Exception):  # noqa: B017, PT011
        trainer.model(input_ids="not a tensor")
    assert attach_module._active.get() is None


def test_what_cannot_be_attached_is_refused(make_trainer, monkeypatch):
    with pytest.raises(
        TypeError,
        match="trainer must be one of TRL's SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer, RLOOTrainer, got str",
    ):
        attach("trainer")
    trainer = make_trainer("sft")
    with pytest.raises(ValueError, match="impl must be one of auto, triton, pytorch, reference, got 'cuda'"):
        attach(trainer, impl="cuda")
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", type("Theirs", (), {"__module__": "another.library"}))
    with pytest.raises(RuntimeError, match=r"got another\.library\.Theirs in its place"):
        attach(trainer)
