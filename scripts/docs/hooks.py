"""Hooks of MkDocs: the pages that are made from the source, and links that lead to a notebook.

python -m mkdocs build --strict
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scripts.docs import api_pages, config_fields, notebook_page

ROOT = Path(__file__).resolve().parents[2]
# What a page writes where a table of config fields goes.
TABLES = {
    "experiment": config_fields.experiment_tables,
    "adapter": config_fields.adapter_tables,
    "launch": config_fields.launch_tables,
}
_MARK = re.compile(r"<!-- fields: (\w+) -->")
_NOTEBOOK = re.compile(r"(\]\((?:[\w/.-]+/)?[\w-]+)\.ipynb\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the API, the notebooks' pages with their pictures, and the changelog."""

    def add(path: str, content: str | bytes) -> None:
        files.append(File.generated(config, path, content=content))

    add("api/index.md", api_pages.index())
    for name, package in api_pages.PACKAGES.items():
        add(f"api/{name}.md", api_pages.page(ROOT, package))
    add("changelog.md", (ROOT / "CHANGELOG.md").read_text("utf-8"))
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        text, pictures = notebook_page.to_markdown(path)
        add(f"notebooks/{path.stem}.md", text)
        for name, content in pictures.items():
            add(f"notebooks/{name}", content)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the tables of fields in, and has links to notebooks lead to their pages."""
    del config, files
    markdown = _MARK.sub(lambda mark: TABLES[mark[1]](ROOT), markdown)
    if page.file.src_uri.startswith("notebooks/"):
        return markdown  # These link to the notebook as a file.
    return _NOTEBOOK.sub(r"\1.md)", markdown)
