"""`liger_kernels=True`: Liger's kernels in every model of a Fused trainer, without its losses; and refusals.

Most tests use a stand-in for Liger, so that they also run without it. With Liger installed, its kernels run in Triton's
interpreter or on a GPU.
"""

import collections
import importlib.util
import sys
import types

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM
from transformers.models.qwen3 import modeling_qwen3

from fusedalign.cli import main
from fusedalign.impls.adapter import Library
from fusedalign.trl import attach, kernels
from fusedalign.trl.arguments import parse
from fusedalign.trl.forward import fused_by
from fusedalign.trl.kernels import add_liger_kernels, check_liger_kernels, liger_parts
from fusedalign.trl.reference import reference_key

KINDS = ("sft", "dpo", "kto", "cpo", "orpo", "tpo")
LIGER = {"head": [("liger_kernels", True)]}


class _StandIn:
    """A function like Liger's `apply_liger_kernel_to_qwen3` that records its effects."""

    def __init__(self):
        self.models, self.losses, self.forwards = [], [], collections.Counter()

    def __call__(self, model, rope=True, cross_entropy=True, fused_linear_cross_entropy=True):
        self.models.append(model)
        self.losses.append((cross_entropy, fused_linear_cross_entropy))
        layers = [layer for layer in model.modules() if isinstance(layer, modeling_qwen3.Qwen3RMSNorm)]
        for layer in layers:
            layer.forward = types.MethodType(self.forward, layer)

        def liger_rotary_pos_emb(*args, **kwargs):
            raise AssertionError("only its name is looked at")

        liger_rotary_pos_emb.__module__ = "liger_kernel.transformers.rope"
        modeling_qwen3.liger_rotary_pos_emb = liger_rotary_pos_emb

    @property
    def forward(self):
        def forward(layer, x):
            self.forwards[id(layer)] += 1
            return type(layer).forward(layer, x)

        forward.__module__, forward.__qualname__ = "liger_kernel.transformers.rms_norm", "LigerRMSNorm.forward"
        return forward

    def ran_in(self, model):
        """Number of layers of `model` that ran the kernel."""
        return sum(id(layer) in self.forwards for layer in model.modules())


@pytest.fixture(autouse=True)
def _restored_modules():
    """Restore the modules of transformers, which Liger changes for all models."""
    modules = [m for n, m in sys.modules.items() if n.startswith("transformers.models.") and ".modeling_" in n]
    before = [(module, dict(vars(module))) for module in modules]
    yield
    for module, names in before:
        for name in vars(module).keys() - names.keys():
            delattr(module, name)
        vars(module).update(names)


@pytest.fixture
def liger(monkeypatch):
    """Install a stand-in for Liger Kernel that supports one architecture."""
    stand_in = _StandIn()
    monkeypatch.setattr(kernels, "_find", lambda: Library({"qwen3": stand_in}, None))
    _environment(monkeypatch, TRITON_INTERPRET="1")
    return stand_in


def _environment(monkeypatch, **variables):
    """Set environment variables for `kernels` only; Triton, which may be imported at any time, sees the real ones."""
    monkeypatch.setattr(kernels, "os", types.SimpleNamespace(environ=variables))


def _models(trainer):
    return [m for m in (trainer.model, getattr(trainer, "ref_model", None)) if m is not None]


