"""Versions, devices, and which impl can run here: what `fusedalign env` prints."""

from __future__ import annotations

import platform
from typing import Any

import torch

import fusedalign
from fusedalign.commandline import fit, wrapped_table
from fusedalign.impls import explain
from fusedalign.impls.survey import auto_choices, coverage
from fusedalign.provenance import PACKAGES, versions
from fusedalign.reports import MISSING, package_version, text_table


def environment() -> dict[str, Any]:
    """Versions, platform, devices and verdicts on impls; nothing of the user's files or environment variables."""
    return {
        "fusedalign": fusedalign.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": _nccl(),
        },
        "packages": {name: package_version(name) for name in PACKAGES},
        "devices": [_device(i) for i in range(torch.cuda.device_count())],
        "driver": _driver(),
        "impls": [
            {
                "impl": verdict.impl,
                "available": verdict.reason is None,
                "reason": verdict.reason,
                "auto": verdict.auto,
                "package": verdict.package,
                "caveat": verdict.caveat,
            }
            for verdict in explain()
        ],
        "auto": auto_choices(),
    }


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def _driver() -> str | None:
    """The version of CUDA that the driver supports; None: no driver, or a build of torch that cannot ask."""
    version = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0
    return f"CUDA {version // 1000}.{version % 1000 // 10}" if version else None


def _nccl() -> str | None:
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except (AttributeError, RuntimeError):  # a build without CUDA
        return None


def environment_text() -> str:
    """The environment as text of `WIDTH` columns, with what each impl serves."""
    rows = [(name, version or MISSING) for name, version in versions().items()]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = [*text_table([*rows, ("CUDA devices", ", ".join(devices) or "none")]), ""]
    table: list[tuple[str, ...]] = [("impl", "here", "auto", "version", "devices", "dtypes", "exact in")]
    notes: list[tuple[str, str]] = []
    for verdict in explain():
        version = (package_version(verdict.package) or MISSING) if verdict.package else "-"
        row = [verdict.impl, "no" if verdict.reason else "yes", "yes" if verdict.auto else "no", version]
        *served, outputs, head, caveats = coverage(verdict.impl) if verdict.reason is None else [[]] * 6
        table.append((*row, *(" ".join(words) or "-" for words in served)))
        notes.append((verdict.impl, verdict.reason or verdict.about))
        notes += [
            ("", f"{title}: {' '.join(words)}") for title, words in (("outputs", outputs), ("head", head)) if words
        ]
        notes += [("", f"not exact: {caveat}") for caveat in caveats]
    lines += [*text_table(table), "", *wrapped_table(notes), ""]
    chosen = ", ".join(f"{impl} in {' '.join(dtypes)}" for impl, dtypes in auto_choices().items())
    return "\n".join([*lines, fit(f"recommended here: impl='auto', which takes {chosen}")])
