"""The packing proof: refusals with reasons, no side effects, and detection of injected faults."""

import copy
import dataclasses
import pickle
from pathlib import Path

import families
import pytest
import torch

pytest.importorskip("transformers")

from fusedalign.packing import (
    LayoutError,
    LayoutMismatchError,
    RightPadded,
    enable,
    enable_unmasked,
    pack_padded,
    packed_hidden,
)
from fusedalign.packing import attention as packed_attention
from fusedalign.packing import proof as proofs
from fusedalign.packing.backbone import unmasked_arguments

TRACES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def traces(model):
    """The state of a model that a proof must not change."""
    config = model.config.get_text_config()
    return {
        "attention": (model.config._attn_implementation, config._attn_implementation),
        "modes": [module.training for module in model.modules()],
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in TRACES],
        "hooks of parameters": [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        "parameters": [(id(p), p.requires_grad, p._version) for p in model.parameters()],
        "grads": [id(p.grad) for p in model.parameters()],
        "random": torch.get_rng_state().tolist(),
    }


def assert_no_trace(model, check, **changed):
    """Assert that `check()` changes nothing except `changed`."""
    for i, module in enumerate(model.modules()):  # a pattern different from any default
        module.training = i % 3 > 0
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, i) if parameter.requires_grad and i % 2 else None
    before = traces(model) | changed
    values = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    check()
    assert traces(model) == before
    assert all(
        p.grad is None if v is None else torch.equal(p.grad, v) for p, v in zip(model.parameters(), values, strict=True)
    )


@pytest.mark.parametrize("name", families.REFUSED)
def test_unpackable_models_are_refused_with_the_reason(name):
    architecture, options, reason = families.REFUSED[name]
    model = families.build(architecture, options, attention=None)

    def check():
        with pytest.raises(LayoutError, match=reason):
            enable(model)

    assert_no_trace(model, check)


@pytest.mark.parametrize("name", ["falcon_h1", "qwen3_next", "lfm2", "falcon", "stablelm", "llama4", "gpt2"])
def test_unsafe_models_without_a_mask_are_refused_with_the_reason(name):
    architecture, options, reason = families.REFUSED[name]
    model = families.build(architecture, options, attention=None)

    def check():
        with pytest.raises(LayoutError, match=reason):
            enable_unmasked(model)

    assert_no_trace(model, check)


@pytest.mark.parametrize("prove", [enable, enable_unmasked])
def test_dropout_is_found_before_training(prove):
    architecture, options, reason = families.REFUSED["gpt2"]
    with pytest.raises(LayoutError, match=reason):
        prove(families.build(architecture, options).eval())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("t5", "T5ForConditionalGeneration is an encoder-decoder"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration takes more than text"),
    ],
)
def test_models_other_than_text_decoders_are_refused(name, reason, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "trl"))
    import tiny

    model = tiny.MODELS[name]()
    for prove in (enable, enable_unmasked):

        def check(prove=prove):
            with pytest.raises(LayoutError, match=reason):
                prove(model)

        assert_no_trace(model, check)


@pytest.mark.parametrize("prove", [enable, enable_unmasked])
def test_the_proof_changes_only_the_attention_name(prove):
    model = families.build(*families.PACKABLE["gemma3"])
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    name = packed_attention.PREFIX + "sdpa"
    assert_no_trace(model, lambda: prove(model), attention=(name, name))
    assert_no_trace(model, lambda: prove(model))  # the second proof


def test_frozen_and_quantised_models_are_proven_by_hidden_states():
    model = families.build(*families.PACKABLE["qwen3"]).requires_grad_(False)
    proof = enable(model)
    assert proof.gradient_difference == 0
    assert 0 < proof.difference <= proof.allowed


def test_a_forward_only_model_may_have_dropout():
    model = families.build(*families.PACKABLE["qwen3"])
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with pytest.raises(LayoutError, match="has dropout in its attention"):
        enable(model)
    proof = enable(model, training=False)
    assert proof.gradient_difference == 0
    assert 0 < proof.difference <= proof.allowed
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = families.build(*families.PACKABLE["qwen3"])
    with pytest.raises(LayoutError, match="Qwen3ForCausalLM has weights that are not in memory"):
        enable(model)


def test_attention_other_than_sdpa_keeps_its_mask():
    model = families.build(*families.PACKABLE["qwen3"], attention="eager")
    with pytest.raises(LayoutError, match="eager attention has its own way with masks"):
        enable_unmasked(model)
    enable(model)


