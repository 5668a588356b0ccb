"""`fusedalign plan`: records of real layers, arithmetic over records, advice, and the command."""

import dataclasses
import json
import time

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from torch.utils._pytree import tree_leaves

from fusedalign.cli import main
from fusedalign.plan import simulation, sizes
from fusedalign.plan import trace as tracing
from fusedalign.plan.advice import changes, ranked, together
from fusedalign.plan.command import parse_memory
from fusedalign.plan.model import Shapes, build
from fusedalign.plan.plan import plan
from fusedalign.plan.shape import METHODS, OPTIMISERS, Layer, Model, Step, Trace
from fusedalign.plan.table import describe, render
from fusedalign.plan.trace import LayersError, trace

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "phi": {},
    "phi3": {},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64},
}
TOKENS = 48
DTYPES = ["bfloat16", "float32"]
#: A step in which every part has a different size.
STEP = Step(batch=3, length=20, prompt=8, dtype="bfloat16")


def config(family="qwen3", **more):
    return transformers.AutoConfig.for_model(family, **SMALL | FAMILIES[family] | more)


def shapes(family="qwen3", **more):
    return Shapes(config(family, **more), family)


@pytest.fixture(scope="module")
def qwen3():
    """Records of one model, cached per module."""
    return shapes()


def real_model(family, dtype):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(family), dtype=getattr(torch, dtype)).train()


# Against real models


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_gradients_and_optimizer_state_match_a_trained_model(family):
    model = real_model(family, "bfloat16")
    ids = torch.arange(TOKENS)[None] % 97
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    optimiser.step()
    model_record = shapes(family).model(STEP)
    assert model_record.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.gradients(model_record).bytes == sum(p.grad.nbytes for p in model.parameters())
    sizes_by_name = {part.name: part.bytes for part in sizes.held(model_record, STEP)}
    averages = [x for state in optimiser.state.values() for name, x in state.items() if name.startswith("exp_avg")]
    assert sizes_by_name["optimiser"] == sum(x.nbytes for x in averages)
    assert sizes_by_name["weights"] == sizes_by_name["reference model"] == sum(p.nbytes for p in model.parameters())
    assert (model_record.vocab, model_record.width) == tuple(model.get_output_embeddings().weight.shape)
    assert model_record.tied is (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def saved_by_the_last_layer(model, tokens, keys):
    """Bytes of the storages that autograd saves in the last layer, and of its output."""
    *_, layers = tracing._decoder_layers(model.base_model)
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}
    alive: list[torch.UntypedStorage] = []

    def pack(x):
        storage = x.untyped_storage()
        saved.setdefault(storage._cdata, storage)
        return x

    def before(layer, args, kwargs):
        known.update(saved)
        alive.extend(saved.values())
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        known.update(x.untyped_storage()._cdata for x in inputs)
        saved.clear()

    def after(layer, args, out):
        pack(out if isinstance(out, torch.Tensor) else out[0])
        finished.append(sum(x.nbytes() for key, x in saved.items() if key not in known))

    finished: list[int] = []
    layers[-1].register_forward_pre_hook(before, with_kwargs=True)
    layers[-1].register_forward_hook(after)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with (
        simulation.packed_attention(model, keys),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        simulation.gpu_autocast(True),
    ):
        model.base_model(input_ids=ids, position_ids=ids, use_cache=False)
    return finished[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_activations_match_what_autograd_saves(family, dtype):
    model = real_model(family, dtype)
    if dtype == "bfloat16" and any(isinstance(m, torch.nn.LayerNorm) for m in model.modules()):
        pytest.skip("LayerNorm of fp32 inputs with bf16 weights needs a GPU")
    for keys in (TOKENS, TOKENS + 16):
        step = Step("sft", 1, TOKENS, dtype=dtype)
        record = trace(build(config(family), step), TOKENS, keys=keys)
        assert len(record.order) == 3
        assert record.tokens == TOKENS
        assert record.layers[-1].kept == saved_by_the_last_layer(model, TOKENS, keys)


def test_a_copied_prompt_costs_its_keys_and_values():
    few, many = (trace(build(config("llama"), STEP), TOKENS, keys=TOKENS + copies).layers[0] for copies in (1, 17))
    assert many.kept - few.kept == 16 * 2 * (2 * 8) * 2  # keys and values of two heads of 8 numbers, in bf16


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tokens", [16, 400])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_backbone_memory_moments_match_a_real_step(family, tokens, checkpointing):
    """Real tensors on the CPU, from the embeddings to the last gradient, plus the gradient of a head."""
    model = real_model(family, "bfloat16")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(tokens)[None] % 97
    with simulation.packed_attention(model, tokens), simulation.LiveStorages() as living:
        with simulation.gpu_autocast(True):
            hidden = model.base_model(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state
        head = torch.empty_like(model.lm_head.weight)
        seed = simulation.GradientSeed.apply(hidden)
        del hidden
        seed.backward()
    source, step = shapes(family), replace(method="sft", batch=1, length=tokens, prompt=0, checkpointing=checkpointing)
    moment = sizes.largest(source.model(step), step, source.trace(step), 0)
    assert moment.bytes == pytest.approx(living.peak, rel=0.03)
    assert 0 < head.nbytes < living.peak


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_stores_one_hidden_state_per_token(dtype):
    record = trace(build(config(), replace(dtype=dtype)), TOKENS)
    item = {"bfloat16": 2, "float32": 4}[dtype]
    assert [layer.checkpoint for layer in record.layers] == [TOKENS * 32 * item] * 3
    assert (record.width, record.item) == (32, item)


def test_layer_gradients_sum_to_those_of_the_model_without_embeddings_and_head():
    record = trace(build(config(), STEP), TOKENS)
    model = real_model("qwen3", "bfloat16")
    assert sum(layer.grads for layer in record.layers) == sum(p.nbytes for p in model.model.layers.parameters())


def test_recomputation_takes_as_much_memory_as_the_layer_without_checkpointing():
    layer = trace(build(config(), STEP), TOKENS).layers[0]
    assert layer.checkpoint < layer.kept < layer.backward_peak
    assert layer.recompute_peak == pytest.approx(layer.backward_peak, rel=0.05)
    assert layer.forward_peak < layer.kept


def test_layers_of_different_kinds_are_traced_separately():
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]}
    record = trace(build(config("qwen3_moe", **options), STEP), TOKENS)
    assert len(record.kinds) == 2
    assert record.order == (0, 1, 0)
    assert record.layers[0].grads != record.layers[1].grads


