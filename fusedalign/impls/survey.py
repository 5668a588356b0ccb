"""What each impl serves on this machine, found by asking it about small problems: for `fusedalign env`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fusedalign.impls import Support, check, considered
from fusedalign.problem import OUTPUTS, Problem


class Coverage(NamedTuple):
    """What an impl serves on this machine, by its `supports` and `caveat`."""

    devices: list[str]
    dtypes: list[str]
    exact: list[str]
    """those of `dtypes` that have no caveat"""
    outputs: list[str]
    """in addition to logps, in any of these dtypes"""
    head: list[str]
    """those of bias, softcap and filter_eps that it serves"""
    caveats: list[str]
    """why some of `dtypes` are not exact"""


def coverage(name: str) -> Coverage:
    """What the impl serves on this machine."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    served: dict[str, dict[torch.dtype, Support]] = {}
    for device in devices:
        verdicts = {d: check(name, _probe(device, d)) for d in _DTYPES}
        if able := {d: v for d, v in verdicts.items() if v.reason is None}:
            served[device] = able

    def any_dtype(**options: Any) -> bool:
        return any(check(name, _probe(x, d, **options)).reason is None for x in served for d in served[x])

    best = next(iter(served.values()), {})
    heads: dict[str, Any] = {"bias": {"bias": True}, "softcap": {"softcap": 1.0}, "filter_eps": {"filter_eps": 1e-4}}
    return Coverage(
        list(served),
        [_name(d) for d in best],
        [_name(d) for d, v in best.items() if v.caveat is None],
        [output for output in OUTPUTS if any_dtype(outputs=frozenset([output]))],
        [name for name, options in heads.items() if any_dtype(**options)],
        list(dict.fromkeys(v.caveat for v in best.values() if v.caveat is not None)),
    )


def auto_choices() -> dict[str, list[str]]:
    """The impls that "auto" takes on this machine's GPU, else on its CPU, each with the dtypes that it takes it for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen: dict[str, list[str]] = {}
    for dtype in _DTYPES:
        verdicts = (check(name, _probe(device, dtype), caveat_first=True) for name in considered())
        fit = (v.impl for v in verdicts if v.auto and v.reason is None and v.caveat is None)
        chosen.setdefault(next(fit, "none"), []).append(_name(dtype))
    return chosen


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _name(dtype: torch.dtype) -> str:
    return {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _probe(device: str, dtype: torch.dtype, *, bias: bool = False, **options: Any) -> Problem:
    """A problem of one token and a trained head."""
    one = torch.zeros(1, 1, device=device, dtype=dtype).requires_grad_()
    targets = torch.zeros(1, device=device, dtype=torch.int64)
    return Problem(one, one, targets, dtype, bias=one[0] if bias else None, **options)
