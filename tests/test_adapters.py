"""Adapters on the head of real PEFT models against the models' own forward: logits, losses and all gradients."""

import collections
import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, IMPLS, Allocations, error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fusedalign import linear_cross_entropy, linear_logps
from fusedalign.head import lm_head

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

V, D = 61, 32
SMALL = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "qwen3 tied": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "gemma2 tied": ("Gemma2ForCausalLM", {"tie_word_embeddings": True, "final_logit_softcapping": 1.7}),
    "cohere": ("CohereForCausalLM", {"tie_word_embeddings": False, "logit_scale": 0.3}),
    "phi": ("PhiForCausalLM", {}),  # its head has a bias
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def build(name, dtype=torch.float64, **config):
    torch.manual_seed(0)
    cls, own = MODELS[name]
    cls = getattr(transformers, cls)
    model = cls(cls.config_class(**{**SMALL, **own, **config})).to(dtype)
    nn.init.normal_(model.lm_head.weight, std=0.3)
    if model.lm_head.bias is not None:
        nn.init.normal_(model.lm_head.bias)
    return model


def lora(r=4, **options):
    return peft.LoraConfig(**{"r": r, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM", **options})


def randomised(model, seed=0):
    """Randomise adapters that start neutral, as if after some training steps."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
    return model


def adapted(name, config, dtype=torch.float64, **options):
    return randomised(peft.get_peft_model(build(name, dtype, **options), config))


def batch():
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(3, V, (3, 7), generator=g)
    ids[:, 2] = 4  # a token that some tests train
    return ids, ids.roll(-1, 1).index_fill(1, torch.tensor([0, 6]), -100)


def apply_head(head, hidden, targets, f=linear_logps, **options):
    options |= {"bias": head.bias, "scale": head.scale, "softcap": head.softcap}
    return f(head.expand(hidden), head.weight, targets, **options)


def eager_logps(model):
    ids, targets = batch()
    logits = model(input_ids=ids, use_cache=False).logits
    return logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1).where(targets != -100, 0)


def fused(model):
    ids, targets = batch()
    hidden = model.get_base_model().model(input_ids=ids, use_cache=False)[0]
    return apply_head(lm_head(model), hidden, targets).logps


def fused_loss(model):
    ids, targets = batch()
    hidden = model.get_base_model().model(input_ids=ids, use_cache=False)[0]
    return apply_head(lm_head(model), hidden, targets, linear_cross_entropy, reduction="sum")


def grads(model, f, weights=None):
    """The result of `f` and the gradients of all trained parameters, with a fixed dropout seed."""
    model.zero_grad()
    torch.manual_seed(1)
    out = f(model)
    (-out if weights is None else out * weights).sum().backward()
    return {"out": out.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same(model):
    """Assert equal log-probabilities and scalar loss, each with all gradients."""
    weights = torch.randn(3, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    want = grads(model, eager_logps, weights)
    assert all(g is not None for g in want.values())
    close(grads(model, fused, weights), want)
    want = grads(model, eager_logps)
    close(grads(model, lambda m: -fused_loss(m)), want | {"out": want["out"].sum()})


def close(got, want, tolerance=1e-7):  # the models' norms compute in fp32
    assert got.keys() == want.keys()
    for name, x in want.items():
        size = x.abs().max()
        assert size > 0, name
        assert error(got[name], x) <= tolerance * size, name


CONFIGS = {
    "lora": lora(),
    "lora of the head alone, with dropout": lora(r=3, target_modules=["lm_head"], lora_dropout=0.3),
    "rslora": lora(r=5, use_rslora=True, lora_alpha=11),
    "lora with a bias": lora(lora_bias=True),
    "tokens": lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [4, 9], "lm_head": [4, 40, 8]}),
    "tokens and lora": lora(target_modules=["q_proj", "k_proj"], trainable_token_indices=[4, 5, 6]),
    "trainable tokens alone": peft.TrainableTokensConfig(token_indices=[4, 60, 0], task_type="CAUSAL_LM"),
    "trainable tokens of the head alone": peft.TrainableTokensConfig(
        token_indices=[4, 60, 0, 7, 8], target_modules=["lm_head"], task_type="CAUSAL_LM"
    ),
    "modules to save": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}
#: An untied head has the trainable tokens named for it; a tied head has those of the embedding.
PAIRS = [
    (model, name)
    for model in MODELS
    for name in CONFIGS
    if not (model == "phi" and name in ("tokens", "trainable tokens of the head alone"))  # refused below
    and not (name in ("tokens", "trainable tokens of the head alone") and "tied" in model)
    and not (name == "modules to save" and "tied" in model)
]


@pytest.mark.parametrize(("model", "config"), PAIRS)
def test_adapted_heads_equal_the_models_own_forward(model, config):
    wrapped = adapted(model, CONFIGS[config])
    assert_same(wrapped)
    head = lm_head(wrapped)
    if config.startswith(("lora", "rslora")):
        layer = wrapped.get_base_model().lm_head
        assert head.weight[0] is layer.base_layer.weight
        assert head.weight[1] is layer.lora_B["default"].weight
        assert not head.weight[0].requires_grad
    elif config != "modules to save":
        head_has_tokens = "tied" in model or config in ("tokens", "trainable tokens of the head alone")
        assert isinstance(head.weight, tuple) == head_has_tokens
        assert not any(x.requires_grad for x in head.weight)  # trained parameters enter as columns of hidden


@pytest.mark.parametrize("model", ["llama", "qwen3 tied"])
def test_a_head_trained_together_with_its_adapter_is_exact(model):
    wrapped = adapted(model, lora())
    wrapped.get_base_model().lm_head.base_layer.weight.requires_grad_()
    assert_same(wrapped)


def test_a_trained_head_with_trainable_tokens_is_exact():
    wrapped = adapted("llama", CONFIGS["tokens"])
    wrapped.get_base_model().lm_head.token_adapter.base_layer.weight.requires_grad_()
    assert_same(wrapped)


def test_dropout_follows_the_current_mode():
    wrapped = adapted("llama", lora(lora_dropout=0.5))
    with torch.no_grad():
        assert error(fused(wrapped), fused(wrapped)) > 0.01
        wrapped.eval()
        assert error(fused(wrapped), eager_logps(wrapped)) < 1e-7


@pytest.mark.parametrize("config", ["lora", "tokens"])
def test_adapter_columns_have_the_product_dtype(config):
    """fp32 adapters on a bf16 head do not widen the hidden states."""
    head = lm_head(adapted("llama", CONFIGS[config], torch.bfloat16))
    assert head.expand(torch.randn(2, 3, D, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_several_token_adapters_combine():
    config = {"target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(build("llama"), peft.TrainableTokensConfig(token_indices=[4, 9], **config))
    wrapped.add_adapter("more", peft.TrainableTokensConfig(token_indices=[40, 8, 5], **config))
    for names in (["more"], ["default", "more"]):
        wrapped.base_model.set_adapter(names)
        assert_same(randomised(wrapped))


@pytest.mark.parametrize("model", ["llama", "qwen3 tied"])
def test_adapters_with_and_without_tokens_combine(model):
    config = CONFIGS["tokens" if model == "llama" else "tokens and lora"]
    wrapped = adapted(model, config)
    wrapped.add_adapter("elsewhere", lora(target_modules=["q_proj"]))
    for name in ("elsewhere", "default"):
        wrapped.set_adapter(name)
        assert_same(randomised(wrapped))
        assert isinstance(lm_head(wrapped).weight, tuple) == (name == "default")


def test_weights_tied_by_peft_are_exact():
    config = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    config.ensure_weight_tying = True
    wrapped = adapted("qwen3 tied", config)
    assert lm_head(wrapped).weight.requires_grad
    assert_same(wrapped)


def test_lora_on_lora_is_exact():
    """A PEFT model inside a PEFT model."""
    inner = adapted("llama", lora(r=2))
    for p in inner.parameters():
        p.requires_grad_(False)
    outer = randomised(peft.get_peft_model(inner, lora(r=3, target_modules=["lm_head"]), adapter_name="outer"))
    with torch.no_grad():
        ids, targets = batch()
        base = inner.get_base_model()
        hidden = base.model(input_ids=ids, use_cache=False)[0]
        got, want = apply_head(lm_head(outer), hidden, targets).logps, eager_logps(outer)
    assert error(got, want) < 1e-7


def test_switching_and_disabling_adapters_is_followed():
    """Policy and reference are adapters of one model, or the model without adapters."""
    wrapped = peft.get_peft_model(build("llama"), lora(r=2), adapter_name="policy")
    wrapped.add_adapter("reference", lora(r=3, use_rslora=True))
    wrapped.add_adapter("elsewhere", lora(target_modules=["q_proj"]))
    for number, name in enumerate(("policy", "reference", "elsewhere")):
        wrapped.set_adapter(name)
        randomised(wrapped, seed=number)
    outputs = {}
    for names in (["policy"], ["reference"], ["elsewhere"], ["policy", "reference"], []):
        wrapped.base_model.set_adapter(names or ["policy"])
        with wrapped.disable_adapter() if not names else contextlib.nullcontext():
            with torch.no_grad():
                outputs[tuple(names)] = fused(wrapped)
                assert error(outputs[tuple(names)], eager_logps(wrapped)) < 1e-7
            parts = lm_head(wrapped).weight
        if names and names != ["elsewhere"]:
            assert_same(wrapped)
            assert [x.shape[1] for x in parts] == [D, *({"policy": 2, "reference": 3}[name] for name in names)]
            assert [x.requires_grad for x in parts] == [False] + [True] * len(names)
        else:
            assert parts is wrapped.get_base_model().lm_head.base_layer.weight
    values = list(outputs.values())
    assert all(error(a, b) > 0.01 for i, a in enumerate(values) for b in values[:i])


@pytest.mark.parametrize(
    ("model", "config"),
    [  # LoRA merged into a tied head would change the embedding too
        ("llama", "lora"),
        ("llama", "tokens"),
        ("llama", "trainable tokens alone"),
        ("qwen3 tied", "tokens and lora"),
        ("qwen3 tied", "trainable tokens alone"),
    ],
)
def test_merged_and_disabled_adapters_are_followed(model, config):
    wrapped = adapted(model, CONFIGS[config]).eval()
    with torch.no_grad():
        with wrapped.disable_adapter():
            bare = fused(wrapped)
            assert error(bare, eager_logps(wrapped)) < 1e-7
        want = fused(wrapped)
        assert error(want, bare) > 0.01
        wrapped.merge_adapter()
        assert isinstance(lm_head(wrapped).weight, torch.Tensor)
        assert error(fused(wrapped), want) < 1e-7
        with wrapped.disable_adapter():  # PEFT's layers unmerge here
            assert error(fused(wrapped), bare) < 1e-7
        assert error(fused(wrapped), want) < 1e-7


# Precision


def head_alone(layer, hidden, targets):
    """The layer's own logits and gradients."""
    layer.zero_grad()
    logits = layer(hidden).double()
    F.cross_entropy(logits.view(-1, V), targets.view(-1), reduction="sum").backward()
    param_grads = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    return {"logps": logits.log_softmax(-1).gather(-1, targets[..., None]).detach()} | param_grads


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 base", "autocast"])
@pytest.mark.parametrize("config", ["lora", "rslora", "tokens"])
@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "reference"])
@pytest.mark.parametrize("device", DEVICES)
def test_fp32_adapters_on_a_bf16_head_are_within_budget(config, autocast, impl, device):
    """At most twice the error of the layer's own forward with bf16 logits, as root mean squares over 8 batches.

    For a single batch of few numbers the ratio of the errors exceeds 2 by chance now and then.
    """
    wrapped = adapted("llama", CONFIGS[config], torch.float32 if autocast else torch.bfloat16)
    layer = wrapped.to(device).get_base_model().lm_head
    exact_layer = copy.deepcopy(layer).double()
    errors, eager_errors = collections.defaultdict(float), collections.defaultdict(float)
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        hidden, targets = torch.randn(2, 9, D, generator=g), torch.randint(0, V, (2, 9), generator=g)
        hidden, targets = hidden.to(device), targets.to(device)
        targets[0] = 4
        hidden = (hidden if autocast else hidden.bfloat16()).requires_grad_()
        exact_hidden = hidden.detach().double().requires_grad_()
        exact = head_alone(exact_layer, exact_hidden, targets) | {"hidden": exact_hidden.grad}
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            eager = head_alone(layer, hidden, targets) | {"hidden": hidden.grad}
            hidden.grad = None
            layer.zero_grad()
            out = apply_head(lm_head(wrapped), hidden, targets, impl=impl)
        (-out.logps.sum()).backward()
        got = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
        got |= {"logps": out.logps[..., None].detach(), "hidden": hidden.grad}
        assert got.keys() == exact.keys()
        for name, x in got.items():
            assert x.dtype == eager[name].dtype or name == "logps"
            errors[name] += (x.double() - exact[name]).square().sum().item()
            eager_errors[name] += (eager[name].double() - exact[name]).square().sum().item()
    for name in errors:
        assert errors[name] <= 2**2 * eager_errors[name], name


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 base", "autocast"])
def test_logits_of_trained_tokens_are_not_rounded(autocast):
    """The row is far from its start, so its logit in bf16 would be off by 0.05; only operands are rounded."""
    wrapped = adapted("llama", CONFIGS["tokens"], torch.float32 if autocast else torch.bfloat16)
    layer = wrapped.get_base_model().lm_head
    hidden = torch.randn(50, D).bfloat16()
    inputs = hidden.float() if autocast else hidden
    with torch.no_grad():
        layer.token_adapter.trainable_tokens_delta["default"].mul_(4)
        exact = copy.deepcopy(layer).double()
        for parameter in exact.parameters():
            parameter.data = parameter.bfloat16().double()
        want, targets = exact(hidden.double()).log_softmax(-1), torch.full((50,), 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got, eager = apply_head(lm_head(wrapped), inputs, targets).logps, layer(inputs).double().log_softmax(-1)
    assert error(eager[:, 4], want[:, 4]) > 0.02
    assert error(got, want[:, 4]) < 2e-4


def test_trained_tokens_are_rounded_like_merged_ones():
    """fp32 token rows of a bf16 head with fp32 hidden states: the product is in fp32."""
    wrapped = adapted("llama", CONFIGS["tokens"], torch.bfloat16)
    assert wrapped.get_base_model().lm_head.token_adapter.trainable_tokens_delta["default"].dtype == torch.float32
    hidden, targets = torch.randn(50, D), torch.full((50,), 4)
    with torch.no_grad():
        got = apply_head(lm_head(wrapped), hidden, targets).logps
        wrapped.merge_adapter()
        torch.testing.assert_close(got, apply_head(lm_head(wrapped), hidden, targets).logps, rtol=1e-5, atol=1e-5)


# Cost


def layer_and_hidden(config, v=601, n=96):
    wrapped = adapted("llama", config, torch.bfloat16, vocab_size=v)
    hidden = torch.randn(n, D, dtype=torch.bfloat16, requires_grad=True)
    return wrapped, hidden, torch.randint(0, v, (n,))


@pytest.mark.parametrize("f", [linear_logps, linear_cross_entropy])
@pytest.mark.parametrize("config", ["lora", "tokens"])
def test_nothing_of_head_size_is_allocated(f, config):
    wrapped, hidden, targets = layer_and_hidden(CONFIGS[config])
    with Allocations() as allocations:
        out = apply_head(lm_head(wrapped), hidden, targets, f)
        getattr(out, "logps", out).sum().backward()
    assert 601 * 4 <= allocations.largest() < 601 * D
    with Allocations() as allocations:
        wrapped.get_base_model().lm_head(hidden).float().log_softmax(-1).sum().backward()
    assert allocations.largest() >= 601 * 96


@pytest.mark.parametrize(
    ("config", "f", "forward", "backward", "own"),
    [
        (lora(target_modules=["q_proj"]), linear_logps, 2, 0, 0),
        (lora(target_modules=["q_proj"]), linear_cross_entropy, 2, 0, 0),
        (CONFIGS["tokens"], linear_logps, 2, 0, 0),
        (CONFIGS["tokens"], linear_cross_entropy, 2, 0, 0),
        (lora(r=8), linear_logps, 1, 2, 8),
        (lora(r=8), linear_cross_entropy, 2, 0, 8),
    ],
    ids=lambda x: getattr(x, "__name__", "" if isinstance(x, peft.LoraConfig) else x),
)
def test_adapters_take_the_documented_number_of_products(config, f, forward, backward, own):
    """In units of the product of all tokens with the head and its extra columns; trained columns take one more."""
    wrapped, hidden, targets = layer_and_hidden(config)
    head = lm_head(wrapped)
    expanded = head.expand(hidden).detach().requires_grad_()
    options = {"bias": head.bias, "scale": head.scale, "softcap": head.softcap}
    with FlopCounterMode(display=False) as counter:
        out = f(expanded, head.weight, targets, **options)
        out = getattr(out, "logps", out).sum()
        at_forward = counter.get_total_flops()
        out.backward()
    product, own_product = 2 * 96 * 601 * expanded.shape[-1], 2 * 96 * 601 * own
    in_forward = forward * product + (own_product if f is linear_cross_entropy else 0)
    assert at_forward == in_forward
    assert counter.get_total_flops() == (forward + backward) * product + own_product


@pytest.mark.parametrize(
    "config", [lora(target_modules=["q_proj"]), CONFIGS["tokens"]], ids=["lora elsewhere", "tokens"]
)
@pytest.mark.parametrize("f", [fused, fused_loss])
def test_the_backward_never_touches_a_frozen_head(config, f):
    wrapped = adapted("llama", config)
    want = grads(wrapped, f)
    weight = lm_head(wrapped).weight
    weight = weight[0] if isinstance(weight, tuple) else weight
    wrapped.zero_grad()
    torch.manual_seed(1)
    out = f(wrapped)
    with torch.no_grad():
        weight.fill_(torch.nan)
    (-out).sum().backward()
    for name, p in wrapped.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, want[name]), name