def test_vision_models_are_traced_by_their_text_layers():
    text = SMALL | FAMILIES["gemma3_text"]
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config_ = transformers.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    model, text_trace = build(config_, STEP), trace(build(config("gemma3_text"), STEP), TOKENS)
    assert trace(model, TOKENS) == text_trace
    model = build(config("gemma3_text"), STEP)
    with torch.device("meta"):
        model.model.tower = transformers.AutoModel.from_config(config("llama", hidden_size=16, num_hidden_layers=1))
    assert trace(model, TOKENS) == text_trace


def test_with_lora_only_adapters_have_gradients_and_layers_save_less():
    peft = pytest.importorskip("peft")
    source, step = shapes(), replace(lora_r=4)
    model = real_model("qwen3", "bfloat16")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    lora, full_training = source.model(step), source.model(STEP)
    assert lora.adapters == sum(p.numel() for p in trained)
    assert lora.parameters == full_training.parameters
    assert sizes.gradients(lora).bytes == sum(p.nbytes for p in trained)
    assert sum(layer.grads for layer in source.trace(step).layers) == sizes.gradients(lora).bytes
    parts = {part.name: part.bytes for part in sizes.held(lora, step)}
    assert parts["reference model"] == 0
    assert parts["optimiser"] == 2 * parts["adapters"]


def test_fp32_weights_are_cast_for_the_products():
    layer = trace(build(config(), replace(dtype="float32")), TOKENS).layers[0]
    model = real_model("qwen3", "float32")
    linear = [m.weight for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear)]
    assert layer.casts + 0 <= 2 * sum(w.numel() for w in linear)
    assert trace(build(config(), STEP), TOKENS).layers[0].casts == 0


def test_a_model_whose_layers_cannot_be_found_is_refused():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config())
    model.model.layers = torch.nn.ModuleList([torch.nn.Identity()])
    with pytest.raises(LayersError, match="expected decoder layers that can be checkpointed, got none in Qwen3Model"):
        trace(model, TOKENS)


MAMBA = transformers.MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2)
HYBRID = transformers.JambaConfig(
    **SMALL | {"vocab_size": 97}, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
)
BLOOM = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_head=4, n_layer=2)


