"""Two gloo ranks train with the Fused trainers: equal parameters, and the losses of one process."""

import os
import socket

import cached
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

from fusedalign.trl import attach

STEPS, ROWS = 3, 12
#: Losses that are means over the tokens or pairs of all ranks; means of per-rank means differ, in TRL too.
RUNS = {
    "sft": ("sft", "fused", {}),
    "sft, attached to": ("sft", "attach", {}),
    "dpo": ("dpo", "fused", {}),
    "dpo, cached reference": ("dpo", "fused", {}),
    "kto": ("kto", "fused", {}),
    "dpo, packed": ("dpo", "packed", {}),
    "sft, packed": ("sft", "packed", {}),
    "kto, packed": ("kto", "packed", {}),
    "dpo, packed stream": ("dpo", "packed", {}),
    "simpo": ("cpo", "fused", {"loss_type": "simpo", "cpo_alpha": 0.0}),
}


def train(folder, name, batch_size):
    """Train; return the losses of all steps and the trained parameters."""
    kind, variant, options = RUNS[name]
    stock, fused, config = tiny.classes(kind)
    data = tiny.data(kind, ROWS)
    args = config(
        output_dir=f"{folder}/runs",
        max_steps=STEPS,
        logging_steps=1,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        optim="sgd",
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        max_length=64,
        **options,
    )
    trainer = (stock if variant == "attach" else fused)(
        model=AutoModelForCausalLM.from_pretrained(f"{folder}/model", attn_implementation="eager"),
        args=args,
        train_dataset=data.to_iterable_dataset() if "stream" in name else data,
        processing_class=tiny.tokenizer(),
        **({"packed": True} if variant == "packed" else {}),
        **({"ref_logps": f"{folder}/ref.parquet"} if "cached" in name else {}),
    )
    if variant == "attach":
        attach(trainer)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return torch.tensor(losses), [x.detach().clone() for x in trainer.model.parameters()]


def rank_main(rank, folder, port):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.save({name: train(folder, name, 2) for name in RUNS}, f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that exits early closes the connections of the other
    os._exit(0)  # interpreter shutdown occasionally aborts in PyTorch's threads


@pytest.mark.slow
def test_two_ranks_equal_one(tiny_folder, tmp_path):
    os.symlink(tiny_folder("qwen3"), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    args = tiny.classes("dpo")[2](output_dir=str(tmp_path), max_length=64, bf16=False, use_cpu=True)
    cached.write(tmp_path / "ref.parquet", "dpo", model, [tiny.data("dpo", ROWS)], tiny.tokenizer(), args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, args=(str(tmp_path), port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(first["dpo, cached reference"][0], first["dpo"][0], rtol=1e-5, atol=1e-5)
    for name in RUNS:
        losses, parameters = train(tmp_path, name, 4)
        torch.testing.assert_close(
            first[name][0], losses, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
        for a, b, c in zip(first[name][1], second[name][1], parameters, strict=True):
            assert torch.equal(a, b), name
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
