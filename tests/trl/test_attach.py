"""attach(): which calls are fused, no logits, no trace after detach(). test_matrix compares the metrics."""

import copy
import io

import peft
import pytest
import tiny
import torch
import trl.trainer.utils as trl_utils
from helpers import Allocations
from transformers import AutoModelForCausalLM

from fusedalign.impls import pytorch
from fusedalign.trl import attach, detach
from fusedalign.trl import attachment as attach_module


def test_the_expert_balancing_loss_is_part_of_the_total(build):
    trainer = build("sft", "attach", model="qwen3_moe", max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] > 0.5  # also part of "loss", which the matrix compares


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_model_without_loss_arguments_trains_like_stock(build, kind):
    """Then the Trainer, not the loss, divides by the number of accumulation steps."""

    def without_loss_arguments(trainer):
        trainer.model_accepts_loss_kwargs = False
        return trainer

    options = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_steps": 3}
    got, want = (
        tiny.history(without_loss_arguments(build(kind, variant, **options))) for variant in ("attach", "stock")
    )
    tiny.assert_same(got, want)


def test_no_step_allocates_the_logits(build):
    def largest(variant):
        trainer = build("dpo", variant, per_device_train_batch_size=12)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.model.train()
        with Allocations() as allocations:
            trainer.compute_loss(trainer.model, batch).backward()
        return allocations.largest(), int(batch["completion_mask"].sum()) * trainer.model.config.vocab_size

    allocated, logits = largest("attach")
    assert allocated < logits
    allocated, logits = largest("stock")
    assert allocated >= logits  # the check can fail: stock TRL


def test_only_the_attached_trainer_is_fused(build, monkeypatch):
    calls = []
    original = attach_module.linear_logps
    monkeypatch.setattr(attach_module, "linear_logps", lambda *a, **k: calls.append(k["impl"]) or original(*a, **k))
    attached, other = (
        build("sft", "attach", max_steps=1, head=[("impl", "pytorch")]),
        build("sft", "stock", max_steps=1),
    )
    other.train()
    assert not calls
    attached.train()
    assert calls == ["pytorch"]
    attach(attached, impl="reference")  # a second attach replaces the impl; each forward is fused once
    attached.train()
    assert calls == ["pytorch", "reference"]
    detach(attached)
    attached.train()
    assert calls == ["pytorch", "reference"]


ONLINE = {
    "arguments": [("reward_funcs", lambda: _reward)],
    "num_generations": 2,
    "max_completion_length": 6,
    "beta": 0.1,
}
EVERY = {"sft": {}, "dpo": {}, "kto": {}, "grpo": ONLINE, "rloo": ONLINE}


def _reward(completions, **_):
    return [float(len(set(completion)) % 5) for completion in completions]


@pytest.mark.parametrize("kind", EVERY)
def test_every_call_of_the_head_is_fused(build, monkeypatch, kind):
    """Calls of policy and reference, in training and evaluation: none reaches TRL's own function."""

    def apply(*_):
        raise AssertionError("TRL's own head was called")

    trainer = build(kind, "stock", max_steps=1, **EVERY[kind])
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", type("Stock", (), {"apply": staticmethod(apply)}))
    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "__module__", trl_utils.__name__)
    with pytest.raises(AssertionError, match="TRL's own head"):
        trainer.train()
    attach(trainer).train()
    trainer.evaluate(**({"eval_dataset": tiny.data(kind, 4)} if kind in ("grpo", "rloo") else {}))
    if kind in ("dpo", "kto"):
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.compute_ref_log_probs(trainer.ref_model, batch)
    detach(trainer)


@pytest.mark.parametrize("model", ["cohere", "gemma2", "phi"])
def test_other_trainers_keep_the_head_of_trl(build, model):
    """While another is attached they keep scale, softcap or bias, outputs, and TRL's handling of ignored tokens."""
    use_triton = getattr(trl_utils, "_use_triton", None)
    other, attached = build("sft", "stock", model=model).model.eval(), build("sft", "attach")
    if use_triton is not None:
        assert trl_utils._use_triton(torch.device("cpu")) == use_triton(torch.device("cpu"))
    ids = torch.randint(3, 400, (2, 9))
    labels = ids.masked_fill(torch.rand(2, 9) < 0.3, -100)
    with torch.no_grad():
        got = other(input_ids=ids, labels=labels, fused_lm_head=True)
        logits, counted = other(input_ids=ids).logits[:, :-1], labels[:, 1:] != -100
    logps = logits.log_softmax(-1)
    entropy, target_logps = -(logps.exp() * logps).sum(-1), logps.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(got.log_probs, target_logps.where(counted, 0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.entropy, entropy.where(counted, 0), rtol=1e-4, atol=1e-4)
    detach(attached)


def test_a_failed_attach_keeps_the_previous_one(build, monkeypatch):
    calls = []
    original = attach_module.linear_logps
    monkeypatch.setattr(attach_module, "linear_logps", lambda *a, **k: calls.append(k["impl"]) or original(*a, **k))
    trainer = build("sft", "attach", max_steps=1, head=[("impl", "reference")])
    for options in ({"impl": "pytorch", "filter_eps": 1e-4}, {"impl": "cuda"}):
        with pytest.raises(ValueError, match=r"filter_eps must be None|impl must be one of"):
            attach(trainer, **options)
    trainer.train()
    assert set(calls) == {"reference"}


def test_trainers_sharing_a_model_keep_their_own_heads(build, monkeypatch):
    """SFT, then DPO of the trained model: each trainer uses its own attachment, or none."""
    calls = []
    original = attach_module.linear_logps

    def recorded(*args, **options):
        calls.append((options["impl"], options["loss_hint"]))
        return original(*args, **options)

    monkeypatch.setattr(attach_module, "linear_logps", recorded)
    sft = build("sft", "attach", max_steps=1, head=[("impl", "reference")])
    sft.train()
    assert set(calls) == {("reference", "nll")}
    calls.clear()
    dpo = build("dpo", "stock", max_steps=1, arguments=[("model", lambda: sft.model)])
    dpo.train()
    assert not calls
    attach(dpo, impl="pytorch").train()
    assert set(calls) == {("pytorch", None)}
    calls.clear()
    sft.evaluate()
    assert set(calls) == {("reference", "nll")}
    detach(dpo)
    calls.clear()
    dpo.evaluate()
    assert not calls


def test_copies_of_an_attached_model_are_not_attached(build):
    trainer = build("sft", "attach", max_steps=1)
    file = io.BytesIO()
    torch.save(trainer.model, file)
    file.seek(0)
    for copied in (torch.load(file, weights_only=False), copy.deepcopy(trainer.model)):
        ids = torch.tensor([[1, 5, 6, 7]])
        torch.testing.assert_close(copied(ids).logits, trainer.model(ids).logits)
    trainer.train()


def test_detach_leaves_no_trace(build, stock_history):
    before = trl_utils._ChunkedLogProbFunction, getattr(trl_utils, "_use_triton", None)
    trainer, other = build("dpo", "stock"), build("sft", "stock")
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in (trainer.model, trainer.ref_model)]
    attach(trainer)
    attach(other)
    detach(trainer)
    assert isinstance(trl_utils._ChunkedLogProbFunction, attach_module._Switch)  # the other trainer still needs it
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in (trainer.model, trainer.ref_model)]
    detach(other)
    detach(other)  # harmless
    assert not {"training_step", "compute_loss"} & vars(trainer).keys()
    assert before == (trl_utils._ChunkedLogProbFunction, getattr(trl_utils, "_use_triton", None))
    tiny.assert_same(tiny.history(trainer), stock_history("dpo"))


