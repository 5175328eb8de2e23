"""A key that nobody reads is a promise broken in silence: every field is read, and where it is handed on, arrives."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from field_reads import ROOT, Read, attributes_of, reads, sources
from ruamel.yaml import YAML

from mmft.recipe import sections as policy
from mmft.recipe.messages import fields_of, is_section, without_null
from mmft.recipe.preference import PreferenceRecipe
from mmft.recipe.rewards import Guards, Reward
from mmft.recipe.strict_yaml import Section

ROOMS = ["mmft/training", "mmft/vlm", "mmft/data"]


def every_section(kind: type[Section]) -> Iterator[type[Section]]:
    yield kind
    for info in kind.model_fields.values():
        inner, _ = without_null(info.annotation)
        if is_section(inner):
            yield from every_section(inner)


def arrived() -> dict[type[Section], set[str]]:
    """Of the sections that are handed on whole, what is read where they arrive."""
    training, rewards = sources("mmft/training"), sources("reward_models")
    config = options_read()
    renamed = {"max_steps": "steps", "lr_scheduler_type": "lr_schedule", "save_steps": "save_every"}
    config |= {renamed[name] for name in config & set(renamed)}
    part = attributes_of(rewards, "part") | {"as_" if key == "as" else key for key in keys_of(rewards, "spec")}
    found: dict[type[Section], set[str]] = dict.fromkeys((policy.Algorithm, policy.Rollout, policy.Train), config)
    found[Reward] = part
    found[policy.Vllm] = used_parameters(training, "vllm_engine")
    found[policy.Video] = attributes_of(class_of("Clips"), "self")
    found[policy.Audio] = attributes_of(class_of("Sounds"), "self")
    guard = attributes_of(training, "guard")
    return found | {without_null(info.annotation)[0]: guard for info in Guards.model_fields.values()}


def options_read() -> set[str]:
    """The options of the trainers that are read outside the file that defines and checks them."""
    outside = [module for module in sources("mmft/training") if not {"PPOConfig"} & names_of(module)]
    return attributes_of(outside, "config", "args", "kl")  # `kl` stands for the config where the penalty is made


def names_of(module: ast.Module) -> set[str]:
    return {node.name for node in module.body if isinstance(node, ast.ClassDef)}


def keys_of(modules: list[ast.Module], name: str) -> set[str]:
    """The keys that are taken out of the mapping of that name, by brackets or by ``get``."""
    found = set()
    for node in (node for module in modules for node in ast.walk(module)):
        if isinstance(node, ast.Subscript):
            owner, key = node.value, node.slice
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and node.args
        ):
            owner, key = node.func.value, node.args[0]
        else:
            continue
        if isinstance(owner, ast.Name) and owner.id == name and isinstance(key, ast.Constant):
            found.add(key.value)
    return found


def class_of(name: str, room: str = "mmft/data") -> list[ast.Module]:
    nodes = [node for module in sources(room) for node in module.body]
    return [ast.Module([node], []) for node in nodes if isinstance(node, ast.ClassDef) and node.name == name]


def used_parameters(modules: list[ast.Module], name: str) -> set[str]:
    nodes = (node for module in modules for node in module.body)
    function = next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name)
    return {node.id for part in function.body for node in ast.walk(part) if isinstance(node, ast.Name)}


def limits() -> set[str]:
    """The guards that `from_recipe` asks for by name."""
    nodes = [node for module in sources("mmft/training") for node in module.body]
    named = (node for node in nodes if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LIMITS")
    return set(ast.literal_eval(next(named).value))


def unread(kind: type[Section], found: set[Read], beside: dict[type[Section], set[str]]) -> list[str]:
    return [
        f"{section.__name__}.{name}"
        for section in every_section(kind)
        for name in section.model_fields
        if (section, name) not in found and name not in beside.get(section, set())
    ]


def test_every_field_is_read():
    found, handed_on = reads(sources(*ROOMS))
    there = arrived() | {Guards: limits()}
    # These two are also compared whole with those of a checkpoint, which is no reading.
    assert handed_on - {policy.WarmStart, policy.Lora} <= set(there), "say in `arrived` where this is read"
    assert unread(policy.Recipe, found, there) == []
    assert unread(PreferenceRecipe, found, {}) == []


def test_every_option_of_the_trainers_is_read():
    """What `from_recipe` passes on under another name is a field of these, and would be lost here."""
    held = class_of("PPOConfig", "mmft/training")[0].body[0]
    fields = {node.target.id for node in held.body if isinstance(node, ast.AnnAssign)}
    assert len(fields) > 40 and fields - options_read() == set()


def test_every_key_of_the_supervised_recipe_is_read_by_supervised_training():
    found, handed_on = reads(sources(*ROOMS), start="run_supervised")

    def dead(section: type[Section], data: dict, before: str = "") -> Iterator[str]:
        for name, value in data.items():
            inner, _ = without_null(fields_of(section)[name].annotation)
            if (section, name) not in found and section not in handed_on:
                yield before + name
            if is_section(inner) and isinstance(value, dict):
                yield from dead(inner, value, f"{before}{name}.")

    data = YAML(typ="safe", pure=True).load(ROOT / "recipes" / "caption_sft.yaml")
    assert list(dead(policy.Recipe, data)) == []
    assert list(dead(policy.Recipe, {"algorithm": {"gamma": 1.0}, "output": {"trackers": []}})) == [
        "algorithm",
        "algorithm.gamma",
        "output.trackers",
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(recipe): return recipe.train.steps", {"train", "steps"}),
        ("def f(recipe):\n a, b = recipe.train, recipe.eval\n return b.rows, a", {"train", "eval", "rows"}),
        ("def f(recipe):\n def g(): return recipe.seed\n return g()", {"seed"}),
        ("def f(recipe): return g(1, recipe.eval)\ndef g(x, y): return x.steps, y.every", {"eval", "every"}),
        ("def f(recipe): return [r.weight for r in recipe.rewards]", {"rewards", "weight"}),
        ("def f(recipe): return recipe.eval.model_dump(), other.rows", {"eval"}),
        ("def f(recipe):\n t = recipe.train\n t = other\n return t.steps", {"train"}),
        ("def f(thing): return thing.train.steps", set()),
    ],
)
def test_the_follower_sees_what_is_read_and_nothing_else(source, expected):
    assert {name for _, name in reads([ast.parse(source)])[0]} == expected
