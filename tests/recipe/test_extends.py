"""`extends`: what is merged, what replaces, and where each value is said to come from."""

from __future__ import annotations

import pytest

from mmft.recipe import RecipeError, load_recipe
from mmft.recipe.kinds import read_any
from mmft.recipe.preference import PreferenceRecipe, load_preference_recipe


@pytest.fixture
def files(tmp_path):
    def write(**texts: str):
        for name, text in texts.items():
            path = tmp_path / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return tmp_path / "r.yaml"

    return write


def test_sections_are_merged_and_everything_else_replaced(files):
    path = files(
        r="extends: base.yaml\ntrain: {steps: 7}\nrewards: [{name: rouge_l}]\n"
        "warm_start: null\nguards: {share: null}\n",
        base="train: {steps: 3, learning_rate: 2.0e-4}\nrewards: [{name: bleu}, {name: cider_d}]\n"
        "warm_start: {epochs: 2}\nguards: {share: {limit: 0.5}, repetition: {limit: 0.5}}\nseed: 9\n",
    )
    recipe = load_recipe(path)
    assert (recipe.train.steps, recipe.train.learning_rate, recipe.seed) == (7, 2e-4, 9)
    assert [reward.name for reward in recipe.rewards] == ["rouge_l"]
    assert recipe.warm_start is None and recipe.guards.share is None and recipe.guards.repetition.limit == 0.5


def test_paths_count_from_the_file_they_stand_in(files):
    path = files(
        r="extends: sub/middle.yaml\nseed: 1\n",
        sub__middle="extends: ../low.yaml\nseed: 2\ntrain: {steps: 2}\n",
        low="seed: 3\ntrain: {steps: 3, warmup_steps: 1}\neval: {rows: 3}\n",
    )
    recipe = load_recipe(path)
    assert (recipe.seed, recipe.train.steps, recipe.train.warmup_steps, recipe.eval.rows) == (1, 2, 1, 3)


def test_a_circle_by_another_path_is_one(files):
    path = files(r="extends: sub/middle.yaml\n", sub__middle="seed: 1\nextends: ../r.yaml\n")
    with pytest.raises(
        RecipeError, match=r"middle\.yaml:2: .*comes back to itself \(r.yaml -> middle.yaml -> r.yaml\)"
    ):
        load_recipe(path)


def test_a_card_is_looked_for_beside_the_file_that_names_it(files, tmp_path):
    path = files(r="extends: sub/base.yaml\n", sub__base="data: {name: card.yaml}\n", sub__card="name: x\n")
    assert load_recipe(path).data.name == str(tmp_path / "sub" / "card.yaml")


def test_what_the_upper_recipe_replaces_is_not_complained_of(files):
    # Neither for its value nor for its kind: the section's own mistakes stay.
    path = files(r="extends: base.yaml\ntrain: {steps: 3}\n", base="train: {steps: x, warmup_steps: y}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert [line.split(": got")[0].rpartition("/")[2] for line in caught.value.problems] == [
        "base.yaml:1: train.warmup_steps"
    ]


def test_mistakes_of_all_files_come_at_once_each_with_its_own(files):
    path = files(
        r="train: {stps: 1}\nextends: base.yaml\n", base="extends: low.yaml\n\nseed: x\nseed: 2\n", low="evl: 1\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["eval.rows=0"])
    places = [line.rpartition("/")[2].split(": ")[0] for line in caught.value.problems]
    assert places == ["command line", "r.yaml:1", "base.yaml:3", "base.yaml:4", "low.yaml:1"]


@pytest.mark.parametrize("base", [{}, {"base": "train:\n\tsteps: 1\n"}], ids=["missing", "broken"])
def test_nothing_is_said_of_combinations_with_a_base_that_cannot_be_read(files, base):
    text = "extends: base.yaml\nrollout: {num_generations: 1}\nmodel: {critic: none}\ntrain: {stps: 1}\n"
    path = files(r=text, **base)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert len(caught.value.problems) == 2 and any("train.stps" in problem for problem in caught.value.problems)


def test_overrides_come_last(files):
    path = files(r="extends: base.yaml\n", base="rewards: [{name: bleu}]\n")
    assert load_recipe(path, ["rewards.0.weight=0.5"]).rewards[0].weight == 0.5


def test_a_preference_recipe_extends_too(files):
    path = files(
        r="extends: base.yaml\nhead: {heads: 2}\n", base="head: {width: 64}\npairs: {train_rows: 5, held_out_rows: 5}\n"
    )
    recipe = load_preference_recipe(path)
    assert (recipe.head.heads, recipe.head.width, recipe.pairs.train_rows) == (2, 64, 5)
    assert isinstance(read_any(path)[0], PreferenceRecipe)


def test_a_recipe_for_another_script_is_told_so(files):
    path = files(r="seed: 1\npairs: {train_rows: 5, held_out_rows: 5}\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2: pairs: belongs .* `python recipes/train_preference.py`"):
        load_recipe(path)
    path = files(r="eval: {rows: 5}\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:1: eval: belongs .* `accelerate launch recipes/caption_ppo.py`"):
        load_preference_recipe(path)
    with pytest.raises(
        RecipeError, match="train.stps: got an unknown key"
    ):  # in doubt it is the one that was asked for
        load_preference_recipe(files(r="train: {stps: 3}\n"))


def test_every_value_knows_its_place(files, tmp_path):
    path = files(
        r="extends: base.yaml\n\ntrain: {steps: 7}\nrewards: [{name: bleu}]\n",
        base="train:\n  steps: 3\n  warmup_steps: 1\nrewards:\n- name: cider_d\n  weight: 2\n",
    )
    _, document = read_any(path, ["eval.rows=4", "rewards.0.weight=3"])
    places = {key: str(place).removeprefix(f"{tmp_path}/") for key, place in document.places.items()}
    assert places["train", "steps"] == "r.yaml:3" and places["train", "warmup_steps"] == "base.yaml:3"
    assert places["eval", "rows"] == places["rewards", 0, "weight"] == "command line"
    assert places["rewards", 0, "name"] == "r.yaml:4"
    assert ("rewards", 0, "credit") not in places and ("extends",) not in places