def test_detach_restores_the_methods_of_an_instance(build):
    """Methods that a user set on the trainer before attach(), and again after it."""
    trainer, calls = build("sft", "stock", max_steps=1), []
    original = trainer.compute_loss

    def counted_compute_loss(*args, **kwargs):
        calls.append("own")
        return original(*args, **kwargs)

    trainer.compute_loss = counted_compute_loss
    attach(trainer)
    trainer.train()
    assert calls == ["own"]
    detach(trainer)
    assert vars(trainer)["compute_loss"] is counted_compute_loss
    assert "training_step" not in vars(trainer)
    attach(attach(trainer))  # the second time replaces the first
    detach(trainer)
    assert vars(trainer)["compute_loss"] is counted_compute_loss

    attach(trainer)
    step = trainer.compute_loss
    trainer.compute_loss = later = lambda *args, **kwargs: step(*args, **kwargs)
    detach(trainer)
    assert vars(trainer)["compute_loss"] is later
    trainer.train()
    assert calls == ["own", "own"]


def test_attached_models_generate_save_and_reload(build, tmp_path):
    trainer = build("sft", "attach")
    trainer.train()
    ids = torch.tensor([[1, 5, 6, 7]])
    answer = trainer.model.generate(ids, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > 4
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(reloaded(ids).logits, trainer.model(ids).logits)
    assert torch.equal(reloaded.generate(ids, max_new_tokens=5, do_sample=False), answer)


def test_a_forward_that_raises_is_deactivated(build):
    trainer = build("sft", "attach")
    with pytest.raises(Exception):  # noqa: B017, PT011
        trainer.compute_loss(trainer.model, {"input_ids": "not a tensor", "labels": torch.zeros(1, 2)})
    assert attach_module._active() is None
    assert attach_module._stepping.get() is None


def test_attach_checks_that_the_impl_supports_the_head(build, monkeypatch):
    """With an impl that refuses everything: a bias and the dtype of mixed precision are passed on."""
    problems = []
    for model, options in (("phi", {}), ("qwen3", {"bf16": True})):
        trainer = build("sft", "stock", model=model, **options)
        with monkeypatch.context() as context:
            context.setattr(
                pytorch.IMPL, "supports", lambda problem: problems.append(problem) or "it is asked too much"
            )
            with pytest.raises(ValueError, match="cannot do this: it is asked too much"):
                attach(trainer, impl="pytorch")
    phi, bf16 = problems[0], problems[-1]
    assert phi.bias is not None
    assert bf16.bias is None
    assert (phi.operand_dtype, bf16.operand_dtype) == (torch.float32, torch.bfloat16)


def test_a_head_that_trl_cannot_read_is_refused(build):
    config = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 5], "task_type": "CAUSAL_LM"}
    trainer = build("dpo", "stock", model="tied", arguments=[("peft_config", lambda: peft.LoraConfig(**config))])
    with pytest.raises(
        TypeError, match=r"a head that TRL reads, got TrainableTokens\w+: use FusedDPOTrainer instead of"
    ):
        attach(trainer)


def test_unsupported_trainers_are_refused(build, monkeypatch):
    with pytest.raises(
        TypeError,
        match="trainer must be one of TRL's SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer, RLOOTrainer, got str",
    ):
        attach("trainer")
    trainer = build("sft", "stock")
    with pytest.raises(ValueError, match=r"impl must be one of auto, triton, .*, reference, got 'cuda'"):
        attach(trainer, impl="cuda")
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", type("Theirs", (), {"__module__": "another.library"}))
    with pytest.raises(RuntimeError, match=r"got another\.library\.Theirs in its place"):
        attach(trainer)