@pytest.mark.parametrize("config", [MAMBA, HYBRID, BLOOM], ids=lambda config: config.model_type)
def test_layers_without_an_attention_function_are_refused_at_once(config):
    start = time.monotonic()
    with pytest.raises(LayersError, match=r"attention|causal LM"):
        trace(build(config, STEP), 100_000)  # their loops over tokens take too long
    assert time.monotonic() - start < 20


def test_layers_that_need_numbers_are_refused_with_the_reason():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config())
    model.model.layers[0].mlp.forward = lambda x: x * float(x.sum())
    with pytest.raises(LayersError, match="expected layers that run without numbers, got Qwen3ForCausalLM: "):
        trace(model, TOKENS)
    assert len(model.model.layers) == 3


# Arithmetic


def replace(step=STEP, **more):
    return dataclasses.replace(step, **more)


LAYER = Layer(kept=1000, checkpoint=100, forward_peak=300, backward_peak=1400, recompute_peak=1500, grads=70, casts=0)
MODEL = Model("m", parameters=1000, item=2, vocab=50, width=4)
TRACE = Trace(tokens=10, width=4, item=2, kinds=(LAYER,), order=(0, 0, 0), before=20, after=30)


class SyntheticSource:
    """A synthetic source of records: activations scale with tokens, weights with the dtype."""

    def __init__(self, parameters=1000, layer=LAYER, adapters=10):
        self.parameters, self.layer, self.adapters = parameters, layer, adapters

    def model(self, step):
        item = 2 if step.dtype == "bfloat16" else 4
        return Model("m", self.parameters, item, 50, 4, self.adapters if step.lora_r else 0)

    def trace(self, step, *, padded=False):
        tokens = step.padded if padded else step.packed
        size = {name: x * tokens for name, x in vars(self.layer).items()}
        return Trace(tokens, 4, 2, (Layer(**size),), (0,) * 8, 2 * tokens, 3 * tokens)


def peak_of(source):
    def peak(step):
        model = source.model(step)
        return sizes.peak(model, step, source.trace(step), sizes.head_layer(sizes.OURS, model, step).bytes)

    return peak


def test_token_slots_of_a_step_are_counted():
    pairs = Step("dpo", batch=3, length=20, prompt=8)
    assert (pairs.rows, pairs.padded, pairs.packed, pairs.keys, pairs.scored) == (6, 120, 96, 120, 72)
    assert Step("orpo", batch=3, length=20, prompt=8).scored == 96
    rows = Step("sft", batch=3, length=20, prompt=8)
    assert (rows.padded, rows.packed, rows.keys, rows.scored) == (60, 60, 60, 36)
    known = Step("dpo", batch=3, length=20, prompt=8, tokens=48)
    assert (known.padded, known.packed, known.keys, known.scored) == (120, 48, 60, 36)


def test_moments_equal_hand_computed_sums():
    step = Step("dpo", 1, 6, 1, dtype="bfloat16")
    moments = {m.name: m.bytes for m in sizes.moments(MODEL, step, TRACE, 5000)}
    head, all_gradients = 50 * 4 * 2, 2000
    assert moments == {
        "head": 20 + 300 + 30 + head + 5000,
        "forward of the reference": 20 + 300 + 30 + head + 300 + 2 * 10 * 4 * 2,
        "backward of layer 3": head + 20 + 200 + 1500,
        "backward of layer 2": head + 70 + 20 + 100 + 1500,
        "backward of layer 1": head + 140 + 20 + 1500,
        "backward of the embedding": all_gradients + 80,
        "step of the optimiser": all_gradients,
    }
    unchecked = {m.name: m.bytes for m in sizes.moments(MODEL, replace(step, checkpointing=False), TRACE, 5000)}
    assert unchecked["head"] == 20 + 3000 + 30 + head + 5000
    assert unchecked["backward of layer 2"] == head + 70 + 20 + 1000 + 1400
    later = {m.name: m.bytes for m in sizes.moments(MODEL, replace(step, accumulation=2), TRACE, 5000)}
    assert later["head"] == moments["head"] + all_gradients
    assert later["backward of layer 3"] == all_gradients + 20 + 200 + 1500
    tied = {m.name: m.bytes for m in sizes.moments(replace(MODEL, tied=True), step, TRACE, 5000)}
    assert tied["backward of the embedding"] == all_gradients + head + 80
    frozen = {m.name: m.bytes for m in sizes.moments(replace(MODEL, adapters=10), step, TRACE, 5000)}
    assert "backward of the embedding" not in frozen
    assert frozen["head"] == moments["head"] - head
    assert "forward of the reference" not in {
        m.name for m in sizes.moments(MODEL, replace(step, precomputed=True), TRACE, 0)
    }


