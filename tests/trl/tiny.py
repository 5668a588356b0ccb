"""Tiny models of many families, a little data, and the trainers that the tests compare."""

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset

SMALL = {
    "vocab_size": 419,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}


def _phi():
    config = transformers.PhiConfig(**SMALL, partial_rotary_factor=0.5)
    model = transformers.PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


#: One model family for each kind of head.
MODELS = {
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=8)),
    "tied": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SMALL, head_dim=8, sliding_window=4)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SMALL,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            final_logit_softcapping=2.0,
        )
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5)
    ),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, logit_scale=3.0)),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**SMALL, logits_scaling=0.3)),
    "falcon_h1": lambda: transformers.FalconH1ForCausalLM(
        transformers.FalconH1Config(
            **SMALL, lm_head_multiplier=2.0, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4
        )
    ),
    "phi": _phi,
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=16)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, **EXPERTS, head_dim=8, num_local_experts=4)
    ),
    "phimoe": lambda: transformers.PhimoeForCausalLM(
        transformers.PhimoeConfig(**SMALL, **EXPERTS, num_local_experts=4)
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=SMALL | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 16,
                "fullatt_block_indexes": [0],
            },
            image_token_id=400,
            vision_start_token_id=401,
            vision_end_token_id=402,
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=419, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    ),
}


def save_model(name, folder):
    """Save that model of `MODELS` into a folder, always with the same weights."""
    torch.manual_seed(1)
    model = MODELS[name]()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # so that logits differ by more than rounding
            parameter.data.mul_(8)
    model.save_pretrained(folder)


SENTENCE = "a good answer is short and says what you want to know but this one goes on and on about boats"
WORDS = SENTENCE.split()


def _text(start, length):
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(length))


def rows(n):
    """n distinct rows of uneven lengths."""
    for i in range(n):
        prompt, chosen, rejected, gold = ((i * 7 + k * 3) % 5 + 2 for k in range(4))
        yield {
            "prompt": _text(i, prompt),
            "chosen": " " + _text(i + 3, chosen),
            "rejected": " " + _text(2 * i + 5, rejected + 2),
            "reference": " " + _text(3 * i + 1, gold + 1),
        }


def data(kind, n):
    """A data set of n rows in the format of the trainer `kind`."""
    all_rows = list(rows(n))
    if kind == "sft":
        return Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in all_rows])
    if kind == "kto":
        sides = [("chosen", True), ("rejected", False)]
        return Dataset.from_list(
            [
                {"prompt": r["prompt"], "completion": r[side], "label": label}
                for i, r in enumerate(all_rows)
                for side, label in [sides[i % 3 == 1]]
            ]
        )
    if kind in ("grpo", "rloo"):
        return Dataset.from_list([{"prompt": r["prompt"]} for r in all_rows])
    columns = ["prompt", "chosen", "rejected", *(["reference"] if kind == "tpo" else [])]
    return Dataset.from_list([{name: r[name] for name in columns} for r in all_rows])


def classes(kind):
    """(stock trainer, Fused trainer or None, configuration class)."""
    import fusedalign.trl

    name = kind.upper()
    holder = trl if hasattr(trl, f"{name}Trainer") and kind not in ("cpo", "orpo", "tpo") else None
    if holder is None:
        from importlib import import_module

        holder = import_module(f"trl.experimental.{kind}")
    fused = getattr(fusedalign.trl, f"Fused{name}Trainer", None)
    return getattr(holder, f"{name}Trainer"), fused, getattr(holder, f"{name}Config")


def lora():
    """A LoRA configuration without adapters on the head."""
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def tokenizer():
    """A tokenizer with words as tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {word: i for i, word in enumerate(sorted(set(WORDS)), 3)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )


UNTIMED = ("_runtime", "_per_second", "step_time", "total_flos")


def history(trainer, evaluate=True):
    """Train (and evaluate); return every logged row without timings."""
    trainer.train()
    if evaluate:
        trainer.evaluate()
    return [{k: v for k, v in row.items() if not k.endswith(UNTIMED)} for row in trainer.state.log_history]


def assert_same(got, want, tolerance=1e-5):
    """Assert equal metric names and values within the tolerance, absolute and relative.

    While policy and reference are equal, rewards are rounding noise, so accuracies are not compared.
    """
    assert [row.keys() for row in got] == [row.keys() for row in want]
    for a, b in zip(got, want, strict=True):
        for name in a:
            if name.endswith("rewards/accuracies") and abs(b[name.replace("accuracies", "margins")]) < tolerance:
                continue
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance, nan_ok=True), (name, a["step"])
