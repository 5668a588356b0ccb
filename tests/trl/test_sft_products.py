"""SFT under TRL takes 3 products of the head's size, since its loss is known in advance; see test_matrix."""

import pytest
import tiny
import torch
import trl
from torch.utils.flop_counter import FlopCounterMode

from fusedalign.impls import pytorch
from fusedalign.trl import FusedSFTTrainer

PYTORCH = [("impl", "pytorch")]


def products(trainer):
    """Head products of a training step, in units of the product of the counted tokens with the head."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    with FlopCounterMode(display=False) as step:
        trainer.compute_loss(trainer.model, batch).backward()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with FlopCounterMode(display=False) as backbone:
        trainer.model.base_model(**inputs).last_hidden_state.sum().backward()
    v, d = trainer.model.get_output_embeddings().weight.shape
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    return (step.get_total_flops() - backbone.get_total_flops()) / (2 * tokens * d * v)


@pytest.mark.parametrize("variant", ["attach", "fused"])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("model", ["qwen3", "tied"])
def test_a_step_takes_three_products(build, variant, loss_type, model):
    assert products(build("sft", variant, model=model, loss_type=loss_type, head=PYTORCH)) == 3


class _Weighted:
    """A custom loss on top of TRL's contract."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs, fused_lm_head=True)
        weights = torch.linspace(1, 2, out.log_probs.shape[1])
        return -(out.log_probs * weights).sum() / 50


class _Stock(_Weighted, trl.SFTTrainer):
    pass


class _Fused(_Weighted, FusedSFTTrainer):
    pass


@pytest.mark.parametrize("variant", ["attach", "fused"])
def test_a_custom_loss_gets_no_hint(build, variant):
    """With a hint its gradients would be computed twice."""
    assert products(build("sft", variant, cls=_Fused if variant == "fused" else _Stock, head=PYTORCH)) == 4


@pytest.mark.parametrize("variant", ["attach", "fused"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dft", "gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"model": "gemma2"},
        {"model": "qwen3_moe"},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_no_step_recomputes_its_logits(build, stock_history, variant, options, monkeypatch):
    """Whatever the loss is divided by and added to; all metrics equal TRL's."""
    options = {"max_steps": 3} | options
    want = stock_history("sft", **options)
    monkeypatch.setattr(pytorch.IMPL, "two_pass_grads", None)
    tiny.assert_same(tiny.history(build("sft", variant, head=PYTORCH, **options)), want)


def test_dpo_gives_no_hint(build, monkeypatch):
    """Its token weights depend on complete sequences."""
    monkeypatch.setattr(pytorch.IMPL, "one_pass", None)
    for variant in ("attach", "fused"):
        build("dpo", variant, head=PYTORCH, max_steps=1).train()


def test_an_evaluation_computes_no_gradient(build, monkeypatch):
    monkeypatch.setattr(pytorch.IMPL, "one_pass", None)
    for variant in ("attach", "fused"):
        build("sft", variant, head=PYTORCH).evaluate()
