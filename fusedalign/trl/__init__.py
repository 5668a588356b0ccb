"""The adapters to Hugging Face TRL; the only room that imports it.

The trainers here are the `__all__` of `trainers` and `experimental`.
"""

from typing import TYPE_CHECKING, Any

from fusedalign.methods import TRAINERS
from fusedalign.trl.attachment import attach as attach
from fusedalign.trl.attachment import detach as detach
from fusedalign.trl.options import HeadOptions as HeadOptions
from fusedalign.trl.trainers import *  # noqa: F403

if TYPE_CHECKING:
    from fusedalign.trl.experimental import *  # noqa: F403

__all__ = ["HeadOptions", "attach", "detach", *(f"Fused{name}" for name in TRAINERS)]


def __getattr__(name: str) -> Any:
    """The trainers of `trl.experimental`, which is slow to import, on first use."""
    if name in __all__:
        from fusedalign.trl import experimental

        return getattr(experimental, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
