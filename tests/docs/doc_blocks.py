"""The fenced blocks of the documentation, and the commands in them."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# First what a newcomer reads, in that order; each page goes on in the folder that the pages before it left.
FIRST = ["README.md", "docs/quick_start.md", "docs/own_pictures.md"]
FENCE = re.compile(r"^( *)(```+)([^\n`]*)\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml|json|csv))\b")  # a first line that says which file the block is
INDENTED = re.compile(r"(?<=\n\n)((?: {4}(?:python|accelerate|mmft|make|[A-Z_]+=) ?\S.*\n(?: {5,}\S.*\n)*)+)")
HEADER = re.compile(r"(?:^#|:) ((?:accelerate launch|python recipes/)(?:.*\\\n#)*.*)$", re.MULTILINE)  # in YAML
ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")


@dataclass(frozen=True)
class Block:
    """A fenced block: its text, and where it begins."""

    page: str
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that this block shows, if its first line says so."""
        named = FILE.match(self.text)
        return named[1] if named else None


@dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
        words: program and arguments.
        environment: assignments in front of it.
        output: file that its output goes to (`> FILE`).
    """

    page: str
    line: int
    text: str
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    output: str | None = None


def pages() -> list[str]:
    """Every page with blocks that are run, paths from the root."""
    others = [*ROOT.glob("docs/**/*.md"), *(ROOT / folder / "README.md" for folder in ("data", "benchmarks"))]
    others += [ROOT / "CONTRIBUTING.md", *ROOT.glob("recipes/*.yaml"), *ROOT.glob("accelerate_configs/*.yaml")]
    return list(dict.fromkeys([*FIRST, *sorted(str(path.relative_to(ROOT)) for path in others)]))


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, indented commands, and those in the comments of a YAML file."""
    text = (ROOT / page).read_text("utf-8")
    if page.endswith(".yaml"):
        commented = [(header.start(1), header[1].replace("\n#", "\n")) for header in HEADER.finditer(text)]
        return [Block(page, text.count("\n", 0, start) + 1, "sh", command) for start, command in commented]
    found = [
        Block(page, text.count("\n", 0, part.start()) + 1, "sh", textwrap.dedent(part[1]))
        for part in INDENTED.finditer(text)
    ]
    for fence in FENCE.finditer(text):
        line, indent = text.count("\n", 0, fence.start()) + 2, fence[1]
        body = re.sub(f"^{indent}", "", fence[4], flags=re.MULTILINE)
        found.append(Block(page, line, fence[3].strip().split(" ")[0], body))
    return found


def commands(block: Block) -> Iterator[Command]:
    """The commands of a ```sh block, continued lines as one."""
    line, waiting = block.line, ""
    for i, text in enumerate(block.text.splitlines()):
        if not waiting:
            line = block.line + i
        if text.endswith("\\"):
            waiting += text[:-1]
            continue
        whole, waiting = (waiting + text).strip(), ""
        words = shlex.split(whole, comments=True)
        if not words:
            continue
        environment = []
        while words and ASSIGNMENT.match(words[0]):
            name, _, value = words.pop(0).partition("=")
            environment.append((name, value))
        output = None
        if ">" in words:
            i = words.index(">")
            words, output = words[:i], words[i + 1]
        yield Command(block.page, line, whole, tuple(words), tuple(environment), output)
