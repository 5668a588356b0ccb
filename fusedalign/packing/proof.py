"""The proof that a model can run packed: checks of its configuration, then a few tokens in both layouts.

There is no list of models. The configuration shows for instance layers that carry a state along the row; then a few
tokens run in the padded and in the packed layout, and hidden states and gradients must agree up to rounding. The
tolerance is measured on the model: a multiple of the change when its input embeddings are perturbed by one rounding
error.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedalign.packing.attention import (
    PROOF_WINDOW,
    Layout,
    LayoutError,
    LayoutMismatchError,
    install,
    installed,
    observation,
    varlen_attention,
)
from fusedalign.packing.backbone import embeddings_device, packed_output, unmasked_arguments
from fusedalign.packing.batch import PackedBatch, RightPadded, pack_padded

#: Tolerances, in multiples of the change by one rounding error of the input embeddings. In bf16 on an H100 the hidden
#: states of a Qwen3 with 28 layers differ by a third of that change; gradients, which pass the layers twice, by up to
#: twice that change in small models of 13 families on a CPU.
_ALLOWANCE = 4.0
_GRADIENT_ALLOWANCE = 8.0

#: Largest vocabulary of a twin.
_TWIN_TOKENS = 128


class Proof(NamedTuple):
    """The result of a comparison of two layouts."""

    difference: float
    """of hidden states, relative to their size"""
    allowed: float
    gradient_difference: float
    """of projections of the parameters' gradients, relative to their size; 0 if no parameter is trained"""
    gradient_allowed: float
    by_segments: bool
    """whether attention ran one segment at a time, without a kernel for packed batches"""


def enable(model: Any, *, training: bool = True) -> Proof:
    """Let a causal LM of transformers run packed batches, if a comparison proves that it computes the same.

    Its attention function is replaced, see `attention.install`; without a packed batch the original runs.

    Args:
        model: not the `PeftModel` around it; adapters in its layers do not matter.
        training: False for a model that only runs forward in eval mode: gradients are not compared, dropout is allowed.

    Returns:
        The numbers of the proof.

    Raises:
        LayoutError: its results would be wrong, with the reason; the model is then unchanged.
    """
    return _enable(model, refusal(model), lambda rows: pack_padded(*rows, groups=2), training)


def enable_unmasked(model: Any) -> Proof:
    """Let a causal LM of transformers run right-padded rows without an attention mask, after the same proof.

    Args, Returns and Raises: as `enable`.
    """
    reason = _structure(model)
    if reason is None and not str(model.config._attn_implementation).endswith("sdpa"):
        reason = f"{model.config._attn_implementation} attention has its own way with masks"
    return _enable(model, reason, lambda rows: RightPadded(), training=True)


def enable_sharded(model: Any, device: torch.device, *, unmasked: bool = False) -> Proof:
    """As `enable` or `enable_unmasked`, for a model with weights that are not whole on this rank.

    The proof runs on `twin(model, device)`.
    """
    small = twin(model, device)
    proof = (enable_unmasked if unmasked else enable)(small)
    if not installed(model):
        install(model)
    return proof


