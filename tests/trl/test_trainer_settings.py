"""Settings outside the matrix: adapters, low precision, encoder-decoders, vision, compilation, refusals."""

import collections
import copy

import peft
import pytest
import tiny
import torch
import trl
import trl.trainer.utils as trl_utils
from helpers import Allocations
from transformers import AutoModelForCausalLM
from trl.trainer import dpo_trainer

from fusedalign.impls import pytorch
from fusedalign.trl import FusedCPOTrainer, FusedDPOTrainer, FusedSFTTrainer, HeadOptions, attach
from fusedalign.trl.forward import add_lm_head, fused_by

KINDS = ("sft", "dpo", "kto", "cpo", "orpo", "tpo")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
PEFT = {
    "lora": tiny.lora,
    "head to save": lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lora", "head to save"])
def test_adapters_train_like_stock(build, stock_history, kind, name):
    options = {"arguments": [("peft_config", PEFT[name])]}
    tiny.assert_same(tiny.history(build(kind, "fused", **options)), stock_history(kind, **options))


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_prompt_tuning_trains_like_stock(build, stock_history, kind):
    options = {"arguments": [("peft_config", PEFT["prompt tuning"])]}
    tiny.assert_same(tiny.history(build(kind, "fused", **options)), stock_history(kind, **options))


@pytest.mark.parametrize("variant", ["attach", "fused"])
def test_an_adapter_trained_further_is_its_own_reference(build, stock_history, variant):
    """TRL copies it to an adapter "ref" and switches to that."""
    options = {"prepare": _with_adapter}
    tiny.assert_same(tiny.history(build("dpo", variant, **options)), stock_history("dpo", **options))


def _with_adapter(model):
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(**LORA))


LOW = [
    pytest.param({"bf16": True}, id="bf16"),
    pytest.param(
        {"fp16": True, "use_cpu": False},
        id="fp16",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="Trainer has no fp16 mixed precision on a CPU"),
        ],
    ),
]


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_is_as_close_to_fp32_as_stock(build, stock_history, kind, low):
    """With a learning rate of 0: updated bf16 weights diverge anyway, which would hide differences.

    Padded as in TRL, also on a GPU: the mean logits of CPO and ORPO include padding there.
    """
    device = {name: x for name, x in low.items() if name == "use_cpu"}
    fp32, stock = (stock_history(kind, learning_rate=0.0, **options) for options in (device, low))
    fused = tiny.history(build(kind, "fused", learning_rate=0.0, head={"packed": False}, **low))
    assert [row.keys() for row in fused] == [row.keys() for row in stock]

    def distances(rows):
        """The largest distance per metric over all training and evaluation batches."""
        largest = collections.defaultdict(float)
        for row, exact in zip(rows, fp32, strict=True):
            for key in row:
                name = key.removeprefix("eval_")
                largest[name] = max(largest[name], abs(row[key] - exact[key]))
        return largest

    got, budget = distances(fused), distances(stock)
    assert all(got[name] <= 2 * budget[name] for name in got), (got, budget)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_no_step_allocates_the_logits(build, kind, mode):
    """Allocations stay below counted tokens x V; the step of stock TRL shows that the check can fail."""

    def largest(variant):
        trainer = build(kind, variant, per_device_train_batch_size=12)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.model.train(mode == "train")
        with Allocations() as allocations:
            if mode == "train":
                trainer.compute_loss(trainer.model, batch).backward()
            else:
                trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
        names = {"sft": "labels", "cpo": "chosen_labels", "orpo": "chosen_labels"}
        counted = batch[names[kind]] != -100 if kind in names else batch["completion_mask"]
        return allocations.largest(), int(counted.sum()) * trainer.model.config.vocab_size

    allocated, logits = largest("fused")
    assert allocated < logits
    allocated, logits = largest("stock")
    assert allocated >= logits


@pytest.mark.parametrize("kind", ["cpo", "orpo"])
def test_encoder_decoders_keep_the_path_of_trl(build, stock_history, kind, caplog):
    options = {"model": "t5", "max_completion_length": 16}
    trainer = build(kind, "fused", **options)
    assert "keeps TRL's own path, with logits" in caplog.text
    tiny.assert_same(tiny.history(trainer), stock_history(kind, **options))


def test_tpo_refuses_an_encoder_decoder(build):
    with pytest.raises(TypeError, match="expected a decoder-only causal LM, got the encoder-decoder T5For"):
        build("tpo", "fused", model="t5")


