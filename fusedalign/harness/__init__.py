"""The model `fusedalign` for the lm-evaluation-harness: its `hf` model on packed batches, without logits.

Importing this package registers the model; `python -m fusedalign.harness` is the command `lm_eval` with the model.
"""

try:
    import lm_eval
except ImportError as error:
    raise ImportError(f"fusedalign.harness needs lm_eval ({error}): pip install 'fusedalign[harness]'") from error

from fusedalign.harness.model import FusedLM

del lm_eval
__all__ = ["FusedLM"]
