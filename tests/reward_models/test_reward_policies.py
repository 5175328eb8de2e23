"""What a reward may return, and what each policy makes of it: the table in docs/rewards/combination.md by cases."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import warnings

import numpy as np
import pytest

from reward_models.named import BUILT_IN, built_in, load_reward
from reward_models.own import _plain
from reward_models.rewards import RewardPart, Scored, WeightedRewards, build_rewards

TEXTS, IDS = ["a", "b", "c"], ["p0", "p1", "p2"]
POLICIES = ("raise", "drop", "zero")
NAN, INF = float("nan"), float("inf")


def scored(returned, policy="raise", **part):
    rewards = WeightedRewards(
        [
            RewardPart("odd", lambda completions, **columns: returned, nonfinite=policy, **part),
            RewardPart("good", lambda completions, **columns: [10.0, 20.0, 30.0]),
        ]
    )
    return rewards(completions=TEXTS, id=IDS)


# --- the 21 cases -----------------------------------------------------------------------------------

NON_FINITE = {"NaN": NAN, "+inf": INF, "-inf": -INF}
WRONG = {
    "text": ([1.0, "0.5", 3.0], r"reward 'odd', row 1 \(id 'p1'\): returned '0.5' \(str\), expected a number or None"),
    "wrong length": ([1.0, 2.0], "reward 'odd' returned 2 values for 3 completions"),
    "wrong shape": (np.ones((3, 1)), r"reward 'odd' returned an array of shape \(3, 1\), expected \(3,\)"),
}


@pytest.mark.parametrize("value", NON_FINITE.values(), ids=NON_FINITE)
def test_raise_names_reward_row_value_and_what_to_do(value):
    with pytest.raises(ValueError, match=r"reward 'odd', row 1 \(id 'p1'\): returned .*(nan|inf).* finite.*drop"):
        scored([1.0, value, 3.0])


@pytest.mark.parametrize("value", NON_FINITE.values(), ids=NON_FINITE)
def test_drop_leaves_the_row_out_and_warns(value):
    with pytest.warns(UserWarning, match=r"reward 'odd': 1 non-finite values, first in row 1 \(id 'p1'\); left out"):
        scores = scored([1.0, value, 3.0], "drop")
    assert scores.keep.tolist() == [True, False, True]
    assert scores.total.tolist() == [11.0, 20.0, 33.0]  # finite even where it is not used
    assert np.isnan(scores.parts["odd"][1]) and scores.weighted["odd"].tolist() == [1.0, 0.0, 3.0]


def test_rows_dropped_by_any_part_are_left_out():
    parts = [
        RewardPart(name, lambda n=i, **c: [NAN if i == n else 1.0 for i in range(3)]) for i, name in enumerate("xy")
    ]
    parts = [dataclasses.replace(part, nonfinite="drop") for part in parts]
    with pytest.warns(UserWarning, match="left out"):
        assert WeightedRewards(parts)(completions=TEXTS).keep.tolist() == [False, False, True]


@pytest.mark.parametrize("value", NON_FINITE.values(), ids=NON_FINITE)
def test_zero_counts_as_zero_and_warns(value):
    with pytest.warns(UserWarning, match=r"reward 'odd': 1 non-finite.* row 1 \(id 'p1'\); counted as 0"):
        scores = scored([1.0, value, 3.0], "zero", weight=2.0)
    assert scores.keep.all() and scores.total.tolist() == [12.0, 20.0, 36.0]
    assert scores.parts["odd"].tolist() == [1.0, 0.0, 3.0]


@pytest.mark.parametrize("policy", POLICIES)
def test_none_is_no_opinion_under_every_policy(policy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = scored([1.0, None, 3.0], policy)
    assert scores.keep.all() and scores.total.tolist() == [11.0, 20.0, 33.0] and np.isnan(scores.parts["odd"][1])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_a_broken_answer_raises_under_every_policy(case, policy):
    returned, message = case
    with pytest.raises(ValueError, match=message):
        scored(returned, policy)


# --- beyond the table -------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [[2.0], np.ones(2), {"a": 1}, 1j, object()])
def test_an_entry_that_is_no_number_names_its_row(entry):
    with pytest.raises(ValueError, match=r"reward 'odd', row 2 \(id 'p2'\)"):
        scored([1.0, 2.0, entry], "zero")


def test_numbers_of_every_kind_are_understood():
    assert scored([True, np.float32(0.5), np.array(2)]).parts["odd"].tolist() == [1.0, 0.5, 2.0]
    assert scored((1, 2, 3)).parts["odd"].tolist() == [1.0, 2.0, 3.0]
    torch = pytest.importorskip("torch")
    assert scored(torch.tensor([1.0, 2.0, 3.0], requires_grad=True)).parts["odd"].tolist() == [1.0, 2.0, 3.0]
    assert scored([torch.tensor(1.0), torch.tensor([2.0]), 3]).parts["odd"].tolist() == [1.0, 2.0, 3.0]
    fine = [1 / 3, 2.0, 3.0]  # float32 would round the third
    assert scored(torch.tensor(fine, dtype=torch.float64)).parts["odd"].tolist() == fine
    assert _plain(torch.tensor(fine, dtype=torch.float64)).tolist() == fine


def test_an_integer_beyond_float_is_infinite():
    with pytest.warns(UserWarning, match="counted as 0"):
        assert scored([1.0, 10**400, 3.0], "zero").parts["odd"].tolist() == [1.0, 0.0, 3.0]


def test_a_sum_that_overflows_names_the_row():
    with pytest.raises(ValueError, match=r"row 2 \(id 'p2'\): the weighted sum is inf"):
        scored([0.0, 0.0, 1e308], weight=1e5)


def test_zeros_of_the_policy_are_normalised_like_any_zero_and_dropped_rows_are_not():
    with pytest.warns(UserWarning):
        zero, drop = (scored([4.0, NAN, 2.0], policy, normalize="batch") for policy in ("zero", "drop"))
    assert zero.weighted["odd"] == pytest.approx(np.array([2.0, -2.0, 0.0]) / np.sqrt(8 / 3))
    assert drop.weighted["odd"].tolist() == [1.0, 0.0, -1.0]


def test_each_thing_is_said_once_and_not_at_every_step():
    answers = iter([[NAN, 1.0], [NAN, 1.0], [None, None], [None, None]])
    rewards = WeightedRewards([RewardPart("odd", lambda **columns: next(answers), nonfinite="drop")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            rewards(completions=["a", "b"])
    assert (
        len(caught) == 2 and "left out" in str(caught[0].message) and "no opinion on any of 2" in str(caught[1].message)
    )
    assert caught[0].filename == __file__  # the warning points at who asked


def test_a_row_on_which_nobody_has_an_opinion_is_mentioned():
    rewards = WeightedRewards([("x", lambda **c: [None, 1.0], 1.0), ("y", lambda **c: [None, None], 1.0)])
    with pytest.warns(UserWarning) as caught:
        rewards(completions=["a", "b"], id=IDS[:2])
    said = [str(warning.message) for warning in caught]
    assert any(text.startswith("row 0 (id 'p0'): no reward has an opinion") for text in said)


def test_logged_columns_become_parts_of_their_own_and_never_train():
    returned = Scored([1.0, None, 3.0], {"std": [0.1, None, INF]})
    scores = scored(returned)
    assert scores.total.tolist() == [11.0, 20.0, 33.0] and set(scores.weighted) == {"odd", "good"}
    assert scores.parts["odd/std"][0] == 0.1 and np.isnan(scores.parts["odd/std"][1:]).all() and scores.keep.all()
    with pytest.raises(ValueError, match="reward 'odd/std' returned 1 values for 3"):
        scored(Scored([1.0, 2.0, 3.0], {"std": [1.0]}))


def test_an_exception_keeps_its_type_and_gets_the_name_of_the_reward():
    def broken(completions, **columns):
        return [columns["colour"]]

    with pytest.raises(KeyError, match="colour") as caught:
        WeightedRewards([("odd", broken, 1.0)])(completions=TEXTS)
    assert "in reward 'odd'" in caught.value.__notes__


# --- asynchronous rewards ---------------------------------------------------------------------------


async def slow(completions, **columns):
    await asyncio.sleep(0.3)
    return [float(len(text)) for text in completions]


async def failing(completions, **columns):
    raise LookupError("nobody home")


def test_asynchronous_rewards_run_at_the_same_time():
    class Judge:
        async def __call__(self, completions, **columns):
            return await slow(completions)

    rewards = WeightedRewards(
        [("x", slow, 1.0), ("now", lambda **c: [0.5], 1.0), ("y", slow, 2.0), ("z", Judge(), 3.0)]
    )
    began = time.perf_counter()
    scores = rewards(completions=["abc"])
    assert time.perf_counter() - began < 0.8  # one after the other: 0.9
    assert scores.total.tolist() == [18.5] and list(scores.parts) == ["x", "now", "y", "z"]


def test_asynchronous_rewards_run_where_a_loop_is_running_already():
    async def notebook():
        return WeightedRewards([("x", slow, 1.0)])(completions=["abc"]).total.tolist()

    assert asyncio.run(notebook()) == [3.0]


def test_an_asynchronous_failure_names_its_reward():
    with pytest.raises(LookupError) as caught:
        WeightedRewards([("x", slow, 1.0), ("odd", failing, 1.0)])(completions=["abc"])
    assert "in reward 'odd'" in caught.value.__notes__


@pytest.mark.filterwarnings("error")
def test_a_failure_before_the_loop_starts_leaves_no_coroutine_behind():
    def broken(**columns):
        raise LookupError

    with pytest.raises(LookupError):
        WeightedRewards([("x", slow, 1.0), ("odd", broken, 1.0)])(completions=["abc"])


# --- rewards of your own ----------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "import time\n"
        "def words(completions, scale=1, **columns):\n"
        "    return [scale * len(c.split()) for c in completions]\n"
        "async def later(completions, scale=1, **columns):\n"
        "    return words(completions, scale)\n"
        "class Words:\n"
        "    def __init__(self, scale=1):\n"
        "        self.scale = scale\n"
        "    def __call__(self, completions, **columns):\n"
        "        return words(completions, self.scale)\n"
        "def hang(completions, **columns):\n"
        "    time.sleep(60)\n"
    )
    return path


@pytest.mark.parametrize("name", ["words", "later", "Words"])
@pytest.mark.parametrize("timeout", [None, 30])
def test_functions_coroutines_and_classes_here_and_in_a_child(own, name, timeout):
    spec = {"name": f"{own}:{name}", "options": {"scale": 3}, "weight": 2.0, "as": None, "timeout": timeout}
    rewards = build_rewards([spec])
    assert rewards(completions=["a dog"]).total.tolist() == [12.0] and rewards.names == [name]


def test_a_reward_that_hangs_ends_in_time(own):
    rewards = build_rewards([{"name": f"{own}:hang", "timeout": 1.0}])
    began = time.perf_counter()
    with pytest.raises(TimeoutError) as caught:
        rewards(completions=["a dog"])
    assert time.perf_counter() - began < 6 and "in reward 'hang'" in caught.value.__notes__


def test_one_reward_several_times_under_different_names():
    from reward_models.metrics.ngrams import DocumentFrequencies

    df = DocumentFrequencies.from_references([["a dog"], ["a cat"]])
    rewards = build_rewards([{"name": "bleu", "n": 1}, {"name": "bleu", "as": "bleu_2", "options": {"n": 2}}], df)
    scores = rewards(completions=["a dog"], references=[["dog a"]])
    assert scores.parts["bleu"][0] > scores.parts["bleu_2"][0] and rewards.names == ["bleu", "bleu_2"]


def test_bleu_reads_text_as_the_training_captions_were_read():
    from reward_models.metrics.ngrams import DocumentFrequencies

    df = DocumentFrequencies.from_references([["a dog"], ["a cat"]], tokenizer="whitespace")
    assert "tok:whitespace" in build_rewards([{"name": "bleu"}], df).signature
    assert "tok:simple" in build_rewards([{"name": "bleu", "tokenizer": "simple"}], df).signature


@pytest.mark.parametrize(
    ("name", "option", "words"),
    [
        ("bleu", "smoth", "bleu has no option 'smoth'; did you mean 'smooth'"),
        ("missing_eos", "x", "parameters are none"),
    ],
)
def test_an_option_that_a_built_in_reward_has_not_is_named(name, option, words):
    with pytest.raises(ValueError, match=words):
        load_reward(name, {option: 1})


def test_a_built_in_reward_gets_its_timeout_as_an_option(monkeypatch):
    monkeypatch.setattr(
        "reward_models.named.built_in", lambda name: lambda url, timeout: {"url": url, "timeout": timeout}
    )
    assert load_reward("http", {"url": "u"}, timeout=3.0) == {"url": "u", "timeout": 3.0}
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"rewards\[0\] \(bleu\).*timeout"):
        build_rewards([{"name": "bleu", "timeout": 3.0}])


def test_a_reward_for_training_captions_gets_their_frequencies(monkeypatch):
    class NeedsTraining:
        needs_training = True

        def __init__(self, df, limit):
            self.df, self.limit = df, limit

    monkeypatch.setattr("reward_models.named.built_in", lambda name: NeedsTraining)
    made = load_reward("novelty", {"limit": 3}, "the frequencies")
    assert (made.df, made.limit) == ("the frequencies", 3)
    with pytest.raises(ValueError, match="document frequencies are needed"):
        load_reward("novelty", {"limit": 3})


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_name_leads_to_a_reward(name):
    try:
        kind = built_in(name)
    except ModuleNotFoundError as error:
        if error.name.startswith("reward_models"):
            raise
        pytest.skip(f"optional dependency {error.name} is not installed")
    assert any("__call__" in vars(base) for base in kind.__mro__)


def test_the_shaping_terms_are_all_known_by_name():
    from reward_models.terms import TERMS

    assert {name: built_in(name) for name in TERMS} == TERMS


def test_a_preference_head_needs_its_folder():
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"rewards\[0\] \(preference\): option 'path' is missing"):
        build_rewards([{"name": "preference"}])
