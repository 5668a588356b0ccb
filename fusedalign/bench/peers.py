"""The rows of the benchmark: our impls, and one small function for each other implementation.

A library, torch too, is imported when its row is measured, so a missing or broken one affects only its own row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from fusedalign.bench.failures import in_short
from fusedalign.bench.tasks import TASKS
from fusedalign.commandline import suggestion
from fusedalign.impls import impl_names

if TYPE_CHECKING:
    from torch import Tensor

    from fusedalign.bench.data import Data


class UnavailableError(Exception):
    """A peer cannot run here; the message says what it needs."""


class Functions(NamedTuple):
    """The functions of an implementation."""

    logps: Callable[[Data], Tensor] | None
    """returns [N], differentiable with respect to hidden states and weight"""
    nll: Callable[[Data], Tensor] | None = None
    """returns the mean NLL; None: use the mean of `logps`"""


class Implementation(NamedTuple):
    """One row."""

    name: str
    load: Callable[[], Functions]
    """imports the library; may raise anything if that is missing or broken"""
    install: str = ""
    """the command that installs the library"""
    tasks: tuple[str, ...] = tuple(TASKS)
    softcap: bool = True
    """whether it supports a softcap"""
    ours: bool = False


def implementations() -> dict[str, Implementation]:
    """All rows by name: our impls, then the peers."""
    ours = [Implementation(name, fused(impl=name), ours=True) for name in impl_names("own")]
    # The scalar loss is the only task with a choice of workspace.
    least = Implementation("triton-256MiB", fused(impl="triton", workspace=256 * 2**20), tasks=("sft",), ours=True)
    return {x.name: x for x in (*ours, least, *PEERS)}


def choose(words: str) -> list[Implementation]:
    """Parse the value of `--impls`: "all", "ours" or comma-separated names; the result is in the order of the table.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    known = implementations()
    names: set[str] = set()
    for word in words.split(","):
        if word == "all":
            names |= known.keys()
        elif word == "ours":
            names |= {name for name, x in known.items() if x.ours}
        elif word in known:
            names.add(word)
        else:
            hint = suggestion(word, known)
            raise ValueError(f"impls must be among all, ours, {', '.join(known)}, got {word!r}{hint}")
    return [x for name, x in known.items() if name in names]


def fused(**options: Any) -> Callable[[], Functions]:
    """The functions of this package, with options of `linear_logps`."""

    def load() -> Functions:
        from fusedalign.ops import linear_cross_entropy, linear_logps

        def logps(d: Data) -> Tensor:
            return linear_logps(d.hidden, d.weight, d.targets, softcap=d.softcap, **options).logps

        def nll(d: Data) -> Tensor:
            return linear_cross_entropy(d.hidden, d.weight, d.targets, softcap=d.softcap, **options)

        return Functions(logps, nll)

    return load


def _eager() -> Functions:
    import torch.nn.functional as F

    from fusedalign.bench.data import capped

    def losses(d: Data, reduction: str) -> Tensor:
        logits = capped(F.linear(d.hidden, d.weight), d.softcap)
        return F.cross_entropy(logits.float(), d.targets, reduction=reduction)

    return Functions(lambda d: -losses(d, "none"), lambda d: losses(d, "mean"))


def _compile() -> Functions:
    import torch

    torch.compiler.reset()  # shapes of earlier tables would count against the recompilation limit
    functions: tuple[Any, ...] = _eager()
    return Functions(*(torch.compile(function, dynamic=False) for function in functions))


def _torch_fused() -> Functions:
    import torch
    import torch.nn.functional as F

    options_class = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options_class is None:
        raise UnavailableError(f"needs PyTorch 2.13's linear_cross_entropy, this is {torch.__version__}")
    # Without options it builds the logits.
    losses = functools.partial(F.linear_cross_entropy, options=options_class())
    return Functions(
        lambda d: -losses(d.hidden, d.weight, d.targets, reduction="none"),
        lambda d: losses(d.hidden, d.weight, d.targets),
    )


def _trl() -> Functions:
    from fusedalign.trl import stock

    function, columns = stock.fused_head(), stock.head_chunk_size()
    if function is None or columns is None:
        raise UnavailableError("needs TRL 1.16's fused head: pip install 'trl>=1.16'")

    def logps(d: Data) -> Tensor:
        return function.apply(d.hidden, d.weight, None, d.targets, 1.0, columns, d.softcap, 1.0, ("log_probs",))[0]

    return Functions(logps)


def _liger_fused() -> Functions:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    def nll(d: Data) -> Tensor:  # bias, class weights, ignore_index, z-loss, label smoothing, reduction, softcap
        return Function.apply(d.hidden, d.weight, d.targets, None, None, -100, 0.0, 0.0, "mean", d.softcap)[0]

    return Functions(None, nll)


def _liger_token() -> Functions:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    return Functions(lambda d: -Function.apply(d.hidden, d.weight, d.targets))


def _cce(*, exact: bool) -> Functions:
    from cut_cross_entropy import linear_cross_entropy as function

    options: dict[str, str | None] = {"impl": "cce_exact" if exact and _cce_has_exact() else "cce"}
    if exact and not _cce_has_exact():  # releases on PyPI lack the preset, but their filter can be turned off
        options["filter_eps"] = None

    def losses(d: Data, reduction: str) -> Tensor:
        return function(d.hidden, d.weight, d.targets, softcap=d.softcap, reduction=reduction, **options)

    return Functions(lambda d: -losses(d, "none"), lambda d: losses(d, "mean"))


def _cce_has_exact() -> bool:
    try:
        from cut_cross_entropy.cce_utils import CCEPresets
    except ImportError:
        return False
    return "cce_exact" in CCEPresets.names


_LIGER = "pip install 'liger-kernel>=0.8.5'"
_CCE = "pip install 'cut-cross-entropy @ git+https://github.com/apple/ml-cross-entropy.git'"

PEERS = (
    Implementation("eager", _eager),
    Implementation("compile", _compile),
    Implementation("torch-fused", _torch_fused, softcap=False),
    Implementation("trl", _trl, "pip install 'trl>=1.16'"),
    Implementation("liger-fused", _liger_fused, _LIGER, tasks=("sft",)),
    Implementation("liger-token", _liger_token, "pip install 'liger-kernel[cutedsl]>=0.8.5'", softcap=False),
    Implementation("cce", lambda: _cce(exact=False), _CCE),
    Implementation("cce-exact", lambda: _cce(exact=True), _CCE),
)


def reason(error: Exception, impl: Implementation) -> str:
    """Why an implementation has no figures, in one line."""
    if isinstance(error, UnavailableError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and impl.install:
        return f"not installed: {impl.install} (no module {error.name})"
    return in_short(error, named=not impl.ours)  # our own messages are full sentences
