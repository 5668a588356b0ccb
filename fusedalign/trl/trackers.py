"""The trackers of `report_to`: whether their packages are installed, checked before model and data are loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from fusedalign.commandline import suggestion

#: Tracker -> the modules that it needs one of; the first is also the name of the package.
_MODULES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "dvclive": ("dvclive",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker that transformers does not know, or that is not installed."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted([*INTEGRATION_TO_CALLBACK, "all", "none"])
            raise ValueError(f"report_to must be among {', '.join(known)}, got {name!r}{suggestion(name, known)}")
        modules = _MODULES.get(name, ())
        if modules and not any(map(_is_installed, modules)):
            raise ValueError(
                f"report_to={name} needs a package that is not installed: pip install {modules[0]}, or leave it out "
                "(metrics.jsonl has every metric)"
            )


def _is_installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # else a folder of that name, which wandb leaves behind
