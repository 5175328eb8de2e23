"""The report of a real run, as a person sees it: while it goes on, when it is interrupted, and in a browser."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig
from PIL import Image

from mmft import PPOConfig, PPOTrainer, load_rows
from mmft.data.rows import FileRows
from mmft.evaluation.report import write_report
from mmft.recipe import load_recipe
from mmft.training.evaluate import Evaluation
from mmft.training.interrupts import Interrupted
from mmft.training.run import run
from mmft.training.summary import LiveReport
from reward_models import CiderD, DocumentFrequencies

ROOT = Path(__file__).parents[2]
SHORT = ["data.train_rows=64", "eval.rows=40", "rollout.prompts_per_step=2", "rollout.num_generations=2"]
SHORT += ["train.steps=3", "train.micro_prompts=null", "train.save_every=0", "eval.every=2", "output.trackers=[]"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"


def samples_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run with two rewards; and what its folder held after each report on the way."""
    folder, seen, show = tmp_path_factory.mktemp("report") / "run", [], LiveReport.show

    def watched(self, step, *rest, **options):
        problem = show(self, step, *rest, **options)
        now = {"step": step, "samples": samples_of(folder), "page": (folder / "report.html").read_text()}
        seen.append(now | {"problem": problem, "finished": (folder / "summary.json").exists()})
        return problem

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveReport, "show", watched)
        patch.setattr("mmft.training.summary._SHARE", 1.0)  # steps this short would not earn the second report
        (folder / "pictures").mkdir(parents=True)
        (folder / "pictures" / "00099.jpg").write_bytes(b"of an earlier run")
        (folder / "summary.json").write_text('{"after": {}}')
        weights = ["rewards.1.weight=0.5"]
        run(load_recipe(ROOT / "recipes" / "caption_ppo.yaml", [*SHORT, *weights, f"output.dir={folder}"]))
    return folder, seen


def test_the_report_is_there_from_the_first_evaluation_on(trained):
    _, seen = trained
    assert [now["step"] for now in seen] == [0, 2, 3]
    assert not any(now["problem"] or now["finished"] for now in seen)
    start, middle, saved = seen
    assert all(s["after"] is None and s["before"] for s in start["samples"])
    assert "no held-out result yet" in start["page"] and "not finished" in start["page"]
    assert all(s["step"] == 2 and s["after"] for s in middle["samples"])
    assert "So far: this is step 2." in middle["page"] and "2 of 3 steps" in middle["page"]
    assert "3 of 3 steps" in saved["page"] and saved["samples"] == middle["samples"]


def test_every_held_out_row_is_kept_with_parts_columns_and_credit(trained):
    folder, _ = trained
    samples = samples_of(folder)
    assert len(samples) == 40 and {s["step"] for s in samples} == {3}
    for sample in samples:
        assert set(sample["columns"]) == {"objects", "background"} and sample["columns"]["objects"] in (1, 2, 3, 4)
        for side in ("before", "after"):
            scores = sample[f"scores_{side}"]
            total = scores["reward/cider_d"] + 0.5 * scores["reward/bleu"]
            assert scores["reward"] == pytest.approx(total, abs=2e-6)
            credit = sample.get(f"credit_{side}")
            assert (credit is not None) == (sample["picture"] is not None)
            if credit is not None:
                assert [word for word, _ in credit] == sample[side].split()
                assert sum(value for _, value in credit) == pytest.approx(scores["cider_d"], abs=1e-4)
    kept = {s["picture"] for s in samples if s["picture"]}
    assert {f"pictures/{path.name}" for path in (folder / "pictures").iterdir()} == kept


def test_curves_of_a_real_run_are_all_drawn(trained):
    folder, _ = trained
    page = write_report(folder).read_text()
    for title in ("Reward", "CIDEr-D", "bleu", "Which part moves the reward", "Held-out: CIDEr-D", "Entropy",
                  "KL to the reference", "Explained variance of the critic", "Response length", "Gradient norm",
                  "Throughput", "Time by phase", "Losses"):  # fmt: skip
        assert f"<figcaption>{title} " in page, title
    for phrase in ("The reward and its parts", "Environment", "device: cpu", "torch 2", "prompts_per_step: 2"):
        assert phrase in page, phrase