def test_cast_weights_count_until_the_forward_ends():
    cast = replace(TRACE, kinds=(replace(LAYER, casts=11),))
    step = Step("sft", 1, 10)
    with_casts, without_casts = ({m.name: m.bytes for m in sizes.moments(MODEL, step, x, 0)} for x in (cast, TRACE))
    assert {name for name in without_casts if with_casts[name] != without_casts[name]} == {"head"}
    assert with_casts["head"] - without_casts["head"] == 33


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_layer_equals_a_hand_computed_sum(method):
    """A head large enough for every tile to be full."""
    model, step = Model("m", 10**9, 2, 150_000, 2048), Step(method, 8, 2048, 0, dtype="bfloat16")
    n = step.rows * 2048
    picked, gradient, both_grads = n * 2048 * 4, 150_000 * 2048 * 2, (n + 150_000) * 2048 * 4
    extra_bytes = {part.name: part.bytes - gradient for part in sizes.head_layers(model, step)}
    stock = picked + both_grads + 4096 * 32768 * 2
    if method in ("cpo", "simpo", "orpo"):
        stock = n * 150_000 * (8 if method == "simpo" else 10)
    assert extra_bytes == {
        "triton": picked + 256 * 2**20,
        "pytorch": picked + 256 * 2**20,
        "liger": picked + 512 * 150_000 * 4,
        "cce": picked + both_grads,
        "stock TRL": stock,
    }
    frozen = {part.name: part.bytes for part in sizes.head_layers(replace(model, adapters=10), step)}
    assert frozen["triton"] == extra_bytes["triton"]
    assert frozen["cce"] == picked + n * 2048 * 4


def test_the_fused_head_of_trl_matches_measured_memory():
    """docs/performance.md: additional memory of forward and backward, including dW and dH, in MiB."""
    measured = {(8192, 4096, 128_256): 3454, (4096, 2048, 151_936): 2086, (8192, 2304, 256_000): 3740}
    for (n, d, v), mib in measured.items():
        part = sizes.head_layers(Model("m", 10**9, 2, v, d), Step("sft", 1, n, 0, dtype="bfloat16"))[-1]
        assert (part.bytes - n * d * 2) / 2**20 == pytest.approx(mib, rel=0.01)  # not counted in the table


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_more_tokens_take_more_memory(qwen3, method, checkpointing):
    peak = peak_of(qwen3)
    totals = [
        [peak(Step(method, batch, length, dtype="bfloat16", checkpointing=checkpointing)) for length in (64, 256)]
        for batch in (1, 8)
    ]
    for i in range(2):
        assert totals[i] == sorted(set(totals[i]))
        column = [row[i] for row in totals]
        assert column == sorted(set(column))


def test_every_formula_evaluates_to_its_bytes(qwen3):
    """The factors and terms of a formula evaluate to its number of bytes."""
    step = replace(batch=64, length=512, prompt=100)
    model = qwen3.model(step)
    for part in [*sizes.head_layers(model, step), sizes.gradients(model), *sizes.held(model, step)[:3]]:
        assert evaluated(part.formula) == pytest.approx(part.bytes, rel=1e-3), part


def evaluated(formula):
    """The value of a formula such as `gradient 97 x 32 x 2 B + workspace 256 MiB`."""
    total = 0.0
    for term in formula.split(";")[0].split(",  ")[0].split(" + "):
        value = 1.0
        for factor in term.split(" x "):
            digits = [word for word in factor.replace(",", "").split() if word.replace(".", "").isdigit()]
            value *= float(digits[0]) * (2**20 if "MiB" in factor else 1)
        total += value
    return total


# Advice


def test_the_best_change_reduces_the_largest_part():
    few = replace(batch=1, length=4, prompt=0)
    heavy_weights = ranked(few, peak_of(SyntheticSource(parameters=10**9)))
    assert heavy_weights[0].about.startswith("LoRA")
    activations = replace(batch=64, length=1000, checkpointing=False)
    assert ranked(activations, peak_of(SyntheticSource(parameters=10)))[0].about == "gradient checkpointing"
    checkpointed = replace(activations, checkpointing=True)
    assert ranked(checkpointed, peak_of(SyntheticSource(parameters=10)))[0].about == "--batch 32 --accumulation 2"
    with_lora = replace(few, lora_r=8, dtype="float32")
    assert ranked(with_lora, peak_of(SyntheticSource(parameters=10**9)))[0].about == "weights in bf16, --dtype bfloat16"


