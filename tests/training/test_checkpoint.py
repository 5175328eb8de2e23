"""Checkpoints as transactions, in one process: what is found, what is refused and in which words, what is kept."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_trainer import rows, trainer_of, weights

from mmft.evaluation.captioning import CaptionScores
from mmft.training import interrupts as signals
from mmft.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from mmft.training.config import PPOConfig
from mmft.training.guards import Guard
from mmft.training.transaction import Checkpoints, Damaged, NotSaved, commit, verify, write_tensors
from mmft.vlm.load import load_model

PARTS = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "value_head.safetensors")
PARTS += ("optimizer.safetensors", "rank-00000.safetensors", "state.json", "before.json", "manifest.json")


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """A trainer whose run folder holds the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    trainer_of(tiny_model, folder, max_steps=2, save_steps=1).train()
    return trainer_of(tiny_model, folder, max_steps=3, save_steps=1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.fixture
def newest(saved):
    """The newest checkpoint, put back after the test has spoilt it."""
    folder = saved.run_dir / "checkpoints" / "step-000002"
    shutil.copytree(folder, saved.run_dir / "kept")
    yield folder
    shutil.rmtree(folder)
    (saved.run_dir / "kept").rename(folder)


@pytest.mark.parametrize("spoil", [Path.unlink, truncate, flip], ids=["delete", "truncate", "flip"])
@pytest.mark.parametrize("part", PARTS)
def test_row_4_a_spoilt_part_is_named_and_passed_over(saved, newest, capsys, part, spoil: Callable[[Path], None]):
    spoil(newest / part)
    with pytest.raises(ValueError) as refused:
        find_checkpoint(saved, newest)
    assert part.rpartition("/")[2] in str(refused.value) and "step-000002" in str(refused.value)
    assert find_checkpoint(saved, True).name == "step-000001"
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("checkpoint skipped") and part.rpartition("/")[2] in said[0]


@pytest.mark.parametrize("stage", range(len(PARTS)))
def test_row_5_a_newest_folder_that_is_partial_is_passed_over(saved, newest, capsys, stage):
    # However far a folder was filled: under its own name by somebody's copy, or by us under a dotted one.
    for part in PARTS[stage:]:
        (newest / part).unlink()
    newest.with_name(".writing-step-000003").mkdir()
    assert find_checkpoint(saved, True).name == "step-000001"
    said = capsys.readouterr().out
    assert "step-000002" in said and ".writing-step-000003 was never finished" in said
    newest.with_name(".writing-step-000003").rmdir()


def test_row_5_without_a_whole_one_nothing_starts(tiny_model, tmp_path):
    trainer_of(tiny_model, tmp_path, max_steps=1, save_steps=1).train()
    flip(tmp_path / "checkpoints" / "step-000001" / "optimizer.safetensors")
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="none of the checkpoints .* is whole.*optimizer.safetensors was altered"):
        trainer_of(tiny_model, tmp_path).train(resume_from_checkpoint=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_an_exact_path_is_taken_or_refused_never_replaced(saved, tmp_path):
    older = saved.run_dir / "checkpoints" / "step-000001"
    assert find_checkpoint(saved, older) == older
    assert find_checkpoint(saved, saved.run_dir).name == "step-000002"  # a run folder: its newest
    with pytest.raises(ValueError, match="manifest.json is missing"):
        find_checkpoint(saved, tmp_path)


# ---------------------------------------------------------------- the transaction


def write_one(folder: Path, text: str = "x") -> None:
    (folder / "file").write_text(text)


def test_what_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path):
    final = tmp_path / "thing"
    commit(final, write_one)

    def fails(folder: Path) -> None:
        write_one(folder, "new")
        write_tensors(folder / "weights.safetensors", {"a": torch.zeros(1000)})

    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, allowed[1]))  # bytes that a file may have
    try:
        with pytest.raises(NotSaved, match=r"weights.safetensors: 4,000 bytes could not be written .*too large"):
            commit(final, fails)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    verify(final)
    assert (final / "file").read_text() == "x" and [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_another_process_that_fails_undoes_it_everywhere(tmp_path):
    answers = iter([False, True])  # prepared; then somebody else could not write
    with pytest.raises(NotSaved, match="another process"):
        commit(tmp_path / "thing", write_one, agree=lambda failed: next(answers))
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_was_edited_is_no_manifest(tmp_path):
    commit(tmp_path / "thing", write_one)
    manifest = tmp_path / "thing" / "manifest.json"
    said = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(said | {"sha256": {}}))  # would vouch for anything
    with pytest.raises(Damaged, match="its digest is not that of what it says"):
        verify(tmp_path / "thing")


