"""Every broken recipe of the table gets its one message, at its place; and what only looks broken is read right."""

from __future__ import annotations

import os
import time

import pytest
from broken_table import BROKEN, HOSTILE, SLIPS, Broken

from mmft.recipe import RecipeError, load_recipe
from mmft.recipe.kinds import read_any


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_the_mistake_is_named_at_its_place(tmp_path, broken):
    path = broken.write(tmp_path)
    with pytest.raises(RecipeError) as caught:
        read_any(path, list(broken.overrides))
    assert not broken.missed(caught.value.problems, tmp_path)


def test_the_table_is_not_empty_talk():
    assert len(SLIPS) == 25 and len(BROKEN) >= 40
    # The judge of the table: another line, another key, a second problem and a missing word are all seen.
    broken = Broken("", "r.yaml:2", "seed", ("got 1", "expected 2"))
    assert not broken.missed(["d/r.yaml:2: seed: got 1, expected 2"], "d")
    for wrong in (["d/r.yaml:3: seed: got 1, expected 2"], ["d/r.yaml:2: sed: got 1, expected 2"], []):
        assert broken.missed(wrong, "d")
    assert broken.missed(["d/r.yaml:2: seed: got 1"], "d") and broken.missed(
        ["d/r.yaml:2: seed: got 1, expected 2"] * 2, "d"
    )


def test_hostile_files_are_refused_quickly(tmp_path):
    began = time.process_time()
    for broken in HOSTILE.values():
        with pytest.raises(RecipeError):
            load_recipe(broken.write(tmp_path))
    assert time.process_time() - began < 1.5  # 0.2 in truth; brackets in brackets alone took 2.4 in the parser


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a device", "long name", "NUL"])
def test_what_is_no_plain_file_is_not_opened(tmp_path, kind):
    base = tmp_path / "base.yaml"
    name = {"long name": "x" * 5000 + ".yaml", "NUL": '"a\\0.yaml"'}.get(kind, "base.yaml")
    {"fifo": os.mkfifo, "folder": os.mkdir, "link to a device": lambda path: path.symlink_to("/dev/zero")}.get(
        kind, lambda path: None
    )(base)
    (tmp_path / "r.yaml").write_text(f"seed: 1\nextends: {name}\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2: extends: got \"") as caught:
        load_recipe(tmp_path / "r.yaml")
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("5.0e-4", 5e-4), ("1E-5", 1e-5), ("1", 1.0), (".5", 0.5), ("1_0", 10.0), ("010", 10.0)],
)
def test_numbers_are_numbers(tmp_path, text, value):
    (tmp_path / "r.yaml").write_text(f"train: {{learning_rate: {text}}}")
    assert load_recipe(tmp_path / "r.yaml").train.learning_rate == value


def test_numbers_of_yaml_1_1_too(tmp_path):
    # Under 1.1 rules 1e-5 is text: it must not become a complaint about a good number.
    (tmp_path / "r.yaml").write_text("%YAML 1.1\n---\ntrain:\n  learning_rate: 1e-5\n")
    assert load_recipe(tmp_path / "r.yaml").train.learning_rate == 1e-5


def test_a_byte_order_mark_and_windows_lines_do_no_harm(tmp_path):
    (tmp_path / "r.yaml").write_bytes("\ufeffseed: 3\r\ntrain:\r\n  steps: 4\r\n".encode())
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.seed, recipe.train.steps) == (3, 4)
    (tmp_path / "r.yaml").write_bytes("\ufeffseed: 3\r\ntrain:\r\n  stps: 4\r\n".encode())
    with pytest.raises(RecipeError, match="r.yaml:3: train.stps"):
        load_recipe(tmp_path / "r.yaml")


def test_an_alias_that_is_no_bomb_is_taken(tmp_path):
    (tmp_path / "r.yaml").write_text("data: {train: &s all, eval: *s}\n")
    assert load_recipe(tmp_path / "r.yaml").data.eval == "all"