# Prompt learning


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=D, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=["prompt tuning", "p-tuning", "prefix tuning"],
)
def test_prompt_learning_uses_the_models_own_head(config):
    """The head is the model's own; hidden states of virtual tokens precede those of the labels."""
    wrapped = peft.get_peft_model(build("llama", torch.float32), config)
    ids, targets = batch()
    hidden_states = []
    backbone = wrapped.get_base_model().model
    handle = backbone.register_forward_hook(lambda module, args, out: hidden_states.append(out[0]))
    labels = F.pad(targets, (1, 0), value=-100)[:, :-1]
    want = wrapped(input_ids=ids, labels=labels).loss
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    want_grads = torch.autograd.grad(want, parameters, retain_graph=True)
    handle.remove()
    got = apply_head(lm_head(wrapped), hidden_states[-1][:, -ids.shape[1] :], targets, linear_cross_entropy)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, parameters), want_grads)


# Refusals


def refused(error_type, match, model):
    with pytest.raises(error_type, match=match) as caught:
        lm_head(model)
    assert "\n" not in str(caught.value)


HEAD = {"target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("config", "adapter_name"),
    [
        (lora(use_dora=True), "plain LoRA, got DoraLinearVariant in adapter 'default'"),
        (lora(target_modules=[], target_parameters=["lm_head.weight"]), "got peft.tuners.lora.layer.ParamWrapper"),
        (peft.AdaLoraConfig(total_step=9, **HEAD), "got peft.tuners.adalora.layer.SVDLinear"),
        (peft.IA3Config(feedforward_modules=[], **HEAD), "got peft.tuners.ia3.layer.Linear"),
        (peft.VeraConfig(**HEAD), "got peft.tuners.vera.layer.Linear"),
        (peft.LoHaConfig(**HEAD), "got peft.tuners.loha.layer.Linear"),
        (peft.OFTConfig(oft_block_size=4, **HEAD), "got peft.tuners.oft.layer.Linear"),
    ],
    ids=lambda x: "" if isinstance(x, str) else type(x).__name__,
)
def test_refuses_other_adapters_by_name(config, adapter_name):
    wrapped = peft.get_peft_model(build("llama", torch.float32), config)
    refused(TypeError, f"{adapter_name}.*; use LoRA .* or modules_to_save for the head", wrapped)


