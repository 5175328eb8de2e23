"""The HTML report of a run folder."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mmft.evaluation import report
from mmft.evaluation.curves import chart, thin
from mmft.evaluation.findings import headline, honesty, where, words_moved
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
    assert "Guard repetition at step 3: responses repeat 40%; training was stopped." in page.text


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
    assert "Of 30 pictures" not in text and "Words used" not in text
    assert "Biggest gains" in text


def test_unfinished_run(tmp_path):
    text = Page(write_report(make_run(tmp_path / "run", finished=False))).text
    assert "no held-out result yet" in text
    assert "20 steps" in text and "not finished" in text
    assert "a blue circle on a" in text and "(nothing)" not in text
    assert "Gradient norm" in text


def test_empty_folder_and_no_folder(tmp_path):
    assert "no steps yet" in Page(write_report(tmp_path)).text
    with pytest.raises(ValueError, match="no run folder"):
        write_report(tmp_path / "absent")


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
    monkeypatch.setattr(report, "PICTURE_BYTES", 1_000)
    page = Page(write_report(run))
    assert 0 < len(page.all("img")) < 20
    assert sum(len(img["src"]) for img in page.all("img")) < 1_000 * 4 / 3 + 40 * 28


def test_headline_states():
    def state(low, high, better="cider_d"):
        mean = (low + high) / 2
        change = {"mean": mean, "low": low, "high": high, "relative": mean}
        return headline(
            {
                "before": {better: {"mean": 1.0}},
                "after": {better: {"mean": 1 + mean}},
                "difference": {better: change},
            }
        )

    assert state(0.1, 0.3).state == "good" and "+20.0 %" in state(0.1, 0.3).text
    assert state(-0.1, 0.3).state == "open" and "No clear change" in state(-0.1, 0.3).text
    assert state(-0.3, -0.1).state == "bad"
    assert state(0.1, 0.3, "bad_ending").state == "bad"  # more of them is worse


def test_cheating_is_called_out():
    before = {"bad_ending": interval(0.0), "length": interval(10.0), "corpus_bleu_4": interval(0.4)}
    after = {"bad_ending": interval(0.02), "length": interval(12.5), "corpus_bleu_4": interval(0.3)}
    fell = {"corpus_bleu_4": interval(-0.1, 0.05)}
    metrics = [{"step": 1, "entropy": 1.0}, {"step": 2, "entropy": 0.05}]
    found = honesty({"before": before, "after": after, "difference": fell}, metrics)
    assert [f.state for f in found] == ["bad"] * 4
    after = {"bad_ending": interval(0.01), "length": interval(8.1), "corpus_bleu_4": interval(0.41)}
    flat = {"corpus_bleu_4": interval(0.01, 0.05)}
    found = honesty({"before": before, "after": after, "difference": flat}, [])
    assert [f.state for f in found] == ["good"] * 3


def test_groups_by_objects():
    samples = [
        {"objects": [{}] * n, "scores_before": {"cider_d": 1.0}, "scores_after": {"cider_d": 4.0 - 2 * n}}
        for n in [1, 2] * 20
    ]
    found = where(samples, "cider_d")
    assert "20 (50 %) score higher" in found[0].text
    assert found[1].text.startswith("1 object (20): +1.000") and found[1].state == "open"
    assert found[2].text.startswith("2 objects (20): −1.000") and found[2].state == "bad"


def test_words_moved():
    more, less = words_moved([{"before": "a red dog.", "after": "a dog a"}, {"before": "x"}])
    assert (more, less) == (["a (1 → 2)"], ["red (1 → 0)"])


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
