"""What this package can do with a model: `fusedalign support --model_name_or_path M`, and docs/models.md.

There is no list of models: a small copy with random weights is built from the configuration, its log-probabilities are
compared with those of its full logits, and packed batches and Liger Kernel's layers are tried.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedalign.head import LMHead, lm_head
from fusedalign.packing.model import head_logps
from fusedalign.packing.proof import twin
from fusedalign.reports import MISSING, package_version, text_table
from fusedalign.score.batch import packing_refusal

#: Standard deviation of an examined model's logits, large enough for a softcap that is missed to show.
_LOGITS_STD = 5.0


class HeadSupport(NamedTuple):
    """The LM head as `lm_head` reads it, and the log-probabilities from it."""

    tied: bool
    """whether its weight is that of the input embeddings"""
    bias: bool
    scale: float
    softcap: float | None
    difference: float
    """the largest difference of a log-probability from that of the model's full logits, in nats"""


class ModelSupport(NamedTuple):
    """What this package can do with a model; a text in the place of a result is the reason for a refusal."""

    model: str
    """name of the class"""
    head: HeadSupport | str
    packed: str | None
    """why its batches stay padded; None: they run packed"""
    liger: tuple[str, ...] | str
    """Liger Kernel's classes and functions that `liger_kernels=True` puts into the model"""


def examine(model: Any) -> ModelSupport:
    """Try everything on a causal LM of transformers that was built for this alone, on any device.

    The model's head is drawn anew. Liger's kernels stay in its layers and in transformers' module of its architecture;
    they are not run, so no GPU is needed.
    """
    return ModelSupport(type(model).__name__, head_support(model), packing_refusal(model), liger_support(model))


def head_support(model: Any) -> HeadSupport | str:
    """Read the head of a model, draw it anew, and compare log-probabilities with those of the model's full logits."""
    model.eval()
    try:
        head = lm_head(model)
    except (TypeError, ValueError) as error:
        return str(error)
    if model.base_model is model:
        return f"{type(model).__name__} has no base_model that is its backbone"
    weight = head.weight if isinstance(head.weight, Tensor) else head.weight[0]
    with torch.no_grad():
        weight.normal_(std=_LOGITS_STD / math.sqrt(weight.shape[-1]))
        if head.bias is not None:
            head.bias.normal_()
        difference = _difference(model, head, len(weight))
    tied = weight is model.get_input_embeddings().weight
    return HeadSupport(tied, head.bias is not None, head.scale, head.softcap, difference)


def _difference(model: Any, head: LMHead, vocab: int) -> float:
    ids = torch.randint(vocab, (2, 24), generator=torch.Generator().manual_seed(0)).to(model.device)
    targets = ids[:, 1:]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
    expected = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    logps = head_logps(head, head.expand(hidden), targets).logps
    return float((logps - expected).abs().max())


def liger_support(model: Any) -> tuple[str, ...] | str:
    """Put Liger's kernels into a model; returns their names, or why they are refused."""
    if package_version("liger-kernel") is None:
        return f"liger-kernel is {MISSING}"
    from fusedalign.trl.kernels import add_liger_kernels, liger_parts

    try:
        add_liger_kernels(model)
    except ValueError as error:
        return str(error).partition(": leave it out")[0]
    return tuple(sorted({name.rpartition(".")[2] for name in liger_parts(model)} - {"forward"}))


def small_model(config: Any) -> Any:
    """A model on the CPU with random fp32 weights, the first layers of a configuration, and few tokens.

    Raises:
        LayoutError: the class cannot be built from such a configuration.
    """
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return twin(model, torch.device("cpu"))


def render(support: ModelSupport) -> str:
    """A table of two columns."""
    rows = [("model", support.model)]
    if isinstance(support.head, str):
        rows.append(("head", f"no: {support.head}"))
    else:
        rows += [
            ("head", "tied to the embeddings" if support.head.tied else "not tied"),
            ("bias", "yes" if support.head.bias else "no"),
            ("scale", f"{support.head.scale:g}"),
            ("softcap", "none" if support.head.softcap is None else f"{support.head.softcap:g}"),
            ("logps, from full logits", f"at most {support.head.difference:.0e} nats apart (fp32)"),
        ]
    liger = f"no: {support.liger}" if isinstance(support.liger, str) else ", ".join(support.liger)
    rows += [("packed batches", "yes" if support.packed is None else f"no: {support.packed}"), ("Liger kernels", liger)]
    return "\n".join(text_table(rows))
