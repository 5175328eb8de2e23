"""What the report says in words: the four answers, the checks, the kinds of pictures."""

from __future__ import annotations

from mmft.evaluation.findings import checks, headline, honesty, in_short, moved_pictures, warnings, words_moved
from mmft.evaluation.groups import groups_of


def interval(mean, half=0.1, **more):
    return {"mean": mean, "low": mean - half, "high": mean + half} | more


def scores(low=0.1, high=0.3, name="cider_d"):
    change = {"mean": (low + high) / 2, "low": low, "high": high, "relative": (low + high) / 2}
    return {
        "before": {name: {"mean": 1.0}},
        "after": {name: {"mean": 1 + change["mean"]}},
        "difference": {name: change},
    }


def sample(old, new, **columns):
    return {"columns": columns, "scores_before": {"cider_d": old}, "scores_after": {"cider_d": new}}


def test_headline_states():
    assert headline(scores()).state == "good" and "+20.0 %" in headline(scores()).text
    assert headline(scores(-0.1)).state == "open" and "No clear change" in headline(scores(-0.1)).text
    assert headline(scores(-0.3, -0.1)).state == "bad"
    assert headline(scores(name="bad_ending")).state == "bad"  # more of them is worse
    assert "So far, after step 20: held-out CIDEr-D" in headline(scores(), step=20).text


def test_few_pictures_are_no_verdict():
    """The interval of a bootstrap over one picture is a point, and leaves out zero whatever was learned."""
    assert headline(scores() | {"rows": 10}).state == "good"
    found = headline(scores() | {"rows": 9})
    assert found.state == "open" and "9 held-out pictures are too few for an interval (it takes 10)" in found.text
    assert answers([], summary=scores() | {"rows": 1})["better"].text.startswith("Nobody knows. 1 held-out picture")


def answers(found, alarms=(), groups=(), moved=None, summary=None):
    return {a.question.split()[-1].strip("?"): a for a in in_short(summary or scores(), found, alarms, groups, moved)}


def test_four_questions_are_answered():
    samples = [sample(1.0, 2.0 - n, kind=f"kind {n}") for n in [0, 2] * 20]
    groups, moved = groups_of(samples, "cider_d"), moved_pictures(samples, "cider_d")
    found = checks({"before": {"length": interval(10)}, "after": {"length": interval(10.5)}, "difference": {}}, [])
    said = answers(found, groups=groups, moved=moved)
    assert said["better"].text.startswith("Yes") and said["better"].state == "good"
    assert "1.000 to 1.200, +0.200 or +20.0 %; 95 % interval +0.100 to +0.300" in said["much"].text
    assert "1 of 1 checks passed" in said["cheating"].text and said["cheating"].state == "good"
    assert "20 (50 %) worse" in said["worse"].text and "kind kind 2 (−1.000)" in said["worse"].text
    assert said["worse"].state == "bad"


def test_cheating_is_called_out():
    before = {"bad_ending": interval(0.0), "length": interval(10.0), "corpus_bleu_4": interval(0.4)}
    after = {"bad_ending": interval(0.02), "length": interval(12.5), "corpus_bleu_4": interval(0.3)}
    fell = {"corpus_bleu_4": interval(-0.1, 0.05)}
    metrics = [{"step": 1, "entropy": 1.0}, {"step": 2, "entropy": 0.05}]
    found = checks({"before": before, "after": after, "difference": fell}, metrics)
    assert [f.state for f in found] == ["bad"] * 4
    assert "4 of 4 checks failed (endings, length, BLEU-4 of the corpus, entropy)" in answers(found)["cheating"].text
    after = {"bad_ending": interval(0.01), "length": interval(8.1), "corpus_bleu_4": interval(0.41)}
    flat = {"corpus_bleu_4": interval(0.01, 0.05)}
    assert [f.state for f in checks({"before": before, "after": after, "difference": flat}, [])] == ["good"] * 3