def test_rotation_keeps_the_last_and_the_chosen(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (5, 10, 999_998, 999_999, 1_000_000):
        checkpoints.save(step, write_one, keep=(5,))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000005", "step-1000000", "step-999999"]
    assert checkpoints.latest().name == "step-1000000"  # by number, not by letters


# ---------------------------------------------------------------- what belongs to a state


def test_everything_comes_back(tiny_model, tmp_path):
    import random

    import numpy as np

    trainer = trainer_of(tiny_model, tmp_path, kl_target=0.05, eval_steps=2, guards={"repetition": Guard(-1.0)})
    trainer.begin()
    trainer.before.metrics["odd"] = np.array([0.1, np.nan, 1 / 3])
    trainer.guards.look(1, trainer.step(1))
    folder = save_checkpoint(trainer, 1)
    drawn = random.random(), np.random.rand(), float(torch.rand(()))
    again = trainer_of(tiny_model, tmp_path, kl_target=0.05, eval_steps=2, guards={"repetition": Guard(-1.0)})
    assert load_checkpoint(again, folder) == 1
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == drawn
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(trainer).items())
    assert again.kl.value == trainer.kl.value and again.guards.state_dict() == trainer.guards.state_dict()
    assert again.before.texts == trainer.before.texts
    assert all(np.array_equal(v, again.before.metrics[n], True) for n, v in trainer.before.metrics.items())
    one, other = (t.optimizer.state_dict()["state"] for t in (trainer, again))
    assert all(torch.equal(value, other[i][name]) for i, slots in one.items() for name, value in slots.items())
    assert again.seconds() > trainer.seconds_before


def test_caption_scores_come_back_with_what_corpus_metrics_need(tmp_path):
    from mmft.evaluation.captioning import score_captions, summarise
    from mmft.training.checkpoint import _evaluation, _evaluation_state
    from mmft.training.evaluate import Evaluation
    from reward_models import DocumentFrequencies

    references = [["a red dog runs", "the dog"], ["a blue cat", "one cat sits"]]
    frequencies = DocumentFrequencies.from_references(references)
    texts = ["a red dog", "a cat sits there"]
    before = Evaluation(texts, score_captions(texts, references, frequencies))
    again = _evaluation(json.loads(json.dumps(_evaluation_state(before))))
    assert isinstance(again.metrics, CaptionScores) and summarise(again.metrics) == summarise(before.metrics)


# ---------------------------------------------------------------- the same run


