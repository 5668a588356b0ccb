"""Tiny causal LMs of many families, and random pairs of rows for them."""

import torch
import transformers

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 4}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
LATENT = {
    **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 8, "v_head_dim": 12, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}

#: test name -> architecture name in transformers, and configuration fields in addition to `SMALL`.
PACKABLE = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral": ("mistral", WINDOW),
    "gemma3": ("gemma3_text", {"head_dim": 8, **MIXED}),
    "cohere2": ("cohere2", MIXED),
    "olmo3": ("olmo3", MIXED),
    "qwen2, windows in some layers": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "phi": ("phi", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {**GPT2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, **EXPERTS}),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "granite": ("granite", {"attention_multiplier": 0.4, "residual_multiplier": 0.7, "logits_scaling": 3.0}),
}
#: Models that cannot be packed: name -> (architecture, options, reason).
REFUSED = {
    "falcon_h1": (
        "falcon_h1",
        {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4},
        "FalconH1ForCausalLM carries a state along the row",
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **EXPERTS,
            **{"head_dim": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 2},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16},
            "layer_types": ["linear_attention", "full_attention"],
        },
        r"Qwen3NextForCausalLM (carries a state along the row|has layers of kinds linear_attention)",
    ),
    "mamba": ("mamba", {}, r"MambaForCausalLM carries a state along the row"),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"lru_width": 32, "attention_window_size": 4, "num_hidden_layers": 3},
        "RecurrentGemmaForCausalLM carries a state along the row",
    ),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"]},
        "Lfm2ForCausalLM (carries a state along the row|has layers of kinds conv, which are no plain attention)",
    ),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}, "BloomForCausalLM has attention of its own"),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "MptForCausalLM has attention of its own"),
    "falcon": ("falcon", {"alibi": True}, r"FalconForCausalLM has position biases in its attention \(ALiBi\)"),
    "gpt_neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_layers": 2, "num_heads": 4},
        "GPTNeoForCausalLM has attention of its own",
    ),
    "gpt_oss": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, **MIXED},
        "GptOssAttention has s_aux in its attention",
    ),
    "gemma2": ("gemma2", {"head_dim": 8}, "Gemma2Attention has softcap in its attention"),
    "stablelm": ("stablelm", {}, "StableLmAttention is not handed the keyword arguments of the model's forward"),
    "nemotron": ("nemotron", {}, "NemotronAttention is not handed the keyword arguments of the model's forward"),
    "llama4": (
        "llama4_text",
        {
            **{"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 48},
            "layer_types": ["chunked_attention", "full_attention"],
        },
        "Llama4ForCausalLM has layers of kinds chunked_attention",
    ),
    "gpt2": ("gpt2", GPT2, "GPT2Attention has dropout in its attention: set it to 0"),
}

ROUTED = {**EXPERTS, "num_local_experts": 4, "n_routed_experts": 4}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
DELTA = {
    **{"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
#: The families of docs/models.md: architecture -> options. Scales and softcaps that are neutral by default are set.
FAMILIES = {
    **{architecture: options for architecture, options, _ in REFUSED.values()},
    **dict(PACKABLE.values()),
    "apertus": {},
    "arcee": {},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "attn_layer_indices": [1]},
    "biogpt": {},
    "codegen": {**GPT2, "rotary_dim": 4},
    "cohere": {},
    "deepseek_v2": LATENT,
    "diffllama": {},
    "ernie4_5": {"head_dim": 8},
    "exaone4": MIXED,
    "exaone_moe": ROUTED,
    "gemma": {"head_dim": 8},
    "gemma4_text": {"head_dim": 8, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 97, **MIXED},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": {"head_dim": 8, **ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt_bigcode": {**GPT2, **NO_DROPOUT},
    "gptj": {**GPT2, "rotary_dim": 4},
    "granitemoe": {**ROUTED, "logits_scaling": 3.0},
    "granitemoehybrid": {
        **ROUTED,
        **{"mamba_n_heads": 2, "mamba_d_head": 32, "mamba_d_state": 4, "layer_types": ["mamba", "attention"]},
        "logits_scaling": 3.0,
    },
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hyperclovax": {"logits_scaling": 2.5},
    "jamba": {**ROUTED, "mamba_d_state": 4},
    "jetmoe": {**ROUTED, "kv_channels": 8},
    "kimi_linear": {},
    "lfm2_moe": {**ROUTED, "layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1},
    "minicpm3": {**LATENT, "dim_model_base": 8},
    "minimax": {**ROUTED, "head_dim": 8},
    "ministral": {"head_dim": 8, **MIXED},
    "mixtral": ROUTED,
    "nanochat": {"final_logit_softcapping": 15.0},
    "nemotron_h": {},
    "olmo": {},
    "olmo2": {},
    "olmo_hybrid": {},
    "olmoe": ROUTED,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "persimmon": {},
    "phi3": {},
    "phimoe": ROUTED,
    "qwen2": {},
    "qwen2_moe": {**ROUTED, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {"head_dim": 8, **DELTA},
    "rwkv": {},
    "seed_oss": {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "smollm3": {},
    "solar_open": ROUTED,
    "starcoder2": {},
    "vaultgemma": {"head_dim": 8},
    "xglm": {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 2},
    "xlstm": {"num_heads": 2, "num_blocks": 2},
}
FAMILIES["falcon_h1"] = {**FAMILIES["falcon_h1"], "lm_head_multiplier": 0.5}


def build(architecture, options=(), attention="sdpa", dtype=torch.float32):
    """Build a model, always with the same weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(architecture, **SMALL | dict(options))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # so that attention weights differ between tokens
            parameter.data.mul_(4)
    return model.to(dtype)


def padded_pairs(seed, pairs=3, longest=14):
    """(input_ids, attention_mask) of uneven pairs, all chosen rows first, right-padded with non-zero ids.

    Some answers share a beginning, one is empty, and one pair has two different prompts.
    """
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    ids_of = lambda n: torch.randint(3, 97, (n,), generator=g).tolist()  # noqa: E731
    chosen, rejected = [], []
    for i in range(pairs):
        prompt, common = ids_of(draw(1, longest)), ids_of(draw(0, 3))
        answers = [common + ids_of(draw(1, longest)) for _ in range(2)]
        if i == 1:
            answers[seed % 2] = []
        prompts = [prompt, prompt[1:] if i == 2 else prompt]
        chosen.append(prompts[0] + answers[0])
        rejected.append(prompts[1] + answers[1])
    rows = chosen + rejected
    width = max(map(len, rows))
    ids = torch.tensor([row + [7] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask
