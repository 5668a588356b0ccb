"""The records of a causal LM from its configuration: the model is built on the meta device, without weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from fusedalign.commandline import one_line
from fusedalign.embedded import EMBEDDED_NAME, embedded_config
from fusedalign.plan.shape import Model, Step, Trace
from fusedalign.plan.trace import trace


def read_config(name: str) -> Any:
    """The configuration of a folder, a Hub model or the embedded model.

    Raises:
        ValueError: there is none, or it is not of a causal LM with a vocabulary.
    """
    import transformers

    option = "--model_name_or_path"
    if name == EMBEDDED_NAME:
        return embedded_config()
    if not name:
        raise ValueError(f"{option} must name a model, got an empty name")
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{option} must be a folder with a config.json, got {name} without one")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError, and validation errors of fields
        reason = "it is no folder here, and the Hub has no such model or cannot be reached"
        if path.is_dir():
            reason = f"its config.json cannot be read: {one_line(error)}"
        raise ValueError(f"{option} must name a model, got {name}: {reason}") from error
    check_config(config, name)
    return config


def check_config(config: Any, name: str) -> None:
    """Raise ValueError unless the configuration is of a causal LM with a vocabulary."""
    from transformers import AutoModelForCausalLM

    kind = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"expected a causal LM, got {name} with {kind}, an encoder-decoder")
    if not getattr(config.get_text_config(), "vocab_size", None):
        raise ValueError(f"expected a configuration with a vocab_size, got {name} with {kind} without one")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"expected a causal LM, got {name} with {kind}, which has none")


class Shapes:
    """The models of one configuration as steps train them, and the memory of their layers, with a cache."""

    def __init__(self, config: Any, name: str) -> None:
        self.config, self.name = config, name
        self._models: dict[Any, tuple[Any, Model]] = {}
        self._traces: dict[Any, Trace] = {}

    def model(self, step: Step) -> Model:
        """The model that a step trains."""
        return self._build(step)[1]

    def trace(self, step: Step, *, padded: bool = False) -> Trace:
        """The memory of the layers for a micro-batch of this step, packed or padded to the longest row."""
        tokens, keys = (step.padded, step.padded) if padded else (step.packed, step.keys)
        key = (step.dtype, step.lora_r, tokens, keys)
        if key not in self._traces:
            self._traces[key] = trace(self._build(step)[0], tokens, keys=keys)
        return self._traces[key]

    def _build(self, step: Step) -> tuple[Any, Model]:
        key = step.dtype, step.lora_r
        if key not in self._models:
            causal_lm = build(self.config, step)
            self._models[key] = causal_lm, _describe(self.name, causal_lm, step)  # before a trace modifies the model
        return self._models[key]


def _describe(name: str, causal_lm: Any, step: Step) -> Model:
    adapters = sum(p.numel() for p in causal_lm.parameters() if p.requires_grad) if step.lora_r else 0
    parameters = sum(p.numel() for p in causal_lm.parameters()) - adapters
    base = causal_lm.get_base_model() if step.lora_r else causal_lm
    head, embedding = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    vocab, width = head.shape
    return Model(name, parameters, head.dtype.itemsize, vocab, width, adapters, head is embedding)


def build(config: Any, step: Step) -> Any:
    """Build the model of a step on the meta device, with LoRA on all linear layers if the step uses it."""
    import transformers

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, step.dtype))
    if model.get_output_embeddings() is None:
        raise ValueError(f"expected a causal LM with an LM head, got {type(model).__name__}")
    if not step.lora_r:
        return model
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ValueError("a plan with LoRA needs peft: pip install peft") from error
    lora = peft.LoraConfig(r=step.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, lora)