def test_changes_save_what_they_claim_and_are_sorted():
    peak, step = peak_of(SyntheticSource(parameters=10**6)), replace(dtype="float32", checkpointing=False)
    found = ranked(step, peak)
    assert [x.saved for x in found] == sorted((x.saved for x in found), reverse=True)
    assert all(x.saved == peak(step) - peak(x.step) > 0 and x.bytes == peak(x.step) for x in found)
    assert {x.about for x in found} <= {about for about, _ in changes(step)}
    reference = next(x for x in found if x.about.startswith("reference"))
    assert reference.saved == 4 * 10**6


def test_settings_already_on_are_not_proposed():
    step = Step("dpo", 1, 8, dtype="bfloat16", lora_r=4, precomputed=True, optimiser="adamw_bnb_8bit")
    assert list(changes(step)) == []
    assert not [about for about, _ in changes(Step("sft", 4, 8)) if about.startswith("reference")]


@pytest.mark.parametrize(("batch", "less"), [(8, (4, 2)), (3, (1, 3)), (9, (3, 3)), (5, (1, 5))])
def test_a_smaller_micro_batch_keeps_the_rows_per_step(batch, less):
    other = next(step for about, step in changes(replace(batch=batch)) if about.startswith("--batch"))
    assert (other.batch, other.accumulation) == less


def test_changes_are_combined_until_the_step_fits():
    peak, step = peak_of(SyntheticSource(parameters=10**6)), replace(dtype="float32", checkpointing=False)
    assert together(step, peak, peak(step)) == []
    best = ranked(step, peak)[0]
    assert [x.about for x in together(step, peak, best.bytes)] == [best.about]
    combined = together(step, peak, best.bytes - 1)
    assert len(combined) > 1
    assert combined[-1].bytes < best.bytes
    assert combined[0].about == best.about
    everything = together(step, peak, 1000)
    assert everything[-1].bytes > 1000
    assert ranked(everything[-1].step, peak) == []


def test_a_single_row_is_printed_in_the_singular():
    assert ", 1 pair of 20 tokens" in describe(replace(batch=1))
    assert ", 1 row of 20 tokens" in describe(replace(batch=1, method="sft"))
    assert ", 3 pairs of 20 tokens" in describe(STEP)


def test_a_plan_says_what_fits():
    source, step = SyntheticSource(parameters=10**6), replace(batch=2)
    needed = plan(source, step).needed
    assert plan(source, step, needed).together == []
    assert ": yes, 0.0 MiB free" in render(plan(source, step, needed)).replace("\n  ", " ")
    tight = plan(source, step, needed - 2**20)
    assert ": no, 1.0 MiB too little" in render(tight).replace("\n  ", " ")
    assert tight.together
    assert tight.together[-1].bytes + sizes.CONTEXT <= needed - 2**20
    assert "\nenough together: LoRA" in render(tight)
    assert "\nnot enough even together: LoRA" in render(plan(source, step, sizes.CONTEXT))


# Command


def saved_config(folder, model_config=None):
    (model_config or config()).save_pretrained(folder)
    return str(folder)