def twin(model: Any, device: torch.device) -> Any:
    """A small model of the same class and dtype with random weights on `device`.

    It has the first layers of the configuration, at least two and one of each kind, few tokens, and few experts, which
    act on each token alone.

    Raises:
        LayoutError: the class cannot be built from such a configuration.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or [None] * depth
    count = next((n for n in range(2, depth) if set(kinds[:n]) == set(kinds)), depth)
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth:  # one value for each layer
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    text.vocab_size = min(text.vocab_size, _TWIN_TOKENS)
    text.pad_token_id = None  # could be beyond the vocabulary
    _reduce_experts(text)
    parameters = list(model.parameters())
    trains = any(parameter.requires_grad for parameter in parameters)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            with torch.device(device), _default_dtype(parameters[0].dtype):  # never as a whole elsewhere
                small = type(model)(config).requires_grad_(trains)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise LayoutError(f"no small {type(model).__name__} can be built for the proof: {reason}") from error
    return small


def _reduce_experts(config: Any) -> None:
    """Leave twice as many experts as a token takes, and as many in each group as routing by groups needs."""
    taken = getattr(config, "num_experts_per_tok", None)
    groups, taken_groups = (getattr(config, name, None) or 1 for name in ("n_group", "topk_group"))
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        count = getattr(config, name, None)
        if isinstance(count, int) and isinstance(taken, int) and count % groups == 0:
            in_group = max(2, -(-2 * taken // groups), -(-taken // taken_groups))
            setattr(config, name, min(count, groups * in_group))


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _enable(model: Any, reason: str | None, lay_out: Callable[[_Rows], Layout], training: bool) -> Proof:
    if reason is None and any(parameter.is_meta for parameter in model.parameters()):
        reason = f"{type(model).__name__} has weights that are not in memory"
    if reason is not None:
        raise LayoutError(reason)
    original = None if installed(model) else install(model)
    try:
        rows = _padded_rows(model)
        return _compare(model, rows, lay_out(rows), training)
    except Exception as error:
        if original is not None:
            model.set_attn_implementation(original)
        if isinstance(error, (LayoutError, torch.OutOfMemoryError)):
            raise
        reason = str(error).split("\n")[0]
        raise LayoutError(f"{type(model).__name__} fails in it with {type(error).__name__}: {reason}") from error


def refusal(model: Any) -> str | None:
    """Why this model cannot run packed, as far as its configuration shows; None: no reason is known."""
    on_cuda = embeddings_device(model).type == "cuda"
    if on_cuda and varlen_attention() is None:
        return f"torch.nn.attention.varlen came with PyTorch 2.10, this is {torch.__version__}"
    return _structure(model)


def _structure(model: Any) -> str | None:
    name, config = type(model).__name__, model.config
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if config.is_encoder_decoder:
        return f"{name} is an encoder-decoder"
    if text is not config:
        return f"{name} takes more than text"
    if getattr(model, "_is_stateful", False):
        return f"{name} carries a state along the row, which would go from one row to the next"
    if kinds:
        return f"{name} has layers of kinds {', '.join(sorted(kinds))}, which are no plain attention"
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", "") == "alibi":
        return f"{name} has position biases in its attention (ALiBi)"
    if not getattr(model, "_can_set_attn_implementation", lambda: False)():
        return f"{name} has attention of its own, which takes no other function"
    return None


#: Two prompts of 4 and 3 tokens with two answers each, both chosen rows first; token ids, modulo the vocabulary's size.
_ROWS = (
    (11, 23, 5, 17, 31, 8, 40),
    (3, 29, 13, 37, 19, 2, 41, 7, 43),
    (11, 23, 5, 17, 47, 12, 53, 6, 59, 14),
    (3, 29, 13, 61, 21),
)


class _Rows(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor


def _padded_rows(model: Any) -> _Rows:
    embeddings = model.get_input_embeddings()
    device, vocab = embeddings.weight.device, model.config.get_text_config().vocab_size
    width = max(map(len, _ROWS)) + 1
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in _ROWS]) % vocab
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in _ROWS])
    return _Rows(ids.to(device), mask.to(device))


class _Measurement(NamedTuple):
    hidden: Tensor
    """[tokens, D] of the real tokens"""
    gradients: Tensor
    """projections of the gradients of all trained parameters, see `_gradient_projections`"""
    windows: set[tuple[int | None, bool]]


def _compare(model: Any, rows: _Rows, layout: Layout, training: bool) -> Proof:
    """Compare a layout with the padded one; raises LayoutError, with the numbers, where they differ."""
    expected = _windows(model)
    # Compiled layers are observed too: they run eagerly here.
    with _undisturbed(model), _narrow_windows(model), torch.compiler.set_stance("force_eager"):
        model.eval()
        padded, candidate = _measure(model, rows, None, training), _measure(model, rows, layout, training)
        with _rounded_embeddings(model, _unit(model, padded.hidden)):
            rounded = _measure(model, rows, None, training)
        narrow = _windows(model)
    windows = {window for window, _ in candidate.windows}
    if windows not in (expected, narrow):  # layers keep their window, or read the configuration in each call
        raise LayoutError(
            f"{type(model).__name__} should ask its attention for windows of {expected}, but asked for {windows}"
        )
    floor = _unit(model, padded.hidden)
    proof = Proof(
        _distance(candidate.hidden, padded.hidden),
        _ALLOWANCE * _distance(rounded.hidden, padded.hidden) + floor,
        _distance(candidate.gradients, padded.gradients),
        _GRADIENT_ALLOWANCE * _distance(rounded.gradients, padded.gradients) + floor,
        any(by_segments for _, by_segments in candidate.windows),
    )
    agrees = proof.difference <= proof.allowed and proof.gradient_difference <= proof.gradient_allowed
    if not agrees:  # NaN too
        raise LayoutMismatchError(
            f"{type(model).__name__} does not come out as in the padded layout: hidden states differ by "
            f"{proof.difference:.1e} ({proof.allowed:.1e} is allowed), gradients by {proof.gradient_difference:.1e} "
            f"({proof.gradient_allowed:.1e})"
        )
    if training:
        with _undisturbed(model), torch.no_grad():  # only in training is dropout passed to attention
            model.train()
            _run(model, rows, layout)
    return proof


def _measure(model: Any, rows: _Rows, layout: Layout | None, training: bool) -> _Measurement:
    trained = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad and training]
    windows: set[tuple[int | None, bool]] = set()
    token = observation.set(windows)
    try:
        with torch.set_grad_enabled(bool(trained)), _gradient_projections(trained) as projections:
            hidden = _run(model, rows, layout)
            if trained:
                (hidden.float() * _direction(hidden.numel(), hidden.device).view_as(hidden)).sum().backward()
    finally:
        observation.reset(token)
    gradients = torch.cat([projections[i] for i in sorted(projections)]) if projections else torch.zeros(0)
    return _Measurement(hidden.detach().float(), gradients, windows)


def _run(model: Any, rows: _Rows, layout: Layout | None) -> Tensor:
    """[tokens, D]: hidden states of the real tokens, in the order of the padded layout."""
    valid = rows.attention_mask.bool()
    if isinstance(layout, PackedBatch):
        hidden: Tensor = packed_output(model, layout).last_hidden_state[0]
        return hidden[layout.token_index[layout.valid].to(hidden.device)]
    options: dict[str, Any] = {"attention_mask": rows.attention_mask}
    if layout is not None:
        options = unmasked_arguments(rows.input_ids, layout)
    hidden = model.base_model(input_ids=rows.input_ids, use_cache=False, **options).last_hidden_state
    return hidden[valid.to(hidden.device)]


def _direction(size: int, device: torch.device) -> Tensor:
    """[size]: weights of a sum that does not vanish by symmetry."""
    return torch.linspace(1.0, 7.0, size, device=device).sin()


def _windows(model: Any) -> set[int | None]:
    """The windows that the layers should pass to their attention."""
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return {window}
    return {window if kind == "sliding_attention" else None for kind in kinds}


def _unit(model: Any, hidden: Tensor) -> float:
    """The rounding error of the dtype that the model computes in."""
    device, dtype = hidden.device, next(model.parameters()).dtype
    if not dtype.is_floating_point:  # a quantised model
        dtype = hidden.dtype
    units = [torch.finfo(dtype).eps]
    if torch.is_autocast_enabled(device.type):
        units.append(torch.finfo(torch.get_autocast_dtype(device.type)).eps)
    if device.type == "cuda":
        units.append(2.0**-10)  # TF32, which fp32 products may use
    return max(units)


def _distance(x: Tensor, reference: Tensor) -> float:
    """The distance of two vectors, relative to the norm of the reference."""
    if not reference.numel():
        return 0.0
    size = torch.linalg.vector_norm(reference.double())
    return float(torch.linalg.vector_norm(x.double() - reference.double()) / size.clamp(min=1e-300))


@contextlib.contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Restore training modes and the state of the random generators on exit."""
    modes = {module: module.training for module in model.modules()}
    device = embeddings_device(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


@contextlib.contextmanager
def _gradient_projections(parameters: list[Any]) -> Iterator[dict[int, Tensor]]:
    """Collect one weighted sum of the rows of each parameter's gradient, and free the gradient at once.

    A norm would not depend on the positions of values in the gradient.
    """
    projections: dict[int, Tensor] = {}
    original_grads = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None

    def record(index: int) -> Callable[[Any], None]:
        def hook(parameter: Any) -> None:
            with torch.autocast(parameter.device.type, enabled=False):
                rows = parameter.grad.float().reshape(-1, parameter.shape[-1] if parameter.ndim else 1)
                projections[index] = (_direction(len(rows), rows.device) @ rows).cpu()
            parameter.grad = None

        return hook

    handles = [p.register_post_accumulate_grad_hook(record(i)) for i, p in enumerate(parameters)]
    try:
        yield projections
    finally:
        for handle in handles:
            handle.remove()
        for parameter, grad in zip(parameters, original_grads, strict=True):
            parameter.grad = grad


@contextlib.contextmanager
def _narrow_windows(model: Any) -> Iterator[None]:
    """Give masks a window that is narrower than the rows of the proof; attention narrows its own."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is None:
        yield
        return
    config.sliding_window = min(window, PROOF_WINDOW)
    try:
        yield
    finally:
        config.sliding_window = window


@contextlib.contextmanager
def _rounded_embeddings(model: Any, unit: float) -> Iterator[None]:
    """Perturb the input embeddings by one rounding error, up or down."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        signs = torch.ones_like(output.flatten())
        signs[::3] = -1.0
        signs[1::7] = -1.0
        return output * (1.0 + unit * signs.view_as(output))

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
