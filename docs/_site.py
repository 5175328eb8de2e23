"""What `mkdocs build` needs beyond Markdown: formulas without scripts, the notebook, and files outside docs/.

Formulas become MathML, which browsers draw themselves. A link that leaves docs/ (to code, a recipe, data/README.md)
works on a code host as it stands; here its target becomes a page below source/. No address of a host is needed.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
SOURCE = "source"  # where files from outside docs/ stand in the site
NOTEBOOK, NOTEBOOK_PAGE = "first_run.ipynb", "first_run.md"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".jinja": "jinja", ".ipynb": "json"}

LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the notebook as a page, and a page for each file outside docs/ that a page links to."""
    todo = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    files.append(File.generated(config, NOTEBOOK_PAGE, content=notebook((DOCS / NOTEBOOK).read_text("utf-8"))))
    seen = set(todo)
    while todo:
        place = todo.pop()
        for target in targets(place):
            if target in seen or target.startswith("docs/") or not (ROOT / target).is_file():
                continue  # a link to nothing is mkdocs' to report
            seen.add(target)
            files.append(File.generated(config, as_page(target), content=content(target)))
            if target.endswith(".md"):
                todo.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Points links that leave docs/, and those of pages from outside it, to where their targets are in the site."""
    uri = page.file.src_uri
    place = uri.removeprefix(f"{SOURCE}/") if uri.startswith(f"{SOURCE}/") else f"docs/{uri}"

    def there(link: re.Match[str]) -> str:
        target, anchor = resolve(place, link[1]), link[2] or ""
        if uri == NOTEBOOK_PAGE or (
            place.startswith("docs/") and target.startswith("docs/") and target != f"docs/{NOTEBOOK}"
        ):
            return link[0]
        if not target.endswith(".md"):
            anchor = re.sub(r"#L(\d+).*", r"#__codelineno-0-\1", line_of(target, anchor))  # of a line of code
        return os.path.relpath(as_page(target), os.path.dirname(uri)) + anchor

    return LINK.sub(there, markdown)


def on_page_content(page_html: str, page: Page, **_: object) -> str:
    """Formulas as MathML; and lines of code count as anchors, so that links to them are checked."""
    if page.present_anchor_ids is not None:
        page.present_anchor_ids |= set(re.findall(r'id="(__codelineno-0-\d+)"', page_html))

    def drawn(formula: re.Match[str]) -> str:
        return convert(html.unescape(formula[3]), display="inline" if formula[2] == "(" else "block")

    return FORMULA.sub(drawn, page_html)


def resolve(place: str, link: str) -> str:
    """A link's target as a path from the root of the repository; `place` is the page's own."""
    return os.path.normpath(os.path.join(os.path.dirname(place), link))


def line_of(target: str, anchor: str) -> str:
    """The anchor, and #L12 for one that is the name of a function or class of the file: lines move, names stay."""
    name = anchor.removeprefix("#").rpartition(".")[2]
    text = (ROOT / target).read_text("utf-8") if name and target.endswith(".py") else ""
    found = re.search(rf"^ *(?:def|class) {name}\b", text, re.MULTILINE) if name else None
    return anchor if found is None else f"#L{text.count(chr(10), 0, found.start()) + 1}"


def targets(place: str) -> Iterator[str]:
    """What the links of a Markdown file point to."""
    for link in LINK.finditer((ROOT / place).read_text("utf-8")):
        yield resolve(place, link[1])


def as_page(target: str) -> str:
    """Where a file of the repository stands in the site's sources."""
    if target.startswith("docs/"):
        target = target.removeprefix("docs/")
        return NOTEBOOK_PAGE if target == NOTEBOOK else target
    is_text = target.endswith((".md", ".png", ".jpg", ".json")) or not (ROOT / target).is_file()
    return f"{SOURCE}/{target}" if is_text else f"{SOURCE}/{target}.md"


def content(target: str) -> str | bytes:
    """A Markdown file, a picture or data as they are; everything else as code on a page, left out of the search."""
    data = (ROOT / target).read_bytes()
    if as_page(target).endswith(target):
        return data.decode("utf-8") if target.endswith(".md") else data
    language = LANGUAGES.get(PurePosixPath(target).suffix, "text")
    code = data.decode("utf-8")
    return f'---\nsearch: {{exclude: true}}\n---\n# {target}\n\n````{language} linenums="1"\n{code}\n````\n'


def notebook(text: str) -> str:
    """A notebook's cells as Markdown. It is kept without outputs; the tests run it."""
    cells = json.loads(text)["cells"]
    parts = {"markdown": "{}", "code": "```python\n{}\n```"}
    return "\n\n".join(parts[cell["cell_type"]].format("".join(cell["source"])) for cell in cells)
