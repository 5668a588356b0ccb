"""On a GPU: trainers pack by default, are as close to fp32 as padded ones, and do not synchronise."""

import logging

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from fusedalign.packing import enable, pack_answers
from fusedalign.packing.attention import varlen_attention
from fusedalign.packing.backbone import packed_output
from fusedalign.trl import HeadOptions
from fusedalign.trl.forward import add_lm_head
from fusedalign.trl.layouts import PACKED, Layouts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(varlen_attention() is None, reason="needs torch.nn.attention.varlen"),
]

#: Means over few tokens or pairs, and signs, are dominated by rounding.
SKIPPED = ("accuracies", "accuracy", "epoch", "learning_rate", "num_tokens")


def runs(build, folder, kind, packed, bf16):
    arguments = [("model", lambda: AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa"))]
    options = {"use_cpu": False, "bf16": bf16, "learning_rate": 1e-4, "arguments": arguments}
    trainer = build(kind, "fused", head=[("packed", packed)], **options)
    return trainer, tiny.history(trainer)


@pytest.mark.parametrize("model", ["qwen3", "gemma3"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "cpo", "orpo", "tpo"])
def test_packed_error_is_at_most_twice_the_padded_one(build, tiny_folder, kind, model):
    """Over all steps the bf16 error of each family of metrics is at most twice that of the padded run, plus rounding.

    A single metric has too few values, so chosen and rejected, training and evaluation are pooled.
    """
    folder = tiny_folder(model)
    trainer, packed = runs(build, folder, kind, True, True)
    assert trainer.layouts.kind == PACKED
    _, padded = runs(build, folder, kind, False, True)
    _, exact = runs(build, folder, kind, False, False)
    assert [row.keys() for row in packed] == [row.keys() for row in exact]
    families: dict[str, list[tuple[int, str]]] = {}
    for i, row in enumerate(exact):
        for name in row:
            if not (name.endswith(SKIPPED) or ("logits/" in name and kind in ("cpo", "orpo"))):
                families.setdefault(name.removeprefix("eval_").split("/")[0], []).append((i, name))
    for family, names in families.items():
        columns = [torch.tensor([rows[i][name] for i, name in names]) for rows in (packed, padded, exact)]
        errors = [(x - columns[2]).double().norm().item() for x in columns[:2]]
        rounding = 2**-8 * columns[2].double().norm().item()
        assert errors[0] <= 2 * errors[1] + rounding, (family, errors)


def test_auto_packs_and_logs_it(build, tiny_folder, caplog):
    caplog.set_level(logging.INFO, "fusedalign")
    trainer, rows = runs(build, tiny_folder("qwen3"), "dpo", "auto", True)
    assert trainer.layouts.kind == PACKED
    lines = [r.getMessage() for r in caplog.records if "batches: " in r.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("FusedDPOTrainer, batches: packed (proven on a few tokens")
    assert all(row["grad_norm"] > 0 for row in rows if "grad_norm" in row)


def test_auto_packs_in_fp32(build, tiny_folder):
    trainer, _ = runs(build, tiny_folder("qwen3"), "dpo", "auto", False)
    assert trainer.layouts.kind == PACKED
    assert trainer.layouts.reason.endswith("attention takes one segment at a time")


def test_packed_steps_do_not_synchronise(tiny_folder):
    """Forward and backward of pairs with the collator's layout never make the CPU wait."""
    g = torch.Generator().manual_seed(0)
    rows = [[torch.randint(3, 40, (n + i,), generator=g).tolist() for i in range(4)] for n in (5, 9, 7)]
    batch = pack_answers(*rows, multiple=64)
    ids = batch.input_ids[0][batch.token_index]
    labels = ids.masked_fill(~batch.valid, -100)
    labels[:, :5] = -100
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("qwen3"), dtype=torch.bfloat16).cuda()
    enable(model)
    layouts = Layouts(groups=2, kind=PACKED, must_pack=True, multiple=64)
    add_lm_head(model, options=HeadOptions(), layouts=layouts)
    arguments = {
        "input_ids": ids.cuda(),
        "attention_mask": batch.valid.long().cuda(),
        "labels": labels.cuda(),
        "num_items_in_batch": 7,
        "fused_lm_head": True,
    }
    want = model(**arguments).log_probs  # without a layout one is computed, which waits
    model(**arguments, layout=batch).loss.backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_output(model, batch)
        got = model(**arguments, layout=batch)
        got.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.log_probs, want, rtol=2e-2, atol=2e-2)
