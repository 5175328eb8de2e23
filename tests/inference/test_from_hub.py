"""A published run is used by its name, by the real client of the Hub against a small one on loopback."""

from __future__ import annotations

import pytest
from fake_hub import fake_hub
from huggingface_hub import constants

from mmft import Captioner, push

NAME = "ann/scenes"
TOKEN = "hf_" + "Q7" * 17


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fake_hub(TOKEN) as served:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


def test_by_its_name_on_the_hub(hub, trained, scenes, tmp_path):
    push(trained, NAME)
    files = hub.repositories[NAME].files
    files["modeling_evil.py"], files["adapter_model.bin"] = b"raise SystemExit", b"a pickle"
    captioner = Captioner(NAME)
    assert captioner.write(scenes).texts == Captioner(trained).write(scenes).texts
    assert captioner.recipe is not None and captioner.source.model == "scenes-vlm"
    fetched = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink() or path.is_file()}
    assert "adapter_model.safetensors" in fetched and not fetched & {"modeling_evil.py", "adapter_model.bin"}
