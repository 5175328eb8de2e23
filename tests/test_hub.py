"""Publishing a run, by the real client of the Hub against a small Hub on loopback (RELIABILITY row 32)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_hub import environment, fake_hub
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file, save_file

from mmft import hub as publishing
from mmft.cli import main
from mmft.hub import PublishError, make_folder, pull, push
from mmft.hub.folder import ALLOWED
from mmft.recipe import load_recipe
from mmft.training.run import run

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "Q7" * 17
NAME = "ann/scenes-ppo"
SHORT = ["train.steps=2", "eval.rows=8", "rollout.prompts_per_step=2", "rollout.num_generations=2", "eval.every=1"]
SHORT += ["train.micro_prompts=null", "train.save_every=0", "data.train_rows=16", "output.trackers=[]"]


def recipe_of(folder: Path, *overrides: str):
    return load_recipe(ROOT / "recipes" / "caption_ppo.yaml", [*SHORT, f"output.dir={folder}", *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A run that was to be published while the machine is offline, and what it said."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setenv("HF_TOKEN", TOKEN)
        run(recipe_of(folder, f"output.push_to_hub={NAME}"))
    assert ended.value.code == publishing.UNPUBLISHED == 3
    return folder, str(ended.value.__cause__)


@pytest.fixture
def run_folder(finished, tmp_path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(finished[0], tmp_path / "run")


@pytest.fixture
def hub(monkeypatch):
    """The client of this process talks to a fake Hub; waiting takes no time and is written down."""
    with fake_hub(TOKEN) as served:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        waits: list[float] = []
        monkeypatch.setattr(time, "sleep", waits.append)
        served.waits = waits
        yield served


def published(hub) -> dict[str, bytes]:
    return {name: data for name, data in hub.repositories[NAME].files.items() if name != ".gitattributes"}


def commits(hub) -> int:
    return len(hub.repositories[NAME].commits) - 1 if NAME in hub.repositories else 0


# --- a run that cannot be published keeps its result ------------------------------------------------


def test_offline_the_run_keeps_its_result(finished):
    folder, said = finished
    assert "offline" in said and NAME in said
    for name in ("summary.json", "adapter/adapter_model.safetensors", "value_head.safetensors", "report.html"):
        assert (folder / name).is_file(), name
    assert json.loads((folder / "summary.json").read_text())["after"]["cider_d"]


def test_nobody_listens(finished, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PublishError, match=NAME):
        push(finished[0], NAME)
    assert hub.waits == [2.0, 8.0]


def test_without_a_login_nothing_is_asked(finished, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="hf auth login"):
        push(finished[0], NAME)
    assert not hub.requests


# --- faults of the Hub ------------------------------------------------------------------------------


def test_a_refused_token_is_not_tried_twice(finished, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    with pytest.raises(PublishError, match=r"401.*hf auth login"):
        push(finished[0], NAME)
    assert hub.counts["create"] == 1 and not hub.waits and not hub.repositories


@pytest.mark.parametrize("kind", ["create", "validate", "info", "preupload", "batch", "upload", "commit"])
@pytest.mark.parametrize("fault", [500, "cut", "lost"])
def test_a_fault_that_passes_ends_in_one_commit(finished, hub, kind, fault):
    hub.faults[kind] = [fault]
    push(finished[0], NAME)
    assert not hub.faults[kind], "the fault was never met"
    assert commits(hub) == 1
    assert hub.counts["commit"] == (2 if kind == "commit" and fault != "lost" else 1)
    assert hub.waits, "not waited before the next attempt"


@pytest.mark.parametrize("kind", ["create", "upload", "commit"])
def test_a_fault_that_stays_ends_in_an_error(finished, hub, kind):
    hub.faults[kind] = [500] * 1000
    with pytest.raises(PublishError, match="500"):
        push(finished[0], NAME)
    assert commits(hub) == 0
    # Uploads are repeated by the client itself, six times each, before an attempt counts as failed.
    files = sum(name.endswith((".safetensors", ".png", ".jpg")) for name in make_names(finished[0]))
    assert hub.counts[kind] <= (3 if kind != "upload" else 3 * 6 * files)
    assert sum(hub.waits) <= 3 * 31 * files + 10


def make_names(folder: Path) -> list[str]:
    return [path.as_posix() for path in make_folder(folder, folder.parent / f"names-{time.monotonic_ns()}", NAME)]


# --- what is published ------------------------------------------------------------------------------


def test_only_chosen_files_leave(run_folder, hub, monkeypatch):
    for name in ("adapter/evil.py", "adapter/training_args.bin", "adapter/.env", "processor/processing_x.py", ".netrc",
                 "adapter/optimizer.pt", "pictures/notes.txt", "adapter/adapter_model.bin"):  # fmt: skip
        (run_folder / name).write_bytes(b"not for others")
    push(run_folder, NAME)
    names = set(published(hub))
    assert names == {
        *("README.md", "recipe.yaml", "adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"),
        *("curves.png", *(f"pictures/{i:05d}.jpg" for i in range(6))),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json"),
    }
    assert all(b"not for others" not in data for data in published(hub).values())
    adapter = (run_folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert published(hub)["adapter_model.safetensors"] == adapter


def test_a_second_push_makes_no_commit_and_a_changed_run_one(run_folder, hub):
    first = push(run_folder, NAME)
    assert push(run_folder, NAME) == first and commits(hub) == 1
    lines = (run_folder / "samples.jsonl").read_text().splitlines()
    (run_folder / "samples.jsonl").write_text("\n".join(lines[:4]) + "\n")
    hub.repositories[NAME].files["notes.md"] = b"by hand"
    push(run_folder, NAME)
    assert commits(hub) == 2
    assert {"pictures/00003.jpg", "notes.md"} <= set(published(hub))
    assert "pictures/00005.jpg" not in published(hub), "of the earlier push"


def test_what_was_to_be_private_does_not_land_in_public(finished, hub):
    push(finished[0], NAME, private=False)
    assert not hub.repositories[NAME].private
    with pytest.raises(ValueError, match="is public"):
        push(finished[0], NAME)
    push(finished[0], NAME, private=False)
    assert commits(hub) == 1


def test_dry_run_writes_the_same_files_and_asks_nobody(finished, hub, tmp_path, capsys):
    assert main(["push", str(finished[0]), NAME, "--dry-run", str(tmp_path / "dry")]) == 0
    assert not hub.requests
    said = capsys.readouterr().out
    written = {p.relative_to(tmp_path / "dry").as_posix(): p.read_bytes() for p in (tmp_path / "dry").rglob("*.*")}
    for name, data in written.items():
        assert re.search(rf"^\s*{len(data):,}  {re.escape(name)}$", said, re.MULTILINE)
    push(finished[0], NAME)
    assert published(hub) == written
    assert main(["push", str(finished[0]), NAME, "--dry-run", str(tmp_path / "dry")]) == 2, "it is not empty"


def test_unfinished_runs_are_refused(run_folder, tmp_path):
    (run_folder / "summary.json").unlink()
    with pytest.raises(ValueError, match="did not finish"):
        make_folder(run_folder, tmp_path / "out", NAME)
    with pytest.raises(ValueError, match="recipe.yaml"):
        make_folder(tmp_path, tmp_path / "out", NAME)
    assert not (tmp_path / "out").exists()


def test_a_broken_adapter_is_refused(run_folder, tmp_path):
    path = run_folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ValueError, match="NaN"):
        make_folder(run_folder, tmp_path / "out", NAME)


def test_no_place_of_this_machine_leaves(run_folder, tmp_path):
    recipe = (run_folder / "recipe.yaml").read_text()
    recipe = recipe.replace("name: scenes\n", f"name: {tmp_path}/ann/photos\n")
    recipe = recipe.replace("- name: bleu", f"- name: {tmp_path}/ann/judge.py:judge")
    (run_folder / "recipe.yaml").write_text(recipe)
    summary = json.loads((run_folder / "summary.json").read_text())
    summary["signatures"]["reward judge"] = f"judge x 0: judge|path:{tmp_path}/ann/judge.py|v1"
    (run_folder / "summary.json").write_text(json.dumps(summary))
    files = make_folder(run_folder, tmp_path / "out", NAME)
    assert not any(name.match("pictures/*") for name in files), "pictures of one's own data go only when asked for"
    for name in files:
        assert str(tmp_path).encode() not in (tmp_path / "out" / name).read_bytes(), name
        assert str(ROOT).encode() not in (tmp_path / "out" / name).read_bytes(), name
    assert load_recipe(tmp_path / "out" / "recipe.yaml").rewards[1].name == "judge.py:judge"
    assert "judge.py|v1" in (tmp_path / "out" / "README.md").read_text()
    asked = make_folder(run_folder, tmp_path / "with", NAME, pictures=True)
    assert sum(name.match("pictures/*") for name in asked) == 6


def test_a_place_or_a_token_in_the_processor_stops_the_push(run_folder, tmp_path, monkeypatch):
    path = run_folder / "processor" / "chat_template.jinja"
    template = path.read_text()
    path.write_text(template + f"{{# {run_folder.resolve()}/x #}}")
    with pytest.raises(ValueError, match=r"chat_template.jinja would hold .*place"):
        make_folder(run_folder, tmp_path / "a", NAME)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    path.write_text(template + "{# 0123456789abcdef0123456789abcdef #}")
    with pytest.raises(ValueError, match=r"chat_template.jinja would hold a token") as refused:
        make_folder(run_folder, tmp_path / "b", NAME)
    assert "0123456789abcdef" not in str(refused.value)


# --- the card ---------------------------------------------------------------------------------------


def test_the_card_says_what_the_run_came_to(finished, tmp_path):
    make_folder(finished[0], tmp_path / "out", NAME)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert (card.data.library_name, card.data.license) == ("peft", "apache-2.0")
    assert card.data.pipeline_tag == "image-text-to-text" and {"ppo", "lora"} <= set(card.data.tags)
    reported = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert reported == {name: pytest.approx(found["mean"], abs=1e-6) for name, found in summary["after"].items()}
    cider = {side: summary[side]["cider_d"] for side in ("before", "after", "difference")}
    row = next(line for line in card.text.splitlines() if line.startswith("| CIDEr-D |"))
    shown = [float(number) for number in re.findall(r"[+-]?\d+\.\d+", row.replace("−", "-"))]
    wanted = [cider[side][key] for side in cider for key in ("mean", "low", "high")]
    assert shown == pytest.approx(wanted, abs=6e-4)
    assert summary["signatures"]["reward cider_d"] in card.text and summary["versions"]["peft"] in card.text
    for name in re.findall(r"\]\(([\w.]+\.png)\)|src=\"([^\"]+)\"", card.text):
        with Image.open(tmp_path / "out" / "".join(name)) as picture:
            assert min(picture.size) > 16
    first = json.loads((finished[0] / "samples.jsonl").read_text().splitlines()[0])
    assert first["after"] in card.text


def test_hostile_captions_are_text(run_folder, tmp_path):
    lines = [json.loads(line) for line in (run_folder / "samples.jsonl").read_text().splitlines()]
    lines[0]["after"] = "a | b\n\n---\n# big <script>x</script> [l](http://evil.example) ![i](//e/p.png) `c` **b** \\"
    (run_folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_folder(run_folder, tmp_path / "out", NAME)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    row = next(line for line in card.text.splitlines() if "evil" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 4, "one row of three cells"
    assert "<script" not in row and not re.search(r"(?<!\\)[`*\[]", row) and "http://" not in row


# --- the way back -----------------------------------------------------------------------------------


LOGITS = """
import sys, torch
sys.path[:0] = [{tests!r}]
import torchvision_shim
torchvision_shim.install()
{code}
from PIL import Image
from safetensors.torch import save_file
chat = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "Describe the picture."}}]}}]
text = processor.apply_chat_template(chat, add_generation_prompt=True) + "a big red star"
inputs = processor(text=text, images=Image.open({picture!r}), return_tensors="pt")
with torch.no_grad():
    save_file({{"logprobs": model.eval()(**inputs).logits.log_softmax(-1).contiguous()}}, {out!r})
