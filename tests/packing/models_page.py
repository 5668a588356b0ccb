"""Make docs/models.md: `python tests/packing/models_page.py > docs/models.md`.

Liger Kernel must be installed. Families named as arguments make a page of these alone.
"""

import contextlib
import re
import sys
import warnings

import families
import torch
import transformers

from fusedalign import support
from fusedalign.reports import MISSING, package_version

COLUMNS = ("model type", "class", "tied", "bias", "scale", "softcap", "logps", "packed", "Liger kernels")
PAGE = """\
# Models

`make models` writes this page: a tiny model of each family is built from its configuration with random weights, and
everything is tried (torch {torch}, transformers {transformers}, Liger Kernel {liger}; fp32 on a CPU). The package has
no list of models, so a family that is missing here may well work. Ask for your own, by its configuration alone:

```sh
fusedalign support --model_name_or_path Qwen/Qwen3-0.6B
```

* **tied, bias, scale, softcap**: the head as `fusedalign.head.lm_head` reads it, or why it is refused. Checkpoints
  differ in `tie_word_embeddings`, scale and softcap; this page has the defaults of the configuration, or a value of its
  own where the default is neutral.
* **logps**: the largest difference, in nats, of a log-probability of `linear_logps` from that of the model's own full
  logits. Rounding gives about 2e-06 here.
* **packed**: whether batches run without padding, with the hidden states and gradients of the padded layout
  ([how that is proven](packing.md)), or why not. Without it a model trains padded, with the same head. "Set it to 0" is
  about the configuration's default.
* **Liger kernels**: the layers that `liger_kernels=True` replaces, which is optional. Empty: there are none.

{table}
"""


def main(names):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    with contextlib.redirect_stdout(sys.stderr):
        rows = table(names or sorted(families.FAMILIES))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    versions = {name: package_version(name) for name in ("torch", "transformers")}
    versions["torch"] = versions["torch"].partition("+")[0]
    print(PAGE.format(**versions, liger=package_version("liger-kernel") or MISSING, table=text), end="")


def table(names):
    """The rows of the page."""
    rows = [[*row(name), "no"] for name in names]
    for cells in rows:  # at the end, because Liger's kernels stay in modules that families share
        cells[-1] = liger_cell(support.liger_support(build(cells[0])))
    return rows


def row(name):
    """The cells of a family, without that of Liger's kernels."""
    model = build(name)
    cls, head = type(model).__name__, support.head_support(model)
    if isinstance(head, str):
        cells = [f"no: {without_subject(head)}", "", "", "", ""]
    else:
        softcap = "" if head.softcap is None else f"{head.softcap:g}"
        cells = [yes(head.tied), yes(head.bias), f"{head.scale:.4g}", softcap, f"{head.difference:.0e}"]
    reason = support.packing_refusal(model)
    return [name, cls, *cells, "yes" if reason is None else f"no: {without_subject(reason)}"]


def build(name):
    return families.build(name, families.FAMILIES[name], attention=None)


def yes(value):
    return "yes" if value else ""


def without_subject(reason):
    """A reason without the class at its start."""
    return re.sub(r"^\w+(CausalLM|LMHeadModel|Attention) ", "", reason)


#: Part of a name of Liger's -> its word on the page.
LAYERS = {"Norm": "norm", "rotary": "RoPE", "Experts": "experts", "GLU": "MLP", "ReLU": "MLP"}


def liger_cell(parts):
    if isinstance(parts, str):
        return "" if "has kernels for" in parts else f"no: {parts}"
    return ", ".join(word for word in dict.fromkeys(LAYERS.values()) if any(word == LAYERS[k] for k in keys(parts)))


def keys(parts):
    return [key for part in parts for key in LAYERS if key in part]


if __name__ == "__main__":
    main(sys.argv[1:])
