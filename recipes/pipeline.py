"""A pipeline over two GPUs, with the loss on the last stage and without logits.

Needs two GPUs, in bf16 with NCCL, or a CPU, in fp32 with gloo; the Qwen3 is a small one.
For your data change `build`, the layers of the stages, and `batch`, token ids and labels.

    torchrun --nproc-per-node 2 pipeline.py --impl auto --schedule 1F1B
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from transformers import Qwen3Config, Qwen3ForCausalLM

from fusedalign import LinearCrossEntropyLoss

VOCAB = 97
SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


class Stage(torch.nn.Module):
    """Some layers of a model; the first stage takes token ids, the last one returns the input of the head."""

    def __init__(self, model, layers, *, first, last):
        super().__init__()
        backbone = model.model
        self.embed_tokens = backbone.embed_tokens if first else None
        self.layers = backbone.layers[layers]
        self.rotary_emb = backbone.rotary_emb
        self.norm = backbone.norm if last else None
        self.lm_head = model.lm_head if last else None  # not called: the loss takes its weight

    def forward(self, x):
        x = x if self.embed_tokens is None else self.embed_tokens(x)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.rotary_emb(x, positions)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return x if self.norm is None else self.norm(x)


def build(seed=0):
    """The two stages of a small Qwen3."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,  # the embedding and the head live on different ranks
    )
    model = Qwen3ForCausalLM(config)
    return Stage(model, slice(0, 1), first=True, last=False), Stage(model, slice(1, None), first=False, last=True)


def batch(seed=0, rows=8, length=9):
    """Token ids and labels; each row has another number of labels that count."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length), generator=g)
    return ids, ids.masked_fill(torch.rand(rows, length, generator=g) < 0.4, -100)


class StepLoss:
    """The loss of one micro-batch: its share of the mean over the labels of the whole batch."""

    def __init__(self, lm_head, impl):
        # Many forwards wait for their backwards: with keep_head=False none of them holds a gradient of the head.
        self.loss_fn = LinearCrossEntropyLoss(lm_head, impl=impl, shift=1, keep_head=False)
        self.num_items = None

    def __call__(self, hidden_states, labels):
        return self.loss_fn(hidden_states, labels, num_items=self.num_items)


def pipeline(stage, rank, schedule, impl, device, microbatches):
    """Return a step: it runs all forwards and backwards of ids and labels, and returns the loss on the last rank."""
    loss = StepLoss(stage.lm_head, impl) if rank == 1 else None
    # Gradients are not scaled: the micro-batches' losses are shares of one mean and add up.
    run = SCHEDULES[schedule](
        PipelineStage(stage, rank, 2, device), n_microbatches=microbatches, loss_fn=loss or sum, scale_grads=False
    )

    def step(ids, labels):
        if rank == 0:
            run.step(ids)
            return None
        loss.num_items = (labels[:, 1:] != -100).sum()
        losses = []
        run.step(target=labels, losses=losses)
        return torch.stack([x.detach() for x in losses]).sum()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--schedule", default="1F1B", choices=SCHEDULES)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    on_gpus = torch.cuda.device_count() >= 2
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    stage = build()[rank].to(device, torch.bfloat16 if on_gpus else torch.float32)
    step = pipeline(stage, rank, options.schedule, options.impl, device, microbatches=4)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    ids, labels = (x.to(device) for x in batch())
    for i in range(options.steps):
        loss = step(ids, labels)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 1:
            print(f"step {i:2}: loss {loss.item():.4f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
