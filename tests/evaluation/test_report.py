"""The HTML report of a run folder."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mmft.evaluation import gallery
from mmft.evaluation.charts import charts
from mmft.evaluation.curves import chart, thin
from mmft.evaluation.report import write_report

HOSTILE = "<script>alert('x')</script> \"quoted\" & 'single' 🦊 {{ 7*7 }} </pre><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Tags with their attributes, and the text a reader sees."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def interval(mean, half=0.1, **more):
    return {"mean": mean, "low": mean - half, "high": mean + half} | more


def make_run(folder: Path, finished=True, caption="a red circle", rows=30) -> Path:
    (folder / "pictures").mkdir(parents=True)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for i in range(rows):
            Image.new("RGB", (96, 96), (i, 2 * i, 90)).save(folder / f"pictures/{i}.png")
            sample = {
                "id": f"row-{i}",
                "picture": f"pictures/{i}.png",
                "references": ["a red circle", caption],
                "before": "a blue circle on a",
                "scores_before": {"cider_d": 1.0, "bleu_4": 0.2},
            }
            if finished:
                sample |= {"after": caption, "scores_after": {"cider_d": 1.0 + (i - 10) / 10, "bleu_4": None}}
            file.write(json.dumps(sample) + "\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 21):
            row = {"step": step, "seconds": 3.0, "reward": step / 10, "reward_std": 0.5, "kl": 0.01 * step}
            row |= {
                "grad_norm": None if step == 7 else 0.4,
                "time/rollout": 1.0,
                "time/update": 2.0,
                "entropy": 1.0,
            }
            file.write(json.dumps(row) + "\n")
        file.write('{"step": 21, "rew')  # a run that is still writing
    if finished:
        summary = {
            "before": {"cider_d": interval(1.0), "length": interval(5.0), "bad_ending": interval(1.0, 0.0)},
            "after": {"cider_d": interval(1.95), "length": interval(3.0), "bad_ending": interval(0.0, 0.0)},
            "difference": {"cider_d": interval(0.95, relative=0.95), "length": interval(-2.0, relative=-0.4)},
            "seconds": 120.0,
            "versions": {"torch": "2.13"},
            "signatures": {"held-out cider_d": "CIDEr-D|eos:no|tok:simple"},
            "alarms": [{"guard": "repetition", "step": 3, "text": "responses repeat 40%", "action": "stop"}],
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "recipe.yaml").write_text(f"seed: 0 # {caption}\n", encoding="utf-8")
    return folder


def test_signatures_and_alarms_are_told(tmp_path):
    page = Page(write_report(make_run(tmp_path)))
    assert "CIDEr-D|eos:no|tok:simple" in page.text
    assert "Step 3, repetition: responses repeat 40%; training was stopped." in page.text
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"rolled_back_to": 4}))
    assert "the weights are those of step 4" in Page(write_report(tmp_path)).text


def test_hostile_text_stays_text(tmp_path):
    run = make_run(tmp_path / "run", caption=HOSTILE)
    page = Page(write_report(run))
    assert not page.all("script")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all(img["src"].startswith("data:image/") for img in page.all("img"))
    assert "<script>alert('x')</script>" in page.text  # shown, as text
    assert "🦊" in page.text and "{{ 7*7 }}" in page.text
    assert page.text.count("seed: 0") == 1 and "</pre>" in page.text


def test_nothing_comes_from_outside(tmp_path):
    path = write_report(make_run(tmp_path / "run"))
    page = Page(path)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    text = path.read_text()
    assert "http://" not in text and "https://" not in text and "url(" not in text


def test_all_pictures_are_inside(tmp_path):
    """12 gains at most 8, 10 losses at most 8, 12 of the rest, each picture once; none by path."""
    page = Page(write_report(make_run(tmp_path / "run")))
    assert len(page.all("img")) == 8 + 8 + 12
    assert len({img["alt"] for img in page.all("img")}) == 28
    assert "no picture" not in page.text


def test_gains_and_losses_are_not_swapped(tmp_path):
    text = Page(write_report(make_run(tmp_path / "run"))).text
    gains, losses = text.index("Biggest gains"), text.index("Worst losses")
    assert gains < text.index("row-29") < losses < text.index("row-0") < text.index("Not chosen")


def test_no_shares_over_picked_samples(tmp_path):
    """samples.jsonl with the 30 most extreme of 500 rows says nothing about how many got better."""
    run = make_run(tmp_path / "run")
    assert "Of 30 pictures" in Page(write_report(run)).text
    summary = json.loads((run / "summary.json").read_text()) | {"rows": 500}
    (run / "summary.json").write_text(json.dumps(summary))
    text = Page(write_report(run)).text
    assert "Of 30 pictures" not in text and "Words used" not in text and "not all held-out captions" in text
    assert "Biggest gains" in text


def test_unfinished_run(tmp_path):
    text = Page(write_report(make_run(tmp_path / "run", finished=False))).text
    assert "no held-out result yet" in text
    assert "20 steps" in text and "not finished" in text
    assert "a blue circle on a" in text and "(nothing)" not in text
    assert "Gradient norm" in text


def test_a_run_that_has_only_begun_and_what_is_no_run(tmp_path):
    for folder, problem in ((tmp_path / "absent", "does not exist"), (tmp_path, "is no run folder")):
        with pytest.raises(ValueError, match=problem):
            write_report(folder)
    (tmp_path / "metrics.jsonl").write_text("")
    text = Page(write_report(tmp_path)).text
    assert "no steps yet" in text and "no held-out result yet" in text
    (tmp_path / "summary.json").write_text('{"before": {}, "after": {}, "seconds": 3}')
    assert "the run had no held-out pictures" in Page(write_report(tmp_path)).text


def test_damaged_files(tmp_path):
    """NaN as Python writes it, null scores, broken lines, pictures that are missing, no image, or outside."""
    run = tmp_path / "run"
    (run / "pictures").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (run / "pictures/text.png").write_text("no image")
    rows = [
        {"id": 1, "picture": "../secret.png", "before": "x", "after": None, "scores_before": None},
        {"id": 2, "picture": "pictures/none.png", "references": None, "before": None, "after": "\ud800 y"},
        {"id": 3, "picture": "pictures/text.png", "scores_before": {"reward": float("nan")}},
    ]
    (run / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n[1]\nnonsense\n")
    steps = ['{"step": 1, "reward": NaN}', '{"step": 2, "kl": Infinity, "reward": 1}', '{"x": 1}']
    (run / "metrics.jsonl").write_text("\n".join(steps))
    (run / "summary.json").write_text('{"before": {"reward": {"mean": NaN}}, "after": {"reward": {"mean": 1.0}}}')
    page = Page(write_report(run))
    assert not page.all("img")
    assert page.text.count("no picture") == 1  # row 3; only samples with a picture file are shown
    assert "nan" not in page.text.lower()
    assert "nan" not in " ".join(p.get("points", "") for p in page.all("polyline"))


def test_size_has_a_limit(tmp_path, monkeypatch):
    """Long runs, long captions and many big pictures; the picture budget is cut to see it hold."""
    run = make_run(tmp_path / "run", caption="word " * 20_000)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(20_000):
            file.write(json.dumps({"step": step, "reward": step % 7, "kl": 1.0, "time/update": 1.0}) + "\n")
    assert write_report(run).stat().st_size < 1_000_000
    monkeypatch.setattr(gallery, "PICTURE_BYTES", 1_000)
    page = Page(write_report(run))
    assert 0 < len(page.all("img")) < 20
    assert sum(len(img["src"]) for img in page.all("img")) < 1_000 * 4 / 3 + 40 * 28


def test_chart_breaks_lines_at_missing_values():
    nan = float("nan")
    drawn = chart("t", [("a", [(1, 1.0), (2, nan), (3, 2.0), (4, 3.0)])])
    assert [len(piece.split()) for piece in drawn.lines[0].pieces] == [1, 2]
    assert [dot[2] for dot in drawn.lines[0].dots] == ["step 1: 1", "step 3: 2", "step 4: 3"]
    low, high = drawn.lines[0].dots[0], drawn.lines[0].dots[2]
    assert low[0] < high[0] and low[1] > high[1]  # SVG's y axis points down


def test_chart_of_nothing_and_of_one_point():
    assert chart("t", [("a", [])]) is None
    assert len(chart("t", [("a", [(5, 0.0)])]).lines[0].dots) == 1


def test_thinning_keeps_the_last_point():
    points = [(float(i), 0.0) for i in range(1000)]
    assert len(thin(points)) <= 241 and thin(points)[-1] == (999.0, 0.0)


def test_lone_peaks_do_not_flatten_a_chart_and_are_told():
    points = [(float(i), 1.0 + i % 2) for i in range(50)]
    points[30] = (30.0, 500.0)
    drawn = chart("KL", [("nats", points)], "A note.")
    assert drawn.note == "A note. Peaks are cut off; the highest is 500."
    assert max(float(tick[1]) for tick in drawn.y_ticks) <= 6
    top = min(dot[1] for dot in drawn.lines[0].dots)
    assert top >= 10 and "step 30: 500" in [dot[2] for dot in drawn.lines[0].dots]
    assert chart("KL", [("nats", points[:30])], "A note.").note == "A note."


def test_ticks_of_an_axis_differ():
    drawn = chart("t", [("a", [(0, 4.2871), (1, 4.2899)])])
    labels = [label for _, label in drawn.y_ticks]
    assert len(set(labels)) == len(labels) > 1


def test_nothing_is_drawn_outside_of_a_chart_nor_its_ticks_cut_off():
    """All values below the floor; and a ratio that is 1 but for rounding."""
    low = chart("t", [("a", [(1, -35.0), (2, -20.0)])], floor=-1.0)
    assert all(10 <= y <= 146 for _, y, _ in low.lines[0].dots)
    place, label = chart("t", [("a", [(0, 1.0), (10_000, 2.0)])]).x_ticks[-1]
    assert label == "10000" and place + 7 * len(label) / 2 <= 360  # seven wide is a digit
    for values in ((1.0, 1.00006), (1.0, 1.00011), (0.0, 0.0), (-0.0025, 0.0025), (4.2871, 4.2899)):
        labels = [label for _, label in chart("t", [("a", list(enumerate(values)))]).y_ticks]
        assert max(map(len, labels)) <= 7 and len(set(labels)) == len(labels) > 1, labels


def test_a_run_keeps_its_colour_where_another_has_no_line():
    assert [line.colour for line in chart("t", [("a", []), ("b", [(1, 1.0)])]).lines] == [1]


def test_claims_are_drawn_as_a_share_of_all_claims():
    rows = [{"step": 1, "eval/attribute_true": 3.0, "eval/attribute_total": 4.0}]
    drawn = charts(rows, {"before": {}, "after": {}})
    assert [(c.title, c.lines[0].last) for c in drawn] == [("Held-out: True claims about objects", "0.75")]


def with_samples(run: Path, **more) -> Path:
    """The run with something more in every sample."""
    lines = [json.loads(line) | more for line in (run / "samples.jsonl").read_text().splitlines()]
    (run / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return run


def test_credit_is_seen_without_colour(tmp_path):
    """Sign by the kind of underline, strength by its thickness, the number on hovering, the end named."""
    credit = [["a", -0.5], ["red", 0.0], ["circle", 1.0], ["", 0.25]]
    path = write_report(with_samples(make_run(tmp_path / "run"), credit_after=credit))
    spans = [s for s in Page(path).all("span") if s.get("title")]
    levels = {s["title"]: s["class"].split()[1:2] for s in spans[:4]}
    assert levels == {
        "−0.50 CIDEr-D": ["n2"],
        "+0.00 CIDEr-D": ["new"],
        "+1.00 CIDEr-D": ["p4"],
        "+0.25 for ending here": ["p1"],
    }
    text = path.read_text()
    assert "underline solid 3.0px" in text and "underline dotted" in text
    assert "What each word added to its caption's CIDEr-D" in text and "(end)" in text


def test_beside_credit_a_change_is_bold_and_not_of_the_colour_of_credit(tmp_path):
    page = Page(write_report(with_samples(make_run(tmp_path / "run"), credit_after=[["a", 1.0], ["b", 0.5], ["c", 0]])))
    assert not page.all("mark") and [s for s in page.all("span") if s.get("class") == "w new" and not s.get("title")]


def test_credit_that_is_none_is_left_out(tmp_path):
    for wrong in ([["a", None]], ["a", 1], "x", [], [["a", float("nan")]], {"a": 1}):
        page = Page(write_report(with_samples(make_run(tmp_path / str(id(wrong))), credit_after=wrong)))
        assert not [s for s in page.all("span") if s.get("title")] and page.all("mark")


def test_hostile_columns_credit_and_recipe(tmp_path):
    """Kinds of pictures and credit come from the data, too; a NUL, a hundred thousand letters, right to left."""
    run = make_run(tmp_path / "run", caption="‮עברית\0 " + "x" * 100_000)
    with_samples(run, columns={HOSTILE: HOSTILE}, credit_after=[[HOSTILE, 1.0]], credit_before=[["\0", -1.0]])
    lines = (run / "samples.jsonl").read_text().splitlines()
    other = [json.dumps(json.loads(line) | {"columns": {HOSTILE: "b"}}) for line in lines[:12]]
    (run / "samples.jsonl").write_text("\n".join([*other, *lines[12:]]))
    path = write_report(run)
    page = Page(path)
    assert not page.all("script") and path.stat().st_size < 1_000_000 and "\0" not in path.read_text()
    assert HOSTILE[:40] in page.text  # a group's name, as text
    assert "עברית" in page.text and all(dd.get("dir") == "auto" for dd in page.all("dd"))


def test_a_run_that_goes_on_shows_its_newest_captions_as_such(tmp_path):
    run = with_samples(make_run(tmp_path / "run"), step=20)
    (run / "summary.json").unlink()
    (run / "recipe.yaml").write_text("train: {steps: 60}\n")
    (run / "alarms.jsonl").write_text(json.dumps({"guard": "kl", "step": 7, "text": "KL runs away"}) + "\n{")
    text = Page(write_report(run)).text
    assert "20 of 60 steps" in text and "not finished" in text
    assert "So far: this is step 20." in text and "after step 20" in text
    assert "Step 7, kl: KL runs away." in text
    assert "Distinct word pairs" in text  # variety can be told without a summary
