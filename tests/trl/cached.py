"""Write a reference cache by a plain loop over full logits."""

import torch

from fusedalign.trl.ref_cache import about, write_cache
from fusedalign.trl.ref_rows import reference_examples


def write(path, kind, model, datasets, tokenizer, args, name="the-model"):
    """Write the cache of these data to `path` and return its record."""
    rows = [row for dataset in datasets for row in reference_examples(kind, dataset, tokenizer, args)]
    with torch.no_grad():
        logps = [_sum_of_logps(model.eval(), row) for row in rows]
    record = about(model, tokenizer, args, name)
    write_cache(path, record, [row.key for row in rows], logps)
    return record


def _sum_of_logps(model, row):
    ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels[1:])
    logps = model(ids).logits[0, -len(row.input_ids) : -1].float().log_softmax(-1)
    counted = labels != -100
    return logps[counted].gather(1, labels[counted, None]).sum().item()
