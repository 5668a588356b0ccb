"""Read the LM head of a Hugging Face model: what turns its hidden states into logits, without calling it.

Configurations keep names that the forward of their family never reads (Aya Vision's text model has a `logit_scale`
that the vision model leaves out), so a name counts only where the forward that calls the head mentions it. What cannot
be read with certainty is refused.

Adapters on the head become further parts of its weight, with further columns of hidden states: no merged weight is
made, and no gradient of the head's size.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedalign.checks import check_plain, is_ordinary, is_row_sharded
from fusedalign.problem import operand_dtype

#: Every configuration name of a transform of the logits, and the transform.
_TRANSFORMS = {
    "final_logit_softcapping": "softcap",  # Gemma 2 and later, NanoChat, Muse
    "logits_soft_cap": "softcap",  # RecurrentGemma
    "output_logit_soft_cap": "softcap",  # xLSTM
    "logit_scale": "logits *",  # Cohere
    "output_multiplier": "logits *",  # Muse
    "lm_head_multiplier": "logits *",  # Falcon-H1
    "logits_scaling": "by family",  # the only name that families use in opposite ways, see below
    "logits_mup_width_multiplier": "hidden /",  # Inkling
    "unpadded_vocab_size": "vocabulary",  # Inkling drops the columns beyond it
}
#: `logits_scaling`, by the start of the model type.
_LOGITS_SCALING = {"granite": "logits /", "hyperclovax": "logits *", "minicpm3": "hidden /"}

#: Model types that compute more than a head, in a way that shows in no name.
_REFUSED = {
    "chameleon": "its forward overwrites the logits of image tokens",
    "prophetnet": "its logits come from an n-gram stream, not from the last hidden state",
}

#: What a forward mentions when it does something to logits, ...
_SUSPECT = re.compile(r"logit|soft_?cap|tanh|multiplier|mup|scal|dim_model_base|finfo|temperature|padded_vocab")
#: ... unless it is one of these, ...
_HARMLESS = re.compile(r"logits|skip_logits|shift_logits|\w*logits_to_keep|\w*router_logits|\w+_with_logits")
#: ... or the helpers of a softcap that is known.
_SOFTCAP_HELPERS = {"tanh", "soft_cap"}
#: Configuration names with "logit" in them that are not about the LM head.
_NOT_THE_HEAD = re.compile(r"to_keep|att(e)?n|router|moe|_init_value|ratio|time_logit")

#: (hidden [..., D], operand dtype) -> the columns that an adapter's part of the head multiplies.
Adapter = Callable[[Tensor, torch.dtype], Tensor]
#: The parts of a linear head, its bias, and for each part but the first its columns.
_Linear = tuple[tuple[Tensor, ...], "Tensor | None", tuple[Adapter, ...]]

_MISSING = object()
_USE_INSTEAD = "use LoRA (also use_rslora=True), trainable_token_indices or modules_to_save for the head"
_CANNOT = "expected logits that weight, bias, scale and softcap describe"


class LMHead(NamedTuple):
    """The head of a model, as arguments of `linear_logps` and `linear_cross_entropy`.

    logits = softcap * tanh(scale * (expand(hidden) @ weight.T + bias) / softcap); no tanh where softcap is None.
    `hidden` is the last hidden state that the backbone returns. These arguments fit every head::

        head.expand(hidden), head.weight, targets, bias=head.bias, scale=head.scale, softcap=head.softcap
    """

    weight: Tensor | tuple[Tensor, ...]
    """[V, D]; the model's own parameter, shared with the embedding where they are tied. With adapters on the head, this
    and a thin part for each of them"""
    bias: Tensor | None = None
    """[V]; the model's own parameter, or the sum of it and those of adapters"""
    scale: float = 1.0
    """factor of the raw logits"""
    softcap: float | None = None
    """> 0, or None"""
    adapters: tuple[Adapter, ...] = ()
    """of each further part of `weight`, its columns of hidden"""

    def expand(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., D] with the columns that the further parts of `weight` multiply: itself where there are none.

        Call it within autocast where the model runs so, once a step: an adapter's dropout is drawn here.
        """
        if not self.adapters:
            return hidden
        dtype = operand_dtype(hidden, self.weight[0])
        return torch.cat([hidden, *(adapter(hidden, dtype).to(dtype) for adapter in self.adapters)], -1)


def lm_head(model: nn.Module) -> LMHead:
    """The head of `model` as it is now: adapters, FSDP and users replace heads, so ask again at every step.

    `model` is a causal LM of transformers, text or vision, bare or inside of DDP, FSDP, DeepSpeed, `torch.compile` or
    PEFT. Of PEFT's adapters on the head, LoRA (also rank-stabilised, with a bias, several at once),
    `trainable_token_indices` and `modules_to_save` are read in their present state: which are active, disabled, merged
    or in training. As in PEFT's own forward, a merged adapter that is disabled is taken out of the weight again.
    Forward hooks on the head are not looked at.

    Prompt learning leaves the head alone, but puts virtual tokens before the sequence: the last hidden states are as
    many longer than the labels, so align them from the right.

    Raises:
        TypeError: `model` is not a decoder-only causal LM with a linear head: encoder-decoder models, quantised heads,
            heads with any other adapter (DoRA, AdaLoRA, IA3, VeRA, ..., `adapter_names` for mixed batches), layers
            between backbone and head.
        ValueError: its forward or its configuration transforms the logits in a way that `LMHead` cannot express.
    """
    outer = _unwrap(model)
    head = outer.get_output_embeddings()
    if head is None:
        raise TypeError(f"expected a causal LM with output embeddings, got {_name(outer)}, which has none")
    _refuse_encoder_decoder(outer)
    owner, attribute = _owner(outer, head)
    _refuse_encoder_decoder(owner)
    model_type = getattr(owner.config, "model_type", "")
    if model_type in _REFUSED:
        raise ValueError(f"{_CANNOT}, got {_name(owner)}: {_REFUSED[model_type]}")

    names = _forward_names(type(owner))
    if attribute not in names:
        raise TypeError(f"expected the forward of {_name(owner)} to call self.{attribute}, but it does not mention it")
    layers = sorted(names & owner._modules.keys() - {attribute})
    if len(layers) > 1:
        raise TypeError(
            f"expected {_name(owner)} to have one backbone below self.{attribute}, its forward uses {layers}"
        )

    plain = layer_head(head, f"{_name(owner)}.{attribute}")
    vocab = len(plain.weight if isinstance(plain.weight, Tensor) else plain.weight[0])
    backbone = owner._modules[layers[0]] if layers else None
    scale, softcap = _transforms(owner, backbone, names, vocab=vocab, has_bias=plain.bias is not None)
    if outer is not owner:  # its forward returns the inner model's logits: it must leave them alone
        _refuse_unknown(outer, _forward_names(type(outer)), set())
    return plain._replace(scale=scale, softcap=softcap)


def layer_head(layer: nn.Module, name: str = "output_embeddings") -> LMHead:
    """The head of a layer alone, without the transforms of its model; `name` is for errors.

    Raises:
        TypeError: as `lm_head`, for what the layer is.
    """
    weight, bias, adapters = _linear(layer, name)
    return LMHead(weight if adapters else weight[0], bias, adapters=adapters)


def _unwrap(model: Any) -> Any:
    """`model` without DDP, FSDP, DeepSpeed, torch.compile and PEFT, down to the class that defines a head."""
    outermost = _name(model)
    while not hasattr(type(model), "get_output_embeddings"):
        if hasattr(type(model), "get_base_model"):
            model = model.get_base_model()
            continue
        inside = [getattr(model, name, None) for name in ("module", "_orig_mod")]
        model = next((module for module in inside if isinstance(module, nn.Module)), None)
        if model is None:
            raise TypeError(f"expected a causal LM with get_output_embeddings(), got {outermost}")
    return model


def _owner(model: Any, head: nn.Module) -> tuple[Any, str]:
    """The module that holds `head`, and under which name: some vision models keep a whole causal LM inside."""
    for parent in model.modules():  # the model itself comes first, so this is short for nearly all
        for name, child in parent._modules.items():
            if child is head:
                if hasattr(type(parent), "get_output_embeddings") and hasattr(parent, "config"):
                    return parent, name
                raise TypeError(f"expected the head to sit in a causal LM itself, got one inside {_name(parent)}")
    raise TypeError(f"expected the output embeddings to be a layer of {_name(model)}, got {_name(head)} from elsewhere")


def _linear(head: Any, where: str) -> _Linear:
    """The linear function of `head`; PEFT's layers are resolved."""
    for hook in getattr(head, "_forward_pre_hooks", {}).values():  # PEFT has them while its forward runs
        if "adapter_names" in getattr(hook, "keywords", ()):
            raise TypeError(f"expected the same adapters for all of a batch in {where}, got adapter_names")
    head = active_copy(head)
    layer = getattr(head, "token_adapter", head)  # in PEFT's wrapper for trainable_token_indices
    if _computes_as(layer, "peft.tuners.lora.layer", "Linear"):
        return _with_lora(layer, where)
    if _computes_as(layer, "peft.tuners.trainable_tokens.layer", "TrainableTokensLayer"):
        return _with_tokens(layer, where)
    wrapped = hasattr(head, "_hf_hook") or _is_tensor_parallel(head)  # accelerate's hooks only move tensors
    own_forward = "forward" in vars(head) and not wrapped
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or own_forward:
        got = f"{type(head).__module__}.{_name(head)}" + (" with a forward of its own" if own_forward else "")
        use = f"; {_USE_INSTEAD}" if got.startswith("peft.") else ""
        raise TypeError(f"expected {where} to be a plain nn.Linear, got {got}{use}")
    _check_tensor(head.weight, f"weight of {where}")
    if head.bias is not None:
        _check_tensor(head.bias, f"bias of {where}")
    return (head.weight,), head.bias, ()


