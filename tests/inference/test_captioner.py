"""A captioner writes what the training's evaluation wrote, from whatever a run leaves; and every way of decoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import TUNED, greedy, made_run
from PIL import Image

from mmft import Captioner
from mmft.inference import captioner as captioner_module
from mmft.recipe import Recipe
from mmft.vlm import selftest
from mmft.vlm.load import BUNDLED, load_model


@pytest.fixture(scope="module")
def captioner(trained) -> Captioner:
    return Captioner(trained)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    made_run(folder, TUNED["lora"])
    return folder


# --- greedy -----------------------------------------------------------------------------------------


def test_greedy_is_the_training_evaluation(captioner, trained, scenes):
    wrote = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    written = captioner.write(scenes)
    assert written.texts == [line["after"] for line in wrote]
    assert written.texts != [line["before"] for line in wrote]
    assert captioner.prompt == "Describe the picture." and captioner.max_new_tokens == 24
    ends = set(captioner.policy.end_ids)
    assert [ids[-1] in ends for ids in written.completion_ids] == written.ended


@pytest.mark.parametrize("case", TUNED)
def test_every_kind_of_run(case, tmp_path, scenes):
    if case == "nf4":
        pytest.importorskip("bitsandbytes")
    policy = made_run(tmp_path / "run", TUNED[case])
    rows = list(scenes[:4])
    expected = greedy(policy, rows)
    assert expected != Captioner("scenes-vlm").write(rows, max_new_tokens=24).texts, "nothing was trained"
    assert Captioner(tmp_path / "run").write(rows).texts == expected


def test_a_checkpoint_and_the_bare_adapter(captioner, trained, scenes):
    rows = list(scenes[:2])
    final = captioner.write(rows).texts
    for place in ("adapter", "checkpoints/step-000002", "checkpoints/step-000002/adapter"):
        found = Captioner(trained / place)
        assert found.write(rows).texts == final and found.recipe is not None, place
    assert Captioner(trained / "checkpoints" / "step-000001").write(rows).completion_ids != final


# --- decoding ---------------------------------------------------------------------------------------


def test_draws_belong_to_their_picture(captioner, photos):
    files = sorted((photos / "images").iterdir())[:3]
    drawn = captioner.caption(files, method="sample", num=4, seed=5)
    assert len(drawn) == 12 and len(set(drawn[:4])) > 1
    assert captioner.caption(files[2], method="sample", num=4, seed=5) == drawn[8:]
    assert captioner.caption(files, method="sample", num=4, seed=6) != drawn


def test_the_best_of_draws_is_their_best(captioner, scenes, monkeypatch):
    rows = list(scenes[:3])
    drawn = captioner.write(rows, method="sample", num=6).texts

    def longest(completions, picture=None, image=None, **columns):
        assert all(isinstance(one, Image.Image) for one in image)
        return [float(len(text)) for text in completions]

    best = captioner.write(rows, method="best-of", num=6, reward=longest).texts
    assert [len(text) for text in best] == [max(map(len, drawn[6 * i : 6 * i + 6])) for i in range(3)]
    assert all(text in drawn[6 * i : 6 * i + 6] for i, text in enumerate(best))
    assert len({*drawn}) > 1

    scored = []  # without a reward: by the mean log-prob, which the forward pass of training gives as well
    choose = captioner_module._best
    monkeypatch.setattr(captioner_module, "_best", lambda *given: scored.append(given[:2]) or choose(*given))
    likeliest = captioner.write(rows, method="best-of", num=6).texts
    policy = captioner.policy
    prompts = policy.pictures.prompts(rows, [str(i) for i in range(3)], policy.device, pixels=True)
    ((responses, means),) = scored
    with torch.no_grad():
        logprobs = policy(prompts, responses).logprobs
    expected = (logprobs * responses.mask).sum(-1) / responses.mask.sum(-1)
    torch.testing.assert_close(means, expected, atol=1e-3, rtol=0)
    assert likeliest == [drawn[6 * i + int(means[6 * i : 6 * i + 6].argmax())] for i in range(3)]


def test_beams_find_likelier_captions_than_greedy(captioner, scenes):
    rows = list(scenes)
    prompts = captioner.policy.pictures.prompts(rows, [str(i) for i in range(8)], captioner.policy.device)

    def mean(written) -> np.ndarray:
        from mmft.batch import Responses

        width = max(map(len, written.completion_ids))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in written.completion_ids])
        mask = torch.tensor([[i < len(row) for i in range(width)] for row in written.completion_ids])
        logprobs = captioner.policy(prompts, Responses(ids, mask, mask[:, 0])).logprobs
        return (logprobs.sum(-1) / mask.sum(-1)).detach().numpy()

    beam, plain = captioner.write(rows, method="beam", num=4), captioner.write(rows)
    assert mean(beam).mean() > mean(plain).mean() and beam.texts != plain.texts
    assert captioner.write(rows, method="beam", num=1).texts == plain.texts


@pytest.mark.parametrize("method", ["greedy", "beam", "sample", "best-of"])
def test_banned_tokens_are_never_written(made, scenes, method):
    captioner = Captioner(made)
    rows = list(scenes[:2])
    usual = {ids[0] for ids in captioner.write(rows, method="sample", num=16).completion_ids}
    captioner.policy.ban(sorted(usual))
    captioner.policy.banned_ids = captioner.policy.banned.nonzero().flatten()
    written = captioner.write(rows, method=method, num=None if method == "greedy" else 4)
    assert not usual & {token for ids in written.completion_ids for token in ids}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "beams"}, "expected one of greedy, beam, sample, best-of"),
        ({"num": 3}, "several come from beam, sample"),
        ({"method": "sample", "num": 0}, "num=0"),
        ({"method": "sample", "temperature": 0.0}, "temperature=0.0"),
        ({"reward": len}, "expected method 'best-of'"),
        ({"method": "best-of", "reward": "lenght"}, "did you mean 'length'"),
        ({"method": "best-of", "reward": "cider_d"}, "best-of by 'cider_d'.* training captions"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_wrong_options(captioner, options, said):
    with pytest.raises(ValueError, match=said):
        captioner.write([], **options)


# --- pictures ---------------------------------------------------------------------------------------


def test_pictures_of_any_kind_and_none(captioner, photos, tmp_path):
    path = photos / "images" / "0.png"
    opened = Image.open(path)
    expected = captioner.caption([path])
    assert captioner.caption(str(path)) == captioner.caption(opened) == expected
    assert captioner.caption([path], prompt="What is to be seen?") != expected  # it was read
    assert captioner.caption([]) == []
    (tmp_path / "broken.png").write_bytes(path.read_bytes()[:200])
    for source, said in [
        ("https://example.org/a.png", "addresses are not fetched"),
        (tmp_path / "none.png", "none.png does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "broken.png", "broken.png is damaged"),
    ]:
        with pytest.raises(ValueError, match=said):
            captioner.caption([path, source])


def test_a_clip_goes_in_as_its_frames(captioner, tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for i in range(16):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 15 * i, np.uint8))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    row = captioner.rows([tmp_path / "clip.mp4"])[0]
    assert len(row["images"]) == 8 and row["prompt"] == "Describe the picture."  # the recipe's own
    assert Captioner("scenes-vlm").rows([tmp_path / "clip.mp4"])[0]["prompt"] == "Describe the clip."


def test_a_model_of_no_listed_family_is_tested_once(made, scenes, monkeypatch):
    monkeypatch.setattr("mmft.inference.captioner.FAMILIES", {})
    calls = []
    monkeypatch.setattr(selftest, "selftest", lambda policy, prompts: calls.append(len(prompts)))
    captioner = Captioner(made)
    captioner.write(list(scenes[:3]))
    captioner.write(list(scenes[:3]))
    assert calls == [2]


# --- where the base is ------------------------------------------------------------------------------


def test_a_warmed_up_base_is_the_runs_own(made, tmp_path, scenes):
    """The recipe names the model that the run began with; the adapter stands on the one that it warmed up."""
    run = shutil.copytree(made, tmp_path / "run")
    recipe = Recipe(model=TUNED["lora"], warm_start={})
    recipe.dump(run / "recipe.yaml")
    with pytest.raises(ValueError, match=r"warm_start is not there.*--base"):
        Captioner(run)
    base, _ = load_model("scenes-vlm")
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "mlp" in name:
                parameter.mul_(0.5)
    base.save_pretrained(run / "warm_start")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "elsewhere/warm_start"
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    rows = list(scenes[:2])
    warm = Captioner(run).write(rows).texts
    assert warm != Captioner(made).write(rows).texts
    # As it is published: adapter and processor at the root, the warmed-up model in base_model/.
    shutil.copytree(run / "adapter", tmp_path / "pulled")
    shutil.copytree(run / "processor", tmp_path / "pulled", dirs_exist_ok=True)
    shutil.copytree(run / "warm_start", tmp_path / "pulled" / "base_model")
    config["base_model_name_or_path"] = None
    (tmp_path / "pulled" / "adapter_config.json").write_text(json.dumps(config))
    recipe.dump(tmp_path / "pulled" / "recipe.yaml")
    assert Captioner(tmp_path / "pulled").write(rows).texts == warm


def test_a_base_that_cannot_be_known_is_asked_for(made, tmp_path, scenes):
    adapter = shutil.copytree(made / "adapter", tmp_path / "adapter")
    rows = list(scenes[:2])
    expected = Captioner(made).write(rows).texts
    assert Captioner(adapter).write(rows, max_new_tokens=24).texts == expected  # a bundled base, known by its place
    config = json.loads((adapter / "adapter_config.json").read_text())
    for said, match in ((None, "does not say which model"), ("ann/nowhere", "ann/nowhere.*name a copy as base")):
        config["base_model_name_or_path"] = said
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=match):
            Captioner(adapter)
    copy = shutil.copytree(BUNDLED["scenes-vlm"], tmp_path / "a_copy")
    assert Captioner(adapter, base=copy).write(rows, max_new_tokens=24).texts == expected


def test_another_base_is_refused(made, tiny_model):
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        Captioner(made, base=tiny_model("llava"))
    with pytest.raises(ValueError, match="stands on no other"):
        Captioner("scenes-vlm", base=made)


def test_what_is_no_captioner(tmp_path, made):
    (tmp_path / "unfinished" / "checkpoints" / "step-000003").mkdir(parents=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "weights.safetensors").touch()
    (tmp_path / "half").mkdir()
    shutil.copy(made / "adapter" / "adapter_model.safetensors", tmp_path / "half")
    (tmp_path / "file.json").touch()
    for name, said in [
        ("unfinished", "unfinished run: --resume it, or name its newest checkpoint, .*step-000003"),
        ("full", "checkpoint of a run without adapters"),
        ("half", "adapter_config.json is missing"),
        ("file.json", "is a file"),
        (".", "holds nothing to write captions with"),
    ]:
        with pytest.raises(ValueError, match=said):
            Captioner(tmp_path / name)
    with pytest.raises(ValueError, match=r"no bundled model \(scenes-vlm\)"):
        Captioner("ann/nothing-here")


def test_a_strange_recipe_is_left_aside(made, tmp_path, scenes):
    run = shutil.copytree(made, tmp_path / "run")
    (run / "recipe.yaml").write_text("cake: [flour, eggs]\n")
    with pytest.warns(UserWarning, match="recipe is left aside"):
        captioner = Captioner(run)
    assert captioner.recipe is None and captioner.caption(scenes[0]["image"], max_new_tokens=4)
