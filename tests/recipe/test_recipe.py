"""Recipes: every mistake is found, at its line, with the nearest right key, before anything heavy is imported."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from mmft.recipe import Recipe, RecipeError, load_recipe, recipe_main
from mmft.recipe.preference import load_preference_recipe
from mmft.recipe.rewards import REWARDS, WITH_TIMEOUT
from mmft.recipe.sections import Algorithm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
    def _write(text: str | bytes) -> Path:
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, list(overrides))
    return [line.replace(str(path), "r.yaml") for line in caught.value.problems]


# What does not go together, beside what broken_table.py has: the file, then what its one problem must begin with.
IMPOSSIBLE = {
    "ragged minibatches": (
        "rollout:\n  prompts_per_step: 10\nalgorithm:\n  num_mini_batches: 4\n",
        "r.yaml:4: algorithm.num_mini_batches: got 4, expected a divisor",
    ),
    "default is to blame": (
        "seed: 0\nrollout:\n  prompts_per_step: 10\nalgorithm: {kl_target: 3, kl_coef: 0}\n",
        "r.yaml:4: algorithm.kl_target: got 3",
    ),
    "reward twice": (
        "rewards:\n- name: bleu\n- name: bleu\n",
        'r.yaml:3: rewards.1.name: got "bleu" a second time',
    ),
    "reward under another's name": (
        "rewards:\n- name: cider_d\n- name: bleu\n  as: cider_d\n",
        'r.yaml:4: rewards.1.as: got "cider_d" a second time',
    ),
    "two functions of one name": (
        "rewards:\n- name: a:score\n- name: b:score\n",
        'r.yaml:3: rewards.1.name: got "score" a second time',
    ),
    "clipped and dense": (
        "rewards:\n- name: bleu\n  credit: dense\n  clip: [0, 1]\n",
        "r.yaml:4: rewards.0.clip: got limits, expected null with credit dense",
    ),
    "shaping by what comes later": (
        "rewards:\n- name: bleu\n  credit: shaping\n  normalize: batch\n",
        "r.yaml:4: rewards.0.normalize: got batch, expected null or running with credit shaping",
    ),
    "a time limit for what has no child": (
        "rewards:\n- name: cider_d\n  timeout: 5\n",
        "r.yaml:3: rewards.0.timeout: got 5.0, expected null with cider_d",
    ),
    "groups of one": (
        "rewards:\n- name: bleu\n  normalize: group\nrollout: {num_generations: 1}\n",
        "r.yaml:3: rewards.0.normalize: got group",
    ),
    "only shares": (
        "seed: 0\nrewards:\n- name: bleu\n  weight: {share: 0.3}\n",
        "r.yaml:2: rewards: got shares of 0.3 together",
    ),
    "shares of everything": (
        "rewards:\n- name: cider_d\n- {name: bleu, weight: {share: 0.5}}\n- {name: rouge_l, weight: {share: -0.5}}\n",
        "r.yaml:1: rewards: got shares of 1.0 together",
    ),
    "long warm-up": ("train:\n  steps: 5\n  warmup_steps: 6\n", "r.yaml:3: train.warmup_steps: got 6"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_combinations_are_named_with_their_line(write, case):
    found = problems(write(case[0]))
    assert len(found) == 1 and found[0].startswith(case[1]), found


def test_all_mistakes_come_at_once_in_file_order(write):
    text = "seed: x\nmodel: {critic: none}\nrollout: {num_generations: 1}\ntrain:\n  step: 1\n  steps: 1\n  steps: 2\n"
    found = problems(write(text), "eval.rows=0")
    places = [line.split(": ")[0] for line in found]
    assert places == ["command line", "r.yaml:1", "r.yaml:3", "r.yaml:5", "r.yaml:7"]


def test_a_wrong_value_does_not_raise_a_false_combination(write):
    # num_generations falls back to its default while checking; only its own mistake may be reported.
    found = problems(write("model: {critic: none}\nrollout: {num_generations: one}\n"))
    assert len(found) == 1 and 'got "one"' in found[0]


def test_none_and_null_are_told_apart(write):
    recipe = load_recipe(write("model: {critic: none, quantize: null}\nwarm_start:\n"))
    assert recipe.model.critic == "none" and recipe.model.quantize is None and recipe.warm_start is None


def test_overrides(write):
    path = write("train: {steps: 5}\nwarm_start: null\nrewards:\n- name: bleu\n")
    recipe = load_recipe(
        path,
        [
            "train.steps=7",
            "train.steps=9",
            "warm_start.epochs=2",
            "rewards.0.weight=0.5",
            "data.prompt=Say a=b",
        ],
    )
    assert recipe.train.steps == 9 and recipe.warm_start.epochs == 2.0 and recipe.rewards[0].weight == 0.5
    assert recipe.data.prompt == "Say a=b"
    assert load_recipe(path, ["data.train_rows="]).data.train_rows is None
    assert load_recipe(path, ["model.lora={r: 4}"]).model.lora.r == 4


def test_an_override_mends_the_file(write):
    assert load_recipe(write("train: {steps: x}\n"), ["train.steps=3"]).train.steps == 3


def test_an_override_is_checked_also_where_the_file_could_not_be_read(write):
    found = problems(write("seed: !x 1\n"), "seed=two")
    assert [line.split(":")[0] for line in found] == ["command line", "r.yaml"] and 'got "two"' in found[0]


def test_missing_file(tmp_path):
    assert problems(tmp_path / "none.yaml") == ["r.yaml: cannot be read: No such file or directory"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_comments_every_key(path, tmp_path):
    load = load_preference_recipe if path.stem == "train_preference" else load_recipe
    recipe = load(path)
    recipe.dump(tmp_path / "copy.yaml")
    assert load(tmp_path / "copy.yaml") == recipe
    for line in path.read_text().splitlines():
        key = line.split("#")[0].rstrip()
        assert not key or key.endswith(":") or "#" in line, f"{path.name}: no comment beside {line!r}"


@pytest.mark.parametrize("name", ["caption_ppo", "caption_a2c", "caption_photos"])
def test_shipped_recipes_show_every_key(name):
    from ruamel.yaml import YAML

    def keys(data, before=""):
        for key, value in data.items():
            yield before + key
            if isinstance(value, dict) and key != "options":
                yield from keys(value, f"{before}{key}.")

    def without_guards(names):  # a section of its own, which a recipe may leave out
        return {key for key in names if key.split(".")[0] != "guards"}

    shown = keys(YAML(typ="safe").load(ROOT / "recipes" / f"{name}.yaml"))
    assert without_guards(shown) == without_guards(keys(load_recipe(ROOT / "recipes" / f"{name}.yaml").model_dump()))


def test_dump_keeps_small_numbers(tmp_path):
    recipe = Recipe.model_validate({"train": {"learning_rate": 1.5e-7}, "data": {"prompt": "no: 1e-5 # really"}})
    recipe.dump(tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_a2c_has_defaults_of_its_own():
    a2c, ppo = Algorithm(name="a2c"), Algorithm()
    assert (a2c.num_ppo_epochs, a2c.cliprange_value) == (1, None)
    assert (ppo.num_ppo_epochs, ppo.cliprange_value) == (2, 0.2)
    assert Algorithm(name="a2c", cliprange_value=0.1).cliprange_value == 0.1


def test_recipes_are_frozen_and_checked_when_built_in_python():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 3
    with pytest.raises(ValueError, match="num_mini_batches: got 5"):
        Recipe.model_validate({"algorithm": {"num_mini_batches": 5}})


def test_a_card_beside_the_recipe_is_found(write, tmp_path):
    (tmp_path / "card.yaml").write_text("name: x\n")
    assert load_recipe(write("data: {name: card.yaml}")).data.name == str(tmp_path / "card.yaml")


# --- rewards and guards ----------------------------------------------------------------------------

# What stands beside `- name: bleu`, from line 3 on; then what the one problem must begin with and hold.
WRONG_REWARDS = {
    "text as weight": ("weight: heavy", 'rewards.0.weight: got "heavy"', "or a section with one of {schedule"),
    "list as weight": ("weight: [1]", "rewards.0.weight: got a list", "a finite number"),
    "unknown kind of weight": ("weight: {shar: 0.3}", "rewards.0.weight: got a section", "{share}"),
    "typo in a weight": ("weight: {share: 0.3, from: 1}", "rewards.0.weight.from: got an unknown key", "one of share"),
    "typo with a near key": (
        "weight: {schedule: linear, step: 3}",
        "rewards.0.weight.step:",
        "rewards.0.weight.steps?",
    ),
    "near the reserved word": (
        "weight: {schedule: linear, form: 3}",
        "rewards.0.weight.form:",
        "rewards.0.weight.from?",
    ),
    "unknown schedule": ("weight: {schedule: linar}", 'rewards.0.weight.schedule: got "linar"', "mean linear?"),
    "no steps": ("weight: {schedule: linear, steps: 0}", "rewards.0.weight.steps: got 0", ">= 1"),
    "text as limit": ("weight: {schedule: linear, from: x}", 'rewards.0.weight.from: got "x"', "a finite number"),
    "whole share": ("weight: {share: 1}", "rewards.0.weight.share: got 1", "< 1"),
    "share of nothing": ("weight: {share: 0}", "rewards.0.weight.share: got 0", "between"),
    "no column": ("weight: {column: ''}", 'rewards.0.weight.column: got ""', "not empty"),
    "no condition": ("weight: {when: {}}", "rewards.0.weight.when: got an empty section", ""),
    "unknown credit": ("credit: dens", 'rewards.0.credit: got "dens"', "mean dense?"),
    "unknown normalisation": ("normalize: yes", 'rewards.0.normalize: got "yes"', "running, batch, group or null"),
    "one limit": ("clip: [1]", "rewards.0.clip: got a list of 1", "[low, high] with low < high"),
    "limits swapped": ("clip: [1, -1]", "rewards.0.clip: got a list of 2", "low < high"),
    "unknown policy": ("nonfinite: skip", 'rewards.0.nonfinite: got "skip"', "raise, drop or zero"),
    "no time": ("timeout: 0", "rewards.0.timeout: got 0", "> 0"),
    "the field's Python name": ("as_: x", "rewards.0.as_: got an unknown key", "mean rewards.0.as?"),
}


@pytest.mark.parametrize("case", WRONG_REWARDS.values(), ids=WRONG_REWARDS)
def test_mistakes_in_a_reward_are_named_with_their_line(write, case):
    found = problems(write(f"rewards:\n- name: bleu\n  {case[0]}\n"))
    assert len(found) == 1 and found[0].startswith(f"r.yaml:3: {case[1]}") and case[2] in found[0], found


def test_rewards_reach_build_rewards_as_they_were_written(write, tmp_path):
    # The plain data of a loaded, dumped and loaded recipe is what the file says; `as` and `from` are not renamed.
    path = write(
        "rewards:\n"
        "- {name: cider_d, credit: dense, normalize: running}\n"
        "- {name: bleu, as: bleu_2, weight: {schedule: cosine, from: 0.5, steps: 40, start: 3}, options: {n: 2}}\n"
        "- {name: bleu, weight: {share: -0.25}, clip: [-1, 2], nonfinite: drop}\n"
        "- {name: 'a.b:f', weight: {column: certainty, scale: 2}, timeout: 5}\n"
        "- {name: 'a.b:f', as: g, weight: {when: {kind: question, hard: true}}}\n"
    )
    load_recipe(path).dump(tmp_path / "copy.yaml")
    recipe = load_recipe(tmp_path / "copy.yaml")
    assert recipe == load_recipe(path) and [r.label for r in recipe.rewards] == ["cider_d", "bleu_2", "bleu", "f", "g"]
    plain = [reward.model_dump() for reward in recipe.rewards]
    assert [entry["weight"] for entry in plain] == [
        1.0,
        {"schedule": "cosine", "from": 0.5, "to": 1.0, "steps": 40, "start": 3},
        {"share": -0.25},
        {"column": "certainty", "scale": 2.0},
        {"when": {"kind": "question", "hard": True}, "weight": 1.0, "otherwise": 0.0},
    ]
    assert plain[1]["as"] == "bleu_2" and plain[2]["clip"] == [-1.0, 2.0] and plain[3]["timeout"] == 5.0
    from reward_models.weights import parse_weight

    assert parse_weight(plain[1]["weight"]).at(43) == 1.0  # the other side reads the same keys


def test_the_recipe_knows_the_rewards_that_there_are():
    from reward_models.named import BUILT_IN

    assert list(BUILT_IN) == REWARDS


def test_guards_log_by_default_and_can_be_switched_off(write):
    guards = load_recipe(
        write("guards: {share: null, held_out: {action: rollback}, bad_endings: {limit: 0.5}}\n")
    ).guards
    assert guards.share is None and guards.blank_picture.every == 0
    assert (guards.held_out.action, guards.held_out.patience) == ("rollback", 2)
    assert (guards.bad_endings.action, guards.bad_endings.limit) == ("log", 0.5)
    found = problems(write("guards:\n  repetition: {limt: 1}\n  share: {action: halt}\n  length_drift: {limit: 0}\n"))
    assert [line.split(": got")[0] for line in found] == [
        "r.yaml:2: guards.repetition.limt",
        "r.yaml:3: guards.share.action",
        "r.yaml:4: guards.length_drift.limit",
    ]


# --- the command line ------------------------------------------------------------------------------


def test_command_line(write, tmp_path):
    path = str(write("seed: 3\n"))
    recipe, resume, allowed = recipe_main("test", [path, "train.steps=2"])
    assert (recipe.seed, recipe.train.steps, resume, allowed) == (3, 2, None, [])
    assert recipe_main("test", [path, "--resume"])[1] == "latest"
    assert recipe_main("test", [path, "--resume", str(tmp_path)])[1] == str(tmp_path)
    words = ["--resume", "train.steps=2", path]  # an override is no checkpoint
    recipe, resume, allowed = recipe_main("test", [*words, "--allow-change", "seed", "--allow-change", "dataset"])
    assert (recipe.seed, recipe.train.steps, resume, allowed) == (3, 2, "latest", ["seed", "dataset"])


@pytest.mark.parametrize(
    "words", [["a.yaml", "b.yaml"], ["--resume", "nowhere"], ["--steps", "3"], ["--allow-change", "seed"]]
)
def test_wrong_command_lines_end_with_code_2(words):
    with pytest.raises(SystemExit) as caught:
        recipe_main("test", words)
    assert caught.value.code == 2


def test_a_wrong_recipe_ends_with_code_2_before_anything_heavy(tmp_path):
    # The script's default recipe is the YAML beside it; torch must not have been imported by then.
    (tmp_path / "job.yaml").write_text("train:\n  step: 1\nsed: 2\n")
    (tmp_path / "job.py").write_text(
        "import atexit, sys\n"
        "atexit.register(lambda: print('HEAVY' if {'torch', 'transformers'} & set(sys.modules) else 'LIGHT'))\n"
        "from mmft.recipe import recipe_main\n"
        "recipe_main('a job')\n"
        "print('STARTED')\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "job.py")],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert done.returncode == 2 and done.stdout.strip() == "LIGHT"
    assert "job.yaml:2: train.step:" in done.stderr and "job.yaml:3: sed:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["x=" + "y" * 5000], ["--resume", "x=" + "y" * 5000]])
def test_a_long_override_is_no_file_name(write, words, capsys):
    with pytest.raises(SystemExit):  # not an OSError: file name too long
        recipe_main("test", [str(write("seed: 3\n")), *words])
    assert "command line: x: got an unknown key" in capsys.readouterr().err


def test_the_recipe_knows_which_rewards_take_a_time_limit():
    from reward_models.named import BUILT_IN, built_in

    light = [name for name in BUILT_IN if name != "preference"]  # which needs torch, and takes none
    assert [n for n in light if "timeout" in inspect.signature(built_in(n)).parameters] == WITH_TIMEOUT


def test_a_reward_that_is_only_logged_may_be_dense_without_a_critic(write):
    text = "model: {critic: none}\nrewards:\n  - {name: bleu}\n  - {name: cider_d, credit: dense, weight: 0}\n"
    assert load_recipe(write(text)).rewards[1].credit == "dense"


def test_dense_credit_needs_a_critic(write):
    path = write("model: {critic: none}\nrewards:\n  - {name: cider_d, credit: dense}\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert len(error.value.problems) == 1 and "rewards.0.credit: got dense, expected last" in error.value.problems[0]
