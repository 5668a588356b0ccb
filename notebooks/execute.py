"""Execute the notebooks of this directory and store their outputs: `python notebooks/execute.py [NAME ...]`.

Each runs in an empty temporary directory. Pictures are stored with a palette, a quarter of their size.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
COLOURS = 64


def execute(path: Path, folder: str | Path) -> nbformat.NotebookNode:
    """The notebook after a fresh execution in `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell has raised.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm in a notebook without ipywidgets
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=resources, record_timing=False, coalesce_streams=True
    )
    return client.execute(env=environment)


def shrink_pictures(notebook: nbformat.NotebookNode) -> None:
    """Store the pictures of a notebook with a palette of `COLOURS`."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
                file = io.BytesIO()
                picture.convert("RGB").quantize(COLOURS).save(file, "png", optimize=True)
                output.data["image/png"] = base64.b64encode(file.getvalue()).decode() + "\n"


def main(names: list[str]) -> None:
    """Execute and store the named notebooks, by default all."""
    paths = [HERE / f"{name.removesuffix('.ipynb')}.ipynb" for name in names] or sorted(HERE.glob("*.ipynb"))
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, folder)
        shrink_pictures(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
