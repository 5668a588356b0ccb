"""Models that consist of a base model and an adapter: to be trained further, or merged."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft.utils.save_and_load import load_peft_weights

from fusedalign.trl.models import ADAPTER_CONFIG, check_folder, check_has_head, has_file, load_processing_class
from fusedalign.trl.stock import create_model_from_path

#: Folders for base models in a training's output directory; found there also after the directory was moved.
OWN_BASES = ("embedded-model", "merged-model")


class Adapter(NamedTuple):
    """An adapter and the name of its base model."""

    path: str
    """folder or Hub name"""
    revision: str | None
    config: peft.PeftConfig
    base: str
    """folder or Hub name of the base model"""

    def processing_class(self, **options: Any) -> Any:
        """The adapter's, which may have added tokens, else its base model's; see `load_processing_class`."""
        if has_file(self.path, "tokenizer_config.json", self.revision):
            return load_processing_class(self.path, **{**options, "revision": self.revision})
        return load_processing_class(self.base, **{**options, "revision": self.config.revision})


def find_adapter(path: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Adapter | None:
    """The adapter of a folder or Hub name; None if it holds none.

    Raises:
        ValueError: a folder that holds a model's weights too, a configuration that cannot be read, no LM head.
        FileNotFoundError: a base model that does not exist.
    """
    if not has_file(path, ADAPTER_CONFIG, revision):
        return None
    patterns = ("model*.safetensors", "pytorch_model*.bin")
    weights = sorted(file.name for pattern in patterns for file in Path(path).glob(pattern))
    if weights:
        raise ValueError(
            f"model_name_or_path must hold a model or an adapter, got {path} with {weights[0]} and {ADAPTER_CONFIG}: "
            "move one of them elsewhere"
        )
    try:
        config = peft.PeftConfig.from_pretrained(path, revision=revision)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{ADAPTER_CONFIG} in {path} must be what PEFT writes, got {type(error).__name__}: {error}"
        ) from error
    what = f"base_model_name_or_path in the {ADAPTER_CONFIG} of {path}"
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"{what} must name the base model, got {base!r}")
    moved = [folder / Path(base).name for folder in (Path(path), Path(path).parent) if Path(base).name in OWN_BASES]
    base = next((str(folder) for folder in (Path(base), *moved) if folder.is_dir()), base)
    check_folder(base, what)
    check_has_head(base, what, revision=config.revision, trust_remote_code=trust_remote_code)
    config.base_model_name_or_path = base
    return Adapter(path, revision, config, base)


def load_adapter(adapter: Adapter, options: Mapping[str, Any], *, trainable: bool = True) -> Any:
    """The base model, loaded with `options`, and its adapter, to be trained further or merged: a `PeftModel`.

    Raises:
        ValueError: an adapter that does not fit its base model, or cannot be trained further.
    """
    if trainable and adapter.config.is_prompt_learning:
        raise ValueError(
            f"model_name_or_path must be an adapter that can be trained further, got {adapter.path} with "
            f"{_kind(adapter)}: name its base model {adapter.base} instead"
        )
    base = create_model_from_path(adapter.base, **{**options, "revision": adapter.config.revision or "main"})
    weights = load_peft_weights(adapter.path, device="cpu", revision=adapter.revision)
    tokenizer = adapter.processing_class(trust_remote_code=options.get("trust_remote_code", False))
    _resize(base, weights, len(getattr(tokenizer, "tokenizer", tokenizer)))
    if not trainable:
        _untie(base)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # they would stay random
            model = peft.PeftModel.from_pretrained(
                base, adapter.path, is_trainable=trainable, config=adapter.config, revision=adapter.revision
            )
    except (RuntimeError, ValueError, UserWarning) as error:
        raise ValueError(f"adapter {adapter.path} must fit its base model {adapter.base}, got: {error}") from error
    return model


def _resize(base: Any, weights: Mapping[str, torch.Tensor], tokens: int) -> None:
    """Resize the base model's vocabulary to the one that the adapter was trained with."""
    names = {module: name for name, module in base.named_modules()}
    sizes = []
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        prefix = f"base_model.model.{names.get(module)}."
        for key, weight in weights.items():
            name = key.removeprefix(prefix)
            if name in ("weight", "base_layer.weight", "lora_B.weight"):
                sizes.append(weight.shape[0])
            elif name == "lora_embedding_A":
                sizes.append(weight.shape[1])
    own_size = base.get_input_embeddings().weight.shape[0]
    size = sizes[0] if sizes else max(own_size, tokens)
    if size != own_size:
        base.resize_token_embeddings(size)


def _untie(model: Any) -> None:
    """Copy the weight of a head that is tied to the embedding, so that a merge into one leaves the other."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def merge(adapter: Adapter, folder: Path, *, dtype: str | None = "auto", trust_remote_code: bool = False) -> None:
    """Write the merged model, in `dtype` ("auto": the base model's), and its tokenizer into a folder.

    Raises:
        ValueError: an adapter that cannot be merged.
    """
    if adapter.config.is_prompt_learning:
        raise ValueError(
            f"expected an adapter of weights, which can be merged, got {adapter.path} with {_kind(adapter)}"
        )
    options = {"dtype": dtype, "device_map": None, "trust_remote_code": trust_remote_code}
    model = load_adapter(adapter, options, trainable=False)
    try:
        merged = model.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"expected an adapter that can be merged, got {adapter.path} with {_kind(adapter)}: {error}"
        ) from error
    embedding, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    if merged.config.tie_word_embeddings and not torch.equal(embedding, head):
        merged.config.tie_word_embeddings = merged.config.get_text_config().tie_word_embeddings = False
    merged.save_pretrained(folder)
    adapter.processing_class(trust_remote_code=trust_remote_code).save_pretrained(folder)


def _kind(adapter: Adapter) -> str:
    return str(getattr(adapter.config.peft_type, "value", adapter.config.peft_type))