def active_copy(head: Any) -> Any:
    """The layer that wrappers of checkpointing and of PEFT's `modules_to_save` call; another layer itself."""
    head = getattr(head, "_checkpoint_wrapped_module", head)
    copies = getattr(head, "modules_to_save", None)
    if not (isinstance(copies, nn.ModuleDict) and hasattr(head, "original_module")):
        return head
    active = list(head.active_adapters)
    use_copy = active and not head.disable_adapters and all(adapter in copies for adapter in active)
    return copies[active[0]] if use_copy else head.original_module


def _is_tensor_parallel(head: Any) -> bool:
    """Whether transformers has sharded the rows of a layer (`tp_plan`), whose forward it then wraps."""
    module = getattr(vars(head).get("forward"), "__module__", None) or ""
    return module.startswith("transformers.distributed.") and is_row_sharded(head.weight)


def _check_tensor(tensor: Tensor, what: str) -> None:
    if not is_row_sharded(tensor):  # which `linear_logps` takes
        check_plain(**{what: tensor})
    if not (is_row_sharded(tensor) or is_ordinary(tensor)) or tensor.dtype not in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        got = f"{type(tensor).__name__} of {tensor.dtype}"
        raise TypeError(f"expected the {what} to be a floating-point tensor, got {got}")


def _computes_as(layer: Any, module: str, name: str) -> bool:
    """Whether `layer` is one of PEFT's classes, or of a subclass that forwards as it does; PEFT is not imported."""
    base = next((c for c in type(layer).__mro__ if (c.__module__, c.__name__) == (module, name)), None)
    return base is not None and type(layer).forward is base.forward and "forward" not in vars(layer)  # type: ignore[attr-defined]