"""


def logprobs(code: str, out: Path, picture: Path, env: dict[str, str] | None = None) -> torch.Tensor:
    """Of fixed words under a picture, by a fresh process that knows nothing but some lines of Python."""
    script = LOGITS.format(tests=str(ROOT / "tests"), code=code, picture=str(picture), out=str(out))
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | (env or {}), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(out)["logprobs"]


def test_published_later_by_the_command_and_loaded_by_the_lines_of_the_card(finished, hub, tmp_path, capsys):
    """By those that `pull` prints, too: equal to the run's own adapter."""
    from peft import PeftModel

    from mmft.vlm.load import load_model

    env = os.environ | environment(hub, str(tmp_path / "home"))
    command = [sys.executable, "-m", "mmft.cli", "push", str(finished[0]), NAME]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{hub.url}/{NAME}/commit/")
    assert commits(hub) == 1 and hub.repositories[NAME].private

    card = published(hub)["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 5
    picture = finished[0] / "pictures" / "00000.jpg"
    loaded = logprobs(code, tmp_path / "a", picture, environment(hub, str(tmp_path / "home")))

    base, processor = load_model("scenes-vlm")
    model = PeftModel.from_pretrained(base, str(finished[0] / "adapter")).eval()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True) + "a big red star"
    inputs = processor(text=text, images=Image.open(picture), return_tensors="pt")
    with torch.no_grad():
        own = model(**inputs).logits.log_softmax(-1)
        with model.disable_adapter():
            assert (model(**inputs).logits.log_softmax(-1) - own).abs().max() > 1e-3, "the adapter does nothing"
    assert torch.equal(loaded, own)

    capsys.readouterr()
    assert main(["pull", NAME, str(tmp_path / "pulled")]) == 0
    assert (tmp_path / "pulled" / "README.md").read_text() == card
    names: dict = {}
    exec(capsys.readouterr().out, names)
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(**inputs).logits.log_softmax(-1), own)


