"""A model for the lm-evaluation-harness, `fusedalign`: its `hf` model without logits, on packed batches.

Importing this package registers the name. `python -m fusedalign.harness` is the command `lm_eval` with it registered.
"""

try:
    import lm_eval
except ImportError as error:
    raise ImportError(
        "fusedalign.harness needs the lm-evaluation-harness: pip install 'fusedalign[harness]'"
    ) from error

from fusedalign.harness.model import FusedLM

del lm_eval
__all__ = ["FusedLM"]
