"""Packed batches: rows of uneven length in one row without padding, in which shared prompts are stored once.

For causal language models of transformers, without TRL. `pack_answers` or `pack_rows` makes a batch on the CPU;
`packed_hidden` and `packed_logps` run a model over it. `enable` proves that a model can, by comparing both layouts.
"""

from fusedalign.packing.attention import LayoutError, LayoutMismatchError
from fusedalign.packing.batch import PackedBatch, RightPadded, pack_answers, pack_documents, pack_padded, pack_rows
from fusedalign.packing.model import packed_hidden, packed_logps
from fusedalign.packing.proof import Proof, enable, enable_sharded, enable_unmasked

__all__ = [
    "LayoutError",
    "LayoutMismatchError",
    "PackedBatch",
    "Proof",
    "RightPadded",
    "enable",
    "enable_sharded",
    "enable_unmasked",
    "pack_answers",
    "pack_documents",
    "pack_padded",
    "pack_rows",
    "packed_hidden",
    "packed_logps",
]