def test_pull_finds_what_was_altered_on_the_way(finished, hub, tmp_path, monkeypatch):
    push(finished[0], NAME)
    files = hub.repositories[NAME].files
    right, served = files["value_head.safetensors"], hub.file
    flipped = right[:-1] + bytes([right[-1] ^ 1])

    def altered(body, name, revision, path):
        status, headers, data = served(body, name, revision, path)
        return status, headers, flipped if path == "value_head.safetensors" else data

    monkeypatch.setattr(hub, "file", altered)
    with pytest.raises(ValueError, match=r"value_head.safetensors is not what the Hub has"):
        pull(NAME, tmp_path / "out")


def test_pull_takes_no_code_and_nothing_of_others(finished, hub, tmp_path):
    push(finished[0], NAME)
    files = hub.repositories[NAME].files
    files |= {"evil.py": b"import os", "adapter_model.bin": b"pickle", "pictures/../../up.jpg": b"up"}
    pull(NAME, tmp_path / "out")
    got = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert got == {name for name in files if ALLOWED.fullmatch(name)} and not (tmp_path / "up.jpg").exists()
    with pytest.raises(ValueError, match="not empty"):
        pull(NAME, tmp_path / "out")
    del files["recipe.yaml"]
    with pytest.raises(ValueError, match="not published by mmft"):
        pull(NAME, tmp_path / "other")
    with pytest.raises(PublishError, match="not there"):
        pull("ann/nothing", tmp_path / "nothing")


