"""docs/metrics.md against what runs really write: no key without an entry, no entry without a key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_trainer import count_wanted, trainer_of
from vllm_stand_in import StandIn

from mmft.evaluation.captioning import score_captions
from mmft.training import diagnoses, guards
from mmft.training.config import A2CConfig
from mmft.training.diagnoses import DIAGNOSES
from mmft.training.guards import Guard
from mmft.training.trainer import A2CTrainer
from reward_models import DocumentFrequencies, RewardPart, WeightedRewards

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
ENTRIES = re.findall(r'^\| <a id="([^"]+)"></a>`([^`]+)` \|(.*)\|$', PAGE.read_text(), re.MULTILINE)


def captions(texts, opened, ended):
    references = [["a dog on the grass"], ["two red birds"], ["one house"]][: len(texts)]
    return score_captions(texts, references, DocumentFrequencies.from_references(references), lambda text, i: (1, 2))


def as_entry(key: str) -> str:
    return re.sub(r"(^|/)(reward|share)/.+", r"\1\2/<part>", key)


@pytest.fixture(scope="module")
def written(tiny_model, tmp_path_factory) -> set[str]:
    """The keys of short runs with many options on."""
    folder, server = tmp_path_factory.mktemp("runs"), StandIn(tiny_model("llava"))
    parts = [
        RewardPart("wanted", count_wanted),
        RewardPart("length", lambda completions, **_: [float(len(text)) for text in completions]),
    ]
    everything = {
        "reward": WeightedRewards(parts),
        "kl_target": 1.0,
        "entropy_coef": 0.01,
        "num_mini_batches": 2,
        "skip_spikes": 50.0,
        "guards": {"blank_picture": Guard(0.4, every=1)},
        "eval_steps": 2,
        "missing_eos_penalty": 1.0,
    }
    everyone = trainer_of(tiny_model, folder / "ppo", **everything, max_steps=3)
    everyone.compute_metrics = captions
    everyone.train()
    own = {"cls": A2CTrainer, "config_class": A2CConfig, "critic": "none", "kl_coef": 0.0, "eval_steps": 1}
    trainer_of(tiny_model, folder / "a2c", **own, max_steps=2).train()
    asked = {"engine": "vllm", "vllm": {"url": server.url}, "max_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.generation.vllm_client.is_vllm_available", lambda *_: True)
        trainer_of(tiny_model, folder / "vllm", **asked).train()
    server.close()
    lines = [json.loads(line) for path in folder.glob("*/metrics.jsonl") for line in path.read_text().splitlines()]
    return {as_entry(key) for line in lines for key in line}


def test_every_key_has_an_entry_and_every_entry_a_key(written):
    entries = {key for _, key, _ in ENTRIES}
    assert written - entries == set() and entries - written == set()


def test_entries_are_whole_and_can_be_linked():
    ids = [anchor for anchor, _, _ in ENTRIES]
    assert len(ids) == len(set(ids)) == len(ENTRIES)
    for anchor, key, rest in ENTRIES:
        assert anchor == key.replace("/<", "-").replace("/", "-").rstrip(">")
        assert len(rest.split("|")) == 4 and rest.split("|")[0].strip(), key


def test_every_warning_is_in_the_table_with_its_numbers():
    told = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE))
    assert set(DIAGNOSES) <= set(told)
    for name, diagnosis in DIAGNOSES.items():
        condition, steps = told[name].rsplit(" | ", 1)
        assert f"`{diagnosis.metric}`" in condition and int(steps.partition(",")[0]) == diagnosis.steps, name
        assert diagnosis.metric in {anchor for anchor, _, _ in ENTRIES}


def test_keys_of_recipes_exist():
    """In the page and in the texts of the warnings."""
    from mmft.recipe.sections import Recipe

    def names(model, above=""):
        for name, field in model.model_fields.items():
            yield above + name
            inner = field.annotation
            if hasattr(inner, "model_fields"):
                yield from names(inner, f"{above}{name}.")

    known = set(names(Recipe))
    texts = [PAGE.read_text(), *(Path(module.__file__).read_text() for module in (diagnoses, guards))]
    key = re.compile(r"\b(?:algorithm|train|rollout|model|eval|data|output)\.[a-z_.]*[a-z_]")
    asked = {found for text in texts for found in key.findall(text)}
    assert asked - known == set() and len(asked) > 15
