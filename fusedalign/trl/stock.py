"""The private names of TRL, transformers and accelerate that this package relies on; tested with TRL 1.15 and 1.16.

Other modules use TRL's through the imports and functions of this one, or override a method of `OVERRIDDEN`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import trl.trainer.utils as trl_utils
from transformers import ProcessorMixin
from trl.data_utils import maybe_apply_chat_template as maybe_apply_chat_template
from trl.data_utils import maybe_extract_prompt as maybe_extract_prompt
from trl.trainer.dpo_trainer import DataCollatorForPreference as DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference as DataCollatorForUnpairedPreference
from trl.trainer.sft_trainer import get_training_chat_template as get_training_chat_template
from trl.trainer.sft_trainer import has_generation_markers as has_generation_markers
from trl.trainer.utils import FusedCausalLMOutput as FusedCausalLMOutput
from trl.trainer.utils import create_model_from_path as create_model_from_path

#: Module -> its names, with what they are.
MODULE_NAMES = {
    "trl.trainer.utils": {
        "_ChunkedLogProbFunction": "autograd function of the fused head; None in TRL 1.15 without Triton",
        "_CHUNKED_LOGPROB_CHUNK_SIZE": "the chunk size that it is called with",
        "_use_triton": "whether ignored tokens are left out before the head, by device; since TRL 1.16",
    },
    "trl.trainer.dpo_trainer": {
        "add_fused_lm_head": "gives a model the forward with the fused head; in the modules of SFT and KTO too",
        "BaseTunerLayer": "PEFT's class, by which a head with an adapter is refused; in SFT's and KTO's too",
        "prepare_fsdp": "shards a reference model under FSDP; in KTO's too",
        "hash_module": "digest of the weights for a precomputed reference; in KTO's too",
        "global_then_local_main_first": "lets the main process prepare a data set first; in SFT's and KTO's too",
        "logger": "logger of the module; also in transformers.tokenization_utils_base",
    },
}
#: Attributes of TRL's trainers, set by their constructors.
ATTRIBUTES = {
    "_metrics": "mode -> name -> values until the next log",
    "_total_train_tokens": "tokens that all ranks have trained on",
    "_tp_size": "ranks of tensor parallelism, which see the same tokens",
    "_tokenizer": "the tokenizer, also where the processing class is a processor",
    "_is_vlm": "whether the processing class is a processor",
    "_precompute_model_hash": "key of the weights in the cache of a precomputed reference",
    "_name": "the trainer's name in the name of its configuration: DPO",
}
#: Methods of TRL's trainers, or of transformers' `Trainer`, that ours override.
OVERRIDDEN = {
    "_prepare_dataset": "tokenises a data set",
    "_compute_loss": "loss and metrics of a batch",
    "_precompute_ref_logps": "adds the columns of the reference to a data set",
    "_get_dataloader": "makes the data loader of a data set",
}
#: Module -> names in its source; those of transformers and accelerate are used where they are needed.
SOURCE_NAMES = {
    "trl.trainer.utils": {"_fused_forward": "the forward that add_fused_lm_head makes"},
    "transformers.configuration_utils": {"_attn_implementation": "name of the attention function"},
    "transformers.modeling_utils": {
        "_can_set_attn_implementation": "whether a model's attention function can be replaced",
        "_from_config": "builds a model from its configuration, without weights",
        "_is_stateful": "whether a model carries a state along the row",
    },
    "transformers.utils.hub": {
        "_raise_exceptions_for_gated_repo": "option of cached_file, as the next two",
        "_raise_exceptions_for_missing_entries": "",
        "_raise_exceptions_for_connection_errors": "",
    },
    "transformers.models.auto.auto_factory": {"_model_mapping": "configuration class -> model class"},
    "transformers.modeling_layers": {"_gradient_checkpointing_func": "function that checkpoints a layer"},
    "accelerate.accelerator": {"_original_forward": "a model's forward before mixed precision wrapped it"},
}


def fused_head() -> Any:
    """The autograd function that TRL's fused forward applies; None if there is none."""
    return getattr(trl_utils, "_ChunkedLogProbFunction", None)