def test_errors_raised_by_a_model_are_reported():
    model = families.build(*families.PACKABLE["qwen3"])

    def broken(*_, **__):
        raise KeyError("its own bug")

    def check():
        model.base_model.forward = broken
        with pytest.raises(LayoutError, match="Qwen3ForCausalLM fails in it with KeyError: 'its own bug'"):
            enable(model)
        del model.base_model.forward

    assert_no_trace(model, check)


def test_without_a_layout_nothing_changes():
    """Without a layout, masks, caches and generation are those of the original attention."""
    ids, mask = families.padded_pairs(0)
    mask = torch.cat([mask[:, :2] * 0, mask[:, 2:]], 1)  # padding on both sides

    def answers(model):
        options = {"attention_mask": mask[:, :4], "max_new_tokens": 9, "do_sample": False}
        return model(input_ids=ids, attention_mask=mask).logits, model.generate(ids[:, :4], **options)

    for attention in ("sdpa", "eager"):
        model = families.build(*families.PACKABLE["gemma3"], attention=attention).eval()
        before = answers(model)
        enable(model)
        assert all(map(torch.equal, answers(model), before))


# Injected faults


def _positions(monkeypatch):
    """Fault: positions of the later answers are off by one."""
    change_batches(monkeypatch, lambda batch: {"position_ids": batch.position_ids + in_answers(batch)})


def in_answers(batch):
    """[1, S]: 1 for tokens after a shared prefix."""
    mask = torch.zeros_like(batch.position_ids)
    for segment in batch.segments:
        if segment.prefix_length:
            mask[:, segment.start : segment.start + segment.length] = 1
    return mask


def change_batches(monkeypatch, change):
    original = proofs.pack_padded

    def pack(*args, **options):
        batch = original(*args, **options)
        return dataclasses.replace(batch, **change(batch))

    monkeypatch.setattr(proofs, "pack_padded", pack)


def change_segments(monkeypatch, change):
    change_batches(monkeypatch, lambda batch: {"segments": tuple(change(segment) for segment in batch.segments)})


def _prefix_dropped(monkeypatch):
    change_segments(monkeypatch, lambda segment: segment._replace(prefix_start=0, prefix_length=0))


def _prefix_short(monkeypatch):
    """Fault: the last token of the prefix is not attended to."""
    change_segments(monkeypatch, lambda segment: segment._replace(prefix_length=max(0, segment.prefix_length - 1)))


def _sibling_seen(monkeypatch):
    """Fault: the prefix is one token too long, so an answer sees a token of the other one."""
    change_segments(
        monkeypatch, lambda segment: segment._replace(prefix_length=segment.prefix_length + (segment.prefix_length > 0))
    )


def _wrong_prefix(monkeypatch):
    """Fault: all rows use the prefix of the first prompt."""
    change_segments(monkeypatch, lambda segment: segment._replace(prefix_start=0))


def change_causal(monkeypatch, change):
    """Replace scale and window of the attention by `change(scale, window)`."""
    original = packed_attention._causal

    def causal(query, key, value, scale, window):
        return original(query, key, value, *change(scale, window))

    monkeypatch.setattr(packed_attention, "_causal", causal)


def _scale(monkeypatch):
    change_causal(monkeypatch, lambda scale, window: (scale * 1.05, window))


def _window_ignored(monkeypatch):
    change_causal(monkeypatch, lambda scale, window: (scale, None))


def _window_wide(monkeypatch):
    change_causal(monkeypatch, lambda scale, window: (scale, window and window + 1))


def _window_narrow(monkeypatch):
    change_causal(monkeypatch, lambda scale, window: (scale, window and window - 1))


def _not_causal(monkeypatch):
    """Fault: a query sees the next token."""

    def causal(query, key, value, scale, window):
        queries, keys = query.shape[2], key.shape[2]
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries + 1)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )

    monkeypatch.setattr(packed_attention, "_causal", causal)