def test_an_interrupted_run_leaves_a_report_of_what_it_reached(tmp_path):
    train, held_out = load_rows("scenes", "train", limit=16), load_rows("scenes", "test", limit=4)
    metric, steps = CiderD(DocumentFrequencies.from_references(train.references())), []

    class Stopping:
        __name__ = "cider_d"
        increments = metric.increments

        def __call__(self, **columns):
            steps.append(len(columns["completions"]))
            if len(steps) == 5:  # evaluation, two steps, evaluation, then this
                os.kill(os.getpid(), signal.SIGTERM)
            return metric(**columns)

    args = PPOConfig(output_dir=str(tmp_path), max_steps=9, prompts_per_step=2, num_generations=2, eval_steps=2)
    args.report_to = []
    lora = LoraConfig(r=4)
    trainer = PPOTrainer("scenes-vlm", Stopping(), args, train, held_out, peft_config=lora)
    with pytest.raises(Interrupted):
        trainer.train()
    page = (tmp_path / "report.html").read_text()
    assert "So far: this is step 2." in page and not (tmp_path / "summary.json").exists()
    assert "3 of 9 steps" in page  # the step that was under way, which was finished
    sample = samples_of(tmp_path)[0]
    credit, score = sample["credit_after"], sample["scores_after"]["reward/cider_d"]
    assert sum(value for _, value in credit) == pytest.approx(score, abs=1e-3)  # no recipe: the reward is the metric


def test_reports_take_a_hundredth_of_a_run_and_the_next_one_has_the_news(trained, tmp_path):
    folder, seen = trained
    shutil.copytree(folder, tmp_path / "run")
    live = LiveReport(tmp_path / "run", load_rows("scenes", "test", limit=40))
    (tmp_path / "run" / "report.html").unlink()
    live.seconds = 1e6  # as after very slow reports
    assert live.show(4, None) is None and not (tmp_path / "run" / "report.html").exists()
    assert live.show(4, None, needed=True) is None and (tmp_path / "run" / "report.html").exists()


def test_columns_of_the_data_come_along(tmp_path):
    Image.new("RGB", (600, 300)).save(tmp_path / "a.png")
    columns = {"season": "winter", "image_id": 7, "note": "x" * 99, "sizes": [1, 2]}
    record = {"id": "1", "prompt": "p", "picture": "a.png", "references": ["x"], "columns": columns}
    before = Evaluation(["x y"], {"reward": np.array([1.0])})
    assert LiveReport(tmp_path, FileRows([record], tmp_path)).show(0, before) is None
    (sample,) = samples_of(tmp_path)
    assert sample["columns"] == {"season": "winter", "note": "x" * 60, "sizes": 2}
    assert sample["before"] == "x y" and sample["after"] is None and sample["step"] is None
    assert Image.open(tmp_path / sample["picture"]).size == (256, 128)


def test_a_report_that_cannot_be_written_is_said_and_no_more(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / ".report.html.part").mkdir()
    assert "no report: " in LiveReport(tmp_path, []).show(1, None)
    assert "no report: " in LiveReport(tmp_path, []).finish(1, None, None)  # nor does it cost a run its end


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield found
        found.close()


def look(browser, path: Path, width: int, scheme: str) -> tuple[dict, list[str]]:
    """What a person at a screen of that width would meet: measures of the page, and everything that went wrong."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else wrong.append(asked.url))
    page.goto(path.as_uri())
    page.evaluate("for (const i of document.images) i.loading = 'eager'")
    page.wait_for_function("[...document.images].every(i => i.complete)")
    measures = page.evaluate(
        """() => ({
            wide: document.documentElement.scrollWidth,
            pictures: document.images.length,
            shown: [...document.images].filter(i => i.naturalWidth > 0).length,
            page: getComputedStyle(document.body).backgroundColor,
            text: getComputedStyle(document.body).color,
        })"""
    )
    context.close()
    return measures, wrong


@pytest.mark.parametrize("width, scheme", [(390, "light"), (1200, "dark")])
def test_the_page_in_a_browser(trained, browser, width, scheme):
    path = write_report(trained[0])
    measures, wrong = look(browser, path, width, scheme)
    assert wrong == []
    assert measures["pictures"] == measures["shown"] >= 12
    assert measures["wide"] <= width  # nothing to scroll sideways
    dark = [sum(map(int, measures[what][4:-1].split(","))) < 3 * 128 for what in ("page", "text")]
    assert dark == ([False, True] if scheme == "light" else [True, False])
    assert path.stat().st_size < 1_000_000
