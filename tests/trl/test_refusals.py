"""Everything that trainers refuse at construction or attach(), by message."""

import contextlib
import dataclasses
import functools
import inspect
import json
import types

import accelerate
import datasets
import peft
import pytest
import tiny
import torch
import transformers
import transformers.trainer
import trl
from transformers.models.phimoe import modeling_phimoe

from fusedalign.cli import main
from fusedalign.impls import pytorch
from fusedalign.trl import FusedSFTTrainer, attach
from fusedalign.trl.forward import fused_by
from fusedalign.trl.reference import KeyedReference
from fusedalign.trl.refusals import refuse_head_unit, refuse_numbers, refuse_uneven_batches

KINDS = ("sft", "dpo", "kto", "cpo", "orpo", "tpo")


# Liger


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for Liger Kernel, which replaces the forward at the start of training unless disabled."""
    applied = []

    def lce_forward(*args, **kwargs):
        raise AssertionError("Liger's forward was called")

    def apply(model, config):
        applied.append(config)
        if (config or {}).get("fused_linear_cross_entropy", True):
            model.forward = lce_forward

    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", apply)
    monkeypatch.setattr(transformers.trainer, "is_liger_kernel_available", lambda: True, raising=False)
    return applied


@pytest.mark.parametrize("kind", ["cpo", "orpo", "tpo"])
def test_other_liger_kernels_leave_the_head_unchanged(build, liger, kind):
    """In SFT, DPO and KTO TRL ensures that."""
    trainer = build(kind, "fused", use_liger_kernel=True, liger_kernel_config={"rope": True}, max_steps=1)
    trainer.train()
    assert liger == [{"rope": True, "fused_linear_cross_entropy": False}]
    assert fused_by(trainer.model) == "fusedalign"


@pytest.mark.parametrize("kind", KINDS)
def test_the_liger_head_is_refused(build, liger, kind):
    with pytest.raises(ValueError, match=rf"Fused{kind.upper()}Trainer needs liger_kernel_config without fused_linear"):
        build(kind, "fused", use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_attach_names_a_liger_forward(build, kind):
    """Liger has patched the trainer's model, so the forward that attach() would replace is gone."""
    trainer = build(kind, "stock", arguments=[("peft_config", tiny.lora)])

    def lce_forward(self, *args, **kwargs):
        return None

    lce_forward.__globals__["__name__"], before = "liger_kernel.transformers.model.qwen3", __name__
    try:
        trainer.model.get_base_model().forward = types.MethodType(lce_forward, trainer.model.get_base_model())
        with pytest.raises(
            RuntimeError, match=r"got liger_kernel\.transformers\.model\.qwen3\.lce_forward in its place"
        ):
            attach(trainer)
    finally:
        lce_forward.__globals__["__name__"] = before


# Arguments and options


@pytest.mark.parametrize("kind", ["cpo", "orpo"])
def test_model_init_is_refused(build, kind):
    """The trainers of TRL that take one."""
    for name in KINDS:
        assert ("model_init" in inspect.signature(tiny.classes(name)[0].__init__).parameters) == (
            name in ("cpo", "orpo")
        )
    instead = "each of its models would come without the fused head; pass the model"
    with pytest.raises(
        ValueError, match=rf"Fused{kind.upper()}Trainer needs model_init=None, got a function: {instead}"
    ):
        build(kind, "fused", arguments=[("model_init", lambda: lambda: None)])


@pytest.mark.parametrize("variant", ["attach", "fused"])
def test_label_smoothing_of_sft_is_refused(build, variant):
    """fusedalign.sft_loss supports it; DFT ignores it, as in TRL, and is not refused."""
    instead = r"which takes the logits: in a loop of your own fusedalign\.sft_loss has label_smoothing"
    with pytest.raises(ValueError, match=rf"needs label_smoothing_factor=0, got 0\.1, {instead}"):
        build("sft", variant, label_smoothing_factor=0.1)
    build("sft", variant, label_smoothing_factor=0.1, loss_type="dft")


