"""A notebook as a Markdown page with the outputs that are kept in it."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def to_markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """The page, and its pictures by their names."""
    notebook = json.loads(path.read_text("utf-8"))
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(_fenced(source, "python"))
            for text, png in _outputs(cell):
                if png:
                    name = f"{path.stem}_{len(pictures)}.png"
                    pictures[name] = png
                    parts.append(f"![Figure of the cell above]({name})")
                else:
                    parts.append(_fenced(text.rstrip("\n"), "text"))
    parts.append(f"[The notebook itself]({path.name})")
    return "\n\n".join(parts) + "\n", pictures


def _outputs(cell: dict) -> Iterator[tuple[str, bytes]]:
    """(text, picture) of each output, one of them empty."""
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            yield "", base64.b64decode(data["image/png"])
        elif "text" in output or "text/plain" in data:
            text = "".join(output.get("text") or data["text/plain"])
            yield _COLOURS.sub("", text), b""


def _fenced(text: str, language: str) -> str:
    fence = "````" if "```" in text else "```"
    return f"{fence}{language}\n{text}\n{fence}"
