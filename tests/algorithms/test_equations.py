"""docs/equations.md and the algorithm pages name functions, tests, metrics and results: all of them are there."""

from __future__ import annotations

import functools
import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "algorithms").glob("*.md"))


def equations() -> list[list[str]]:
    """The cells of every row of the page's tables."""
    lines = (DOCS / "equations.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] != "what"]


@functools.cache
def sources() -> dict[str, str]:
    """Text of each test file by its base name."""
    return {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}


def named(short: str) -> list:
    """Every object that ``file.name`` or ``folder.file.name`` may mean; ``torch.optim.AdamW`` is itself."""
    module, _, name = short.rpartition(".")
    if short.startswith("torch."):
        return [getattr(importlib.import_module(module), name)]
    packages = [ROOT / package for package in ("mmft", "reward_models")]
    files = [path for package in packages for path in package.rglob(f"{module.replace('.', '/')}.py")]
    modules = [importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in files]
    return [getattr(found, name) for found in modules if hasattr(found, name)]


def test_every_row_has_formula_source_function_and_test():
    rows = equations()
    assert len(rows) > 50
    for row in rows:
        assert len(row) == 5, f"{row[0]}: {len(row)} cells; a bar inside a formula is \\lvert"
        assert row[1] and row[2], row[0]
        assert re.fullmatch(r"(`[\w.]+`(, )?)+", row[3]) and re.fullmatch(
            r"(`test_\w+\.py::test_\w+`(, )?)+", row[4]
        ), row


@pytest.mark.parametrize("row", equations(), ids=lambda row: row[0].replace(" ", "_"))
def test_functions_and_tests_of_an_equation_are_there(row):
    for short in re.findall(r"`([\w.]+)`", row[3]):
        found = named(short)
        assert len(found) == 1 and callable(found[0]), f"{short}: {len(found)} such functions"
    for file, name in re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[4]):
        assert f"\ndef {name}(" in sources()[file], f"{file} has no {name}"


def test_every_cited_work_is_in_the_references():
    page = (DOCS / "equations.md").read_text(encoding="utf-8")
    references = page.partition("## References")[2]
    cited = {found for row in equations() for found in re.findall(r"([A-Z][\w-]+)[^;,]*? ((?:19|20)\d\d)", row[2])}
    missing = [f"{name} {year}" for name, year in cited if not re.search(rf"{name}[^\n]* {year}\.", references)]
    assert cited and not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_an_algorithm_page_points_at_code_that_is_there(page):
    text = page.read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+\.py)::([\w.]+)`", text)
    linked = re.findall(r"\[`([\w/]+\.py)::([\w.]+)`\]\(\.\./\.\./\1#\2\)", text)
    assert len(places) >= 3 and linked == places, set(places) - set(linked)
    for file, name in places:
        source = (ROOT / file).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"(def|class) {part}\b|^    {part}:|^{part} = ", source, re.M), f"{file} has no {part}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_results_of_an_algorithm_page_are_those_of_the_benchmarks(page):
    """`file.json: path.to.number = shown`, in a comment behind each figure."""
    text = page.read_text(encoding="utf-8")
    claims = re.findall(r"([-−+]?[\d.]+)(?: %| ×)?\s*<!-- (\w+\.json): ([^>]+?) -->", text)
    for shown, file, path in claims:
        value = json.loads((ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8"))
        for key in path.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
        digits = len(shown.partition(".")[2])
        assert round(float(value), digits) == float(shown.replace("−", "-")), f"{page.name}: {path} is {value}"