def test_the_command_prints_every_part_in_a_hundred_columns(tmp_path, capsys):
    words = ["plan", "--model_name_or_path", saved_config(tmp_path), "--batch", "8", "--length", "4096"]
    assert main([*words, "--method", "dpo", "--memory", "1GiB"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for text in (
        *("weights", "reference model", "optimiser", "gradients", "with checkpointing", "without checkpointing"),
        *("triton", "pytorch", "liger", "cce", "stock TRL", "fits on 1.00 GiB: ", "changes that help"),
    ):
        assert f"\n  {text} " in out or f"\n{text}" in out, text


@pytest.mark.parametrize("flags", [["--lora"], ["--method", "orpo"], ["--method", "kto", "--precompute_ref_log_probs"]])
def test_the_command_gives_json(tmp_path, capsys, flags):
    words = ["plan", "--model_name_or_path", saved_config(tmp_path), "--batch", "2", "--length", "64", "--json"]
    assert main([*words, *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["parameters"] == sum(p.numel() for p in real_model("qwen3", "bfloat16").parameters())
    total = report["totals"][0]
    assert total["bytes"] == sum(x["bytes"] for x in report["held"]) + sum(size for _, size in total["moment"]["parts"])


def test_a_quantised_model_is_planned_unquantised_with_a_note(tmp_path, capsys):
    quantised = config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    words = [
        "plan",
        "--model_name_or_path",
        saved_config(tmp_path, quantised),
        "--method",
        "sft",
        "--dtype",
        "bfloat16",
    ]
    assert main([*words, "--batch", "1", "--length", "16"]) == 0
    out, err = capsys.readouterr()
    assert f"warning: {tmp_path} has a quantization_config, which is left out: weights are bfloat16 here" in err
    assert "parameters x 2 B" in out


def test_the_embedded_model_is_planned_without_being_built(capsys, monkeypatch):
    import fusedalign.embedded

    monkeypatch.setattr(fusedalign.embedded, "build_embedded_model", None)
    assert main(["plan", "--model_name_or_path", "embedded", "--method", "sft", "--batch", "2", "--length", "64"]) == 0
    assert capsys.readouterr().out.startswith("embedded: 1,042,304 parameters, 2 layers, V = ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "ppo"], "--method must be one of sft, dpo, kto, cpo, simpo, orpo, got 'ppo'"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--length", "1"], "--length must be at least 2, got 1"),
        (["--length", "8", "--prompt", "8"], "--prompt must be below --length 8, got 8"),
        (["--lora_r", "0"], "--lora_r must be at least 1, got 0"),
        (["--memory", "24 apples"], "--memory must be a number with a unit, such as 24GiB or 80GB, got '24 apples'"),
        (["--memory", "-3GiB"], "--memory: expected one argument"),
        (["--memory", "24"], "--memory must be at least 1MiB, got '24'"),
        (["--dtype", "int8"], "--dtype must be one of bfloat16, float32, got 'int8'"),
        (["--batch", "2", "--length", "8", "--tokens", "33"], "--tokens must be at most the 32 of full rows, got 33"),
        (
            ["--method", "sft", "--precompute_ref_log_probs"],
            "--precompute_ref_log_probs needs a method with a reference",
        ),
        (["--colour", "red"], "expected flags of fusedalign plan, got the unknown --colour"),
    ],
)
def test_a_wrong_argument_is_a_one_line_error(words, message, capsys):
    assert main(["plan", "--model_name_or_path", "embedded", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_wrong_model_is_a_one_line_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    t5 = transformers.T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "no such model"}')
    (tmp_path / "empty").mkdir()
    for name, fields in (("words", {"hidden_size": "abc"}), ("code", {"auto_map": {"AutoConfig": "c.C"}})):
        (tmp_path / name).mkdir()
        kind = "llama" if name == "words" else "its own"
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind} | fields))
    wrong = {
        saved_config(tmp_path / "t5", t5): "expected a causal LM, got ",
        saved_config(tmp_path / "vit", transformers.ViTConfig()): "expected a configuration with a vocab_size, got ",
        saved_config(tmp_path / "clip", transformers.Wav2Vec2Config()): "expected a causal LM, got ",
        str(tmp_path / "broken"): "its config.json cannot be read: ",
        str(tmp_path / "words"): "its config.json cannot be read: Validation error for field 'hidden_size'",
        str(tmp_path / "code"): "contains custom code",
        "": "--model_name_or_path must name a model, got an empty name",
        str(tmp_path / "empty"): "must be a folder with a config.json, got ",
        "no/such-model": "--model_name_or_path must name a model, got no/such-model: it is no folder here",
    }
    for name, message in wrong.items():
        assert main(["plan", "--model_name_or_path", name]) == 2
        out, err = capsys.readouterr()
        assert (message in err, out) == (True, ""), (name, err)
        assert err.count("\n") == 1
    assert main(["plan"]) == 2
    assert "plan needs --model_name_or_path" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    assert main(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    for name in ("model_name_or_path", "method", "batch", "length", "lora", "dtype", "memory", "optim", *METHODS):
        assert name in out
    assert all(name in out for name in OPTIMISERS)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("24 gib", 24 * 2**30), ("24G", 24 * 2**30), ("1.5T", 3 * 2**39)],
)
def test_memory_is_read_in_the_usual_units(text, size):
    assert parse_memory(text) == size