def noisy_copy(model: Path, folder: Path) -> Path:
    """Another base model of the same shape."""
    model, processor = load_model(str(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_row_10_another_run_is_refused_field_by_field(tiny_model, tmp_path, saved):
    checkpoint = saved.run_dir / "checkpoints" / "step-000002"
    changed = [{**row, "wanted": "z"} if row["id"] == "r5" else row for row in rows()]
    others = {
        "dataset": {"dataset": changed},
        "seed": {"seed": 5},
        "base_model": {"model": str(noisy_copy(tiny_model("llava"), tmp_path / "noisy"))},
        "held_out": {"eval_rows": 2},
        "optimizer": {"optimizer": "sgd"},
        "rewards": {"reward": lambda completions, **_: [0.0] * len(completions)},
    }
    for field, options in others.items():
        other = trainer_of(tiny_model, tmp_path / field, **options)
        with pytest.raises(ValueError) as refused:
            load_checkpoint(other, checkpoint)
        old, new = saved.fingerprint[field], other.fingerprint[field]
        assert f"made with {field} {old}, this run has {field} {new}" in str(refused.value) and old != new
        assert str(refused.value).endswith(f": --allow-change {field}")  # that one and no other
    other = trainer_of(tiny_model, tmp_path / "rank", dataset=changed, seed=5)
    other.allow_change = ("dataset", "seed")
    assert load_checkpoint(other, checkpoint) == 2
    other = trainer_of(tiny_model, tmp_path / "fewer", eval_rows=2)
    assert other.begin(checkpoint, ["held_out"]) == 2
    assert other.before is None  # of three rows; there are two now
    other.allow_change = ("data",)
    with pytest.raises(ValueError, match="--allow-change data: expected one of algorithm, seed"):
        load_checkpoint(other, checkpoint)


def test_row_10_another_rank_of_adapters_is_refused(tiny_model, tmp_path, saved, monkeypatch):
    import test_trainer

    plain = test_trainer.lora_config
    monkeypatch.setattr(test_trainer, "lora_config", lambda model, r: plain(model, r=8))
    with pytest.raises(ValueError, match=r"made with lora_rank \[4\], this run has lora_rank \[8\].*--allow-change"):
        load_checkpoint(trainer_of(tiny_model, tmp_path), saved.run_dir / "checkpoints" / "step-000002")


# ---------------------------------------------------------------- starting, ending


def test_a_new_run_does_not_lose_the_old_one_nor_mix_with_it(tiny_model, tmp_path, capsys):
    trainer_of(tiny_model, tmp_path, max_steps=2, save_steps=1).train()
    trainer_of(tiny_model, tmp_path, max_steps=1, save_steps=1, learning_rate=1e-4).train()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert sorted(p.name for p in (tmp_path / "checkpoints-before").iterdir()) == ["step-000001", "step-000002"]
    assert "checkpoints of an earlier run were moved to" in capsys.readouterr().out


def test_patience_ends_the_run_with_the_best_state(tiny_model, tmp_path):
    quality = iter([1.0, 3.0, 2.0, 2.5, 9.9, 9.9])  # before, step 1 (best), step 2, step 3: two without a better one

    def metrics(texts, opened, ended):
        import numpy as np

        return {"cider_d": np.full(len(texts), current[0])}

    current = [0.0]
    options = {"max_steps": 6, "eval_steps": 1, "patience": 2, "keep_last": 1, "save_steps": 1, "guards": {}}
    trainer = trainer_of(tiny_model, tmp_path, **options)
    trainer.compute_metrics = metrics
    evaluate, at_best = trainer.evaluate, {}

    def counted():
        current[0] = next(quality)
        if current[0] == 3.0:
            at_best.update(weights(trainer))
        return evaluate()

    trainer.evaluate = counted
    summary = trainer.train()
    assert summary["rolled_back_to"] == 1 and [a["guard"] for a in summary["alarms"]] == ["patience"]
    assert "2 evaluations without a better cider_d than at step 1" in summary["alarms"][0]["text"]
    assert all(torch.equal(value, at_best[name]) for name, value in weights(trainer).items())
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_the_last_step_is_always_saved_so_that_more_of_them_lose_nothing(tiny_model, tmp_path):
    trainer_of(tiny_model, tmp_path, max_steps=3, save_steps=2).train()
    trainer = trainer_of(tiny_model, tmp_path, max_steps=4)  # save_steps=0: only at the end
    assert trainer.begin(resume=True) == 3
    trainer.train()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000004"]


def test_patience_may_be_added_on_the_way(tiny_model, tmp_path):
    trainer_of(tiny_model, tmp_path, max_steps=1).train()  # its best evaluation, the first, was kept by nobody
    options = {"max_steps": 3, "eval_steps": 1, "patience": 1}
    same_rows = trainer_of(tiny_model, tmp_path, **options)
    assert same_rows.begin(resume=True) == 1 and same_rows.guards.best_step is None
    other_rows = trainer_of(tiny_model, tmp_path, eval_rows=2, **options)
    assert other_rows.begin(resume=True, allow_change=["held_out"]) == 1 and other_rows.before is None


def test_patience_without_evaluations_is_refused():
    with pytest.raises(ValueError, match="patience=2.*eval_steps"):
        PPOConfig(patience=2)


def test_a_step_that_would_take_too_long_is_given_up_and_not_half_counted(tiny_model, tmp_path, monkeypatch):
    from reward_models import RewardPart, WeightedRewards

    at_step = [0]

    def length(completions, **_):
        if at_step[0] == 3:
            broken._interrupts._signal = 15  # noticed ahead of the update: this score has moved the moments already
        return [float(len(c)) for c in completions]

    def rewards():
        return WeightedRewards([RewardPart("n", length, normalize="running")])

    unbroken = trainer_of(tiny_model, tmp_path / "a", rewards())
    unbroken.train()
    broken = trainer_of(tiny_model, tmp_path / "b", rewards())
    monkeypatch.setattr(signals, "_PATIENCE", -1.0)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "said.json"))  # what a launcher ends its report with
    step = broken.step

    def counted(number):
        at_step[0] = number
        return step(number)

    broken.step = counted
    with pytest.raises(signals.Interrupted) as ended:
        broken.train()
    assert ended.value.code == 143
    assert "ended by SIGTERM after step 2: saved" in (tmp_path / "said.json").read_text()
    at_step[0] = 0
    assert [p.name for p in (tmp_path / "b" / "checkpoints").iterdir()] == ["step-000002"]
    resumed = trainer_of(tiny_model, tmp_path / "b", rewards())
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(unbroken).items())
    assert resumed.reward_funcs.state_dict() == unbroken.reward_funcs.state_dict()


def test_files_of_a_resumed_run_are_those_of_an_unbroken_one(tiny_model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder: Path) -> dict:
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        found = {tag: values for tag, values in scalars.items() if "second" not in tag and "time/" not in tag}
        for name in ("ledger", "alarms"):
            found[name] = (folder / f"{name}.jsonl").read_text()
        summary = json.loads((folder / "summary.json").read_text())
        return found | {"before": summary["before"], "alarms": summary["alarms"]}

    options = {"save_steps": 2, "report_to": ("tensorboard", "ledger"), "guards": {"repetition": Guard(-1.0)}}
    trainer_of(tiny_model, tmp_path / "a", **options).train()
    broken = trainer_of(tiny_model, tmp_path / "b", **options)
    step = broken.step

    def dies(at: int):
        if at == 4:
            raise KeyboardInterrupt
        return step(at)

    broken.step = dies
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer_of(tiny_model, tmp_path / "b", **options)
    resumed.evaluate, evaluations = _counting(resumed.evaluate)
    resumed.train(resume_from_checkpoint=True)
    one, other = read(tmp_path / "a"), read(tmp_path / "b")
    assert one == other and [step for step, _ in one["reward"]] == [1, 2, 3, 4]
    assert len(one["ledger"].splitlines()) == 4 * 12
    assert len(evaluations) == 1  # the one after; that before training came with the checkpoint


def _counting(function):
    calls: list[int] = []

    def counted():
        calls.append(1)
        return function()

    return counted, calls