def _active(layer: Any) -> list[str]:
    """The adapters that a PEFT layer adds to its base layer in its forward."""
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    return [] if layer.disable_adapters or layer.merged else list(layer.active_adapters)


def _with_lora(layer: Any, where: str) -> _Linear:
    """The base weight, B1, B2, ...; B1 multiplies scaling * A1(dropout(hidden))."""
    weight, bias, adapters = _linear(layer.base_layer, where)
    for name in _active(layer):
        if name not in layer.lora_A:
            continue
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None or layer.use_dora.get(name):
            kind = _name(variant) if variant is not None else "DoRA"
            raise TypeError(f"expected {where} to have plain LoRA, got {kind} in adapter {name!r}; {_USE_INSTEAD}")
        b = layer.lora_B[name]
        _check_tensor(b.weight, f"lora_B of {where}")
        weight, adapters = (*weight, b.weight), (*adapters, functools.partial(_lora_columns, layer, name))
        if b.bias is not None:
            b_bias = layer.scaling[name] * b.bias
            bias = b_bias if bias is None else bias + b_bias
    return weight, bias, adapters


def _lora_columns(layer: Any, name: str, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    a = layer.lora_A[name]
    if getattr(layer, "cast_input_dtype_enabled", True):
        hidden = hidden.to(a.weight.dtype)
    return layer.scaling[name] * a(layer.lora_dropout[name](hidden))


def _with_tokens(layer: Any, where: str) -> _Linear:
    """The base weight and a selection matrix, which adds hidden @ (rows - weight[index]).T to the retrained tokens."""
    weight, bias, adapters = _linear(layer.base_layer, where)
    names = [name for name in _active(layer) if name in layer.token_indices]
    indices = [i for name in names for i in layer.token_indices[name]]
    if not indices:
        return weight, bias, adapters
    if adapters:
        raise TypeError(f"expected a plain nn.Linear below the trainable tokens of {where}, got one with an adapter")
    if bias is not None:
        raise TypeError(f"expected {where} to have no bias below trainable tokens: PEFT's forward leaves it out")
    if len(set(indices)) < len(indices):
        raise ValueError(f"expected trainable tokens that differ in {where}, got some of {sorted(indices)} twice")
    rows = [layer.trainable_tokens_delta[name] for name in names]
    index = torch.tensor(indices, device=weight[0].device)
    # Two columns for each token: one half-precision number for a logit would be off by 2**-9. Products are fast with
    # multiples of 8 columns.
    width = -(-2 * len(indices) // 8) * 8
    selection = weight[0].new_zeros(len(weight[0]), width)
    selection[torch.cat([index, index]), torch.arange(2 * len(indices), device=index.device)] = 1
    adapters = (functools.partial(_token_columns, weight[0], index, rows, width),)
    return (*weight, selection), bias, adapters


def _token_columns(
    weight: Tensor, index: Tensor, rows: list[Tensor], width: int, hidden: Tensor, dtype: torch.dtype
) -> Tensor:
    fp32 = torch.promote_types(dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        # Both are rounded as operands of the product are; their difference is not.
        retrained = torch.cat([x.to(weight.dtype).to(dtype) for x in rows]).to(fp32)
        z = nn.functional.linear(hidden.to(dtype).to(fp32), retrained - weight[index].to(dtype).to(fp32))
    high = z.to(dtype)
    low = (z - high).detach().to(dtype)  # the gradient of one of them is that of z
    return torch.cat([high, low, z.new_zeros(*z.shape[:-1], width - 2 * len(index))], -1)


def _transforms(
    owner: Any, backbone: Any, names: set[str], *, vocab: int, has_bias: bool
) -> tuple[float, float | None]:
    """Scale and softcap that the forward of `owner` applies, as the model has them now."""
    config = _config(owner, text=bool(names & {"text_config", "get_text_config"}))
    scale, softcap = 1.0, None
    for name in sorted(names & _TRANSFORMS.keys()):
        values = (getattr(holder, name, _MISSING) for holder in (owner, backbone, config))
        value = next((v for v in values if v is not _MISSING), None if "getattr" in names else _MISSING)
        transform = _TRANSFORMS[name]
        if transform == "by family":
            family = str(getattr(owner.config, "model_type", ""))
            transform = next((t for start, t in _LOGITS_SCALING.items() if family.startswith(start)), "")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            got = "nothing" if value is _MISSING else repr(value)
            raise ValueError(f"expected {name} of {_name(owner)} to be a finite number or None, got {got}")
        if transform == "softcap" and value > 0 and softcap is None:
            softcap = float(value)
        elif transform == "logits *":
            scale *= value
        elif (transform == "logits /" or (transform == "hidden /" and not has_bias)) and value != 0:
            scale /= value
        elif transform != "vocabulary" or value < vocab:  # also a softcap of 0, a division by 0, a second cap
            raise ValueError(f"{_CANNOT}, got {_name(owner)} with {name}={value}")
    read = names & _TRANSFORMS.keys()
    helpers = _SOFTCAP_HELPERS if any(_TRANSFORMS[name] == "softcap" for name in read) else set()
    _refuse_unknown(owner, names, read | helpers)
    return float(scale), softcap


def _refuse_encoder_decoder(model: Any) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(f"expected a decoder-only causal LM, got the encoder-decoder {_name(model)}")


def _refuse_unknown(model: Any, names: set[str], known: set[str]) -> None:
    """Refuse what may change the logits beyond `known`, in the names of the forward and in the configuration."""
    for name in sorted(names - known):
        if _SUSPECT.search(name) and not _HARMLESS.fullmatch(name):
            raise ValueError(f"expected a known transform of the logits, the forward of {_name(model)} uses {name!r}")
    # transformers' own forwards leave known names unread on purpose; in others a helper may read them for the forward
    module = inspect.unwrap(type(model).forward).__module__
    unread: set[str] = set() if module.startswith("transformers.models.") else _TRANSFORMS.keys() - known
    for config in (model.config, _config(model, text=True)):
        for name, value in vars(config).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and value not in (0, 1)
            unknown = "logit" in name and name not in _TRANSFORMS and not _NOT_THE_HEAD.search(name)
            if number and (unknown or name in unread):
                raise ValueError(
                    f"expected logit transforms that the forward reads, {_name(config)} has {name}={value}"
                )


def _config(model: Any, *, text: bool) -> Any:
    get_text_config = getattr(model.config, "get_text_config", None)
    return get_text_config(decoder=True) if text and get_text_config is not None else model.config


def _forward_names(cls: type) -> set[str]:
    """Attributes and globals that the forward of `cls` mentions, with those of the forwards it reaches by super().

    Those of the class, not of the instance: accelerate, TRL and others wrap an instance's forward without changing the
    logits.
    """
    names: set[str] = set()
    for base in cls.__mro__:
        if "forward" in vars(base):
            code = getattr(inspect.unwrap(vars(base)["forward"]), "__code__", None)
            names |= _code_names(code) if code is not None else set()
            if "super" not in names:
                break
    return names


@functools.lru_cache(maxsize=64)
def _code_names(code: CodeType) -> frozenset[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a comprehension or an inner function
            names |= _code_names(constant)
        elif isinstance(constant, str) and constant.isidentifier():  # getattr(config, "name")
            names.add(constant)
    return frozenset(names)


def _name(thing: object) -> str:
    return type(thing).__name__
