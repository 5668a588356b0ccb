"""The command `fusedalign merge`; what does the work is imported once its help is ruled out."""

from __future__ import annotations

from pathlib import Path

from fusedalign.commandline import CommandParser
from fusedalign.reports import check_writable


def merge_command(argv: list[str]) -> None:
    """Run `fusedalign merge` with the words that follow it.

    Raises:
        ValueError: a bad argument, no adapter, an adapter that cannot be merged, a folder that is not empty.
        FileNotFoundError: no base model.
    """
    parser = CommandParser(
        "fusedalign merge",
        "Merges an adapter into its base model, and writes the model and its tokenizer into a folder.",
    )
    add, dtypes = parser.add_argument, ("auto", "float32", "bfloat16", "float16")
    add("adapter", nargs="?", metavar="ADAPTER", help="folder or Hub name of the adapter")
    add("--out", metavar="DIR", help="folder for the merged model, new or empty")
    add("--dtype", choices=dtypes, default="auto", help="of the merged model; default: auto, the base model's")
    options = parser.parse(argv)
    if options is None:
        return
    for word, value in {"ADAPTER": options.adapter, "--out": options.out}.items():
        if not value:
            raise ValueError(f"merge needs ADAPTER --out DIR, got no {word}")
    from fusedalign.trl.adapters import find_adapter, merge
    from fusedalign.trl.models import ADAPTER_CONFIG, check_folder

    check_folder(options.adapter, "ADAPTER", adapter=True)
    adapter = find_adapter(options.adapter)
    if adapter is None:
        raise ValueError(f"ADAPTER must be a folder or Hub model with an {ADAPTER_CONFIG}, got {options.adapter}")
    folder = Path(options.out)
    check_writable(folder, "--out")
    if any(folder.iterdir()):
        raise ValueError(
            f"--out must be a new or empty folder, got {folder} with {min(p.name for p in folder.iterdir())}"
        )
    merge(adapter, folder, dtype=options.dtype)
    print(f"model: {folder}")