# Which models


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_of_a_trainer_gets_kernels_without_losses(build, liger, kind):
    trainer = build(kind, "fused", max_steps=1, **LIGER)
    models = _models(trainer)
    assert len(models) == (2 if kind in ("dpo", "kto") else 1)
    assert liger.models == models
    assert set(liger.losses) == {(False, False)}
    trainer.train()
    for model in models:
        assert fused_by(model) == "fusedalign"
        assert liger.ran_in(model) == sum(isinstance(x, modeling_qwen3.Qwen3RMSNorm) for x in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_off_by_default(build, liger, kind):
    for head in ((), [("liger_kernels", False)]):
        trainer = build(kind, "fused", head=head)
        assert liger.models == []
        assert all(liger_parts(model) == [] for model in _models(trainer))


@pytest.mark.parametrize("kind", ["sft", "dpo", "orpo"])
def test_a_named_model_gets_kernels(build, liger, tiny_folder, kind):
    trainer = build(kind, "fused", arguments=[("model", lambda: str(tiny_folder("qwen3")))], **LIGER)
    assert liger.models == _models(trainer)


@pytest.mark.parametrize("kind", ["sft", "dpo", "cpo"])
@pytest.mark.parametrize("source", ["configuration", "PeftModel"])
def test_adapted_models_get_kernels(build, liger, kind, source):
    """The reference is the same model with its adapters disabled or switched."""
    options = {"prepare": lambda model: peft.get_peft_model(model, tiny.lora())}
    if source == "configuration":
        options = {"arguments": [("peft_config", tiny.lora)]}
    trainer = build(kind, "fused", max_steps=1, **options, **LIGER)
    assert liger.models == [trainer.model.get_base_model()]
    trainer.train()
    assert liger.ran_in(trainer.model)


def test_a_passed_reference_gets_kernels(build, liger, tiny_folder):
    own = AutoModelForCausalLM.from_pretrained(tiny_folder("qwen3"), attn_implementation="eager")
    trainer = build("dpo", "fused", arguments=[("ref_model", lambda: own)], **LIGER)
    assert liger.models == [trainer.model, own]


def test_a_precomputed_reference_runs_with_kernels(build, liger):
    """It is computed while the trainer is built."""
    trainer = build("dpo", "fused", precompute_ref_log_probs=True, **LIGER)
    assert "ref_chosen_logps" in trainer.train_dataset.column_names
    assert liger.ran_in(trainer.model)


def test_a_second_trainer_of_the_same_model_runs_its_own_layers(build, liger):
    """Its reference is a copy of a model with kernels, whose copied layers must run."""
    first = build("dpo", "fused", max_steps=1, **LIGER)
    second = build("dpo", "fused", max_steps=1, arguments=[("model", lambda: first.model)], **LIGER)
    assert second.ref_model not in (first.model, first.ref_model)
    for layer in second.ref_model.modules():
        if "forward" in vars(layer) and layer is not second.ref_model:
            assert layer.forward.__self__ is layer
    tiny.assert_same(tiny.history(second, evaluate=False), tiny.history(build("dpo", "fused", max_steps=1), False))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_kernels_do_not_change_the_metrics(build, stock_history, liger, kind):
    """The stand-in computes what the layers compute."""
    tiny.assert_same(tiny.history(build(kind, "fused", **LIGER)), stock_history(kind))
    assert liger.forwards


def test_the_key_of_a_precomputed_reference_depends_on_kernels(build, liger):
    """However the kernels were added: the key describes the functions that run."""
    trainer = build("dpo", "fused")
    key = reference_key(trainer)
    add_liger_kernels(trainer.ref_model)
    expected = ["liger_kernel.transformers.rms_norm.LigerRMSNorm.forward", "liger_kernel.transformers.rope"]
    parts = liger_parts(trainer.ref_model)
    assert parts[0] == expected[0]
    assert parts[1].startswith(expected[1])
    assert reference_key(trainer) != key


# Refusals


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_liger_kernel_is_refused(build, monkeypatch, kind):
    _environment(monkeypatch, TRITON_INTERPRET="1")
    reason = "liger_kernel is not installed: pip install 'liger-kernel>=0.8.5'"
    monkeypatch.setattr(kernels, "_find", lambda: Library(None, reason))
    with pytest.raises(ValueError, match=f"liger_kernels=True needs Liger Kernel, got none: {reason}"):
        build(kind, "fused", **LIGER)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels._find.__wrapped__().reason == "liger_kernel is not installed: pip install 'liger-kernel>=0.8.5'"


@pytest.mark.parametrize("kind", KINDS)
def test_a_cpu_is_refused(build, liger, monkeypatch, kind):
    _environment(monkeypatch)
    with pytest.raises(ValueError, match="needs a GPU, where Liger's Triton kernels run, got the device cpu: leave it"):
        build(kind, "fused", **LIGER)
    assert liger.models == []


def test_a_cpu_is_refused_without_a_configuration(liger, monkeypatch):
    """TRL then creates one, for the available device."""
    _environment(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(ValueError, match="got the device cpu"):
        check_liger_kernels(True, "FusedSFTTrainer", None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    check_liger_kernels(True, "FusedSFTTrainer", None)


@pytest.mark.parametrize("kind", KINDS)
def test_use_liger_kernel_at_the_same_time_is_refused(build, liger, kind):
    message = rf"Fused{kind.upper()}Trainer needs use_liger_kernel=False with liger_kernels=True, got both: leave out"
    with pytest.raises(ValueError, match=message):
        build(kind, "fused", use_liger_kernel=True, **LIGER)


@pytest.mark.parametrize(("kind", "model", "name"), [
    ("sft", "phi", "PhiForCausalLM with model_type 'phi'"),
    ("dpo", "cohere", "CohereForCausalLM with model_type 'cohere'"),
    ("cpo", "mixtral", "MixtralForCausalLM with model_type 'mixtral'"),
    ("orpo", "t5", "T5ForConditionalGeneration with model_type 't5'"),
])  # fmt: skip
def test_an_architecture_without_kernels_is_refused(build, liger, kind, model, name):
    options = {"max_completion_length": 16} if model == "t5" else {}
    with pytest.raises(ValueError, match=f"has kernels for, got {name}: leave it out; there are qwen3$"):
        build(kind, "fused", model=model, **options, **LIGER)
    assert liger.models == []


def test_remote_code_with_a_known_model_type_is_refused(liger):
    class Remote(torch.nn.Module):
        config = types.SimpleNamespace(model_type="qwen3")

    with pytest.raises(ValueError, match="has kernels for, got Remote with model_type 'qwen3'"):
        add_liger_kernels(Remote())


def test_a_model_on_several_devices_is_refused(liger):
    model = tiny.MODELS["qwen3"]()
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": 0}
    with pytest.raises(ValueError, match="needs a model on one device, got one on 0, 1: pass device_map=None"):
        add_liger_kernels(model)
    model.hf_device_map = {"": "cpu"}
    add_liger_kernels(model)


@pytest.mark.parametrize("fault", ["raises", "changes nothing"])
def test_a_kernel_function_that_does_not_fit_is_refused(build, monkeypatch, liger, fault):
    def apply_liger_kernel_to_qwen3(model=None):
        if fault == "raises":
            raise ImportError("cannot import name\n'Norm'")

    monkeypatch.setattr(kernels, "_find", lambda: Library({"qwen3": apply_liger_kernel_to_qwen3}, None))
    message = {
        "raises": "can change, got Qwen3ForCausalLM and ImportError: cannot import name 'Norm'$",
        "changes nothing": "changes, got Qwen3ForCausalLM$",
    }[fault]
    with pytest.raises(ValueError, match=f"liger_kernels=True needs a model that Liger Kernel {message}"):
        build("sft", "fused", **LIGER)


@pytest.mark.parametrize("act", ["gelu", "relu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("liger_class", ["LigerSwiGLUMLP", "LigerGEGLUMLP"])
def test_other_activations_than_those_of_liger_are_refused(monkeypatch, liger, act, liger_class):
    """Liger's layers have a fixed activation, whatever the configuration of an existing model says."""

    def apply(model):
        def forward(layer, x):
            raise AssertionError("only its name is looked at")

        forward.__module__, forward.__qualname__ = "liger_kernel.transformers.mlp", f"{liger_class}.forward"
        for layer in model.model.layers:
            layer.mlp.forward = types.MethodType(forward, layer.mlp)

    monkeypatch.setattr(kernels, "_find", lambda: Library({"qwen3": apply}, None))
    config = transformers.Qwen3Config(**tiny.SMALL, head_dim=8, hidden_act=act)
    model = transformers.Qwen3ForCausalLM(config)
    if (liger_class, act) == ("LigerGEGLUMLP", "gelu_pytorch_tanh"):
        return add_liger_kernels(model)
    with pytest.raises(ValueError, match=rf"activation of {liger_class}, .* got \w+ in model\.layers\.0\.mlp: leave"):
        add_liger_kernels(model)


@pytest.mark.parametrize("value", ["true", 1, None, {"rope": True}])
def test_values_that_are_not_bool_are_refused(build, liger, value):
    with pytest.raises(TypeError, match="liger_kernels must be True or False, got "):
        build("sft", "fused", head=[("liger_kernels", value)])


def test_attach_has_no_liger_kernels_option(build):
    with pytest.raises(TypeError, match=r"options must be among impl, .*, got liger_kernels"):
        attach(build("sft", "stock"), liger_kernels=True)


# Command


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "cpo", "simpo", "orpo"])
def test_liger_kernels_is_a_flag_and_a_field_with_help(tmp_path, capsys, method):
    out = ["--output_dir", str(tmp_path)]
    assert not parse(method, out).fused.liger_kernels
    assert parse(method, [*out, "--liger_kernels"]).fused.liger_kernels
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"liger_kernels": True, "output_dir": str(tmp_path)}))
    assert parse(method, ["--config", str(tmp_path / "c.yaml")]).fused.liger_kernels
    assert not parse(method, ["--config", str(tmp_path / "c.yaml"), "--liger_kernels", "false"]).fused.liger_kernels
    assert main([method, "--help"]) == 0
    assert "--liger_kernels" in capsys.readouterr().out.partition("fusedalign's other fields:")[2]


