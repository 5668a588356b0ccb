"""Digests of what log-probabilities depend on: weights, configuration, adapter, tokenizer, chat template.

They are equal on every device and in every process. Fused heads, Liger's kernels, `torch.compile` and wrappers do not
change them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from fusedalign.engines import gathered_tensors, is_partitioned

#: Bytes of a tensor copied to the CPU at a time, for each thread.
_CHUNK = 64 << 20
_THREADS = 8

#: Fields of a model's configuration that do not change its log-probabilities in eval mode, given its weights. Others
#: count, also of future versions: a field too many costs a new scoring, a field too few gives wrong numbers silently.
_CONFIG_WITHOUT_INFLUENCE = (
    "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states",
    "output_router_logits", "router_aux_loss_coef", "tie_word_embeddings", "return_dict", "chunk_size_feed_forward",
    "initializer_range", "auto_map",
)  # fmt: skip
_DROPOUT = ("drop", "dropout", "dropout_rate", "dropout_prob")
#: Fields of an adapter's configuration that change nothing, given the names and values of its tensors.
_ADAPTER_WITHOUT_INFLUENCE = (
    "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode", "auto_mapping",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "lora_dropout", "runtime_config", "loftq_config", "corda_config", "eva_config",
    "lora_ga_config", "init_weights",
)  # fmt: skip
#: Parts that PEFT and `torch.compile` add to the names of a model's own tensors.
_WRAPPERS = frozenset({"base_layer", "original_module", "_orig_mod"})


def digest(*parts: Any) -> str:
    """The digest of JSON values; sets in order, other objects as their text."""
    return hashlib.blake2b(json.dumps(parts, default=plain, sort_keys=True).encode(), digest_size=16).hexdigest()


def plain(x: Any) -> Any:
    """For `json.dumps`: sets in order, other objects as their text; a text with an address never matches again."""
    return sorted(map(repr, x)) if isinstance(x, set | frozenset) else repr(x)


def weights_digest(model: nn.Module) -> str:
    """The digest of a model's parameters and saved buffers: name, dtype, shape and bytes of each.

    Args:
        model: of transformers; the active adapter of a `PeftModel` counts too, unless it is new and changes nothing.

    Raises:
        ValueError: weights that are offloaded or not in plain tensors.
    """
    tensors, adapter = _weights(model)
    names = sorted(tensors)
    # All ranks must gather what ZeRO-3 has partitioned in the same order.
    threads = 1 if any(map(is_partitioned, tensors.values())) else min(_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        return digest(list(pool.map(lambda name: _tensor_digest(name, tensors[name]), names)), adapter)


def _weights(model: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors by name, and the configuration of the active adapter, if there is one."""
    if not is_peft_model(model):
        return _own_tensors(model, ()), None
    tensors = _own_tensors(model.get_base_model(), model.peft_config)
    from peft import get_peft_model_state_dict

    name = model.active_adapter
    config = model.peft_config[name]
    adapter: dict[str, Tensor] = get_peft_model_state_dict(
        model, model.state_dict(keep_vars=True), adapter_name=name, save_embedding_layers=False
    )
    if _changes_nothing(config, adapter):
        return tensors, None
    tensors |= {f"adapter {name}": x for name, x in adapter.items()}
    fields = {name: x for name, x in config.to_dict().items() if name not in _ADAPTER_WITHOUT_INFLUENCE}
    return tensors, fields


def _own_tensors(model: nn.Module, adapters: Any) -> dict[str, Tensor]:
    """A model's tensors without those of adapters, by the names that they have without PEFT."""
    state = {name: x for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
    children: dict[str, set[str]] = {}
    for name in state:
        parts = name.split(".")
        for i, part in enumerate(parts):
            children.setdefault(".".join(parts[:i]), set()).add(part)
    adapter_modules = {parent for parent, names in children.items() if names <= set(adapters)}  # PEFT's ModuleDicts
    tensors = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if not any(".".join(parts[:i]) in adapter_modules for i in range(len(parts))):
            tensors[".".join(part for part in parts if part not in _WRAPPERS)] = tensor
    return tensors


def _changes_nothing(config: Any, adapter: Mapping[str, Tensor]) -> bool:
    """Whether an adapter is LoRA in its default initialisation: A random, B zero."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA" or not all(".lora_A." in name or ".lora_B." in name for name in adapter):
        return False
    return not any(_any(x) for name, x in adapter.items() if ".lora_B." in name)


def _any(x: Tensor) -> bool:
    with gathered_tensors([x]):
        return bool(x.any())


def _tensor_digest(name: str, tensor: Tensor) -> tuple[tuple[str, str, list[int]], str]:
    """Name, dtype and shape of a tensor, and the digest of its bytes."""
    if tensor.is_meta:
        raise ValueError(f"expected a model with its weights in memory, got {name} offloaded: load it without offload")
    content = hashlib.blake2b(digest_size=16)
    try:
        with gathered_tensors([tensor]):
            facts = name, str(tensor.dtype), list(tensor.shape)
            for chunk in tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(_CHUNK):
                content.update(chunk.cpu().numpy())
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"expected weights in plain tensors, got {type(tensor).__name__} in {name}") from error
    return facts, content.hexdigest()


def config_digest(model: Any) -> str:
    """The digest of the fields of a model's configuration that change log-probabilities."""
    return digest(_influential(model.config.to_dict()))


def _influential(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(name): _influential(x) if isinstance(x, Mapping) else x
        for name, x in fields.items()
        if name not in _CONFIG_WITHOUT_INFLUENCE and not str(name).startswith("_") and not str(name).endswith(_DROPOUT)
    }


def tokenizer_digest(processing_class: Any) -> str:
    """The digest of how a tokenizer, or that of a processor, tokenises text; padding does not count."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        facts = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        facts = json.loads(backend.to_str())
        for name in ("padding", "truncation"):  # settings of the latest call
            facts.pop(name, None)
    return digest(facts, str(tokenizer.bos_token), str(tokenizer.eos_token))


def template_digest(processing_class: Any) -> str:
    """The digest of a chat template, or of there being none."""
    return digest(getattr(processing_class, "chat_template", None))
