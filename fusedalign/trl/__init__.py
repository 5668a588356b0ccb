"""fusedalign in Hugging Face TRL's trainers; the only place that imports TRL."""

from fusedalign.trl.attachment import attach, detach

__all__ = ["attach", "detach"]
