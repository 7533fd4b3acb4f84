"""Rows of numbers as text, and in files."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import jax


def format_rows(rows: list[dict]) -> str:
    """The rows as an aligned table."""
    columns = list(rows[0])

    def text(value) -> str:
        if isinstance(value, float):
            return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
        return "" if value is None else str(value)

    cells = [columns, *([text(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(lines)


def write_rows(path: str, kind: str, rows: Sequence[dict], **versions: str) -> None:
    """Writes a benchmark's rows to a JSON file, with its kind, and the machine and the versions that made them."""
    machine = {
        "jax": jax.__version__,
        **versions,
        "device": str(jax.devices()[0]),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    result = {"kind": kind, "machine": machine, "rows": rows}
    Path(path).write_text(json.dumps(result, indent=1))
