"""Combination of rewards, rewards from recipes, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reward_models import Bleu, CiderD, DocumentFrequencies, WeightedRewards, build_rewards

ROOT = Path(__file__).resolve().parents[2]
DF = DocumentFrequencies.from_references([["a dog"], ["a cat"], ["a red bus"]])
CHAT = [[{"role": "assistant", "content": text}] for text in ("a dog", "bus")]
REFS = [["a dog"], ["a red bus"]]


def constant(values):
    return lambda completions, **columns: values


def test_total_is_the_weighted_sum_and_weight_zero_only_logs():
    rewards = WeightedRewards(
        [("x", constant([1.0, 2.0]), 2.0), ("y", constant([10, 20]), -0.5), ("z", constant([5.0, 5.0]), 0)]
    )
    scores = rewards(prompts=["p", "p"], completions=["a", "b"])
    assert scores.total.tolist() == [-3.0, -6.0]
    assert scores.parts["z"].tolist() == [5.0, 5.0] and scores.parts["x"].tolist() == [1.0, 2.0]


def test_none_is_nan_in_the_part_and_nothing_in_the_total():
    scores = WeightedRewards([("x", constant([None, 2.0]), 1.0), ("y", constant([3.0, 4.0]), 1.0)])(
        prompts=None, completions=["a", "b"]
    )
    assert scores.total.tolist() == [3.0, 6.0]
    assert np.isnan(scores.parts["x"][0]) and scores.parts["x"][1] == 2.0


@pytest.mark.parametrize(
    "returned",
    [
        [1.0, float("nan")], [1.0, float("inf")], [1.0, "2"], [1.0, [2.0]], [1.0], [1.0, 2.0, 3.0], None, 3.0, "ab",
        np.zeros((2, 1)), {"a": 1, "b": 2},
    ],
)  # fmt: skip
def test_bad_values_are_refused_naming_the_reward(returned):
    with pytest.raises(ValueError, match="'broken'"):
        WeightedRewards([("broken", constant(returned), 0.0)])(completions=["a", "b"])


def test_bad_value_names_row_and_id():
    with pytest.raises(ValueError, match=r"'broken', row 1 \(id 'b7'\)"):
        WeightedRewards([("broken", constant([1.0, float("nan")]), 1.0)])(completions=["a", "b"], id=["b6", "b7"])


def test_misaligned_column_is_refused():
    with pytest.raises(ValueError, match="'references' has 1 rows"):
        WeightedRewards([("x", constant([1.0, 2.0]), 1.0)])(completions=["a", "b"], references=[["r"]])


@pytest.mark.parametrize("parts", [[], [("x", constant([]), float("nan"))], [("x", 3, 1)], [("x", constant([]), "1")]])
def test_bad_parts_are_refused_at_once(parts):
    with pytest.raises(ValueError):
        WeightedRewards(parts)


def test_names_must_differ():
    with pytest.raises(ValueError, match="'x' is used 2 times"):
        WeightedRewards([("x", constant([]), 1), ("x", constant([]), 1)])


def test_metrics_are_trl_functions_for_plain_and_conversational_completions():
    for metric in (CiderD(DF), Bleu(2)):
        plain = metric(prompts=["p"] * 2, completions=["a dog", "bus"], references=REFS, completion_ids=[[1], [2]])
        assert isinstance(plain, list) and all(isinstance(value, float) for value in plain)
        assert plain == metric(prompts=["p"] * 2, completions=CHAT, references=REFS, trainer_state=None)
        assert plain == metric.score(["a dog", "bus"], REFS).tolist()
        assert metric.__name__  # TRL logs a reward under its __name__


def test_ended_reaches_the_metric():
    scores = [
        build_rewards([{"name": "cider_d"}], DF)(completions=["a red bus"], references=[["a red bus"]], ended=[e])
        for e in (True, False)
    ]
    assert scores[0].total[0] > scores[1].total[0]


def test_empty_or_wrong_references_name_the_row():
    for metric in (CiderD(DF), Bleu()):
        with pytest.raises(ValueError, match=r"row 1 \(id 'p9'\) has no references"):
            metric(completions=["a", "b"], references=[["a"], []], id=["p8", "p9"])
        with pytest.raises(ValueError, match="row 0.*list of strings, got str"):
            metric(completions=["a"], references=["abc"])
        with pytest.raises(ValueError, match="row 0.*NoneType"):
            metric(completions=["a"], references=[["a", None]])
        with pytest.raises(ValueError, match="row 1"):
            metric(completions=["a", None], references=[["a"], ["b"]])
        with pytest.raises(ValueError, match="2 completions but 1 references"):
            metric(completions=["a", "b"], references=[["a"]])
        with pytest.raises(ValueError, match="'references'"):
            metric(completions=["a"])
        assert metric(completions=[], references=[]) == []


def test_build_rewards_reads_names_weights_and_options(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "def words(completions, scale=1, **columns):\n    return [scale * len(c.split()) for c in completions]\n"
    )
    rewards = build_rewards(
        [
            {"name": "cider_d", "weight": 1.0},
            {"name": "bleu", "weight": 0.0, "n": 2},
            {"name": f"{own}:words", "weight": 0.5, "scale": 3},
        ],
        DF,
    )
    assert rewards.names == ["cider_d", "bleu", "words"]
    scores = rewards(completions=["a dog"], references=[["a dog"]])
    assert scores.parts["words"].tolist() == [6.0]
    assert scores.total[0] == pytest.approx(scores.parts["cider_d"][0] + 3.0)
    assert "n:2" in rewards.signature and "scale=3" in rewards.signature


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "cider"}, "did you mean 'cider_d'"),
        ({"name": "bleu", "m": 3}, r"rewards\[0\] \(bleu\).*'m'"),
        ({"name": "no_such_module_here:f"}, "no_such_module_here"),
        ({"name": "reward_models.metrics.text:simpel"}, "did you mean 'simple'"),
        ({"name": "nowhere/own.py:f"}, r"no such file: nowhere/own\.py"),
        ({"weight": 1.0}, r"rewards\[0\]"),
        ({"name": "cider_d", "weight": None}, "finite number"),
    ],
)
def test_mistakes_in_specs_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        build_rewards([spec], DF)


def test_cider_without_frequencies_is_refused():
    with pytest.raises(ValueError, match="document frequencies"):
        build_rewards([{"name": "cider_d"}], None)


def test_import_needs_nothing_but_numpy():
    blocked = "mmft trl accelerate deepspeed transformers torch PIL pycocoevalcap datasets pandas scipy"
    code = (
        f"import sys\nfor name in {blocked.split()!r}: sys.modules[name] = None\n"
        "import reward_models as r\n"
        "df = r.DocumentFrequencies.from_references([['a dog'], ['a cat']])\n"
        "print(r.build_rewards([{'name': 'cider_d'}, {'name': 'bleu'}], df)"
        "(completions=['a dog'], references=[['a dog']]).total[0] > 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True", done.stderr