NAN, INF = float("nan"), float("inf")
#: kind -> numbers of its configuration, each with invalid values
BAD_NUMBERS = {
    "dpo": {
        "beta": (NAN, INF, -1.0, 0.0),
        "ld_alpha": (NAN, -0.1, 1.1),
        "f_alpha_divergence_coef": (NAN, INF),
        "discopop_tau": (NAN, INF, 0.0, -0.05),
        "label_smoothing": (NAN, INF, -0.1, 1.0),
        "ref_model_mixup_alpha": (NAN, 1.5),
        "router_aux_loss_coef": (NAN, INF),
    },
    "kto": {
        "beta": (NAN, INF, -1.0, 0.0),
        "desirable_weight": (NAN, INF, -1.0),
        "undesirable_weight": (NAN, INF, -1.0),
    },
    "cpo": {
        "beta": (NAN, INF, -1.0, 0.0),
        "cpo_alpha": (NAN, INF, -1.0),
        "simpo_gamma": (NAN, INF, -0.5),
        "alpha": (NAN, INF),
        "label_smoothing": (NAN, -0.1, 1.0),
    },
    "orpo": {"beta": (NAN, INF, -1.0)},
    "tpo": {
        "beta": (NAN, INF, -1.0, 0.0),
        "tpo_alpha": (NAN, INF, -1.0),
        "tpo_l_gamma": (NAN, INF, -0.5),
        "label_smoothing": (NAN, -0.1, 1.0),
    },
    "sft": {"router_aux_loss_coef": (NAN, INF), "max_length": (-5,)},
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, numbers in BAD_NUMBERS.items() for name in numbers])
def test_invalid_loss_numbers_are_refused(build, kind, name):
    for bad in BAD_NUMBERS[kind][name]:
        for variant in ("fused", "attach") if kind in ("sft", "dpo", "kto") and bad is NAN else ("fused",):
            with pytest.raises(ValueError, match=rf"^{name} must be .*, got {bad}$"):
                build(kind, variant, model="qwen3_moe" if name.startswith("router") else "qwen3", **{name: bad})


def test_every_number_of_a_loss_is_checked():
    """All numeric fields of TRL's configurations except those known not to enter a loss are checked."""
    exempt = {"precompute_ref_batch_size", "ref_model_sync_steps", "max_completion_length"}
    exempt |= {"pad_to_multiple_of", "padding_value", "dataset_num_proc", "learning_rate"}
    for kind, numbers in BAD_NUMBERS.items():
        config = tiny.classes(kind)[2]
        own = {f.name: str(f.type) for f in dataclasses.fields(config)}
        base = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
        numeric = {name for name, kind in own.items() if ("float" in kind or "int" in kind) and name not in base}
        assert numeric - exempt - {"loss_weights"} <= set().union(*BAD_NUMBERS.values()), kind
        assert numbers.keys() <= own.keys()


