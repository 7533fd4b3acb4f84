"""A page of text, tables, figures and samples, as Markdown and as one HTML file.

All text is data: it is escaped for either format.
"""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2

from scripts.report_tables import Table

# Prompts with function schemas run to thousands of characters.
_MAX_SAMPLE_CHARS = 600


@dataclass(frozen=True)
class Paragraph:
    """Text, or with `bullets` a list."""

    text: str
    bullets: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A figure's file and what to say below it."""

    file: str
    caption: str


@dataclass(frozen=True)
class Output:
    """One line of a sample: who, the text (None: there is none), and ✓, ✗, ≠ or nothing."""

    name: str
    text: str | None
    mark: str = ""


@dataclass(frozen=True)
class Samples:
    """The examples of a task group: for each, its task and lines."""

    group: str
    examples: Sequence[tuple[str, Sequence[Output]]]


Block = Paragraph | Figure | Table | Samples


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


def _shorten(text: str | None) -> str:
    if text is None:
        return "(no prediction)"
    text = text.strip()
    left_out = len(text) - _MAX_SAMPLE_CHARS
    if left_out > 0:
        text = f"{text[:_MAX_SAMPLE_CHARS]} … ({left_out:,} more characters)"
    return text or "(empty)"


def markdown(text: str) -> str:
    """Escapes what Markdown or HTML would read as markup; line ends become ⏎."""
    text = html.escape(" ⏎ ".join(text.splitlines()), quote=False)
    # Underscores inside words and brackets without a target are plain text: escaping them all would
    # spoil task names and notes where the text is read as it is.
    return re.sub(r"([\\`*|~$]|(?<!\w)_|_(?!\w)|\](?=[(\[:]))", r"\\\1", text)


def markdown_table(table: Table) -> str:
    """Padded to columns, so that it reads as plain text too; notes follow."""
    rows = [[markdown(name) for name in table.header]]
    for row in table.rows:
        texts = [markdown(cell.text) for cell in row]
        rows.append([f"**{t}**" if c.best else t for t, c in zip(texts, row, strict=True)])
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [f"{first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in rest)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])
    return "\n\n".join([lines, *(markdown(note) for note in table.notes)])


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The page as Markdown; figures are linked by file name."""
    parts = [f"# {markdown(title)}"]
    for section in sections:
        parts.append(f"## {markdown(section.title)}")
        for block in section.blocks:
            if isinstance(block, Paragraph):
                if block.text:
                    parts.append(markdown(block.text))
                parts.append("\n".join(f"- {markdown(item)}" for item in block.bullets))
            elif isinstance(block, Figure):
                caption = markdown(block.caption)
                parts.append(f"![{caption}]({block.file})\n\n{caption}")
            elif isinstance(block, Table):
                parts.append(markdown_table(block))
            else:
                parts.append(f"<details><summary>{html.escape(block.group)}</summary>")
                for task, lines in block.examples:
                    rows = [f"| {markdown(task)} | |", "|---|---|"]
                    for line in lines:
                        text = markdown(_shorten(line.text))
                        name = f"{markdown(line.name)} {line.mark}".strip()
                        rows.append(f"| {name} | {text} |")
                    parts.append("\n".join(rows))
                parts.append("</details>")
    return "\n\n".join(part for part in parts if part) + "\n"


def to_html(title: str, sections: Sequence[Section], pngs: Mapping[str, bytes]) -> str:
    """The page as one HTML file; figures are embedded."""
    images = {name: base64.b64encode(png).decode() for name, png in pngs.items()}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shorten"] = _shorten
    environment.tests["kind"] = lambda block, name: type(block).__name__ == name
    page = environment.from_string(_PAGE)
    return page.render(title=title, sections=sections, images=images)


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em;
       color: #1c1c1c; background: #fff; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .8em; border-bottom: 1px solid #e2e2e2; text-align: left; }
.numbers td + td, .numbers th + th { text-align: right; }
.best { font-weight: 700; background: #e6f2ea; }
.wide { overflow-x: auto; }
.sample { width: 100%; } .sample th { width: 9em; font-weight: 500; vertical-align: top; }
.sample td { white-space: pre-wrap; overflow-wrap: anywhere; }
.right { color: #00664a; } .wrong { color: #a23c00; }
.note, figcaption { color: #555; font-size: .9em; margin: .2em 0; }
figure { margin: 1em 0; } img { max-width: 100%; height: auto; }
summary { cursor: pointer; font-weight: 600; padding: .3em 0; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for block in section.blocks %}
{% if block is kind("Paragraph") %}
{% if block.text %}
<p>{{ block.text }}</p>
{% endif %}
{% if block.bullets %}
<ul>{% for item in block.bullets %}<li>{{ item }}</li>{% endfor %}</ul>
{% endif %}
{% elif block is kind("Figure") %}
<figure><img src="data:image/png;base64,{{ images[block.file] }}" alt="{{ block.caption }}">
<figcaption>{{ block.caption }}</figcaption></figure>
{% elif block is kind("Table") %}
<div class="wide"><table class="numbers">
<tr>{% for name in block.header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in block.rows %}
<tr>
{% for cell in row %}
<td{% if cell.best %} class="best"{% endif %}>{{ cell.text }}</td>
{% endfor %}
</tr>
{% endfor %}
</table></div>
{% for note in block.notes %}
<p class="note">{{ note }}</p>
{% endfor %}
{% else %}
<details><summary>{{ block.group }}</summary>
{% for task, lines in block.examples %}
<table class="sample">
<tr><th>task</th><td>{{ task }}</td></tr>
{% for line in lines %}
<tr>
<th>
{{ line.name }}
<span class="{{ "right" if line.mark == "✓" else "wrong" }}">{{ line.mark }}</span>
</th>
<td dir="auto">{{ line.text | shorten }}</td>
</tr>
{% endfor %}
</table>
{% endfor %}
</details>
{% endif %}
{% endfor %}
{% endfor %}
</body>
</html>
"""