class _Scaled(torch.autograd.Function):
    """Correct values with wrong gradients."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor(grad), None


def change_gradients(monkeypatch, factor):
    original = packed_attention._causal

    def causal(query, key, value, scale, window):
        if query.shape[2] < key.shape[2]:  # after a shared prefix
            key, value = _Scaled.apply(key, factor), _Scaled.apply(value, factor)
        return original(query, key, value, scale, window)

    monkeypatch.setattr(packed_attention, "_causal", causal)


def _gradients_lost(monkeypatch):
    """Fault: the prompt gets no gradient from the later answers."""

    def lost(grad):
        grad = grad.clone()
        grad[:, :, :2] = 0
        return grad

    change_gradients(monkeypatch, lost)


def _gradients_misplaced(monkeypatch):
    """Fault: each gradient is shifted to the previous token."""
    change_gradients(monkeypatch, lambda grad: grad.roll(-1, 2))


FAULTS = {
    "positions": _positions,
    "prefix dropped": _prefix_dropped,
    "prefix short": _prefix_short,
    "sibling seen": _sibling_seen,
    "another prompt": _wrong_prefix,
    "scale": _scale,
    "not causal": _not_causal,
    "gradients lost": _gradients_lost,
    "gradients misplaced": _gradients_misplaced,
}
WINDOW_FAULTS = {
    "window ignored": _window_ignored,
    "window wide": _window_wide,
    "window narrow": _window_narrow,
}


#: Faults within bf16 rounding: a scale 5 % off, and positions if few head dimensions encode them.
HALF = [(fault, "qwen3", torch.bfloat16) for fault in FAULTS if fault != "scale"]
HALF += [(fault, "gpt_neox", torch.bfloat16) for fault in FAULTS if fault not in ("scale", "positions")]
CASES = [(fault, name, torch.float32) for fault in FAULTS for name in ("qwen3", "gpt_neox", "deepseek_v3")] + HALF


@pytest.mark.parametrize(("fault", "name", "dtype"), CASES)
def test_the_proof_detects_every_injected_fault(fault, name, dtype, monkeypatch):
    model = families.build(*families.PACKABLE[name], dtype=dtype)
    FAULTS[fault](monkeypatch)
    with pytest.raises(LayoutMismatchError, match="does not come out as in the padded layout"):
        enable(model)
    assert not packed_attention.installed(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [4, 4096])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.parametrize("prove", [enable, enable_unmasked])
@pytest.mark.parametrize("fault", WINDOW_FAULTS)
def test_the_proof_detects_window_faults(fault, prove, name, window, dtype, monkeypatch):
    """Also with windows wider than the rows of the proof."""
    architecture, options = families.PACKABLE[name]
    model = families.build(architecture, options | {"sliding_window": window}, dtype=dtype)
    WINDOW_FAULTS[fault](monkeypatch)
    with pytest.raises(LayoutMismatchError):
        prove(model)
    assert model.config.sliding_window == window


def test_layers_with_a_different_window_are_refused():
    model = families.build(*families.PACKABLE["gemma3"])
    for layer in model.base_model.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = 17
    with pytest.raises(LayoutError, match="should ask its attention for windows of"):
        enable(model)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_compiled_model_stays_one_graph(name, attention):
    """Without a layout, and with right-padded rows."""
    ids, mask = families.padded_pairs(0)
    model = families.build(*families.PACKABLE[name], attention=attention)
    enable(model)
    compiled = torch.compile(model.base_model, backend="eager", fullgraph=True, dynamic=False)
    for arguments in ({"attention_mask": mask}, unmasked_arguments(ids, RightPadded())):
        with torch.no_grad():
            got, want = (f(input_ids=ids, use_cache=False, **arguments) for f in (compiled, model.base_model))
        torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_layers_compiled_beforehand_pass_the_proof():
    model = families.build(*families.PACKABLE["gemma3"])
    for layer in model.base_model.layers:
        layer.compile(backend="eager")
    enable(model)
    enable_unmasked(model)


@pytest.mark.parametrize("prove", [enable, enable_unmasked])
def test_layers_that_change_their_mask_are_refused(prove):
    """As in sparse attention, where a few tokens of the proof would not show it."""
    model = families.build(*families.PACKABLE["qwen3"])
    attention = model.base_model.layers[0].self_attn
    forward = attention.forward

    def sparse(hidden_states, position_embeddings, attention_mask, **options):
        length = hidden_states.shape[1]
        nearby = torch.ones(length, length, dtype=torch.bool).triu(-100)
        return forward(hidden_states, position_embeddings, attention_mask & nearby, **options)

    attention.forward = sparse
    with pytest.raises(LayoutError, match="Qwen3Attention changes the mask of its attention"):
        prove(model)


@pytest.mark.skipif(not packed_attention._COMPILES_NAMES, reason="torch.compile traces no subclass of str")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pickled_models_keep_their_original_attention(attention):
    """Another process has no packed attention registered."""
    unpickled = lambda x: pickle.loads(pickle.dumps(x))  # noqa: E731
    model = families.build(*families.PACKABLE["gemma3"], attention=attention).eval()
    enable(model)
    for config in (unpickled(model.config), unpickled(model).config):
        assert config._attn_implementation == attention
    ids, mask = families.padded_pairs(0)
    batch = pack_padded(ids, mask, groups=2)
    for copied in (unpickled(model), copy.deepcopy(model)):
        torch.testing.assert_close(packed_hidden(copied, batch), packed_hidden(model, batch))
