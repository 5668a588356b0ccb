"""fusedalign in Hugging Face TRL's trainers; the only place that imports TRL."""

from typing import TYPE_CHECKING, Any

from fusedalign.trl.attachment import attach, detach
from fusedalign.trl.options import HeadOptions
from fusedalign.trl.trainers import FusedDPOTrainer, FusedKTOTrainer, FusedSFTTrainer

if TYPE_CHECKING:
    from fusedalign.trl.experimental import FusedCPOTrainer, FusedORPOTrainer, FusedTPOTrainer

__all__ = [
    "FusedCPOTrainer",
    "FusedDPOTrainer",
    "FusedKTOTrainer",
    "FusedORPOTrainer",
    "FusedSFTTrainer",
    "FusedTPOTrainer",
    "HeadOptions",
    "attach",
    "detach",
]


def __getattr__(name: str) -> Any:
    """The trainers of `trl.experimental`, which is slow to import, when they are asked for."""
    if name in __all__:
        from fusedalign.trl import experimental

        return getattr(experimental, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
