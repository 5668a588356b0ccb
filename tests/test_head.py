"""`lm_head` against the models' own logits, family by family, and the heads that it must refuse."""

import copy
import functools

import pytest
import torch
from torch import nn

from fusedalign.head import LMHead, lm_head

transformers = pytest.importorskip("transformers")

V, D = 61, 32
SMALL = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {**SMALL, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {
    "vocab_size": V,
    "n_embd": D,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM = {"vocab_size": V, "hidden_size": D, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
MPT = {"vocab_size": V, "d_model": D, "n_layers": 2, "n_heads": 4}
OPT = {**SMALL, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
BART = {"vocab_size": V, "d_model": D, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
GRIFFIN = {**SMALL, "num_hidden_layers": 3, "lru_width": D, "block_types": ["recurrent", "recurrent", "attention"]}
XLSTM = {"vocab_size": V, "hidden_size": D, "num_heads": 2, "num_blocks": 2, "num_hidden_layers": 2}
MAMBA2 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MINICPM3 = {**SMALL, **MLA, "num_key_value_heads": 4}
GEMMA4 = {**SMALL, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": V}
ENCODER = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
SIGLIP = {**VIT, "model_type": "siglip_vision_model", "projection_dim": D}
LLAMA4_VIT = {**VIT, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
QWEN_VIT = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": D, "intermediate_size": 16}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
QFORMER = {**ENCODER, "hidden_size": 16, "encoder_hidden_size": 16}


def vlm(text, vision=SIGLIP, **rest):
    return {"text_config": text, "vision_config": vision, **rest}


# (model class, configuration arguments, (scale, softcap), or None if these depend on the version). Scales and
# softcaps are never neutral here, so that a head read without them fails.
PLAIN = (1.0, None)
FAMILIES = [
    ("Qwen3ForCausalLM", {**SMALL, "tie_word_embeddings": False}, PLAIN),
    ("Qwen3ForCausalLM", {**SMALL, "tie_word_embeddings": True}, PLAIN),
    ("Qwen3MoeForCausalLM", MOE, PLAIN),
    ("LlamaForCausalLM", SMALL, PLAIN),
    ("MistralForCausalLM", SMALL, PLAIN),
    ("MixtralForCausalLM", MOE, PLAIN),
    ("Olmo2ForCausalLM", SMALL, PLAIN),
    ("GptOssForCausalLM", MOE, PLAIN),
    ("Gemma2ForCausalLM", {**SMALL, "final_logit_softcapping": 1.7}, (1.0, 1.7)),
    ("Gemma2ForCausalLM", {**SMALL, "final_logit_softcapping": None}, PLAIN),
    ("Gemma3ForCausalLM", {**SMALL, "final_logit_softcapping": 1.7}, (1.0, 1.7)),
    ("Gemma4ForCausalLM", {**GEMMA4, "final_logit_softcapping": 1.7}, (1.0, 1.7)),
    ("VaultGemmaForCausalLM", {**SMALL, "final_logit_softcapping": 1.7}, (1.0, 1.7)),
    ("NanoChatForCausalLM", {**SMALL, "final_logit_softcapping": 1.7}, (1.0, 1.7)),
    ("BeamForCausalLM", {**SMALL, "final_logit_softcapping": 1.7}, (1.0, 1.7)),
    ("RecurrentGemmaForCausalLM", {**GRIFFIN, "logits_soft_cap": 1.7}, (1.0, 1.7)),
    ("xLSTMForCausalLM", {**XLSTM, "output_logit_soft_cap": 1.7}, (1.0, 1.7)),
    ("CohereForCausalLM", {**SMALL, "logit_scale": 0.3}, (0.3, None)),
    ("CohereForCausalLM", {**SMALL, "logit_scale": 0.0}, (0.0, None)),
    ("Cohere2ForCausalLM", {**SMALL, "logit_scale": 0.3}, (0.3, None)),
    ("GraniteForCausalLM", {**SMALL, "logits_scaling": 2.5}, (0.4, None)),
    ("GraniteMoeForCausalLM", {**MOE, "logits_scaling": 2.5}, (0.4, None)),
    ("GraniteMoeSharedForCausalLM", {**MOE, "logits_scaling": 2.5}, (0.4, None)),
    ("HyperCLOVAXForCausalLM", {**SMALL, "logits_scaling": 2.5}, (2.5, None)),
    ("MiniCPM3ForCausalLM", {**MINICPM3, "dim_model_base": 8}, (0.25, None)),
    ("FalconH1ForCausalLM", {**SMALL, **MAMBA2, "lm_head_multiplier": 0.3}, (0.3, None)),
    ("PhiForCausalLM", SMALL, PLAIN),
    ("Phi3ForCausalLM", SMALL, PLAIN),
    ("GPT2LMHeadModel", GPT2, PLAIN),
    ("GPTJForCausalLM", {**GPT2, "rotary_dim": 4}, PLAIN),
    ("GPTNeoXForCausalLM", SMALL, PLAIN),
    ("BloomForCausalLM", BLOOM, PLAIN),
    ("MptForCausalLM", {**MPT, "logit_scale": 0.3}, PLAIN),  # the forward ignores logit_scale
    ("OPTForCausalLM", OPT, PLAIN),  # projects hidden states before the head
    ("StableLmForCausalLM", SMALL, PLAIN),
    ("MambaForCausalLM", {**SMALL, "state_size": 4}, PLAIN),
    ("BartForCausalLM", BART, PLAIN),
    ("Qwen2_5_VLForConditionalGeneration", vlm({**SMALL, **MROPE}, QWEN_VIT), PLAIN),
    ("Gemma3ForConditionalGeneration", vlm({**SMALL, "final_logit_softcapping": 1.7}, VIT), PLAIN),  # softcap ignored
    ("LlavaForConditionalGeneration", vlm({**SMALL, "model_type": "gemma2"}), PLAIN),  # ignored as well
    ("AyaVisionForConditionalGeneration", vlm({**SMALL, "model_type": "cohere2", "logit_scale": 0.3}), PLAIN),
    (
        "PaliGemmaForConditionalGeneration",
        vlm({**SMALL, "model_type": "gemma2", "final_logit_softcapping": 1.7}, projection_dim=D),
        None,  # transformers 5.17 ignores the softcap, later versions read it
    ),
    ("PaliGemmaForConditionalGeneration", vlm({**SMALL, "model_type": "gemma"}, projection_dim=D), PLAIN),
    (
        "MuseGlimmerForConditionalGeneration",
        vlm({**SMALL, "final_logit_softcapping": 1.7, "output_multiplier": 0.6}, VIT),
        (0.6, 1.7),
    ),
    ("Llama4ForConditionalGeneration", vlm({**MOE, "intermediate_size_mlp": 32}, LLAMA4_VIT), PLAIN),
]
IDS = [f"{name}-{number}" for number, (name, _, _) in enumerate(FAMILIES)]


def build(name, config):
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**copy.deepcopy(config))).eval()
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        nn.init.normal_(head.weight, std=0.3)  # large enough for a softcap to bend the logits
        if head.bias is not None:
            nn.init.normal_(head.bias)
    return model


def qwen3(**config):
    return build("Qwen3ForCausalLM", {**SMALL, **config})


def last_hidden_and_logits(model):
    """The backbone's hidden states and the model's logits of one forward."""
    causal_lm = getattr(model, "language_model", model)  # Llama 4 with vision contains a causal LM
    backbone = causal_lm.model if causal_lm.base_model is causal_lm else causal_lm.base_model
    backbone = getattr(backbone, "decoder", backbone)
    hidden_states = []
    handle = backbone.register_forward_hook(lambda module, args, out: hidden_states.append(out[0]))
    logits = model(input_ids=torch.randint(6, V, (3, 5)), use_cache=False).logits
    handle.remove()
    return hidden_states[-1], logits


def logits_of(hidden, head):
    logits = head.scale * nn.functional.linear(hidden, head.weight, head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize(("name", "config", "expected"), FAMILIES, ids=IDS)
def test_head_gives_the_models_own_logits_and_gradients(name, config, expected):
    model = build(name, config)
    head = lm_head(model)
    if expected is not None:
        assert (head.scale, head.softcap) == pytest.approx(expected)

    hidden, logits = last_hidden_and_logits(model)
    torch.testing.assert_close(logits_of(hidden, head), logits, rtol=1e-5, atol=1e-5)

    linear = model.get_output_embeddings()
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    parameters = [parameter for parameter in (head.weight, head.bias) if parameter is not None]
    upstream = torch.randn(logits.shape)
    # subtract the gradient through the backbone, which contains a tied weight too
    head_grads = torch.autograd.grad(logits_of(hidden.detach(), head), parameters, upstream)
    hidden_grad = torch.autograd.grad(logits, hidden, upstream, retain_graph=True)[0]
    backbone_grads = torch.autograd.grad(hidden, parameters, hidden_grad, retain_graph=True, allow_unused=True)
    model_grads = torch.autograd.grad(logits, parameters, upstream)
    for head_grad, backbone_grad, model_grad in zip(head_grads, backbone_grads, model_grads, strict=True):
        total = head_grad if backbone_grad is None else head_grad + backbone_grad
        torch.testing.assert_close(total, model_grad, rtol=1e-4, atol=1e-4)


NOT_NEUTRAL = [
    (family, field)
    for family in FAMILIES
    for field, value, neutral in zip(("scale", "softcap"), family[2] or PLAIN, PLAIN, strict=True)
    if value != neutral
]


@pytest.mark.parametrize(("family", "field"), NOT_NEUTRAL, ids=[f"{f[0]}-{field}" for f, field in NOT_NEUTRAL])
def test_the_comparison_detects_a_head_without_its_transform(family, field):
    name, config, _ = family
    model = build(name, config)
    hidden, logits = last_hidden_and_logits(model)
    head = lm_head(model)
    wrong = head._replace(scale=1.0) if field == "scale" else head._replace(softcap=None)
    assert (logits_of(hidden, wrong) - logits).abs().max() > 0.1


def test_tied_embeddings_give_the_shared_parameter():
    model = qwen3(tie_word_embeddings=True)
    assert lm_head(model).weight is model.get_input_embeddings().weight


def test_the_head_is_read_at_call_time():
    model = build("Gemma2ForCausalLM", SMALL)
    model.config.final_logit_softcapping = 5.0
    assert lm_head(model).softcap == 5.0
    model.set_output_embeddings(nn.Linear(D, V, bias=True))
    assert lm_head(model)[:2] == (model.lm_head.weight, model.lm_head.bias)


def test_attributes_of_the_model_take_precedence_over_the_configuration():
    model = build("CohereForCausalLM", {**SMALL, "logit_scale": 0.3})
    model.config.logit_scale = 7.0  # the forward reads the copy taken at construction
    assert lm_head(model).scale == 0.3
    model.logit_scale = None
    assert lm_head(model).scale == 1.0


def test_a_causal_lm_inside_another_model_is_found():
    config = vlm(OPT, VIT, qformer_config=QFORMER, num_query_tokens=2)
    model = build("Blip2ForConditionalGeneration", config)
    assert lm_head(model).weight is model.language_model.lm_head.weight


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_wrapped_models_are_unwrapped():
    model = qwen3()
    for wrapped in (Wrapper(model), Wrapper(Wrapper(model)), torch.compile(model), Wrapper(torch.compile(model))):
        assert lm_head(wrapped).weight is model.lm_head.weight


def test_wrapped_and_inherited_forwards_are_read():
    class Mine(transformers.Gemma2ForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    config = transformers.Gemma2Config(**SMALL, final_logit_softcapping=1.7)
    model = Mine(config)
    model.forward = functools.wraps(model.forward)(lambda *args, **kwargs: None)
    assert lm_head(model).softcap == 1.7


def test_accelerate_hooks_on_the_head_are_allowed():
    """They set a forward on the instance without changing the product."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = qwen3()
    hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook(execution_device="cpu"))
    assert "forward" in vars(model.lm_head)
    assert lm_head(model).weight is model.lm_head.weight


class Around(nn.Module):
    """A model that contains a causal LM; the cases below change its logits in different ways."""

    def __init__(self, inside):
        super().__init__()
        self.inside, self.config = inside, inside.config

    def get_output_embeddings(self):
        return self.inside.lm_head

    def forward(self, input_ids):
        return self.inside(input_ids=input_ids).logits


def test_a_model_around_a_causal_lm_is_read():
    model = qwen3()
    assert lm_head(Around(model)) == lm_head(model)


def test_a_scale_on_the_backbone_is_used():
    """It is looked up after the model itself and before the configuration."""
    model = build("CohereForCausalLM", {**SMALL, "logit_scale": 0.3})
    del model.logit_scale
    model.model.logit_scale, model.config.logit_scale = 0.7, 0.9
    assert lm_head(model).scale == 0.7
    del model.model.logit_scale
    assert lm_head(model).scale == 0.9


# Refusals


def refused(error, match, model):
    with pytest.raises(error, match=match) as caught:
        lm_head(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "thing", [nn.Linear(2, 2), Wrapper(nn.Linear(2, 2)), "a name"], ids=["layer", "wrapped", "str"]
)
def test_refuses_models_that_are_not_causal_lms(thing):
    refused(TypeError, r"expected a causal LM with get_output_embeddings\(\), got", thing)


def test_refuses_models_without_a_head():
    refused(TypeError, "output embeddings, got Qwen3Model", qwen3().model)


@pytest.mark.parametrize(
    ("name", "config", "error", "match"),
    [
        (
            "T5ForConditionalGeneration",
            {"vocab_size": V, "d_model": D, "num_layers": 1},
            TypeError,
            "encoder-decoder T5",
        ),
        ("BertLMHeadModel", {**ENCODER, "is_decoder": True}, TypeError, "inside BertLMPredictionHead"),
        ("RobertaForCausalLM", {**ENCODER, "is_decoder": True}, TypeError, "inside RobertaLMHead"),
        ("ElectraForCausalLM", {**ENCODER, "is_decoder": True}, TypeError, r"\['electra', 'generator_predictions'\]"),
        ("ModernBertDecoderForCausalLM", SMALL, TypeError, r"\['lm_head', 'model'\]"),
        (
            "ChameleonForConditionalGeneration",
            {**SMALL, "vocabulary_map": {"<image>": 4, "IMGIMGA": 5}},
            ValueError,
            "overwrites the logits of image tokens",
        ),
        (
            "Blip2ForConditionalGeneration",
            vlm({"model_type": "t5", "vocab_size": V, "d_model": D, "num_layers": 1}, VIT, qformer_config=QFORMER),
            TypeError,
            "encoder-decoder Blip2",
        ),
        ("ProphetNetForCausalLM", {"vocab_size": V, "num_decoder_layers": 1}, ValueError, "n-gram stream"),
        (
            "MusicgenForCausalLM",
            {"vocab_size": V, "num_hidden_layers": 1},
            TypeError,
            "plain nn.Linear, got .*ModuleList",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refuses_families_with_more_than_one_head(name, config, error, match):
    with torch.device("meta"):
        cls = getattr(transformers, name)
        refused(error, match, cls(cls.config_class(**config)))


class OwnForward(nn.Linear):
    def forward(self, hidden):
        return super().forward(nn.functional.normalize(hidden))


class Packed(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (OwnForward(D, V), "plain nn.Linear, got .*OwnForward"),
        (nn.Sequential(nn.Linear(D, V)), "plain nn.Linear, got .*Sequential"),
        (nn.Embedding(V, D), "plain nn.Linear, got .*Embedding"),
    ],
)
def test_refuses_heads_that_are_not_plain_linear(head, match):
    model = qwen3()
    model.lm_head = head
    refused(TypeError, match, model)


def test_refuses_a_packed_bias():
    model = qwen3()
    model.lm_head.bias = nn.Parameter(torch.zeros(V, dtype=torch.int8), requires_grad=False)
    refused(TypeError, "bias of .* floating-point tensor, got Parameter of torch.int8", model)


def test_refuses_a_model_around_a_causal_lm_that_changes_its_logits():
    class Tempered(Around):
        def forward(self, input_ids):
            return self.inside(input_ids=input_ids).logits / self.temperature

    refused(ValueError, "the forward of Tempered uses 'temperature'", Tempered(qwen3()))


def test_refuses_a_head_that_no_causal_lm_holds():
    """A module without a configuration may do anything to the logits."""

    class Foreign(Around):
        def get_output_embeddings(self):
            return nn.Linear(D, V)

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(D, V)

        def get_output_embeddings(self):
            return self.lm_head

    refused(TypeError, "output embeddings to be a layer of Foreign, got Linear from elsewhere", Foreign(qwen3()))
    refused(TypeError, "the head to sit in a causal LM itself, got one inside Bare", Bare())


def test_refuses_a_head_whose_forward_was_replaced():
    model = qwen3()
    model.lm_head.forward = lambda hidden: hidden
    refused(TypeError, "Linear with a forward of its own", model)


def test_refuses_packed_weights():
    model = qwen3()
    model.lm_head.weight = nn.Parameter(torch.zeros(V, D, dtype=torch.int8), requires_grad=False)
    refused(TypeError, "weight of .* floating-point tensor, got Parameter of torch.int8", model)
    model.lm_head.weight = nn.Parameter(torch.zeros(V, D).as_subclass(Packed))
    refused(TypeError, "floating-point tensor, got Packed of torch.float32", model)


def test_refuses_unknown_logit_names_in_the_configuration():
    model = qwen3()
    model.config.attn_logit_softcapping = 50.0  # known not to concern the head
    model.config.num_logits_to_keep = 3
    lm_head(model)
    model.config.final_logit_power = 2
    refused(ValueError, "Qwen3Config has final_logit_power=2", model)


class Odd(transformers.Qwen3ForCausalLM):
    """A model with a custom forward, set by the cases below."""


def scaled_by_an_unknown_name(self, input_ids):
    return self.lm_head(self.model(input_ids)[0]) * self.config.logit_zoom


def capped_by_a_constant(self, input_ids):
    return torch.tanh(self.lm_head(self.model(input_ids)[0]))


def with_a_layer_between(self, input_ids):
    return self.lm_head(self.extra(self.model(input_ids)[0]))


def without_the_head(self, input_ids):
    return self.compute(self.model(input_ids)[0])


def leaves_scale_to_a_helper(self, input_ids):
    return self.postprocess(self.lm_head(self.model(input_ids)[0]))


def scaled_by_a_known_name(self, input_ids):
    return self.lm_head(self.model(input_ids)[0]) * self.config.logit_scale


def scaled_in_either_direction(self, input_ids):
    return self.lm_head(self.model(input_ids)[0]) / self.config.logits_scaling


def zoomed_by_a_name_that_starts_like_a_known_one(self, input_ids):
    return self.logits_zoom(self.lm_head(self.model(input_ids)[0]))


def scaled_in_an_inner_function(self, input_ids):
    def logits(hidden):
        return self.lm_head(hidden) * self.config.logit_zoom

    return logits(self.model(input_ids)[0])


def scaled_by_a_name_in_a_string(self, input_ids):
    return self.lm_head(self.model(input_ids)[0]) * getattr(self.config, "logit_scale", 1.0)


def capped_twice(self, input_ids):
    cap, second_cap = self.config.final_logit_softcapping, self.config.output_logit_soft_cap
    return torch.tanh(self.lm_head(self.model(input_ids)[0]) / cap) * second_cap


def without_the_last_columns(self, input_ids):
    return self.lm_head(self.model(input_ids)[0])[..., : self.config.unpadded_vocab_size]


def capped_by_a_known_name(self, input_ids):
    return self.lm_head(self.model(input_ids)[0]) / self.config.final_logit_softcapping


@pytest.mark.parametrize(
    ("forward", "config", "error", "match"),
    [
        (scaled_by_an_unknown_name, {}, ValueError, "the forward of Odd uses 'logit_zoom'"),
        (capped_by_a_constant, {}, ValueError, "the forward of Odd uses 'tanh'"),
        (
            with_a_layer_between,
            {},
            TypeError,
            r"one backbone below self.lm_head, its forward uses \['extra', 'model'\]",
        ),
        (without_the_head, {}, TypeError, "forward of Odd to call self.lm_head"),
        (leaves_scale_to_a_helper, {"logit_scale": 0.3}, ValueError, "Qwen3Config has logit_scale=0.3"),
        (scaled_by_a_known_name, {}, ValueError, "logit_scale of Odd to be a finite number or None, got nothing"),
        (scaled_by_a_known_name, {"logit_scale": "inv_sqrt_d_model"}, ValueError, "got 'inv_sqrt_d_model'"),
        (scaled_by_a_known_name, {"logit_scale": float("inf")}, ValueError, "got inf"),
        (scaled_in_either_direction, {"logits_scaling": 2.0}, ValueError, "got Odd with logits_scaling=2.0"),
        (capped_by_a_known_name, {"final_logit_softcapping": 0.0}, ValueError, "final_logit_softcapping=0.0"),
        (capped_by_a_known_name, {"final_logit_softcapping": -2.0}, ValueError, "final_logit_softcapping=-2.0"),
        (scaled_by_a_known_name, {"logit_scale": True}, ValueError, "to be a finite number or None, got True"),
        (zoomed_by_a_name_that_starts_like_a_known_one, {}, ValueError, "the forward of Odd uses 'logits_zoom'"),
        (scaled_in_an_inner_function, {}, ValueError, "the forward of Odd uses 'logit_zoom'"),
        (
            scaled_in_either_direction,
            {"model_type": "granite", "logits_scaling": 0.0},
            ValueError,
            "got Odd with logits_scaling=0.0",
        ),
        (
            capped_twice,
            {"final_logit_softcapping": 2.0, "output_logit_soft_cap": 3.0},
            ValueError,
            "got Odd with output_logit_soft_cap=3.0",
        ),
        (without_the_last_columns, {"unpadded_vocab_size": V - 1}, ValueError, f"unpadded_vocab_size={V - 1}"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refuses_unreadable_forwards(forward, config, error, match, monkeypatch):
    model = Odd(transformers.Qwen3Config(**SMALL))
    model.extra = nn.Linear(D, D)
    for name, value in config.items():
        setattr(model.config, name, value)
    monkeypatch.setattr(Odd, "forward", forward)
    refused(error, match, model)


@pytest.mark.parametrize(
    ("forward", "config", "expected"),
    [
        (scaled_by_a_name_in_a_string, {"logit_scale": 0.3}, (0.3, None)),
        (scaled_by_a_name_in_a_string, {}, (1.0, None)),  # getattr has a default
        (without_the_last_columns, {"unpadded_vocab_size": V}, (1.0, None)),
        (
            leaves_scale_to_a_helper,
            {"logit_scale": 1, "use_logit_norm": True, "logit_power": 0},
            (1.0, None),
        ),  # neutral
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_reads_other_forwards(forward, config, expected, monkeypatch):
    model = Odd(transformers.Qwen3Config(**SMALL))
    for name, value in config.items():
        setattr(model.config, name, value)
    monkeypatch.setattr(Odd, "forward", forward)
    assert lm_head(model)[2:4] == expected


def scaled_by_the_text_configuration(self, input_ids):
    return self.lm_head(self.model(input_ids)[0]) * self.config.get_text_config().logit_scale


@pytest.mark.parametrize(
    ("forward", "expected"), [(scaled_by_a_known_name, 0.3), (scaled_by_the_text_configuration, 0.9)]
)
def test_the_configuration_that_the_forward_reads_is_checked(forward, expected, monkeypatch):
    """Its own or, for a vision model, the text configuration; both are searched for unknown names."""
    model = Odd(transformers.Qwen3Config(**SMALL))
    text = copy.deepcopy(model.config)
    model.config.logit_scale, text.logit_scale = 0.3, 0.9
    vars(model.config)["get_text_config"] = lambda **_: text
    monkeypatch.setattr(Odd, "forward", forward)
    assert lm_head(model).scale == expected
    text.final_logit_power = 2
    refused(ValueError, "Qwen3Config has final_logit_power=2", model)


def test_refuses_lost_columns_below_an_adapter(monkeypatch):
    """The vocabulary is that of the base weight."""
    model = Odd(transformers.Qwen3Config(**SMALL))
    monkeypatch.setattr(Odd, "forward", without_the_last_columns)
    model.config.unpadded_vocab_size = V
    wrapped = peft_model(model, target_modules=["lm_head"])
    assert len(lm_head(wrapped).weight) == 2
    model.config.unpadded_vocab_size = V - 1
    refused(ValueError, f"unpadded_vocab_size={V - 1}", wrapped)


def test_refuses_a_bias_under_a_scale_of_the_hidden_states():
    model = build("MiniCPM3ForCausalLM", {**MINICPM3, "dim_model_base": 8})
    model.lm_head = nn.Linear(D, V, bias=True)
    refused(ValueError, "MiniCPM3ForCausalLM with logits_scaling=4", model)


def test_refuses_truncated_logits():
    if not hasattr(transformers, "InklingForCausalLM"):
        pytest.skip("this transformers has no Inkling")
    config = transformers.InklingForCausalLM.config_class(**SMALL, logits_mup_width_multiplier=2.5)
    with torch.device("meta"):
        model = transformers.InklingForCausalLM(config)
    assert lm_head(model).scale == 0.4
    model.config.unpadded_vocab_size = V - 1
    refused(ValueError, f"unpadded_vocab_size={V - 1}", model)


# PEFT; adapters on the head itself: test_adapters.py


def peft_model(model, adapter="default", **config):
    peft = pytest.importorskip("peft")
    defaults = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**{**defaults, **config}), adapter_name=adapter)


def test_peft_adapters_elsewhere_leave_the_head_unchanged():
    model = qwen3()
    wrapped = peft_model(model)
    assert lm_head(wrapped) == lm_head(Wrapper(wrapped)) == LMHead(model.lm_head.weight)
    hidden = torch.randn(2, 3, D)
    assert lm_head(wrapped).expand(hidden) is hidden
    assert not lm_head(wrapped).weight.requires_grad


def test_peft_prompt_learning_leaves_the_head_unchanged():
    peft = pytest.importorskip("peft")
    model = qwen3()
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    assert lm_head(peft.get_peft_model(model, config)).weight is model.lm_head.weight


def test_peft_modules_to_save_are_the_head():
    peft = pytest.importorskip("peft")
    model = qwen3(tie_word_embeddings=False)
    original = model.lm_head.weight
    wrapped = peft_model(model, adapter="first", modules_to_save=["lm_head"])
    wrapped.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    copies = model.lm_head.modules_to_save
    for name in ("first", "second"):
        wrapped.set_adapter(name)
        assert lm_head(wrapped).weight is copies[name].weight
        assert lm_head(wrapped).weight.requires_grad
    with torch.no_grad():
        copies["second"].weight.add_(1.0)
    hidden, logits = last_hidden_and_logits(model)
    torch.testing.assert_close(logits_of(hidden, lm_head(wrapped)), logits, rtol=1e-5, atol=1e-5)
    wrapped.add_adapter("elsewhere", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.set_adapter("elsewhere")  # PEFT keeps no copy of the head then
    assert lm_head(wrapped).weight is original
    wrapped.set_adapter("second")
    with wrapped.disable_adapter():
        assert lm_head(wrapped).weight is original
        hidden, logits = last_hidden_and_logits(model)
        torch.testing.assert_close(logits_of(hidden, lm_head(wrapped)), logits, rtol=1e-5, atol=1e-5)
