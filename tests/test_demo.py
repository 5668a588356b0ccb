"""The figures of the demo's picture; the command itself runs in test_record.py."""

import pytest
import torch

trl = pytest.importorskip("trl")

from fusedalign.demo.memory import LOGIT_BYTES, computed, full_logits_peak  # noqa: E402
from fusedalign.demo.slots import EpochSlots, count_slots  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_on_full_logits_takes_the_bytes_of_the_formula(dtype):
    n, d, v = 64, 4, 2048
    hidden, weight = torch.randn(n, d, dtype=dtype), torch.randn(v, d, dtype=dtype)
    peak = full_logits_peak(hidden, weight, torch.randint(0, v, (n,)))
    assert peak == pytest.approx(LOGIT_BYTES * n * v, rel=0.01)


def test_at_a_real_vocabulary_ours_takes_least():
    memory = computed()
    assert memory.full_logits > 12 * 4096 * 151_936 > 2 * memory.stock
    assert memory.stock > 2 * memory.fused


def test_packed_slots_count_the_prompt_of_a_pair_once():
    """A prompt of 60 tokens with answers of 40 and 20: 2 rows of 100 slots, packed 120 and a filler of 8."""

    class Pair(trl.DPOTrainer):
        def __init__(self):
            pass

        def get_train_dataloader(self):
            ids, mask = torch.ones(2, 100, dtype=torch.int64), torch.ones(2, 100, dtype=torch.int64)
            ids[1, 60:] = 2
            mask[1, 80:] = 0
            return [{"input_ids": ids, "attention_mask": mask}] * 3

    slots = count_slots(Pair())
    assert slots == EpochSlots(padded=600, packed=384)
    assert slots.change == pytest.approx(-0.36)
