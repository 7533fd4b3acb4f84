"""The site builds without a warning and loads nothing from elsewhere; the pages' links work in the repository too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
_LINK = re.compile(r"\]\(([^)#\s]+)?(?:#([^)\s]+))?\)")


def test_site_builds_without_a_warning(tmp_path):
    """One test of the whole site, so that it is built once however the tests are shared out."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr + done.stdout
    site = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*.html")}
    every_page_is_there(site)
    nothing_comes_from_another_host(site)
    made_pages_have_what_they_are_for(site)


def every_page_is_there(site):
    made = ["changelog", "api/index", "api/routing", "api/adapters", "api/models", "api/training"]
    notebooks = [p.stem for p in (REPOSITORY / "docs/notebooks").glob("*.ipynb")]
    expected = [p.stem for p in PAGES] + made + [f"notebooks/{name}" for name in notebooks]
    assert {f"{name}.html" for name in expected} <= set(site)
    assert len(notebooks) == 2


def nothing_comes_from_another_host(site):
    loaded = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?(\S+)")
    for name, page in site.items():
        urls = loaded.findall(page)
        assert urls
        assert [url for url in urls if url.startswith(("http", "//"))] == [], name


def made_pages_have_what_they_are_for(site):
    assert "capacity_factor" in site["configs.html"]
    assert "<!-- fields" not in site["configs.html"]
    assert "within_capacity" in site["api/routing.html"]
    assert "load_balance_loss" in site["api/routing.html"]
    # Links to a notebook lead to its page.
    assert 'href="notebooks/sira_from_scratch.html"' in site["index.html"]
    assert ".ipynb" not in site["index.html"]


def anchors(path):
    """The anchors of a page's headings."""
    text = re.sub(r"(?m)^    .*$", "", path.read_text())
    titles = re.findall(r"(?m)^#+ (.*)$", text)
    kept = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {re.sub(r"[\s]+", "-", title) for title in kept}


@pytest.mark.parametrize("path", [REPOSITORY / "README.md", *PAGES], ids=lambda p: p.name)
def test_links_work_in_the_repository(path):
    """What the site makes (the API, the changelog) is no file of the repository, so no page may link to it."""
    for target, anchor in _LINK.findall(path.read_text()):
        if target.startswith("http"):
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_readme_names_the_documentation():
    assert "docs/index.md" in (REPOSITORY / "README.md").read_text()
