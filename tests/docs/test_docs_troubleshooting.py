"""The messages that docs/troubleshooting.md quotes are those that the program says."""

from __future__ import annotations

import ast
import re

import pytest
from doc_blocks import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
# What other programs say.
OTHERS = {"CUDA out of memory", "Killed", "operator torchvision::nms does not exist", "mmft: command not found"}
QUOTED = re.compile(r"`([^`]+)`")


def texts(node: ast.AST) -> str | None:
    """A string of the source, `…` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{\w*(:[^}]*)?\}", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


@pytest.fixture(scope="module")
def said() -> list[str]:
    found = [(ROOT / "Makefile").read_text()]
    for package in ("mmft", "reward_models"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text("utf-8"))
            found += [text for text in map(texts, ast.walk(tree)) if text]
    return found


def messages() -> list[str]:
    cells = re.findall(r"^\| (.*?) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    quoted = [text for cell in cells for text in QUOTED.findall(cell)]
    return [text for text in quoted if text not in OTHERS and (" " in text or "…" in text)]


def is_said(message: str, found: list[str]) -> bool:
    """Whether the pieces between the gaps stand in one text of the source, in that order."""
    pieces = [piece.strip() for piece in message.split("…") if piece.strip()]
    pattern = re.compile(".*?".join(map(re.escape, pieces)), re.DOTALL)
    return any(pattern.search(text) for text in found)


def test_every_message_quoted_is_one_of_the_program(said):
    assert len(messages()) > 35
    wrong = [message for message in messages() if not is_said(message, said)]
    assert not wrong, wrong
    assert not is_said("no such … message is … said", said)