def test_a_reward_that_rises_alone_is_called_out():
    both = {
        side: scores()[side] | {"reward": scores(name="reward")[side]["reward"]}
        for side in ("before", "after", "difference")
    }
    assert [f.state for f in checks(both, [])] == ["good"]
    unsure = both | {"difference": both["difference"] | {"cider_d": interval(0.2, 0.5)}}  # it rose, perhaps by luck
    assert [f.state for f in checks(unsure, [])] == ["open"]
    alone = unsure | {"after": both["after"] | {"cider_d": {"mean": 1.0}}}
    assert [f.state for f in checks(alone, [])] == ["bad"]


def test_guards_that_spoke_leave_a_doubt_and_a_spike_does_not():
    length = checks({"before": {"length": interval(10)}, "after": {"length": interval(10)}}, [])
    alarm = {"guard": "repetition", "step": 3, "text": "responses repeat", "action": "log"}
    assert answers(length, [alarm])["cheating"].state == "open"
    assert "guards warned of repetition" in answers(length, [alarm])["cheating"].text
    assert answers(length, [alarm | {"guard": "spike"}])["cheating"].state == "good"


def test_a_guard_that_speaks_often_is_one_line():
    alarms = [{"guard": "spike", "step": step, "text": "a gradient.", "action": "log"} for step in range(1, 201)]
    alarms.append({"guard": "held_out", "step": 9, "text": "fell", "action": "rollback"})
    found = warnings(alarms)
    assert len(found) == 2 and "(200 times in all)" in found[0].text and len(found[0].text) < 120
    assert found[1].text == "Step 9, held_out: fell; training ended."  # there may be no state to go back to
    told = "Step 9, held_out: fell; training ended with the weights of step 5, the best evaluated."
    assert warnings(alarms, rolled_back_to=5)[1].text == told
    assert len(honesty({"alarms": alarms}, [])) == 2  # the model card has them, too


def test_groups_by_column_and_by_length_of_references():
    samples = [sample(1.0, 4.0 - 2 * n, objects=n) | {"references": ["a b c " * (i % 3 + 1)]}
               for i, n in enumerate([1, 2] * 30)]  # fmt: skip
    found = groups_of(samples, "cider_d")
    assert [(g.column, g.label, g.size, g.state) for g in found[:2]] == [
        ("objects", "1", 30, "good"),
        ("objects", "2", 30, "bad"),
    ]
    assert found[0].change["mean"] == 1.0 and found[1].change["mean"] == -1.0
    assert [(g.column, g.label) for g in found[2:]] == [("words per reference", n) for n in ("3.0", "6.0", "9.0")]


def test_columns_that_sort_nothing_and_groups_too_small_are_left_out():
    samples = [sample(1.0, 2.0, file=f"{i}.jpg", one=1, kind="rare" if i < 9 else "usual") for i in range(60)]
    assert [(g.column, g.label, g.size) for g in groups_of(samples, "cider_d")] == [("kind", "usual", 51)]
    assert groups_of([sample(1.0, 2.0) | {"columns": [1]}] * 20, "cider_d") == []


def test_luck_in_one_of_many_groups_is_not_called_worse():
    """One kind of twelve with an interval that just leaves out zero: 95 % alone would call it worse."""
    import numpy as np

    stream = np.random.default_rng(4)
    noise = [stream.normal(0, 1, 20) for _ in range(12)]
    noise[0] += -0.5 - noise[0].mean()  # 2.2 standard errors below zero
    samples = [sample(0.0, float(v), kind=f"k{k:02d}") for k in range(12) for v in noise[k]]
    assert groups_of(samples[:40], "cider_d", level=0.5)[0].state == "bad"
    assert {g.state for g in groups_of(samples, "cider_d") if g.label == "k00"} == {"open"}


def test_words_moved():
    more, less = words_moved([{"before": "a red dog.", "after": "a dog a"}, {"before": "x"}])
    assert (more, less) == (["a (1 → 2)"], ["red (1 → 0)"])
