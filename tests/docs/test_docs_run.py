"""Every command and every Python block of the documentation is run, page by page, as a reader would.

One folder serves all pages: runs stay, so that a training that stands on several pages is done once; other files go
when the next page begins. Each test is a page.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import doc_runner
import pytest
from doc_blocks import ROOT, Block, Command, blocks, commands, pages
from doc_world import make_world, tidy
from fake_hub import FakeHub, fake_hub
from huggingface_hub import constants
from safetensors import safe_open

TOKEN = "hf_" + "D3" * 17
# What most pages speak of: a finished run, and one on the Hub.
PREPARED = ["accelerate launch recipes/caption_ppo.py", "accelerate launch recipes/caption_a2c.py"]
PREPARED += ["mmft push runs/caption_ppo user/name"]
LANGUAGES = {"sh", "python", "bash", "yaml", "text", "json", "csv", "diff"}  # bash: a file that is shown, parsed alone


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    """The folder, made the present one, with a small Hub on loopback and the finished run that most pages speak of."""
    with pytest.MonkeyPatch.context() as patch, fake_hub(TOKEN) as hub:
        hubs.append(hub)
        folder = make_world(tmp_path_factory.mktemp("reader"), tiny_model)
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setenv("MMFT_DATA_DIR", str(folder / "sets"))
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for text in PREPARED:
            run(next(commands(Block("prepared", 0, "sh", text))))
        yield folder


@pytest.fixture(scope="module")
def counts(request):
    counted: Counter[str] = Counter()
    yield counted
    said = ", ".join(f"{counted[key]} {key}" for key in sorted(counted))
    slowest = sorted(seconds, key=lambda text: -seconds[text])[:5]
    lines = [f"documentation: {said}", f"CPU seconds: {sum(seconds.values()):.0f} in all; of the slowest commands:"]
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, *(f"{seconds[text]:6.1f}  {text[:100]}" for text in slowest), sep="\n")


hubs: list[FakeHub] = []
done: set[tuple] = set()
seconds: dict[str, float] = {}  # CPU time of each command


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    return sum(os.times()[:4])


def run(command: Command) -> str | None:
    """Runs a command that its page has not run before; what trains or diagnoses, if no page has."""
    once = command.words[0] in ("accelerate", "python") or command.words[:2] == ("mmft", "doctor")
    key = ("" if once else command.page, command.words, command.environment)
    if key in done:
        return None
    done.add(key)
    began = cpu_seconds()
    try:
        return doc_runner.run_command(command)
    finally:
        seconds[command.text] = cpu_seconds() - began


@pytest.mark.parametrize("page", pages())
def test_every_block_of_a_page_runs(page, world, counts):
    failed, names = [], {"__name__": "page"}
    found = blocks(page)
    tidy(world)
    for block in found:
        if block.file:
            Path(block.file).write_text(block.text)
    for block in found:
        assert block.language in LANGUAGES, f"{page}:{block.line}: what is in this block? got {block.language!r}"
        try:
            if block.language == "sh":
                for command in commands(block):
                    if how := run(command):
                        counts[f"commands {how}"] += 1
            elif block.language == "bash":
                doc_runner.parse_bash(block)
                counts["files of bash parsed"] += 1
            elif block.language == "python":
                counts["blocks of Python run"] += 1
                doc_runner.run_python(block, names)
        except AssertionError as error:
            failed.append(str(error))
    assert not failed, "\n\n".join(failed)


@pytest.mark.parametrize(
    "text",
    [
        "mmft nonsense",
        "mmft doctor nowhere.yaml",
        "curl example.org",
        "make nothing",
        "pip install 'mmft[nothing]'",
        "python -m pytest tests/nowhere.py",
        "python benchmarks/vs_trl.py --no-such-option",
        "accelerate launch recipes/caption_ppo.py train.stepz=3",
        "accelerate launch --config_file accelerate_configs/zero3.yaml recipes/caption_ppo.py train.stepz=3",
    ],
)
def test_a_wrong_command_is_found(text, world):
    (command,) = commands(Block("page", 1, "sh", text))
    with pytest.raises(AssertionError, match="page:1: "):
        doc_runner.run_command(command)


def test_six_commands_lead_from_a_folder_of_photos_to_the_hub(world):
    """The path of docs/own_pictures.md, and what each of its commands leaves behind."""
    page = "docs/own_pictures.md"
    text = (ROOT / page).read_text("utf-8")
    first, last = (text.count("\n", 0, text.index(mark)) for mark in ("## The six commands", "The same with COCO JSON"))
    path = [command for block in blocks(page) if first < block.line < last for command in commands(block)]
    assert len(path) == 6
    for command in path:
        run(command)
    folder = world / "runs" / "caption_photos"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rows"] >= 1 and {"before", "after", "difference"} <= set(summary)
    (evaluated,) = folder.glob("evaluation/*/predictions.json")
    predictions = json.loads(evaluated.read_text())
    assert predictions and set(predictions[0]) == {"image_id", "caption"}
    assert (evaluated.parent / "scores.json").is_file()
    assert "<img" in (folder / "report.html").read_text("utf-8")
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "np") as adapter:
        trained = [name for name in adapter.keys() if "lora_B" in name]
        assert trained and any(adapter.get_tensor(name).any() for name in trained)  # they start at zero
    assert "adapter_model.safetensors" in hubs[-1].repositories["user/name"].files