# --- other ways of tuning ---------------------------------------------------------------------------


@pytest.mark.parametrize("tune", ["full", "frozen"])
def test_a_whole_model_is_published_with_its_weights(tune, tmp_path):
    from mmft.vlm.load import load_model

    run(recipe_of(tmp_path / "run", f"model.tune={tune}", "train.steps=1", "eval.every=0"))
    files = make_folder(tmp_path / "run", tmp_path / "out", NAME)
    assert Path("model.safetensors") in files and Path("adapter_config.json") not in files
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers" and "PeftModel" not in card.text
    model, _ = load_model(str(tmp_path / "out"))
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == saved.keys() and all(torch.equal(written[name], saved[name]) for name in saved)
    base, _ = load_model("scenes-vlm")
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)]
    assert any(moved), "what was loaded is the untrained model"


def test_a_trained_connector_is_published_with_the_adapter(tmp_path):
    """The lines of the card give the connector that was trained, not the base model's."""
    run(recipe_of(tmp_path / "run", "model.tune=hybrid", "train.steps=1", "eval.every=0"))
    make_folder(tmp_path / "run", tmp_path / "out", NAME)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "and the connector in full" in card
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace(NAME, str(tmp_path / "out")), names)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    state, untrained = (
        names["model"].state_dict(),
        load_file(ROOT / "mmft" / "assets" / "scenes_vlm" / "model.safetensors"),
    )
    connector = {name: tensor for name, tensor in saved.items() if "lora_" not in name}
    assert connector and all("multi_modal_projector" in name for name in connector)
    for name, tensor in connector.items():
        inner = name.split("multi_modal_projector.")[1]
        loaded = next(t for n, t in state.items() if n.endswith(f"projector.modules_to_save.default.{inner}"))
        before = next(t for n, t in untrained.items() if n.endswith(f"multi_modal_projector.{inner}"))
        assert torch.equal(loaded, tensor) and not torch.equal(tensor, before), name