def test_orpo_uses_padding_value(build, stock_history):
    got = tiny.history(build("orpo", "fused", padding_value=7))
    tiny.assert_same(got, stock_history("orpo", padding_value=7))


@pytest.mark.parametrize("variant", ["fused", "attach"])
def test_int32_labels_of_a_collator_are_accepted(build, stock_history, variant):
    trainer = build("sft", variant)
    collate = trainer.data_collator

    def short(rows):
        batch = collate(rows)
        return batch | {"labels": batch["labels"].int()}

    trainer.data_collator = short
    tiny.assert_same(tiny.history(trainer), stock_history("sft"))


def test_a_copied_model_uses_its_own_weights(build):
    model, ids = build("orpo", "fused").model, torch.tensor([[1, 5, 6, 7]])
    before, copied = model(ids).logits, copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(ids).logits, before)
    assert not model(ids).logits.any()


def test_experts_under_another_configuration_name_train_like_stock(build, stock_history):
    """TRL's fused head fails there, but its ORPO and CPO compute the logits."""
    trainer = build("orpo", "fused", model="phimoe")
    tiny.assert_same(tiny.history(trainer), stock_history("orpo", model="phimoe"))


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_a_vision_model_trains_on_text_like_stock(build, stock_history, kind):
    options = {"model": "qwen2_5_vl"}
    tiny.assert_same(tiny.history(build(kind, "fused", **options)), stock_history(kind, **options))


