"""A small model that needs no download: built from the data in `recipes/data` in seconds, on any machine.

Its name is `model_name_or_path: embedded`. The weights are random, so train it with SFT first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EMBEDDED_NAME = "embedded"

VOCAB_SIZE = 2048
MAX_LENGTH = 512
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>\\n' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def data_directory() -> Path:
    """The directory of the shipped data sets (`preferences/`, `sft/`), in the checkout or in the installed wheel.

    Raises:
        FileNotFoundError: neither exists.
    """
    package = Path(__file__).resolve().parent
    candidates = (package.parent / "recipes" / "data", package / "_recipes" / "data")
    for candidate in candidates:
        if (candidate / "sft" / "train.jsonl").is_file():
            return candidate
    raise FileNotFoundError(f"the shipped data is in neither {candidates[0]} nor {candidates[1]}: reinstall fusedalign")


def build_embedded_model(directory: str | Path, *, seed: int = 0) -> Path:
    """Build a small Qwen3 causal language model and its tokenizer, and save them in `directory`.

    The tokenizer is a byte-level BPE trained on the shipped training data. Its ChatML chat template marks the
    assistant's turns for `assistant_only_loss`. The model (about a million parameters, fp32) has random weights that
    depend only on `seed`. The global random state does not change.

    Args:
        directory: created if missing; files of the same names are overwritten.
        seed: of the weights.

    Returns:
        `directory` as a `Path`, for `AutoModelForCausalLM.from_pretrained` or a trainer.
    """
    import torch
    from transformers import GenerationConfig, Qwen3ForCausalLM

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer()
    config = _config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).float()
    model.generation_config = GenerationConfig(**_special(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def embedded_config() -> Any:
    """The configuration of the embedded model, without building it."""
    return _config(_train_tokenizer())


def _special(tokenizer: Any) -> dict[str, Any]:
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}


def _config(tokenizer: Any) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.04,  # twice the default: a model this small then learns much faster
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        **_special(tokenizer),
    )


def _train_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that every byte, hence any text, has a token
        show_progress=False,
    )
    texts = ["user", "assistant", "\n"]
    for kind in ("preferences", "sft"):
        for line in (data_directory() / kind / "train.jsonl").read_text(encoding="utf-8").splitlines():
            texts += [message["content"] for turn in json.loads(line).values() for message in turn]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