def test_names_are_looked_at_before_anything_is_written(run_folder, tmp_path):
    for name in ("scenes", "ann/../scenes", "ann/my scenes", "a/b/c", "/scenes"):
        with pytest.raises(ValueError, match="user/name|namespace|Repo id"):
            push(run_folder, name, dry_run=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_on_the_hub_is_named_everywhere(run_folder, hub, tmp_path):
    """A run on a folder, whose copy on the Hub is told on the command line."""
    text = (run_folder / "recipe.yaml").read_text()
    (run_folder / "recipe.yaml").write_text(text.replace("name: scenes-vlm", f"name: {tmp_path}/mine", 1))
    push(run_folder, NAME, base="ann/base")
    files = published(hub)
    recipe = files["recipe.yaml"].decode()
    assert "name: ann/base" in recipe and NAME not in recipe and "ann/base" in files["README.md"].decode()
    assert 'from_pretrained("ann/base")' in pull(NAME, tmp_path / "out")


def test_a_base_on_this_machine_is_not_taken_for_one_on_the_hub(run_folder, tmp_path, monkeypatch):
    """models/mine is a good name on the Hub, too; here it is a folder, and nobody else has it."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for base in ("models/mine", "./mine", "a/b/c"):
        with pytest.raises(ValueError, match="--base: .*place on this machine"):
            push(run_folder, NAME, base=base, dry_run=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_code_of_the_model_is_told(run_folder, tmp_path):
    text = (run_folder / "recipe.yaml").read_text().replace("name: scenes-vlm", "name: ann/coded", 1)
    (run_folder / "recipe.yaml").write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    make_folder(run_folder, tmp_path / "out", NAME)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "needs Python code of its own" in card and "trust_remote_code=True" not in card.split("```")[1]


def test_pull_refuses_an_index_that_points_outside(finished, hub, tmp_path):
    push(finished[0], NAME)
    index = json.dumps({"weight_map": {"a": "../../other.safetensors"}}).encode()
    files = hub.repositories[NAME].files
    files |= {"base_model/config.json": b"{}", "base_model/model.safetensors.index.json": index}
    with pytest.raises(ValueError, match="weight_map names '../../other.safetensors'"):
        pull(NAME, tmp_path / "out")


def test_a_warmed_up_base_is_published_with_the_adapter(tmp_path):
    warm = "warm_start={max_steps: 2, batch_size: 4}"
    run(recipe_of(tmp_path / "run", warm, "train.steps=1", "eval.every=0"))
    make_folder(tmp_path / "run", tmp_path / "out", NAME)
    card = (tmp_path / "out" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace(f'snapshot_download("{NAME}")', "FOLDER")
    names: dict = {"FOLDER": str(tmp_path / "out")}
    exec(code, names)
    warmed = load_file(tmp_path / "run" / "warm_start" / "model.safetensors")
    state = names["model"].state_dict()
    untrained = load_file(ROOT / "mmft" / "assets" / "scenes_vlm" / "model.safetensors")
    end = ".layers.0.input_layernorm.weight"
    loaded, saved, before = (
        next(value for key, value in tensors.items() if key.endswith(end)) for tensors in (state, warmed, untrained)
    )
    assert torch.equal(loaded, saved) and not torch.equal(saved, before)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    loaded = {key.replace(".default", ""): value for key, value in state.items() if "lora_" in key}
    assert loaded.keys() == adapter.keys() and all(torch.equal(loaded[key], adapter[key]) for key in adapter)


def test_the_value_head_is_published_as_it_is(finished, tmp_path):
    make_folder(finished[0], tmp_path / "out", NAME)
    head = load_file(tmp_path / "out" / "value_head.safetensors")
    own = load_file(finished[0] / "value_head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {"weight": (1, 128), "bias": (1,)}
    assert all(np.array_equal(head[name], own[name]) for name in own) and head["weight"].abs().sum() > 0
