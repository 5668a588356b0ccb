"""The machine that measures: its device, and the versions of what is compared. torch is imported when it is asked."""

from __future__ import annotations

import platform

import fusedalign
from fusedalign.reports import MISSING, package_version


def device_type() -> str:
    """cuda or cpu."""
    return "cuda" if gpu_count() else "cpu"


def gpu_count() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def machine(device: str) -> dict[str, str]:
    """The device, and the version of every package that is compared."""
    import torch

    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    facts = {"device": torch.cuda.get_device_name() if device == "cuda" else cpu, "torch": torch.__version__}
    facts["fusedalign"] = fusedalign.__version__
    packages = ("triton", "trl", "liger-kernel", "cut-cross-entropy")
    return facts | {name: package_version(name) or MISSING for name in packages}


def describe_machine(facts: dict[str, str]) -> str:
    """The facts of `machine` in one line."""
    return ", ".join(fact if name == "device" else f"{name} {fact}" for name, fact in facts.items())
