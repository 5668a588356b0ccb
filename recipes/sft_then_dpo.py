"""SFT, then DPO from there with a cached reference: no second model in memory.

Needs 28.7 GiB: fusedalign plan --model_name_or_path Qwen/Qwen3-1.7B --precompute_ref_log_probs
For your data change MODEL, and add flags to SFT and DPO: --dataset_name, --learning_rate, ...

    python sft_then_dpo.py              # flags for both trainings may follow, such as --max_steps 2
"""

import subprocess
import sys
from pathlib import Path

MODEL = "embedded"
SFT = ["--config", "sft"]
DPO = ["--config", "dpo"]
FOLDER = Path("runs/sft_then_dpo")


def fusedalign(*words):
    """Run a command in a process of its own, which leaves all memory to the next one."""
    process = subprocess.run([sys.executable, "-m", "fusedalign", *map(str, words)])
    if process.returncode:
        sys.exit(process.returncode)  # the command has printed why


def main(flags):
    """Train with SFT, score the pairs under that model, and train with DPO against these scores."""
    sft, reference, dpo = (FOLDER / name for name in ("sft", "reference.parquet", "dpo"))
    fusedalign("sft", *SFT, "--model_name_or_path", MODEL, "--output_dir", sft, *flags)
    training = [*DPO, "--model_name_or_path", sft, "--output_dir", dpo, *flags]
    fusedalign("score", "--ref_cache", reference, "--method", "dpo", *training)
    fusedalign("dpo", *training, "--ref_logps", reference)


if __name__ == "__main__":
    main(sys.argv[1:])