WORDS = ["--config", "recipes/dpo.yaml", "--max_steps", "1", "--eval_strategy", "no", "--use_cpu", "--liger_kernels"]


def test_the_command_trains_with_kernels(tmp_path, liger, capsys):
    assert main(["dpo", *WORDS, "--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size", "2"]) == 0
    assert len(liger.models) == 2
    assert all(liger.ran_in(model) for model in liger.models)


def test_the_command_refuses_in_one_line(tmp_path, liger, monkeypatch, capsys):
    _environment(monkeypatch)
    out = ["--output_dir", str(tmp_path / "out")]
    assert main(["dpo", *WORDS, *out]) == 2
    *_, line = capsys.readouterr().err.splitlines()  # other libraries may print warnings first
    assert line.startswith("fusedalign: error: liger_kernels=True needs a GPU")


# Liger's own

needs_liger = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")


@pytest.fixture
def interpreted(monkeypatch):
    """Patch Triton's interpreter for Liger's kernels: floats as fp32 scalars, and CUDA library functions."""
    if torch.cuda.is_available():
        pytest.skip("for Liger Kernel on a machine without a GPU")
    import liger_kernel.ops.geglu
    import liger_kernel.ops.rms_norm
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(x):
        if not isinstance(x, float):
            return convert(x)
        return tl.tensor(interpreter.TensorHandle(np.array([x], dtype=np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(liger_kernel.ops.geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


def _loss_and_gradients(trainer):
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.detach().double(), torch.cat(gradients).double()


@needs_liger
@pytest.mark.parametrize(
    ("kind", "model"), [("sft", "qwen3"), ("dpo", "qwen3"), ("orpo", "granite"), ("cpo", "gemma2")]
)
def test_a_step_is_as_close_to_fp64_as_without_kernels(build, interpreted, kind, model):
    options = {"model": model, "rows": 2, "per_device_train_batch_size": 2, "max_length": 8}
    if kind == "dpo":  # its first loss is constant
        options["prepare"] = _moved
    double = options | {"prepare": lambda m: options.get("prepare", lambda m: m)(m).double()}
    exact = _loss_and_gradients(build(kind, "fused", **double))
    plain = _loss_and_gradients(build(kind, "fused", **options))
    trainer = build(kind, "fused", **options, **LIGER)
    got = _loss_and_gradients(trainer)
    for model in _models(trainer):
        parts = " ".join(liger_parts(model))
        assert all(part in parts for part in ("LigerRMSNorm.forward", "liger_rotary_pos_emb", "GLUMLP.forward"))
        assert fused_by(model) == "fusedalign"
    assert torch.nn.functional.cross_entropy.__module__ == "torch.nn.functional"
    for a, b, c in zip(got, plain, exact, strict=True):
        eps = torch.finfo(torch.float32).eps
        assert (a - c).norm() <= 2 * (b - c).norm() + eps * c.norm()


def _moved(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    return model


ACTIVATIONS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, "silu", "gelu"),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, "silu", "relu"),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM, "silu", "gelu"),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM, "gelu_pytorch_tanh", "relu"),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, "silu", "gelu"),
    "nemotron": (transformers.NemotronConfig, transformers.NemotronForCausalLM, "relu2", "silu"),
}


