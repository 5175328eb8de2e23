"""Combination of rewards, rewards from recipes, and what is refused."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reward_models import Bleu, CiderD, DocumentFrequencies, WeightedRewards, build_rewards
from reward_models.rewards import RewardPart

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


# --- credit per token -------------------------------------------------------------------------------


class Letters:
    """The number of letters (None for "?"), and what each piece adds to it."""

    def __init__(self, error=0.0, rows=lambda rows: rows):
        self.error, self.rows, self.asked = error, rows, 0

    def __call__(self, completions, **columns):
        return [None if text == "?" else len(text) for text in completions]

    def increments(self, pieces, **columns):
        assert "completions" not in columns and "prompts" not in columns and columns["ended"] == [True] * len(pieces)
        self.asked += 1
        return self.rows([np.array([len(piece) + self.error for piece in row]) for row in pieces])


PIECES = [["a", "bc", ""], ["def"]]
TWO = {"completions": ["abc", "def"], "pieces": PIECES, "ended": [True, True]}


def test_dense_credit_is_spread_and_the_rest_stays_at_the_end():
    scores = WeightedRewards([RewardPart("x", Letters(), 2.0, "dense"), RewardPart("y", constant([5.0, 7.0]))])(**TWO)
    assert [row.tolist() for row in scores.dense] == [[2.0, 4.0, 0.0], [6.0]]
    assert scores.total.tolist() == [11.0, 13.0] and scores.last.tolist() == [5.0, 7.0] and scores.potentials is None


def test_shaping_gives_prefix_scores_and_leaves_the_total_where_it_was():
    scores = WeightedRewards([RewardPart("x", Letters(), 2.0, "shaping"), RewardPart("y", constant([5.0, 7.0]))])(**TWO)
    assert [row.tolist() for row in scores.potentials] == [[2.0, 6.0, 6.0], [6.0]] and scores.dense is None
    assert scores.last.tolist() == scores.total.tolist() == [11.0, 13.0]


@pytest.mark.parametrize("normalize", ["running", "batch", "group"])
def test_normalised_credit_sums_to_what_the_part_adds(normalize):
    # Forgetting either the division or the mean breaks the sum; the mean must sit on the last token alone.
    texts, pieces = ["abc", "d", "", "?"], [["ab", "c"], ["d", ""], [], ["?"]]
    rewards = WeightedRewards([RewardPart("x", Letters(), 3.0, "dense", normalize)])
    with pytest.warns(UserWarning, match="row 3: no reward has an opinion"):
        scores = rewards(completions=texts, pieces=pieces, ended=[True] * 4, group_size=2, training=True)
    assert [row.sum() + last for row, last in zip(scores.dense, scores.last)] == pytest.approx(scores.total.tolist())
    deviation = np.std([3, 1]) if normalize == "group" else np.std([3, 1, 0])
    assert scores.dense[0][0] == pytest.approx(3.0 * 2 / deviation) and scores.last[:2].tolist() == [0.0, 0.0]
    assert scores.last[2] == scores.total[2] and scores.dense[3].tolist() == [0.0]  # no token; no opinion


def test_several_dense_parts_and_weights_by_row_add_up():
    parts = [RewardPart("x", Letters(), {"column": "w"}, "dense"), RewardPart("y", Letters(), -1.0, "dense")]
    parts.append(RewardPart("z", Letters(), 0.5, "shaping"))
    scores = WeightedRewards(parts)(**TWO, w=[3.0, 0.0])
    assert [row.tolist() for row in scores.dense] == [[2.0, 4.0, 0.0], [-3.0]]
    assert [row.tolist() for row in scores.potentials] == [[0.5, 1.5, 1.5], [1.5]]
    assert scores.last.tolist() == [1.5, 1.5]


def test_nothing_is_asked_of_a_dense_part_that_counts_nothing():
    letters = Letters()
    scores = WeightedRewards([RewardPart("x", letters, 0.0, "dense"), RewardPart("y", constant([5.0, 7.0]))])(**TWO)
    assert letters.asked == 0 and [row.tolist() for row in scores.dense] == [[0.0] * 3, [0.0]]


def test_without_pieces_a_held_out_call_has_the_plain_total():
    rewards = WeightedRewards([RewardPart("x", Letters(), 1.0, "dense")])
    scores = rewards(completions=["abc"], ended=[True])
    assert scores.total.tolist() == scores.last.tolist() == [3.0] and scores.dense is None
    with pytest.raises(ValueError, match="reward 'x': credit dense needs pieces="):
        rewards(completions=["abc"], ended=[True], training=True)


def test_a_bad_value_in_a_dense_part_gives_no_credit():
    class Broken(Letters):
        def __call__(self, completions, **columns):
            return [3.0, float("nan")]

        def increments(self, pieces, **columns):
            return [np.array([1.0, 2.0, 0.0]), np.array([float("nan")])]

    with pytest.warns(UserWarning, match="counted as 0"):
        scores = WeightedRewards([RewardPart("x", Broken(), 1.0, "dense", nonfinite="zero")])(**TWO)
    assert [row.tolist() for row in scores.dense] == [[1.0, 2.0, 0.0], [0.0]] and scores.last.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("letters", "message"),
    [
        (Letters(error=0.5), r"reward 'x', row 0 \(id 'p'\): increments sum to 4.5 but the score is 3"),
        (Letters(error=float("nan")), r"row 0 \(id 'p'\): increments sum to nan"),
        (Letters(rows=lambda rows: [row[:-1] for row in rows]), r"increments of shape \(2,\), expected \(3,\)"),
        (Letters(rows=lambda rows: rows[:1]), "reward 'x': 1 rows of increments for 2 completions"),
    ],
)
def test_wrong_increments_are_refused(letters, message):
    with pytest.raises(ValueError, match=message):
        WeightedRewards([RewardPart("x", letters, 1.0, "dense")])(**TWO, id=["p", "q"])


def test_credit_that_cannot_be_given_is_refused_at_once():
    with pytest.raises(ValueError, match=r"reward 'x': credit dense needs a reward with increments.*cider_d"):
        RewardPart("x", constant([]), 1.0, "dense")
    with pytest.raises(ValueError, match="reward 'x': clip and credit dense exclude each other"):
        RewardPart("x", Letters(), 1.0, "dense", clip=(0, 1))
    for normalize in ("batch", "group"):  # the factor would know how the response goes on
        with pytest.raises(ValueError, match=f"'x': credit shaping and normalize {normalize} exclude each other"):
            RewardPart("x", Letters(), 1.0, "shaping", normalize)
    RewardPart("x", Letters(), 1.0, "shaping", "running")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"credit": "dens"}, "credit is 'dens', expected one of last, dense, shaping"),
        ({"normalize": "mean"}, "normalize is 'mean', expected one of None, running, batch, group"),
        ({"nonfinite": "skip"}, "nonfinite is 'skip', expected one of raise, drop, zero"),
        ({"clip": (1, 1)}, r"clip is \(1, 1\), expected \(low, high\)"),
        ({"clip": 3}, "clip is 3"),
        ({"clip": ("0", "1")}, "clip is"),
        ({"name": ""}, "a reward's name must be text"),
    ],
)
def test_wrong_options_of_a_part_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        RewardPart(**{"name": "x", "function": constant([]), **option})


def test_the_signature_says_how_each_part_counts():
    parts = [RewardPart("x", Letters(), {"share": 0.3}, "dense", "running"), ("y", CiderD(DF), 0.5)]
    parts.append(RewardPart("z", Letters(), clip=(0, 2), nonfinite="zero"))
    first, second, third = WeightedRewards(parts).signature.splitlines()
    head, _, source = first.rpartition("|")
    assert head == "x x share(0.3)|credit:dense|normalize:running: test_weighted_rewards:Letters"
    assert re.fullmatch("source:[0-9a-f]{12}", source)
    assert second == f"y x 0.5: {CiderD(DF).signature}"
    assert third.startswith("z x 1|clip:0..2|nonfinite:zero: ")


def test_the_signature_of_a_function_follows_its_code_and_not_its_place(tmp_path):
    """Two folders, one text: equal. Another text: different. Options and the child process make no other kind."""
    for folder, text in (("one", "len(c)"), ("two", "len(c)"), ("three", "-len(c)")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(
            f"def f(completions, k=1, **columns):\n    return [{text} for c in completions]\n"
            "class C:\n    def __init__(self, k=1): pass\n    __call__ = f\n"
        )

    def signature(folder, name="f", **more):
        return build_rewards([{"name": f"{tmp_path}/{folder}/own.py:{name}", **more}]).signature

    assert signature("one") == signature("two") != signature("three")
    assert signature("one").startswith("f x 1: own.py:f|source:") and str(tmp_path) not in signature("one")
    for name in "fC":
        bound = signature("one", name, options={"k": 3})
        assert bound.startswith(f"{name} x 1: own.py:{name}|k:3|source:")
        assert bound == signature("one", name, options={"k": 3}, timeout=30)


def test_the_own_signature_of_a_function_gets_its_options(tmp_path):
    own = tmp_path / "said.py"
    own.write_text("def f(completions, k=1, **columns):\n    return [k]\nf.signature = 'f|version:2'\n")
    lines = [build_rewards([{"name": f"{own}:f", "options": o}]).signature for o in ({}, {"k": 3})]
    assert lines == ["f x 1: f|version:2", "f x 1: f|version:2|k:3"]


def test_a_function_without_source_is_told_by_its_code():
    def made(text, line=0):
        scope = {"__name__": "typed"}
        exec("\n" * line + f"def f(completions, **columns):\n    return [{text} for c in completions]", scope)
        return RewardPart("f", scope["f"]).signature

    assert made("c in {'a', 'b'}") == made("c in {'a', 'b'}", line=5) != made("c in {'a', 'c'}")
    assert made("1.0").startswith("f x 1: typed:f|source:")
    code = (
        'exec(\'def f(c): return c in {"a", "b", "c", "d"}\')\n'
        "from reward_models.own import signature_of\nprint(signature_of(f))"
    )
    told = {  # a set of strings has another order in every process
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in "123"
    }
    assert len(told) == 1 and "|source:" in told.pop()
    half = functools.partial(constant, values=[1])
    assert "test_weighted_rewards:constant|values:[1]|source:" in RewardPart("f", half).signature


# --- the metrics as rewards, and rewards from plain data --------------------------------------------


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
        metric(completions=["a"], references=[["a"]])  # warm: now references are looked up, which hashes them
        with pytest.raises(ValueError, match="row 0: a reference is list, expected a string"):
            metric(completions=["a"], references=[[["a"]]])
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
            {"name": f"{own}:words", "weight": 0.5, "options": {"scale": 3}},
        ],
        DF,
    )
    assert rewards.names == ["cider_d", "bleu", "words"]
    scores = rewards(completions=["a dog"], references=[["a dog"]])
    assert scores.parts["words"].tolist() == [6.0]
    assert scores.total[0] == pytest.approx(scores.parts["cider_d"][0] + 3.0)
    assert "n:2" in rewards.signature and "|scale:3|" in rewards.signature


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "cidre_d"}, "did you mean 'cider_d'"),
        ({"name": "bleu", "m": 3}, r"rewards\[0\] \(bleu\).*'m'"),
        ({"name": "no_such_module_here:f"}, "no_such_module_here"),
        ({"name": "reward_models.metrics.text:simpel"}, "did you mean 'simple'"),
        ({"name": "nowhere/own.py:f"}, r"no such file: nowhere/own\.py"),
        ({"weight": 1.0}, r"rewards\[0\]"),
        ({"name": "cider_d", "weight": "1"}, "finite number"),
        ({"name": "bleu", "options": "eos"}, r"rewards\[0\] \(bleu\): options: expected a mapping.*'eos'"),
        ({"name": "bleu", "n": 1, "options": {"n": 2}}, r"rewards\[0\] \(bleu\): option 'n' is given twice"),
        ({"name": "a:f", "wieght": 1}, r"rewards\[0\] \(a:f\): unknown key 'wieght'; did you mean 'weight'\?"),
        ({"name": "a:f", "limit": 1}, "Options of a reward of your own go under 'options'"),
    ],
)
def test_mistakes_in_specs_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        build_rewards([spec], DF)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("cider_d", {"eos": "no"}, "cider_d: eos must be true or false, got 'no' (in YAML 1.2 yes, no, on and off are"),
        ("cider", {"eos": 0}, "cider: eos must be true or false, got 0"),
        ("cider_d", {"n": 2.5}, "cider_d: n must be a whole number from 1 to 4, got 2.5"),
        ("cider_d", {"n": 5}, "cider_d: n must be a whole number from 1 to 4, got 5"),
        ("cider_d", {"sigma": "6"}, "cider_d: sigma must be a number, got '6'"),
        ("cider_d", {"cache_size": 1.5}, "cider_d: cache_size must be a whole number of at least 1, got 1.5"),
        ("bleu", {"n": True}, "bleu: n must be a whole number from 1 to 9, got True"),
        ("bleu", {"smooth": "no"}, "bleu: smooth must be true or false, got 'no'"),
        ("bleu", {"eos": "off"}, "bleu: eos must be true or false, got 'off'"),
        ("rouge_l", {"eos": "no"}, "rouge_l: eos must be true or false, got 'no'"),
        ("rouge_l", {"beta": None}, "rouge_l: beta must be a number, got None"),
    ],
)
def test_options_of_metrics_have_their_type(name, option, message):
    with pytest.raises(ValueError, match=re.escape(f"rewards[0] ({name}): {message}")):
        build_rewards([{"name": name, "options": option}], DF)


def test_numbers_and_flags_of_numpy_are_numbers_and_flags():
    metric = CiderD(DF, eos=np.bool_(False), n=np.int64(2), sigma=np.float32(3))
    assert "|n:2|sigma:3|" in metric.signature and "eos:no" in metric.signature


def test_a_weight_of_none_is_one():
    assert build_rewards([{"name": "bleu", "weight": None, "options": None}]).parts[0].weight == 1.0


@pytest.mark.parametrize("timeout", [None, 30])
@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("f", "limt", "f has no option 'limt'; did you mean 'limit'?"),
        ("f", "completions", "f has no option 'completions'; its named parameters are limit"),
        ("Child", "limt", "Child has no option 'limt'; did you mean 'limit'?"),
    ],
)
def test_a_mistyped_option_is_not_swallowed(tmp_path, name, option, message, timeout):
    own = tmp_path / "mistyped.py"
    own.write_text(
        "def f(prompts, completions, limit=1, **columns):\n    return [limit] * len(completions)\n"
        "class Base:\n    def __init__(self, limit=2, **rest): self.limit = limit\n"
        "    def __call__(self, completions, **columns): return [self.limit] * len(completions)\n"
        "class Child(Base):\n    def __init__(self, scale=1, **rest): super().__init__(**rest)\n"
    )
    spec = {"name": f"{own}:{name}", "timeout": timeout}
    with pytest.raises(ValueError, match=re.escape(message)):
        build_rewards([{**spec, "options": {option: 7}}])
    assert build_rewards([{**spec, "options": {"limit": 7}}])(completions=["a"]).total.tolist() == [7.0]


def test_cider_without_frequencies_is_refused():
    with pytest.raises(ValueError, match="document frequencies"):
        build_rewards([{"name": "cider_d"}], None)


def test_dense_cider_d_from_a_recipe_sums_to_its_score():
    if not hasattr(CiderD, "increments"):
        pytest.skip("CIDEr-D has no increments")
    rewards = build_rewards([{"name": "cider_d", "credit": "dense", "normalize": "running", "weight": 0.5}], DF)
    scores = rewards(
        completions=["a red bus", "a dog"],
        pieces=[["a", " red", " b", "us", ""], ["a", " dog"]],
        references=[["a red bus"], ["a cat", "a red dog"]],
        ended=[True, False],
        training=True,
    )
    assert [row.sum() for row in scores.dense] == pytest.approx(scores.total.tolist(), abs=1e-9)
    assert scores.last.tolist() == [0.0, 0.0] and scores.dense[0][2] == 0.0  # " b" completes no word


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
