"""A model for the lm-evaluation-harness, `fusedalign`: its `hf` model without logits, on packed batches.

Importing this package registers the name. `python -m fusedalign.harness` is the command `lm_eval` with it registered.
"""

try:
    import lm_eval
except ImportError as error:
    raise ImportError(f"fusedalign.harness needs lm_eval ({error}): pip install 'fusedalign[harness]'") from error

from fusedalign.harness.model import FusedLM

del lm_eval
__all__ = ["FusedLM"]
