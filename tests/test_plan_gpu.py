"""On a GPU: the predicted peak of a step is within 10 % of the measured one, for two models and three trainings.

`pytest -m gpu -s tests/test_plan_gpu.py` prints the table of docs/plan.md.
"""

import gc

import pytest
import torch

from fusedalign.plan import sizes
from fusedalign.plan.model import Shapes
from fusedalign.plan.shape import Step

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

PAIRS, LENGTH, PROMPT = 8, 2048, 1024  # of the mix "equal" of `fusedalign bench trl`


def predicted(training, size):
    from fusedalign.bench.training.settings import SIZES

    method, _, lora = training.partition("-")
    step = Step(method, PAIRS, LENGTH, PROMPT, dtype="bfloat16", lora_r=16 if lora else 0)
    shapes = Shapes(transformers.Qwen3Config(**SIZES[size].config), size)
    model, trace = shapes.model(step), shapes.trace(step)
    return sizes.peak(model, step, trace, sizes.head_layer(sizes.OURS, model, step).bytes)


def measured(training, size, folder):
    """The measured peak of steps 2 and 3 with the trainer of `bench trl --equal`."""
    from fusedalign.bench.training.settings import Job
    from fusedalign.bench.training.worker import build

    class Peak(transformers.TrainerCallback):
        bytes = 0

        def on_step_begin(self, args, state, control, **_):
            torch.cuda.reset_peak_memory_stats()

        def on_step_end(self, args, state, control, **_):
            torch.cuda.synchronize()
            if state.global_step > 1:
                self.bytes = max(self.bytes, torch.cuda.max_memory_allocated())

    peak = Peak()
    trainer, _ = build(Job(training, size, "equal", "packed", steps=1, device="cuda", step_rows=2 * PAIRS), folder)
    assert trainer.layouts.kind == "packed"
    trainer.add_callback(peak)
    trainer.train()
    return peak.bytes


def test_the_prediction_runs_without_a_gpu():
    assert predicted("dpo-lora", "0.6b") < predicted("orpo", "0.6b") < predicted("dpo", "0.6b")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", ["0.6b", "1.7b"])
@pytest.mark.parametrize("training", ["dpo", "dpo-lora", "orpo"])
def test_within_10_percent_of_the_measured_peak(training, size, tmp_path):
    before = torch.cuda.memory_allocated()
    want, got = predicted(training, size), measured(training, size, str(tmp_path)) - before
    print(f"\n| {size} | {training} | {want / 2**30:.2f} | {got / 2**30:.2f} | {want / got:.3f} |")
    gc.collect()
    torch.cuda.empty_cache()
    assert 0.9 <= want / got <= 1.1