def test_invalid_loss_weights_and_number_types_are_refused(build):
    weights = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, NAN]}
    with pytest.raises(ValueError, match=r"^loss_weights\[1\] must be finite, got nan$"):
        build("dpo", "fused", **weights)
    with pytest.raises(TypeError, match=r"^beta must be a number, got str$"):
        build("dpo", "fused", beta="0.1")
    with pytest.raises(
        ValueError, match=r"^label_smoothing must be in \[0, 0.5\) with loss_type=\['robust'\], got 0.5$"
    ):
        build("dpo", "fused", loss_type=["robust"], label_smoothing=0.5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dpo", {"ld_alpha": 0.0, "loss_type": ["sigmoid", "sft"], "loss_weights": [0.0, 1.0]}),
        ("dpo", {"ld_alpha": 1.0, "f_alpha_divergence_coef": -0.5, "ref_model_mixup_alpha": 1.0}),
        ("dpo", {"label_smoothing": 0.3}),
        ("kto", {"desirable_weight": 0.0, "undesirable_weight": 1}),
        ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.0, "alpha": -0.25}),
        ("cpo", {"loss_type": "hinge", "label_smoothing": 0.1}),
        ("orpo", {"beta": 0.0}),
        ("tpo", {"tpo_alpha": 0.0, "tpo_l_gamma": 0.0}),
    ],
)
def test_valid_loss_numbers_are_accepted(build, kind, options):
    build(kind, "fused", **options)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_online_trainers_accept_beta_0(kind):
    """Tests the check of attach() directly, since these trainers are slow to build."""
    config = tiny.classes(kind)[2]
    for beta in (0.0, 0.04):
        refuse_numbers(config(output_dir="unused", beta=beta, report_to="none", use_cpu=True, bf16=False))
    for bad in (NAN, -1.0):
        with pytest.raises(ValueError, match=rf"^beta must be >= 0, got {bad}$"):
            refuse_numbers(config(output_dir="unused", beta=bad, report_to="none", use_cpu=True, bf16=False))


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_the_command_refuses_invalid_numbers(capsys, tiny_folder, tmp_path, value):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "a good", "chosen": " answer", "rejected": " boats"}) + "\n")
    model = tiny_folder("qwen3")
    tiny.tokenizer().save_pretrained(model)
    for method, flag in (("dpo", "--beta"), ("simpo", "--simpo_gamma")):
        flags = {"--model_name_or_path": model, "--dataset_name": data, "--output_dir": tmp_path / "out"}
        words = [method, *(str(x) for pair in flags.items() for x in pair), f"{flag}={value}"]
        words += ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "1"]
        assert main(words) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fusedalign: error")]
        assert line.startswith(f"fusedalign: error: {flag[2:]} must be ")
        assert f"got {float(value)}" in line
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_label_smoothing_in_training_arguments_is_refused(tmp_path):
    """transformers' TrainingArguments, without a loss_type."""
    args = transformers.TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    data, tokenizer = tiny.data("sft", 4), tiny.tokenizer()
    with pytest.raises(ValueError, match=r"FusedSFTTrainer needs label_smoothing_factor=0, got 0\.1"):
        FusedSFTTrainer(tiny.MODELS["qwen3"](), args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize(("kind", "variant"), [("sft", "fused"), ("sft", "attach"), ("orpo", "fused")])
def test_adapters_that_need_logits_are_refused(build, kind, variant):
    cpt = {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2], "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match="has no way for CPT, whose model calls the forward with logits"):
        build(kind, variant, arguments=[("peft_config", lambda: peft.CPTConfig(**cpt))])


def test_trl_trainers_with_a_loss_on_logits_are_refused(build):
    class GKDTrainer(trl.SFTTrainer):
        __module__ = "trl.experimental.gkd"

    with pytest.raises(TypeError, match="or your own, got GKDTrainer"):
        build("sft", "attach", cls=GKDTrainer)


def test_attach_refuses_experts_that_trl_cannot_count(build):
    with pytest.raises(
        ValueError, match=r"with one of num_experts in the configuration, got Phimoe.*: use FusedSFTTrain"
    ):
        build("sft", "attach", model="phimoe")


def test_experts_with_their_own_balancing_loss_are_refused(build, monkeypatch):
    monkeypatch.setattr(modeling_phimoe, "load_balancing_loss_func", lambda router_logits, keys: None)
    with pytest.raises(ValueError, match=r"got PhimoeForCausalLM: set its router_aux_loss_coef to 0"):
        build("sft", "fused", model="phimoe")


def test_construction_checks_that_the_impl_supports_the_head(build, monkeypatch):
    """With an impl that refuses everything: all outputs, a bias and the dtype of mixed precision are passed on."""
    problems, first_problems = [], []
    monkeypatch.setattr(pytorch.IMPL, "supports", lambda problem: problems.append(problem) or "it is asked too much")
    for kind, model, options in (("sft", "phi", {}), ("dpo", "gemma2", {}), ("orpo", "qwen3", {"bf16": True})):
        with pytest.raises(ValueError, match="cannot do this: it is asked too much"):
            build(kind, "fused", model=model, head=[("impl", "pytorch")], **options)
        first_problems.append(problems[0])
        problems.clear()
    sft, dpo, orpo = first_problems
    assert sft.outputs == {"entropy", "is_top1"}
    assert sft.bias is not None
    assert dpo.outputs == {"entropy", "mean_logit", "is_top1"}
    assert dpo.softcap == 0.5
    assert (sft.operand_dtype, orpo.operand_dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("variant", ["attach", "fused"])
def test_compute_loss_func_is_refused(build, variant):
    instead = "it is given the logits; override compute_loss of a subclass instead"
    with pytest.raises(ValueError, match=f"needs compute_loss_func=None, got a function: {instead}"):
        build("sft", variant, arguments=[("compute_loss_func", lambda: lambda *a, **k: None)])


# Several processes


def fsdp1(**options):
    """The plugin of the first FSDP, without its environment variables."""
    return accelerate.FullyShardedDataParallelPlugin(fsdp_version=1, reshard_after_forward="FULL_SHARD", **options)


def with_lora(*names):
    return peft.get_peft_model(tiny.MODELS["qwen3"](), peft.LoraConfig(target_modules=["q_proj", *names]))


LAYERS = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["Qwen3DecoderLayer"]}
LINEAR = LAYERS | {"transformer_cls_names_to_wrap": ["Linear"]}
EMBEDDINGS = LAYERS | {"transformer_cls_names_to_wrap": ["Embedding"]}


@pytest.mark.parametrize(
    ("model", "plugin", "unit"),
    [
        ("qwen3", LAYERS, None),
        ("qwen3", EMBEDDINGS, None),
        ("qwen3", {"auto_wrap_policy": "no_wrap"}, None),
        ("qwen3", {"auto_wrap_policy": "size_based_wrap", "min_num_params": 10**9}, None),
        ("qwen3", {"auto_wrap_policy": "size_based_wrap", "min_num_params": 10}, "lm_head"),
        ("qwen3", LINEAR, "lm_head"),
        ("tied", EMBEDDINGS, "model.embed_tokens"),
        ("lora", LAYERS, None),
        ("lora on the head", LAYERS, "base_model.model.lm_head.lora_A.default"),
    ],
)
def test_a_head_that_is_a_unit_of_the_first_fsdp_is_refused(monkeypatch, model, plugin, unit):
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP", raising=False)
    models = {**tiny.MODELS, "lora": with_lora, "lora on the head": functools.partial(with_lora, "lm_head")}
    model = models[model]()
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=fsdp1(**plugin)), unwrap_model=lambda model, **_: model
    )
    trainer = types.SimpleNamespace(model=model, accelerator=accelerator)
    expected = contextlib.nullcontext()
    if unit is not None:
        expected = pytest.raises(ValueError, match=rf"policy that makes {unit} a unit of its own: .* FSDP2")
    with expected:
        refuse_head_unit(trainer)


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_last_batches_of_unequal_size_are_refused(build, kind):
    trainer = build(kind, "fused", accelerator_config={"even_batches": False})  # one process
    several = types.SimpleNamespace(num_processes=2, even_batches=False, split_batches=False)
    ranks = types.SimpleNamespace(accelerator=several, args=trainer.args, eval_dataset=None)
    for rows, refused in ((8, False), (16, False), (15, True), (12, True)):
        ranks.train_dataset = range(rows)
        with pytest.raises(ValueError, match="even_batches=False") if refused else contextlib.nullcontext():
            refuse_uneven_batches(ranks)
    ranks.train_dataset, ranks.eval_dataset = range(8), {"one": range(8), "two": range(9)}
    with pytest.raises(ValueError, match="with 9 rows, 8 in the batches of a step"):
        refuse_uneven_batches(ranks)
    several.even_batches = True
    refuse_uneven_batches(ranks)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_reference_of_data_in_memory_is_refused_on_several_ranks(build, monkeypatch, tmp_path, kind):
    """Data of files reach TRL's precomputation."""
    reached = []
    trainer = build(kind, "fused")
    monkeypatch.setattr(KeyedReference, "_precompute_ref_logps", lambda self, *args: reached.append(args))
    monkeypatch.setattr(trainer.accelerator.state, "num_processes", 2)
    data = tiny.data(kind, 4)
    with pytest.raises(ValueError, match="needs a data set in files for precompute_ref_log_probs on several ranks"):
        trainer._precompute_ref_logps(data, "train", 4)
    data.save_to_disk(tmp_path / "data")
    trainer._precompute_ref_logps(datasets.load_from_disk(tmp_path / "data"), "train", 4)
    assert len(reached) == 1
