"""What the doctor says: findings in sections on one page. Knows nothing of what is looked at."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["fine", "note", "warning", "wrong"]
MARKS: dict[Kind, str] = {"fine": "✓", "note": "·", "warning": "!", "wrong": "✗"}
PLAIN_MARKS: dict[Kind, str] = {"fine": "ok", "note": " -", "warning": " !", "wrong": " X"}
COLOURS: dict[Kind, str] = {"fine": "32", "note": "2", "warning": "33", "wrong": "1;31"}
WIDTH = 100
SAME = 60  # first characters of two errors that are one


@dataclass(frozen=True)
class Finding:
    """One line of the page. todo: what to do about it; empty where nothing is to be done."""

    kind: Kind
    text: str
    todo: str = ""


@dataclass
class Section:
    """Findings about one thing. numbers: what a program may want to read of them."""

    title: str
    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def fine(self, text: str) -> None:
        self.findings.append(Finding("fine", text))

    def note(self, text: str, todo: str = "") -> None:
        self.findings.append(Finding("note", text, todo))

    def warn(self, text: str, todo: str = "") -> None:
        """Something that will do, and could be better."""
        self.findings.append(Finding("warning", text, todo))

    def wrong(self, text: str, todo: str = "") -> None:
        """Something that will end the run or spoil its result."""
        self.findings.append(Finding("wrong", text, todo))

    @property
    def broken(self) -> bool:
        return any(finding.kind == "wrong" for finding in self.findings)


@dataclass
class Page:
    """All sections, in order, and the command that comes next."""

    then: str = ""
    sections: list[Section] = field(default_factory=list)
    say: Callable[[str], None] = lambda title: None

    @contextmanager
    def section(self, title: str) -> Iterator[Section]:
        """A section that nothing can break: an error becomes a finding, and the next section is looked at."""
        section = Section(title)
        self.sections.append(section)
        self.say(title)
        try:
            yield section
        except (ValueError, OSError) as error:  # said for users
            text = str(error).strip()
            known = any(other.text.startswith(text[:SAME]) for seen in self.sections for other in seen.findings)
            section.note("not possible, for the reason above") if known else section.wrong(text)
        except ImportError as error:
            section.wrong(str(error), "a library is missing, or does not fit the others")
        except Exception as error:
            section.wrong(f"{type(error).__name__}: {str(error).strip()}", "this was not foreseen; the run would fail")

    def count(self, kind: Kind) -> int:
        return sum(finding.kind == kind for section in self.sections for finding in section.findings)

    @property
    def fine(self) -> bool:
        """Whether nothing was found that will hurt."""
        return not self.count("wrong")

    def as_dict(self) -> dict[str, Any]:
        sections = [asdict(section) for section in self.sections]
        counts = {"wrong": self.count("wrong"), "warnings": self.count("warning")}
        return {"fine": self.fine, **counts, "sections": sections, "next": self.then}

    def text(self, colour: bool = False, plain: bool = False) -> str:
        """The page.

        Args:
            colour: with the colours of a terminal.
            plain: with marks of ASCII, for screens that know no others.
        """
        lines = []
        for section in self.sections:
            lines += [f"\033[1m{section.title}\033[0m" if colour else section.title]
            for finding in section.findings:
                mark = (PLAIN_MARKS if plain else MARKS)[finding.kind]
                lines += _finding(finding, mark, f"\033[{COLOURS[finding.kind]}m{mark}\033[0m" if colour else mark)
            lines += [""]
        return "\n".join([*lines, *self._verdict()])

    def _verdict(self) -> list[str]:
        wrong, warnings = self.count("wrong"), self.count("warning")
        said = f"{wrong} thing{'s' * (wrong != 1)} will hurt" if wrong else "Nothing was found that will hurt"
        said += f"; {warnings} could be better." if warnings else "."
        return [said, f"Next: {self.then}"] if self.then and not wrong else [said]


def _finding(finding: Finding, mark: str, shown: str) -> list[str]:
    """A finding in lines: what was found, and below it what to do. Line breaks of messages are kept."""
    indent = " " * (len(mark) + 3)
    lines: list[str] = []
    for text, begin in ((finding.text, ""), (finding.todo, "-> ")):
        for i, line in enumerate(text.splitlines()):
            own = begin if i == 0 else " " * len(begin)
            wrapped = textwrap.wrap(
                line, WIDTH - len(indent) - len(begin), break_long_words=False, break_on_hyphens=False
            )
            lines += [indent + own + wrapped[0]] if wrapped else []
            lines += [indent + " " * len(begin) + rest for rest in wrapped[1:]]
    return [f"  {shown} {lines[0].lstrip()}", *lines[1:]] if lines else []
