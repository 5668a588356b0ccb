"""DPO, then SimPO, in a plain PyTorch loop: no trainer, and no logits.

Needs a CPU and half a minute; on a GPU, move the models and the batches to it.
For your data change build_embedded_model to the name of a model, and the data set in `train`.

    python custom_loop.py
"""

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedalign import dpo_loss, linear_logps, sequence, simpo_loss
from fusedalign.embedded import build_embedded_model, data_directory
from fusedalign.head import lm_head


def pair_of(model, tokenizer, rows):
    prompts = tokenizer.apply_chat_template(rows["prompt"] * 2, tokenize=False, add_generation_prompt=True)
    answers = [message[0]["content"] + tokenizer.eos_token for message in rows["chosen"] + rows["rejected"]]
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    lengths = torch.tensor([len(ids) for ids in tokenizer(prompts)["input_ids"]])
    labels = sequence.completion_labels(batch.input_ids, sequence.completion_mask(lengths, batch.attention_mask))
    targets = sequence.shift_labels(labels)
    hidden = model.model(**batch).last_hidden_state
    return sequence.preference_pair(linear_logps(hidden, lm_head(model).weight, targets).logps, targets != -100)


def train(loss_name, steps=30, folder="runs/custom-loop"):
    tokenizer = AutoTokenizer.from_pretrained(path := build_embedded_model(folder))
    model, reference = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for rows in load_dataset(str(data_directory() / "preferences"), split="train").take(8 * steps).iter(8):
        pair, ref = pair_of(model, tokenizer, rows), pair_of(reference.requires_grad_(False), tokenizer, rows)
        dpo = dpo_loss(pair.chosen_logps, pair.rejected_logps, ref.chosen_logps, ref.rejected_logps)
        simpo = simpo_loss(pair.chosen_mean_logps, pair.rejected_mean_logps)
        loss = (dpo if loss_name == "dpo" else simpo).losses.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


for name in ("dpo", "simpo") if __name__ == "__main__" else ():
    print(name, *(f"{loss:.3f}" for loss in train(name)))
