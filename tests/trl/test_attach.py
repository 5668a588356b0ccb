"""attach(): who is served and who is not, no logits, and no trace after detach(). test_matrix has the metrics."""

import copy
import io

import pytest
import tiny
import torch
import trl.trainer.utils as trl_utils
from helpers import Allocations
from transformers import AutoModelForCausalLM

from fusedalign.trl import attach, detach
from fusedalign.trl import attachment as attach_module


def test_the_expert_balancing_loss_is_in_the_total(build):
    trainer = build("sft", "attach", model="qwen3_moe", max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] > 0.5  # and part of "loss", which the matrix compares


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_model_that_takes_no_loss_arguments(build, kind):
    """Then the Trainer, and not the loss, divides by the number of accumulation steps."""

    def without(trainer):
        trainer.model_accepts_loss_kwargs = False
        return trainer

    options = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_steps": 3}
    got, want = (tiny.history(without(build(kind, how, **options))) for how in ("attach", "stock"))
    tiny.assert_same(got, want)


def test_no_step_makes_the_logits(build):
    def largest(how):
        trainer = build("dpo", how, per_device_train_batch_size=12)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.model.train()
        with Allocations() as allocations:
            trainer.compute_loss(trainer.model, batch).backward()
        return allocations.largest(), int(batch["completion_mask"].sum()) * trainer.model.config.vocab_size

    made, logits = largest("attach")
    assert made < logits
    made, logits = largest("stock")
    assert made >= logits  # the check can fail


def test_only_the_attached_trainer_is_served(build, monkeypatch):
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
    attach(attached, impl="reference")  # again: replaces the impl, and each forward is served once
    attached.train()
    assert calls == ["pytorch", "reference"]
    detach(attached)
    attached.train()
    assert calls == ["pytorch", "reference"]


def test_trainers_that_share_a_model(build, monkeypatch):
    """SFT, then DPO of the model that came out: each is served as it was attached, or not at all."""
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


def test_a_copy_of_an_attached_model_is_nobodys(build):
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
    assert isinstance(trl_utils._ChunkedLogProbFunction, attach_module._Switch)  # the other one still needs it
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in (trainer.model, trainer.ref_model)]
    detach(other)
    detach(other)  # harmless
    assert not {"training_step", "compute_loss"} & vars(trainer).keys()
    assert before == (trl_utils._ChunkedLogProbFunction, getattr(trl_utils, "_use_triton", None))
    tiny.assert_same(tiny.history(trainer), stock_history("dpo"))


def test_detach_gives_an_instances_own_methods_back(build):
    """Those that a user has put on this trainer: before attach(), under it, and over it."""
    trainer, calls = build("sft", "stock", max_steps=1), []
    original = trainer.compute_loss

    def own(*args, **kwargs):
        calls.append("own")
        return original(*args, **kwargs)

    trainer.compute_loss = own
    attach(trainer)
    trainer.train()
    assert calls == ["own"]
    detach(trainer)
    assert vars(trainer)["compute_loss"] is own
    assert "training_step" not in vars(trainer)
    attach(attach(trainer))  # the second time replaces the first
    detach(trainer)
    assert vars(trainer)["compute_loss"] is own

    attach(trainer)
    step = trainer.compute_loss
    trainer.compute_loss = later = lambda *args, **kwargs: step(*args, **kwargs)
    detach(trainer)
    assert vars(trainer)["compute_loss"] is later
    trainer.train()
    assert calls == ["own", "own"]


def test_generate_save_and_reload(build, tmp_path):
    trainer = build("sft", "attach")
    trainer.train()
    ids = torch.tensor([[1, 5, 6, 7]])
    answer = trainer.model.generate(ids, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > 4
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(reloaded(ids).logits, trainer.model(ids).logits)
    assert torch.equal(reloaded.generate(ids, max_new_tokens=5, do_sample=False), answer)


def test_a_forward_that_raises_does_not_stay_active(build):
    trainer = build("sft", "attach")
    with pytest.raises(Exception):  # noqa: B017, PT011
        trainer.compute_loss(trainer.model, {"input_ids": "not a tensor", "labels": torch.zeros(1, 2)})
    assert attach_module._active() is None
    assert attach_module._stepping.get() is None


def test_what_cannot_be_attached_is_refused(build, monkeypatch):
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