def use_triton() -> Callable[[Any], bool] | None:
    """TRL's function that tells for a device whether to leave out ignored tokens before the head; None in TRL 1.15."""
    return getattr(trl_utils, "_use_triton", None)


def replace_fused_head(head: Any, triton: Callable[[Any], bool] | None = None) -> None:
    """Let TRL's fused forward apply `head` and, if given, ask `triton` instead of `use_triton()`."""
    names = vars(trl_utils)
    names["_ChunkedLogProbFunction"] = head
    if triton is not None:
        names["_use_triton"] = triton


def head_chunk_size() -> int | None:
    """The chunk size that TRL's fused forward passes to the head; None if it has none."""
    return getattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", None)


def is_fused_forward(function: Any) -> bool:
    """Whether `add_fused_lm_head` of TRL has made a forward; `functools.wraps` has replaced its `__name__`."""
    name = getattr(getattr(function, "__code__", None), "co_name", "")
    return name == "_fused_forward" and str(function.__globals__.get("__name__")).startswith("trl.")


def head_replacements(add_head: Callable[..., None]) -> dict[str, Any]:
    """For `construction.replaced`: `add_head(original, model, ...)` adds the head, with adapters or not."""
    return {"add_fused_lm_head": add_head, "BaseTunerLayer": lambda original, layer: False}


def reference_replacements(trainer: Any, load: Callable[..., Any], config: Callable[..., Any]) -> dict[str, Any]:
    """For `construction.replaced`: `load` and `config` make model and configuration, and no weights are hashed.

    Both are called with the original before its arguments.
    """
    return {"create_model_from_path": load, **hash_replacements(), f"{trainer._name}Config": config}


def hash_replacements() -> dict[str, Any]:
    """For `construction.replaced`: the weights are not hashed."""
    no_hash: Any = lambda original, module: None  # noqa: E731
    return {"hash_module": no_hash}


def sharding_replacements(shard: Callable[..., Any]) -> dict[str, Any]:
    """For `construction.replaced`: `shard(original, model, accelerator)` shards a reference model under FSDP."""
    return {"prepare_fsdp": shard}


def row_replacements(logger: Any) -> dict[str, Any]:
    """For `construction.replaced`: a row is prepared without a wait for other processes, and logged to `logger`."""
    # TRL's own logger needs the process state that such a wait sets up.
    return {"global_then_local_main_first": lambda original: contextlib.nullcontext(), "logger": logger}


def trainer_without_model(cls: Any, processing_class: Any) -> Any:
    """An instance of a trainer that has not been constructed and can only prepare data sets."""
    trainer = object.__new__(cls)
    trainer._is_vlm = isinstance(processing_class, ProcessorMixin)
    # Some tokenizers have an attribute `tokenizer` too, such as transformers' for mistral-common.
    trainer._tokenizer = processing_class.tokenizer if trainer._is_vlm else processing_class
    return trainer


def metrics(trainer: Any, mode: str) -> dict[str, list[float]]:
    """The metrics of "train" or "eval" since the last log; unknown names have an empty list."""
    values: dict[str, list[float]] = trainer._metrics[mode]
    return values


def count_train_tokens(trainer: Any, count: int) -> int:
    """Add `count` tokens, summed over ranks, to those trained on, and return the new total."""
    trainer._total_train_tokens += count // trainer._tp_size
    total: int = trainer._total_train_tokens
    return total


@contextlib.contextmanager
def extended_reference_key(trainer: Any, key: str) -> Iterator[None]:
    """Within this context TRL's cache of a precomputed reference depends on `key` too."""
    weights = trainer._precompute_model_hash
    trainer._precompute_model_hash = f"{weights}-{key}"
    try:
        yield
    finally:
        trainer._precompute_model_hash = weights
