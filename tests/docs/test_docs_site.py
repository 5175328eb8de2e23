"""The documentation as a site: every link and anchor holds, every page is in the menu, nothing is fetched."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from doc_blocks import ROOT
from markdown.extensions.toc import slugify
from mkdocs.commands.build import build
from mkdocs.config import load_config

FETCHED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=["'](?:https?:)?//[^"']+""")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of the site, and the warnings of its build."""
    folder = tmp_path_factory.mktemp("site")
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger = logging.getLogger("mkdocs")
    logger.addHandler(handler)
    try:
        # Not strict, so that all warnings are seen and not only that there are some.
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=False)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        logger.removeHandler(handler)
    return folder, warnings


def test_it_builds_without_a_warning(site):
    folder, warnings = site
    assert not warnings, "\n".join(warnings)
    assert load_config(str(ROOT / "mkdocs.yml")).strict  # what `make docs` and a reader's build go by
    assert (folder / "search" / "search_index.json").stat().st_size > 100_000


def test_pages_fetch_nothing_and_draw_their_formulas(site):
    pages = list(site[0].rglob("*.html"))
    assert len(pages) > 40
    texts = {page.name: page.read_text("utf-8") for page in pages}
    assert not [(name, fetched) for name, text in texts.items() for fetched in FETCHED.findall(text)]
    assert texts["equations.html"].count("<math") > 50
    assert not [name for name, text in texts.items() if 'class="arithmatex"' in text]


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md", "benchmarks/README.md"]
)
def test_links_outside_the_site_hold(page):
    """Of pages that stand at the root or beside code; anchors are headings of their targets."""
    text = (ROOT / page).read_text("utf-8")
    for target, anchor in re.findall(r"\]\((?!\w+:|#)([^)\s#]+)(?:#([^)\s]+))?\)", text):
        path = (ROOT / page).parent / target
        assert path.exists(), f"{page}: {target}"
        headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [slugify(heading, "-") for heading in headings], f"{page}: {target}#{anchor}"
