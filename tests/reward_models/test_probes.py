"""The doctor: rewards with a hole are found out, sound ones are left in peace."""

from __future__ import annotations

import pytest
from PIL import Image, ImageStat

from reward_models import Bleu, CiderD, DocumentFrequencies, WeightedRewards
from reward_models.probes import PROBES, TOTAL, probe_rewards
from reward_models.rewards import RewardPart

SUBJECTS = ["red dog", "grey cat", "old man", "small boat", "green bus", "tall woman", "blue bird", "white horse"]
PLACES = ["beach", "street", "river", "meadow", "table", "snow", "bridge", "sofa"]


def rows(images=False):
    found = []
    for i, (who, where) in enumerate(zip(SUBJECTS, PLACES, strict=True)):
        references = [f"a {who} is near the {where}", f"the {who} near a {where}", f"a {who} by the {where}"]
        row = {"id": str(i), "prompt": "say", "references": references}
        found.append(row | ({"image": Image.new("RGB", (8, 6), (200, 10 * i, 0))} if images else {}))
    return found


CORPUS = [row["references"] for row in rows()] + [["a thing", "a thing"]]
CIDER = CiderD(DocumentFrequencies.from_references(CORPUS))


def flagged(reward, images=False):
    report = probe_rewards(WeightedRewards([RewardPart("it", reward)]), rows(images), CORPUS)
    return {finding.probe for finding in report.flagged}, report


def test_cider_d_and_bleu_prefer_the_honest_caption():
    assert flagged(CIDER)[0] == set()
    assert flagged(Bleu())[0] == set()


def length(completions, **_):
    return [float(len(text.split())) for text in completions]


def brevity(completions, **_):
    return [-float(len(text.split())) for text in completions]


def nothing(completions, **_):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("reward", "holes"),
    [
        (length, {"said twice", "broken off", "four times as long"}),
        (brevity, {"empty", "one word", "commonest caption", "words listed"}),
        (nothing, set()),
    ],
)
def test_holes_are_named(reward, holes):
    assert flagged(reward)[0] == holes


def test_each_probe_by_hand():
    seen = []

    def look(completions, references, **_):
        seen.extend(zip(completions, references, strict=True))
        return [0.0] * len(completions)

    flagged(look)
    texts = [text for text, _ in seen[: 1 + len(PROBES)]]
    honest = "a red dog is near the beach"
    assert texts[:4] == [honest, "", "red", f"{honest} {honest}"]
    assert texts[4:] == [
        "a thing",
        "red dog beach",
        f"{honest} with the",
        "a grey cat is near the street",
        honest,
        texts[-1],
    ]
    assert len(texts[-1].split()) == 4 * len(honest.split()) and texts[-1].startswith(honest)
    # Leave-one-out: the honest caption is nobody's reference.
    assert all(honest not in references for _, references in seen[: 1 + len(PROBES)])


def test_the_picture_is_blanked_for_one_probe_alone():
    def red(completions, image, **_):
        assert all(picture.size == (8, 6) for picture in image)
        return [ImageStat.Stat(picture).mean[0] for picture in image]

    holes, report = flagged(red, images=True)
    assert report.blind == [] and "honest, blank picture" not in holes
    blank = next(f for f in report.findings if f.reward == TOTAL and f.probe == "honest, blank picture")
    assert blank.difference == 128 - 200
    assert flagged(CIDER, images=True)[1].blind == ["it", "total"]
    assert flagged(CIDER)[1].blind == []  # nothing to be blind to


def test_a_penalty_counts_as_one_and_weight_zero_by_its_raw_score():
    parts = [RewardPart("short", length, -1.0), RewardPart("long", length, 0.0), RewardPart("cider", CIDER, 100.0)]
    report = probe_rewards(WeightedRewards(parts), rows(), CORPUS)
    holes = {name: {f.probe for f in report.findings if f.reward == name and f.flagged} for name in ("short", "long")}
    assert "empty" in holes["short"] and "four times as long" in holes["long"] and not report.flagged
    assert "*" in report.table() and "nothing that was tried" in report.table()
    assert report.as_dict()["flagged"] == []


def test_no_opinion_is_no_finding():
    report = flagged(lambda completions, **_: [None] * len(completions))[1]
    assert {f.reward for f in report.findings} == {TOTAL}


def test_too_few_references_are_refused():
    with pytest.raises(ValueError, match="0 of 1 rows have two references"):
        probe_rewards(WeightedRewards([RewardPart("it", nothing)]), [{"references": ["a"]}], [["a"]])


@pytest.mark.parametrize(
    "part",
    [
        RewardPart("hole", length, {"share": 0.6}),
        RewardPart("hole", length, {"schedule": "linear", "from": 0.0, "to": 50.0, "steps": 10}),
        RewardPart("hole", length, {"schedule": "linear", "from": 50.0, "to": 0.0, "steps": 10}),
        RewardPart("hole", length, 50.0, normalize="running"),
        RewardPart("hole", length, 50.0, normalize="group"),
    ],
    ids=["share", "later", "at first", "running", "group"],
)
def test_a_hole_is_found_whatever_its_weight_looks_like(part):
    # Kills: rewards asked as if no training step had ever been: shares and schedules from 0 would add nothing.
    rewards = WeightedRewards([RewardPart("cider", CIDER), part])
    before = rewards.state_dict()
    report = probe_rewards(rewards, rows(), CORPUS)
    assert "four times as long" in {finding.probe for finding in report.flagged}
    assert rewards.state_dict() == before


def test_dense_parts_are_probed_too():
    assert not probe_rewards(WeightedRewards([RewardPart("cider", CIDER, credit="dense")]), rows(), CORPUS).flagged
