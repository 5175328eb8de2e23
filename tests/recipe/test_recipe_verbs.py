"""`mmft recipe show | check | schema | reference`, and the files in the tree that they make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from broken_table import HOSTILE, SLIPS, VALUES
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from mmft.cli import main
from mmft.recipe import Recipe, load_recipe
from mmft.recipe.kinds import read_any
from mmft.recipe.preference import PreferenceRecipe
from mmft.recipe.schema import json_schema, reference
from mmft.recipe.show import annotated

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
KINDS = {"recipe": Recipe, "preference": PreferenceRecipe}


@pytest.fixture(scope="module")
def validators():
    return {name: Draft202012Validator(json_schema(kind)) for name, kind in KINDS.items()}


# --- show ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_shown_is_the_same_recipe(path, tmp_path):
    recipe, document = read_any(path)
    text = annotated(recipe, document)
    (tmp_path / "shown.yaml").write_text(text)
    assert read_any(tmp_path / "shown.yaml")[0] == recipe
    for line in text.splitlines():  # every value has its origin, and only values do
        assert line.rstrip().endswith(":") or "  # " in line, line


def test_each_value_is_shown_with_its_origin(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text("train:\n  steps: 3\n  lr_schedule: linear\n")
    (tmp_path / "r.yaml").write_text("extends: base.yaml\nrewards:\n- name: bleu\n  clip: [0, 1]\n")
    words = ["data.prompt='a  # b: c'", "rewards.0.clip.1=2", "rewards.0.options={api_key: xyzzy, n: 2}"]
    assert main(["recipe", "show", str(tmp_path / "r.yaml"), "train.steps=7", *words]) == 0
    shown = [" ".join(line.replace(f"{tmp_path}/", "").split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "steps: 7 # command line",
        "lr_schedule: linear # base.yaml:3",
        "- name: bleu # r.yaml:3",
        "clip: [0.0, 2.0] # r.yaml:4, command line",
        "seed: 0 # default",
        "warm_start: null # default",
        "prompt: 'a # b: c' # command line",
        "n: 2 # command line",
        "api_key: (hidden) # command line",
    ):
        assert line in shown, (line, shown)
    assert "xyzzy" not in "\n".join(shown)


# --- check -----------------------------------------------------------------------------------------


def test_check_finds_every_mistake_of_every_file(tmp_path, capsys):
    good, bad, worse = (tmp_path / f"{name}.yaml" for name in ("good", "bad", "worse"))
    good.write_text("seed: 1\n")
    bad.write_text("sed: 1\ntrain: {steps: x}\n")
    worse.write_text("pairs: {train_rows: 3, held_out_rows: 0}\n")
    assert main(["recipe", "check", str(good), str(bad), str(worse), str(tmp_path / "none.yaml")]) == 2
    said = capsys.readouterr()
    assert said.out == f"{good}: fine\n"
    assert [line.split(": ")[0] for line in said.err.splitlines()] == [
        f"{bad}:1",
        f"{bad}:2",
        f"{worse}:1",
        f"{tmp_path}/none.yaml",
    ]
    assert main(["recipe", "check", *map(str, SHIPPED)]) == 0


def test_check_in_a_fresh_process_imports_nothing_heavy(tmp_path):
    (tmp_path / "r.yaml").write_text("train: {stps: 1}\n")
    code = f"import sys; from mmft.cli import main; code = main(['recipe', 'check', {str(tmp_path / 'r.yaml')!r}]); "
    code += "print(code, sorted({'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ})
    assert done.stdout.strip() == "2 []" and "mean train.steps?" in done.stderr and "Traceback" not in done.stderr


# --- schema ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_schema_in_the_tree_is_current(name, tmp_path):
    words = ["recipe", "schema", *(["--preference"] if name == "preference" else [])]
    assert main([*words, "--output", str(tmp_path / "schema.json")]) == 0
    shipped = ROOT / "recipes" / f"{name}.schema.json"
    made = (tmp_path / "schema.json").read_text()
    assert made == shipped.read_text(), f"mmft {' '.join(words)} --output {shipped.relative_to(ROOT)}"
    Draft202012Validator.check_schema(json.loads(made))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_fit_their_schema_and_name_it(path, validators):
    name = "preference" if path.stem == "train_preference" else "recipe"
    assert f"# yaml-language-server: $schema={name}.schema.json\n" in path.read_text()
    data = YAML(typ="safe", pure=True).load(path)
    assert [error.message for error in validators[name].iter_errors(data)] == []
    other = next(validator for key, validator in validators.items() if key != name)
    assert not other.is_valid(data)


WRONG = {f"{at}: {name}": case for at, cases in (("slip", SLIPS), ("value", VALUES)) for name, case in cases.items()}
WRONG |= {name: HOSTILE[name] for name in ("no for false",)}


@pytest.mark.parametrize("broken", WRONG.values(), ids=WRONG)
def test_broken_recipes_do_not_fit(broken, validators):
    data = YAML(typ="safe", pure=True).load(broken.text)
    validator = validators["preference" if "pairs" in data else "recipe"]
    assert not validator.is_valid(data)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("extends: base.yaml", True),
        ("extends: base.txt", False),
        ("rewards: [{name: 'mine.py:polite', weight: {share: 0.3}}]", True),
        ("rewards: [{name: bleu, weight: {schedule: linear, from: 0.5, steps: 3}}]", True),
        ("rewards: [{name: bleu, weight: {column: x, scale: 2}}, {name: bleu, as: b, weight: {when: {k: 1}}}]", True),
        ("rewards: [{name: bleu, weight: {share: 0}}]", False),
        ("rewards: [{name: bleu, weight: {share: 1}}]", False),
        ("rewards: [{name: bleu, weight: {shar: 0.3}}]", False),
        ("rewards: [{name: bleu, as_: x}]", False),
        ("rewards: [{name: bleu, clip: [1]}]", False),
        ("rewards: [{name: bleu, options: {any: [thing, 3]}}]", True),
        ("rewards: []", False),
        ("warm_start: null", True),
        ("model: null", False),
        ("guards: {share: null}", True),
        ("seed: 4294967296", False),
    ],
)
def test_the_schema_and_the_reader_agree(text, fits, validators, tmp_path):
    assert validators["recipe"].is_valid(YAML(typ="safe", pure=True).load(text)) == fits
    if "extends" not in text:
        (tmp_path / "r.yaml").write_text(text.replace("bleu", "cider_d", 1))
        try:
            load_recipe(tmp_path / "r.yaml")
        except ValueError as error:
            assert not fits or "shares of" in str(error)  # what goes with what is beyond a schema
        else:
            assert fits


# --- reference -------------------------------------------------------------------------------------


def test_the_reference_page_is_current():
    page = ROOT / "docs" / "recipe_keys.md"
    assert page.read_text() == reference(), "mmft recipe reference --output docs/recipe_keys.md"


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_key_has_a_meaning(kind):
    def undescribed(schema):
        for name, value in schema.get("properties", {}).items():
            if not value.get("description"):
                yield name
            if isinstance(value.get("default"), float | int | str | bool | list):
                assert "type" in value or "anyOf" in value or "oneOf" in value or "enum" in value, name

    whole = json_schema(kind)
    assert [name for part in (whole, *whole["$defs"].values()) for name in undescribed(part)] == []
    assert all(
        part["additionalProperties"] is False and part["description"] for part in (whole, *whole["$defs"].values())
    )
