"""Imports point one way (CONTRIBUTING.md, "Layout"). Read from the source by AST, so that nothing has to run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {".venv", "runs", "build", "dist"}

# Height of each room of mmft; a file may import its own room and anything lower. Rooms of one height do not know
# each other.
HEIGHTS = {
    "recipe": 0,
    "batch": 0,
    "algorithms": 1,
    "vlm": 2,
    "data": 2,
    "evaluation": 2,
    "hub": 3,
    "training": 4,
    "inference": 5,
    "cli": 6,
}
NEVER_IN_REWARDS = {"mmft", "trl", "accelerate", "deepspeed"}


def python_files(*folders: str) -> list[Path]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(p for p in found if not SKIPPED & set(p.relative_to(ROOT).parts))


def imports(source: str, package: str) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import, the lazy ones inside functions included.

    `from a import b` counts as `a.b`, because b may be a module. `package` resolves relative imports.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def imports_of(path: Path) -> list[tuple[int, str]]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return imports(path.read_text(encoding="utf-8"), package)


def room(name: str) -> str | None:
    """The room a dotted name of mmft lies in."""
    parts = name.split(".")
    if parts[0] != "mmft" or len(parts) == 1:
        return None
    return parts[1]


def runs_back(importer: str | None, imported: str) -> bool:
    """Whether an import from one room of mmft into another points up or sideways."""
    target = room(imported)
    if importer is None or target is None or target == importer or target not in HEIGHTS:
        return False
    return HEIGHTS[target] >= HEIGHTS[importer]


def report(broken: list[str]) -> None:
    assert not broken, "\n" + "\n".join(broken)


def room_of(path: Path) -> str | None:
    parts = path.relative_to(ROOT / "mmft").with_suffix("").parts
    return None if parts == ("__init__",) else parts[0]


def test_every_room_has_a_height():
    rooms = {room_of(path) for path in python_files("mmft")} - {None, ""}
    assert rooms <= set(HEIGHTS), f"give {rooms - set(HEIGHTS)} a place in HEIGHTS"


def test_no_arrow_runs_back():
    report(
        [
            f"{path.relative_to(ROOT)}:{line}: {room_of(path)} must not import {name}"
            for path in python_files("mmft")
            for line, name in imports_of(path)
            if runs_back(room_of(path), name)
        ]
    )


def test_algorithms_know_torch_alone():
    allowed = sys.stdlib_module_names | {"torch"}
    report(
        [
            f"{path.relative_to(ROOT)}:{line}: {name}"
            for path in python_files("mmft/algorithms")
            for line, name in imports_of(path)
            if name.split(".")[0] not in allowed and room(name) not in ("algorithms", "batch")
        ]
    )


def test_rewards_stand_alone():
    report(
        [
            f"{path.relative_to(ROOT)}:{line}: reward_models must not import {name}"
            for path in python_files("reward_models")
            for line, name in imports_of(path)
            if name.split(".")[0] in NEVER_IN_REWARDS
        ]
    )


def test_rewards_import_with_the_trainer_side_blocked():
    """The same at run time: an import by string, or by way of a third package, is invisible to AST."""
    block = "".join(f"sys.modules[{name!r}] = None; " for name in sorted(NEVER_IN_REWARDS))
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in python_files("reward_models")
        if path.name != "__main__.py"
    ]
    code = f"import sys, importlib; {block}[importlib.import_module(m) for m in {modules!r}]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_imports_recipes_tests_or_benchmarks():
    """Recipes are launched. Benchmarks may share their models, and tests may try a benchmark out."""
    own = {"benchmarks": ("benchmarks",), "tests": ("benchmarks",)}
    report(
        [
            f"{path.relative_to(ROOT)}:{line}: {name}"
            for path in python_files("mmft", "reward_models", "recipes", "benchmarks", "tests")
            for line, name in imports_of(path)
            if name.split(".")[0] in ("recipes", "tests", "benchmarks")
            and name.split(".")[0] not in own.get(path.relative_to(ROOT).parts[0], ())
        ]
    )


def test_no_drawer_for_everything():
    """A file named utils is where rooms go to lose their walls."""
    report([str(p) for p in python_files("mmft", "reward_models", "recipes", "tests") if p.stem == "utils"])


@pytest.mark.parametrize(
    ("importer", "imported", "back"),
    [
        ("vlm", "mmft.training.trainer", True),
        ("vlm", "mmft.data", True),
        ("algorithms", "mmft.vlm.policy", True),
        ("batch", "mmft.algorithms.losses", True),
        ("training", "mmft.vlm.policy", False),
        ("training", "mmft.recipe.strict_yaml.read", False),
        ("vlm", "mmft.vlm.families", False),
        ("training", "reward_models.metrics.cider", False),
        ("data", "mmft.cli.main", True),
    ],
)
def test_the_rule_itself(importer, imported, back):
    assert runs_back(importer, imported) is back


def test_finds_lazy_and_relative_imports():
    source = "def f():\n    from ..training import trainer\nfrom . import families\nimport mmft.cli\n"
    assert [name for _, name in sorted(imports(source, "mmft.vlm"))] == [
        "mmft.training.trainer",
        "mmft.vlm.families",
        "mmft.cli",
    ]
