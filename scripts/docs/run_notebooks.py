"""Runs the notebooks of docs/notebooks from the first cell to the last, and keeps what they print and draw in them.

make notebooks
python scripts/docs/run_notebooks.py docs/notebooks/sira_from_scratch.ipynb
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

FOLDER = Path(__file__).resolve().parents[2] / "docs/notebooks"
# A cell with this tag sets what a caller may set otherwise.
PARAMETERS = "parameters"


def read(path: Path, parameters: Mapping[str, Any] | None = None) -> nbformat.NotebookNode:
    """The notebook, `parameters` in place of the assignments of its cell with that tag.

    Raises:
      KeyError: the notebook has no such cell.
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        cells = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", ())}
        cells[PARAMETERS].source = "\n".join(f"{k} = {v!r}" for k, v in parameters.items())
    return notebook


def execute(notebook: nbformat.NotebookNode, timeout: int = 3600) -> None:
    """Runs all cells in a kernel of this environment; their outputs replace those that the notebook had.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=timeout, record_timing=False).execute()
    for cell in notebook.cells:
        # Progress bars and the like are of the run, not of the text.
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell printed."""
    return [
        "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def main(paths: list[str]) -> None:
    """Runs and rewrites the notebooks, by default all."""
    for path in [Path(p) for p in paths] or sorted(FOLDER.glob("*.ipynb")):
        notebook = read(path)
        execute(notebook)
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
