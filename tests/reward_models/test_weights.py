"""Weights that follow the step, the columns or the other parts, and normalised scores; each worked by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from reward_models.rewards import RewardPart, WeightedRewards
from reward_models.weights import parse_weight


def constant(values):
    return lambda completions, **columns: values


def column(name):
    """A reward that reads its scores from a column."""
    return lambda completions, **columns: columns[name]


def combined(*parts):
    return WeightedRewards([RewardPart(**part) for part in parts])


# --- by step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", {0: 2.0, 10: 2.0, 11: 1.75, 12: 1.5, 14: 1.0, 99: 1.0}),
        ("cosine", {10: 2.0, 11: 1.0 + math.cos(math.pi / 8) ** 2, 12: 1.5, 14: 1.0, 99: 1.0}),
        ("constant", {0: 2.0, 9: 2.0, 10: 1.0, 99: 1.0}),
    ],
)
def test_schedules(schedule, expected):
    weight = {"schedule": schedule, "from": 2.0, "to": 1.0, "steps": 4, "start": 10}
    rewards = combined({"name": "x", "function": constant([1.0]), "weight": weight})
    for step, value in expected.items():
        assert rewards(completions=["a"], step=step, training=True).total[0] == pytest.approx(value, abs=1e-12)


def test_a_held_out_call_uses_the_weight_of_the_last_training_step():
    weight = {"schedule": "linear", "from": 0.0, "to": 1.0, "steps": 10}
    rewards = combined({"name": "x", "function": constant([1.0]), "weight": weight})
    assert rewards(completions=["a"]).total[0] == 0.0
    rewards(completions=["a"], step=5, training=True)
    rewards(completions=["a"], step=9)  # held out: may ask for another step without moving the clock
    assert rewards(completions=["a"]).total[0] == 0.5
    with pytest.raises(ValueError, match="reward 'x': a scheduled weight needs step="):
        rewards(completions=["a"], training=True)


# --- by row -----------------------------------------------------------------------------------------


def test_a_weight_may_be_a_column():
    rewards = combined({"name": "x", "function": constant([1.0, 2.0]), "weight": {"column": "sure", "scale": 0.5}})
    assert rewards(completions=["a", "b"], sure=[3, np.float32(0.5)]).total.tolist() == [1.5, 0.5]


def test_a_weight_may_depend_on_several_columns():
    weight = {"when": {"kind": "question", "hard": True}, "weight": 2.0, "otherwise": -1.0}
    rewards = combined({"name": "x", "function": constant([1.0] * 4), "weight": weight})
    columns = {"kind": ["question", "question", "caption", None], "hard": [True, 1, True, True]}
    assert rewards(completions=list("abcd"), **columns).total.tolist() == [2.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("value", [None, "3", float("nan"), True, [1.0]])
def test_a_weight_column_without_a_number_names_reward_row_and_column(value):
    rewards = combined({"name": "x", "function": constant([1.0, 1.0]), "weight": {"column": "sure"}})
    with pytest.raises(ValueError, match=r"reward 'x': row 1 \(id 'p'\): weight column 'sure' is"):
        rewards(completions=["a", "b"], sure=[1.0, value], id=["o", "p"])


@pytest.mark.parametrize("weight", [{"column": "sure"}, {"when": {"sure": 1}}])
def test_a_missing_weight_column_names_those_that_are_there(weight):
    rewards = combined({"name": "x", "function": constant([1.0]), "weight": weight})
    with pytest.raises(ValueError, match=r"reward 'x': the weight reads column 'sure'.*completions, id$"):
        rewards(completions=["a"], id=[3])


# --- by share ---------------------------------------------------------------------------------------


def shares(*more):
    return combined(
        {"name": "main", "function": column("x")},
        {"name": "extra", "function": column("y"), "weight": {"share": 0.25}},
        *more,
    )


def spread(contribution, size):
    """Root of the mean within-group variance (one degree of freedom less per group), the slow way."""
    groups = [contribution[i : i + size] for i in range(0, len(contribution), size)]
    squares = sum(sum((v - sum(g) / size) ** 2 for v in g) for g in groups)
    return math.sqrt(squares / sum(size - 1 for _ in groups))


def test_the_first_step_already_holds_the_share():
    x, y = [0.0, 2.0, 10.0, 14.0], [100.0, 400.0, -1000.0, -900.0]
    scores = shares()(completions=list("abcd"), x=x, y=y, step=1, group_size=2, training=True)
    main, extra = (spread(scores.weighted[name].tolist(), 2) for name in ("main", "extra"))
    assert extra / (main + extra) == pytest.approx(0.25) and scores.weighted["extra"][1] > 0


def test_an_offset_between_groups_counts_for_nothing():
    # Responses to one prompt compete with each other only; what all of them get trains nothing.
    y = [1.0, 2.0, 1.0, 2.0]
    for offset in (0.0, 50.0):
        x = [0.0, 1.0, offset, offset + 1.0]
        scores = shares()(completions=list("abcd"), x=x, y=y, step=1, group_size=2, training=True)
        assert scores.weighted["extra"] == pytest.approx([1 / 3, 2 / 3, 1 / 3, 2 / 3])


def test_a_negative_share_is_a_penalty():
    rewards = combined(
        {"name": "main", "function": column("x")},
        {"name": "extra", "function": column("y"), "weight": {"share": -0.25}},
    )
    scores = rewards(completions=["a", "b"], x=[0.0, 3.0], y=[0.0, 1.0], training=True)
    assert scores.weighted["extra"].tolist() == pytest.approx([0.0, -1.0])


def test_rows_without_opinion_take_no_part_in_the_spread():
    # Deviations of y: -1, 1 in the first group, a single row in the second; so its variance is 2 with one freedom.
    x, y = [0.0, 1.0, 2.0] * 2, [0.0, 2.0, None, None, None, 5.0]
    scores = shares()(completions=list("abcdef"), x=x, y=y, step=1, group_size=3, training=True)
    assert scores.weighted["extra"][1] == pytest.approx(2.0 / 3 / math.sqrt(2))


@pytest.mark.parametrize("change", ["x up", "x down", "y up", "y down"])
def test_an_adapted_weight_grows_by_a_quarter_at_most_per_step_and_gets_there(change):
    # One of the spreads jumps tenfold after the first step, so in the end the weight has to change tenfold as well.
    factor = 10.0 if change.endswith("up") else 0.1
    rewards, weights = shares(), []
    for step in range(1, 100):
        x, y = (factor if step > 1 and change.startswith(name) else 1.0 for name in "xy")
        weighted = rewards(completions=["a", "b"], x=[0.0, 3 * x], y=[0.0, y], step=step, training=True).weighted
        weights.append(weighted["extra"][1] / y)
    moves = [after / before for before, after in zip(weights, weights[1:])]
    assert weights[0] == pytest.approx(1.0) and max(moves) <= 1.25 + 1e-12
    if change == "y up":  # the share is not passed even in the step in which the part grows
        assert weights[1] == pytest.approx(0.1 * math.sqrt(0.9 + 0.1))
    assert weights[-1] == pytest.approx(factor if change.startswith("x") else 1 / factor, rel=0.1)


def test_a_part_without_spread_adds_nothing_until_it_has_one():
    rewards = shares()
    columns = {"completions": ["a", "b", "c"], "x": [0.0, 3.0, 6.0], "training": True}
    assert rewards(**columns, y=[0.1] * 3).total.tolist() == [0.0, 3.0, 6.0]  # whose mean is not 0.1 in binary
    with pytest.warns(UserWarning, match="'extra' had no opinion"):
        assert rewards(**columns, y=[None] * 3).total.tolist() == [0.0, 3.0, 6.0]
    assert rewards(**columns, y=[0.0, 1.0, 2.0]).weighted["extra"][1] > 0


def test_a_part_silent_at_first_has_its_share_in_the_call_in_which_it_speaks():
    # Zeros before that, remembered, would make its spread sqrt(10) times too small and its weight as much too large.
    rewards = shares()
    for y in (0.0, 0.0, 2.0):
        scores = rewards(completions=["a", "b"], x=[0.0, 3.0], y=[0.0, y], training=True)
    assert scores.weighted["extra"][1] == pytest.approx(1.0)  # 1 of 1 + 3


def test_other_parts_silent_at_first_count_from_the_call_in_which_they_speak():
    rewards = shares()
    for x in (0.0, 3.0):
        scores = rewards(completions=["a", "b"], x=[0.0, x], y=[0.0, 1.0], training=True)
    assert scores.weighted["extra"][1] == pytest.approx(1.0)


def test_a_rare_penalty_never_passes_its_share():
    # Its mean spread over many calls is small; by that alone it would get ten times its share when it fires.
    rewards = shares()
    for step in range(100):
        y = 5.0 if step % 30 == 0 else 0.0
        scores = rewards(completions=["a", "b"], x=[0.0, 3.0], y=[0.0, y], training=True)
        assert scores.weighted["extra"][1] <= 1.0 + 1e-9
        if step == 0:
            assert scores.weighted["extra"][1] == pytest.approx(1.0)


@pytest.mark.parametrize("tiny", [1e-7, 1e-150])
def test_a_tiny_spread_does_not_explode(tiny):
    rewards = shares()
    rewards(completions=["a", "b"], x=[0.0, 3.0], y=[0.0, tiny], training=True)
    held_out = rewards(completions=["a", "b"], x=[0.0, 3.0], y=[0.0, 1.0])
    assert held_out.weighted["extra"][1] == pytest.approx(250.0)  # 0.25 * 1000, not 1 / tiny
    scores = rewards(completions=["a", "b"], x=[0.0, 3.0], y=[0.0, 1.0], training=True)
    assert scores.weighted["extra"][1] == pytest.approx(1.0)  # and down again at once


def test_years_of_silence_do_not_explode_either():
    rewards = shares()
    for y in [1.0] + [0.0] * 400:
        rewards(completions=["a", "b"], x=[0.0, 3.0], y=[0.0, y], training=True)
    assert rewards(completions=["a"], x=[0.0], y=[1.0]).total[0] <= 250.0 + 1e-9


def test_the_share_is_of_what_the_other_parts_add_and_not_of_their_raw_scores():
    rewards = combined(
        {"name": "main", "function": column("x"), "weight": -4.0},
        {"name": "extra", "function": column("y"), "weight": {"share": 0.25}},
    )
    scores = rewards(completions=["a", "b"], x=[0.0, 3.0], y=[0.0, 1.0], training=True)
    assert scores.weighted["extra"][1] == pytest.approx(4.0)  # of 4 + 12


def test_spreads_are_remembered():
    # The variance of x falls to 0: with a memory of 0.9 its spread falls to sqrt(0.9) of what it was, not to 0.
    rewards = shares()
    rewards(completions=["a", "b"], x=[0.0, 3.0], y=[0.0, 1.0], training=True)
    scores = rewards(completions=["a", "b"], x=[3.0, 3.0], y=[0.0, 1.0], training=True)
    assert scores.weighted["extra"][1] == pytest.approx(math.sqrt(0.9))


def test_dropped_rows_move_neither_shares_nor_moments_of_other_parts():
    """Row 2 has no score of `odd`: it is out of the update, so what the others say of it normalises nothing."""

    def asked(drop):
        rewards = combined(
            {"name": "odd", "function": constant([1.0, 2.0, float("nan")][: 2 if drop else 3]), "nonfinite": "drop"},
            *({"name": kind, "function": column("x"), "normalize": kind} for kind in ("batch", "running", "group")),
            {"name": "extra", "function": column("x"), "weight": {"share": 0.25}},
        )
        size = 2 if drop else 3
        columns = {"completions": ["a"] * size, "x": [0.0, 4.0, 1e6][:size], "group_size": size, "training": True}
        if drop:
            return rewards(**columns), rewards
        with pytest.warns(UserWarning, match="left out of the update"):
            return rewards(**columns), rewards

    (with_row, one), (without, other) = asked(False), asked(True)
    assert with_row.keep.tolist() == [True, True, False]
    for name in ("batch", "running", "group", "extra"):
        assert with_row.weighted[name][:2].tolist() == without.weighted[name].tolist()
    assert one.state_dict() == other.state_dict()


def test_held_out_calls_leave_shares_alone():
    rewards = shares()
    assert rewards(completions=["a", "b"], x=[0.0, 3.0], y=[0.0, 1.0]).total.tolist() == [0.0, 3.0]
    rewards(completions=["a", "b"], x=[0.0, 3.0], y=[0.0, 1.0], training=True)
    before = json.dumps(rewards.state_dict())
    assert rewards(completions=["a"], x=[0.0], y=[50.0]).total[0] == pytest.approx(50.0)
    assert json.dumps(rewards.state_dict()) == before


def test_impossible_shares_are_refused():
    with pytest.raises(ValueError, match="every weight is a share"):
        combined({"name": "x", "function": constant([]), "weight": {"share": 0.5}})
    with pytest.raises(ValueError, match="below 1"):
        shares({"name": "more", "function": constant([]), "weight": {"share": -0.75}})


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"schedule": "linar"}, "weight.schedule is 'linar', expected one of constant, linear, cosine"),
        ({"schedule": "linear", "steps": 0}, "weight.steps is 0, expected a whole number >= 1"),
        ({"schedule": "linear", "start": 1.5}, "weight.start is 1.5"),
        ({"schedule": "linear", "from": "0"}, "weight.from is '0', expected a finite number"),
        ({"schedule": "linear", "end": 1}, "unknown key 'end' beside 'schedule'; allowed: schedule, from, to"),
        ({"share": 1.0}, "weight.share is 1.0"),
        ({"share": 0}, "weight.share is 0"),
        ({"share": 0.3, "column": "x"}, "unknown key 'column' beside 'share'"),
        ({"column": 3}, "weight.column is 3"),
        ({"column": "x", "scale": None}, "weight.scale is None"),
        ({"when": {}}, "weight.when is {}"),
        ({"when": {"a": 1}, "weight": float("inf")}, "weight.weight is inf"),
        ({}, "expected a finite number or one of"),
        ({"weight": 3}, "expected a finite number or one of"),
        ([1], "must be a finite number or one of"),
        (True, "must be a finite number"),
    ],
)
def test_wrong_weights_are_refused_by_name(weight, message):
    with pytest.raises(ValueError) as caught:
        RewardPart("x", constant([]), weight)
    assert str(caught.value).startswith("reward 'x': ") and message in str(caught.value)


def test_a_parsed_weight_is_kept():
    weight = parse_weight({"column": "x"})
    assert parse_weight(weight) is weight


# --- normalisation ----------------------------------------------------------------------------------


def normal(kind, **more):
    return combined({"name": "x", "function": column("x"), "normalize": kind, **more})


def test_running_moments_are_those_of_everything_seen_in_training():
    rng, rewards, seen = np.random.default_rng(0), normal("running"), []
    for size in (3, 1, 7, 2):
        values = rng.normal(1e4, 2.0, size).tolist()
        seen += values
        total = rewards(completions=["a"] * size, x=values, training=True).total
        if len(seen) > 1:
            assert total == pytest.approx((np.array(values) - np.mean(seen)) / np.std(seen), abs=1e-7)
    held_out = rewards(completions=["a", "b"], x=[1e4, 1e9])
    assert held_out.total[0] == pytest.approx((1e4 - np.mean(seen)) / np.std(seen), abs=1e-7)
    again = rewards(completions=["a"], x=[seen[0]], training=True).total[0]  # 1e9 was never seen
    assert again == pytest.approx((seen[0] - np.mean([*seen, seen[0]])) / np.std([*seen, seen[0]]), abs=1e-7)


def test_running_before_any_training_changes_nothing():
    assert normal("running")(completions=["a", "b"], x=[3.0, 5.0]).total.tolist() == [3.0, 5.0]


def test_batch_and_group():
    x = [1.0, 3.0, 10.0, 10.0]
    batch = normal("batch")(completions=list("abcd"), x=x).total
    assert batch == pytest.approx([-5 / math.sqrt(16.5), -3 / math.sqrt(16.5), *[4 / math.sqrt(16.5)] * 2])
    group = normal("group")(completions=list("abcd"), x=x, group_size=2, training=True).total
    assert group.tolist() == [-1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["running", "batch", "group"])
@pytest.mark.parametrize("value", [0.1, -1e8 / 3, 1e-300, 0.0])
def test_equal_scores_are_zero_whatever_their_size(kind, value):
    # The mean of three 0.1 is not 0.1: dividing that rounding error by itself would give a score of one.
    scores = normal(kind)(completions=list("abc"), x=[value] * 3, group_size=3, training=True)
    assert scores.total.tolist() == [0.0, 0.0, 0.0]


def test_rows_without_opinion_do_not_count_as_zero():
    with pytest.warns(UserWarning, match="row 1: no reward has an opinion"):
        scores = normal("batch")(completions=list("abc"), x=[4.0, None, 6.0])
    assert scores.total.tolist() == [-1.0, 0.0, 1.0] and np.isnan(scores.parts["x"][1])


def test_the_clip_comes_after_normalisation_and_before_the_weight():
    scores = normal("batch", clip=(-0.5, 5), weight=10.0)(completions=["a", "b"], x=[100.0, 300.0])
    assert scores.total.tolist() == [-5.0, 10.0] and scores.parts["x"].tolist() == [100.0, 300.0]
    raw = combined({"name": "x", "function": column("x"), "clip": (0, 2)})(completions=["a", "b"], x=[-1.0, 3.0])
    assert raw.total.tolist() == [0.0, 2.0]


def test_groups_are_needed_for_group_scaling_while_training_and_ignored_without():
    for size in (None, 1):
        with pytest.raises(ValueError, match="reward 'x': normalize group needs group_size"):
            normal("group")(completions=["a"], x=[3.0], group_size=size, training=True)
    with pytest.raises(ValueError, match="3 completions do not make groups of 2"):
        normal("group")(completions=list("abc"), x=[1.0, 2.0, 3.0], group_size=2, training=True)
    assert normal("group")(completions=["a", "b"], x=[3.0, 4.0]).total.tolist() == [3.0, 4.0]
    assert normal("group")(completions=["a", "b"], x=[3.0, 5.0], group_size=2).total.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("kind", ["running", "batch", "group", "share"])
def test_scores_whose_variance_overflows_are_refused_by_name(kind):
    option = {"weight": {"share": 0.5}} if kind == "share" else {"normalize": kind}
    rewards = combined({"name": "x", "function": column("x"), **option}, {"name": "y", "function": constant([0, 1])})
    with pytest.raises(ValueError, match="reward 'x'.* variance overflows; scale them down"):
        rewards(completions=["a", "b"], x=[0.0, 1e200], group_size=2, training=True)


# --- plain ------------------------------------------------------------------------------------------


def test_plain_is_the_same_for_the_same_row_whatever_stands_beside_it():
    rewards = combined(
        {"name": "b", "function": column("x"), "normalize": "batch", "weight": 2.0, "clip": (-0.5, 0.5)},
        {"name": "g", "function": column("x"), "normalize": "group"},
        {"name": "r", "function": column("x"), "normalize": "running", "weight": 0.5},
        {"name": "c", "function": column("x"), "clip": (0, 4)},
        {"name": "n", "function": column("y"), "weight": {"schedule": "linear", "steps": 10}},
    )
    more = rewards(completions=["a", "b"], x=[3.0, 9.0], y=[10.0, None], group_size=2, step=5, training=True)
    assert more.plain.tolist() == [2 * 3 + 3 + 1.5 + 3 + 5.0, 2 * 9 + 9 + 4.5 + 4 + 0.0]
    alone = rewards(completions=["a"], x=[3.0], y=[10.0])
    later = rewards(completions=["a", "b"], x=[3.0, -70.0], y=[10.0, 1.0], group_size=2, step=5, training=True)
    assert alone.plain[0] == later.plain[0] == more.plain[0] and later.total[0] != more.total[0]


def test_plain_is_the_total_where_nothing_is_normalised():
    rewards = combined({"name": "x", "function": column("x"), "weight": -2.0, "clip": (0, 1)})
    scores = rewards(completions=["a", "b"], x=[0.5, 7.0])
    assert scores.plain.tolist() == scores.total.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("option", [{"normalize": "group"}, {"normalize": "batch"}, {"normalize": "running"}])
def test_two_processes_count_as_one(option):
    """`reduce` sums over processes. Here two take turns; their scores are those of one that has all rows."""
    x, y = [1.0, 3.0, 10.0, 20.0], [1.0, 0.0, 5.0, 2.0]

    def make():
        return combined(
            {"name": "x", "function": column("x"), **option},
            {"name": "y", "function": column("y"), "weight": {"share": 0.5}},
        )

    def call(rewards, rows):
        return rewards(
            completions=["a"] * len(rows), x=[x[i] for i in rows], y=[y[i] for i in rows], group_size=2, training=True
        ).total.tolist()

    whole = call(make(), [0, 1, 2, 3])

    # A real all-reduce blocks until both have arrived; two threads and a barrier do the same.
    import threading

    barrier, sent, results = threading.Barrier(2, timeout=20), {}, {}

    def work(rank, rows):
        def reduce(array):
            sent[rank] = array.copy()
            barrier.wait()
            total = sent[0] + sent[1]
            barrier.wait()
            return total

        rewards = make()
        rewards.reduce = reduce
        results[rank] = call(rewards, rows)

    threads = [threading.Thread(target=work, args=(0, [0, 1])), threading.Thread(target=work, args=(1, [2, 3]))]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert results[0] + results[1] == pytest.approx(whole, abs=1e-12)


# --- state ------------------------------------------------------------------------------------------


def everything():
    return combined(
        {"name": "x", "function": column("x"), "normalize": "running"},
        {"name": "y", "function": column("y"), "weight": {"share": 0.3}, "normalize": "running"},
        {"name": "z", "function": column("x"), "weight": {"schedule": "cosine", "steps": 9}, "clip": (0, 1)},
    )


def test_a_resumed_run_is_bitwise_the_same():
    rng = np.random.default_rng(1)
    batches = [{"x": rng.normal(size=8).tolist(), "y": rng.normal(size=8).tolist()} for _ in range(12)]

    def run(rewards, first, last):
        return [
            rewards(completions=["a"] * 8, step=s, group_size=4, training=True, **batches[s - 1]).total.tolist()
            for s in range(first, last)
        ]

    unbroken = run(everything(), 1, 13)
    first = everything()
    run(first, 1, 6)
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second = everything()
    second.load_state_dict(state)
    assert second(completions=["a"] * 8, **batches[0]).total.tolist() == (
        first(completions=["a"] * 8, **batches[0]).total.tolist()
    )
    assert run(second, 6, 13) == unbroken[5:]


def test_the_state_of_other_rewards_is_refused():
    other = combined({"name": "x", "function": column("x")})
    with pytest.raises(ValueError, match=r"saved rewards were x\|normalize:running, y\|weight:share\|.*; these are x;"):
        other.load_state_dict(everything().state_dict())
    with pytest.raises(ValueError, match=r"were x; these are x\|normalize:running"):
        normal("running").load_state_dict(other.state_dict())


class Dense:
    def __call__(self, completions, **columns):
        return [1.0] * len(completions)

    def increments(self, pieces, **columns):
        return [np.ones(len(row)) / len(row) for row in pieces]


@pytest.mark.parametrize(
    "change",
    [{"credit": "dense"}, {"credit": "shaping"}, {"weight": {"schedule": "linear"}}, {"weight": {"column": "w"}}],
)
def test_a_state_of_another_form_of_weight_or_credit_is_refused(change):
    saved = combined({"name": "x", "function": Dense(), "weight": 2.0}).state_dict()
    combined({"name": "x", "function": Dense(), "weight": 3.0}).load_state_dict(saved)  # another number will do
    with pytest.raises(ValueError, match=r"the saved rewards were x; these are x\|"):
        combined({"name": "x", "function": Dense(), **change}).load_state_dict(saved)


def test_a_saved_state_does_not_move_on():
    rewards = everything()
    batch = {"completions": ["a", "b"], "x": [0.0, 1.0], "y": [1.0, 0.5], "training": True}
    rewards(**batch, step=1)
    state = rewards.state_dict()
    text = json.dumps(state)
    rewards(**batch, step=2)
    assert json.dumps(state) == text
