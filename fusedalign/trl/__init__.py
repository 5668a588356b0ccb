"""The adapters to Hugging Face TRL; the only room that imports it.

The trainers here are the `__all__` of `trainers` and `experimental`. Names are imported on first use, so that the
command line reads `fields` and `help` without TRL.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fusedalign.methods import TRAINERS

if TYPE_CHECKING:
    from fusedalign.trl.attachment import attach as attach
    from fusedalign.trl.attachment import detach as detach
    from fusedalign.trl.experimental import *  # noqa: F403
    from fusedalign.trl.options import HeadOptions as HeadOptions
    from fusedalign.trl.trainers import *  # noqa: F403

__all__ = ["HeadOptions", "attach", "detach", *(f"Fused{name}" for name in TRAINERS)]

_MODULES = {"HeadOptions": "options", "attach": "attachment", "detach": "attachment"}


def __getattr__(name: str) -> Any:
    """A public name; the trainers of `trl.experimental`, which is slow to import, come last."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module_name in (_MODULES[name],) if name in _MODULES else ("trainers", "experimental"):
        module = importlib.import_module(f"{__name__}.{module_name}")
        if hasattr(module, name):
            globals()[name] = getattr(module, name)
            return globals()[name]
    raise AttributeError(f"{__name__} has no {name}")