def test_a_vision_model_runs_its_whole_backbone(tiny_folder):
    torch.manual_seed(0)
    model = tiny.MODELS["qwen2_5_vl"]()
    vision = model.config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ids = torch.tensor([[5, 401, 400, 400, 400, 400, 402, 7, 8, 9]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(16, patch),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 400).long(),
    }
    labels = ids.masked_fill(ids > 300, -100)
    expected = model(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    add_lm_head(model, options=HeadOptions())
    out = model(**inputs, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs, expected.where(labels[:, 1:] != -100, 0))
    blind = model(**inputs | {"pixel_values": torch.zeros(16, patch)}, labels=labels, fused_lm_head=True)
    assert not torch.allclose(blind.log_probs, out.log_probs)


def test_aligned_labels_are_not_shifted_again(tiny_folder):
    """`shift_labels`, used by context and sequence parallelism."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("qwen3"))
    add_lm_head(model, outputs=("log_probs", "entropy"), options=HeadOptions())
    ids = torch.randint(3, 400, (2, 7))
    labels = ids.masked_fill(torch.rand(2, 7) < 0.3, -100)
    aligned = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    want = model(ids, labels=labels, fused_lm_head=True)
    got = model(ids, shift_labels=aligned, fused_lm_head=True)
    assert got.log_probs.shape == (2, 7)
    for name in ("log_probs", "entropy", "label_mask"):
        torch.testing.assert_close(getattr(got, name)[:, :-1], getattr(want, name))
    torch.testing.assert_close(got.loss, want.loss)


@pytest.mark.parametrize("kind", ["sft", "dpo", "tpo"])
def test_compute_metrics_receives_the_logits(build, stock_history, kind):
    """Evaluations compute them in a separate forward; training steps do not."""
    options = {"arguments": [("compute_metrics", lambda: _mean_logit)]}
    got = tiny.history(build(kind, "fused", **options))
    assert "eval_mean_logit" in got[-1]
    tiny.assert_same(got, stock_history(kind, **options))


def _mean_logit(prediction):
    return {"mean_logit": float(prediction.predictions[prediction.predictions != -100].mean())}


def _reward(completions, **_):
    return [float(len(set(completion)) % 5) for completion in completions]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("extra", [{}, {"beta": 0.1, "temperature": 0.7}])
def test_attached_online_trainers_train_like_stock(build, stock_history, kind, extra):
    options = {
        "arguments": [("reward_funcs", lambda: _reward)],
        "max_steps": 2,
        "num_generations": 2,
        "max_completion_length": 6,
        "optim": "sgd",  # Adam's first steps follow the signs of gradients, which may be rounding noise
        "learning_rate": 0.1,
        **extra,
    }
    got = tiny.history(build(kind, "attach", **options), evaluate=False)
    want = tiny.history(build(kind, "stock", **options), evaluate=False)
    if kind == "rloo":  # rewards contain the KL, rounding noise at step 1: equal rewards may differ by it
        got, want = ([{k: v for k, v in row.items() if k != "frac_reward_zero_std"} for row in x] for x in (got, want))
    tiny.assert_same(got, want)
    assert any(row.get("grad_norm", 0) > 0 for row in got)


def test_attached_grpo_with_an_fp32_head_trains_like_stock(build):
    options = {
        "arguments": [("reward_funcs", lambda: _reward)],
        "max_steps": 1,
        "num_generations": 2,
        "max_completion_length": 6,
        "cast_lm_head_to_fp32": True,
        "bf16": True,
    }
    got, want = (tiny.history(build("grpo", variant, **options), evaluate=False) for variant in ("attach", "stock"))
    tiny.assert_same(got, want, tolerance=1e-2)


def test_trl_is_restored_after_construction_and_after_a_failure(build):
    before = dpo_trainer.add_fused_lm_head, dpo_trainer.BaseTunerLayer
    assert fused_by(build("dpo", "fused").model) == "fusedalign"
    assert fused_by(build("dpo", "stock").model) == "trl"
    with pytest.raises(ValueError, match="exo_pair"):
        build("dpo", "fused", loss_type="exo_pair")
    assert (dpo_trainer.add_fused_lm_head, dpo_trainer.BaseTunerLayer) == before


def test_a_subclass_trains_like_stock(build, stock_history):
    class Mine(FusedDPOTrainer):
        pass

    tiny.assert_same(tiny.history(build("dpo", "fused", cls=Mine)), stock_history("dpo"))


# Refusals


@pytest.mark.parametrize("kind", ["sft", "cpo"])
def test_options_are_checked_at_construction(build, kind):
    with pytest.raises(ValueError, match=r"impl must be one of auto, triton, .*, got 'cuda'"):
        build(kind, "fused", head=[("impl", "cuda")])
    with pytest.raises(ValueError, match="filter_eps must be None"):
        build(kind, "fused", head=[("impl", "pytorch"), ("filter_eps", 1e-4)])
    trainer = build(kind, "fused", head=[("impl", "reference"), ("workspace", 10**6)])
    assert trainer.head_options == HeadOptions("reference", None, 10**6)


def test_attach_checks_its_options(build):
    trainer = build("sft", "stock")
    with pytest.raises(TypeError, match="options must be among impl, filter_eps, workspace, got chunk"):
        attach(trainer, chunk=3)
    with pytest.raises(ValueError, match="filter_eps must be None"):
        attach(trainer, impl="pytorch", filter_eps=1e-4)


def test_the_workspace_reaches_the_head(build, monkeypatch):
    workspaces = []
    plan = pytorch._plan
    monkeypatch.setattr(pytorch, "_plan", lambda p: workspaces.append(p.memory.workspace) or plan(p))
    for variant in ("attach", "fused"):
        build("dpo", variant, max_steps=1, head=[("workspace", 77_777)]).train()
    assert set(workspaces) == {77_777}


def test_a_head_that_cannot_be_read_is_refused_at_construction(build):
    def tanh(model):
        model.lm_head.forward = lambda hidden: hidden
        return model

    for kind in ("dpo", "cpo"):
        with pytest.raises(TypeError, match=r"expected .*lm_head to be a plain nn.Linear"):
            build(kind, "fused", prepare=tanh)


def test_attach_names_the_library_of_a_foreign_forward(build):
    trainer = build("sft", "stock")

    def lce_forward(*args, **kwargs):
        return None

    trainer.model.forward = lce_forward
    name = r"test_trainer_settings\.lce_forward"
    with pytest.raises(RuntimeError, match=rf"expected TRL's own fused forward, got .*{name} in its"):
        attach(trainer)


def test_attach_to_a_fused_trainer_is_refused(build):
    with pytest.raises(TypeError, match="got FusedSFTTrainer: give it the options itself"):
        attach(build("sft", "fused"))
    with pytest.raises(TypeError, match="trainer must be one of TRL's"):
        attach(build("orpo", "stock"))


def test_the_fused_classes_extend_those_of_trl():
    assert issubclass(FusedSFTTrainer, trl.SFTTrainer)
    assert FusedCPOTrainer.__name__ == "FusedCPOTrainer"
    assert hasattr(trl_utils, "add_fused_lm_head")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["attach", "fused"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "orpo"])
def test_torch_compile_trains_like_stock(build, stock_history, kind, variant):
    if variant == "attach" and kind == "orpo":
        pytest.skip("attach() does not support ORPO")
    got = tiny.history(build(kind, variant, torch_compile=True, max_steps=2))
    tiny.assert_same(got, stock_history(kind, max_steps=2), tolerance=1e-4)