@needs_liger
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activations_of_liger_layers_are_known(name):
    config, cls, *activations = ACTIVATIONS[name]
    experts = {**tiny.EXPERTS, "num_experts": 4, "moe_intermediate_size": 16} if name == "qwen3_moe" else {}
    own, other = (cls(config(**tiny.SMALL, **experts, hidden_act=activation)) for activation in activations)
    add_liger_kernels(own)
    with pytest.raises(ValueError, match=r"liger_kernels=True needs the activation of Liger\w+, which"):
        add_liger_kernels(other)


@needs_liger
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_on_a_gpu_are_as_close_to_fp32_as_without_kernels(build, kind):
    """With a learning rate of 0: updated bf16 weights diverge anyway, which would hide differences."""

    def history(**options):
        return tiny.history(build(kind, "fused", learning_rate=0.0, use_cpu=False, **options))

    fp32, plain = history(), history(bf16=True)
    got = history(bf16=True, **LIGER)

    def distances(rows):
        largest = collections.defaultdict(float)
        for row, exact in zip(rows, fp32, strict=True):
            for key in row:
                name = key.removeprefix("eval_")
                if name.endswith(("accuracy", "accuracies")):  # counts, which one rounding changes by a full token
                    continue
                largest[name] = max(largest[name], abs(row[key] - exact[key]))
        return largest

    error, budget = distances(got), distances(plain)
    assert all(error[name] <= 2 * budget[name] for name in error), (error, budget)


@needs_liger
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_fp32_training_on_a_gpu_equals_that_without_kernels(build, kind):
    plain = tiny.history(build(kind, "fused", use_cpu=False, max_steps=2))
    tiny.assert_same(tiny.history(build(kind, "fused", use_cpu=False, max_steps=2, **LIGER)), plain, 1e-4)