def test_refuses_batches_of_mixed_adapters():
    wrapped = adapted("llama", lora()).eval()
    calls = []

    def ask(*_):
        refused(TypeError, "expected the same adapters for all of a batch .* got adapter_names", wrapped)
        calls.append(1)

    wrapped.get_base_model().model.register_forward_hook(ask)
    wrapped(input_ids=batch()[0], adapter_names=["default", "__base__", "default"])
    assert calls


def test_refuses_quantised_layers_below_lora():
    wrapped = adapted("llama", lora(), torch.float32)
    layer = wrapped.get_base_model().lm_head.base_layer
    layer.weight = nn.Parameter(torch.zeros(V, D, dtype=torch.int8), requires_grad=False)
    refused(TypeError, "weight of LlamaForCausalLM.lm_head to be a floating-point tensor, got .*int8", wrapped)


def test_refuses_adapters_that_are_quantised():
    wrapped = adapted("llama", lora(), torch.float32)
    b = wrapped.get_base_model().lm_head.lora_B["default"]
    b.weight = nn.Parameter(torch.zeros(V, 4, dtype=torch.int8), requires_grad=False)
    refused(TypeError, "lora_B of LlamaForCausalLM.lm_head to be a floating-point tensor, got .*int8", wrapped)


def test_refuses_tokens_above_another_adapter():
    """A PEFT model inside a PEFT model: the replaced rows are the sum of the weight and LoRA."""
    config = peft.TrainableTokensConfig(token_indices=[4], **HEAD)
    wrapped = peft.get_peft_model(adapted("llama", lora(), torch.float32), config, adapter_name="outer")
    refused(TypeError, "plain nn.Linear below the trainable tokens of .*lm_head, got one with an adapter", wrapped)


def test_refuses_layers_with_another_forward():
    wrapped = adapted("llama", lora(), torch.float32)
    layer = wrapped.get_base_model().lm_head
    layer.forward = lambda hidden: hidden
    refused(TypeError, "Linear with a forward of its own", wrapped)
    del layer.forward
    layer.__class__ = type("Linear4bit", (type(layer),), {"forward": lambda self, hidden: hidden})
    refused(TypeError, "plain nn.Linear, got .*Linear4bit", wrapped)


def test_refuses_cases_that_peft_computes_wrongly():
    """PEFT's forward drops a head's bias under trainable tokens, and with a duplicate row it depends on the order."""
    config = lora(target_modules=["q_proj"], trainable_token_indices={"lm_head": [4]})
    refused(TypeError, "to have no bias below trainable tokens", adapted("phi", config))
    config = lora(target_modules=["q_proj"], trainable_token_indices={"lm_head": [4, 5, 4]})
    refused(ValueError, r"got some of \[4, 4, 5\] twice", adapted("llama", config))
