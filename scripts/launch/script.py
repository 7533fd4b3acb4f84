"""The fixed parts of rendered scripts: files in bodies/, which hold no value of a config.

A rendered script is a head that sets variables, each quoted, and such a body, which only uses them.
"""

from pathlib import Path

# The file that starts a launch, whatever the target.
START = "submit.sh"

_FOLDER = Path(__file__).parent / "bodies"
RENDERED = "Rendered by scripts/launch/render.py: change the config and render again."


def body(name: str) -> str:
    """The text of bodies/NAME."""
    return (_FOLDER / name).read_text()


def script(*lines: str, body_name: str | None = None) -> str:
    """A bash script of the lines and a body."""
    head = ["#!/bin/bash", f"# {RENDERED}", *lines]
    return "\n".join(head) + "\n" + (f"\n{body(body_name)}" if body_name else "")
