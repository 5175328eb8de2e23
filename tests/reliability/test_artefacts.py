"""Row 29: canaries in every slot where a file is read. None may sing; that each can is shown by opening its cage."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmft.data import load_rows
from mmft.data.rows import open_picture
from mmft.evaluation.report import write_report
from mmft.recipe import load_recipe
from mmft.training.config import PPOConfig
from mmft.training.trainer import PPOTrainer
from mmft.training.transaction import MANIFEST, _digest, sha256
from mmft.vlm.adapter_files import check_adapter, load_adapter
from mmft.vlm.feature_cache import FeatureCache
from mmft.vlm.load import build_policy, load_model, lora_config
from mmft.vlm.pictures import Pictures
from reward_models import DocumentFrequencies
from reward_models.preference import PreferenceReward

ROOT = Path(__file__).parents[2]


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.fixture
def sung(tmp_path) -> Path:
    """What a canary makes when it sings."""
    return tmp_path / "sung"


@pytest.fixture
def pickled(sung) -> bytes:
    return pickle.dumps(Canary(sung))


@pytest.fixture
def singer(sung) -> str:
    """Python code of a canary."""
    return f"import os\nos.mkdir({str(sung)!r})\n"


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of a small model to spoil."""
    return Path(shutil.copytree(tiny_model("llava"), tmp_path / "model"))


def change(path: Path, **keys) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def refused(work: Callable[[], object], sung: Path, *said: str) -> str:
    with pytest.raises(ValueError) as caught:
        work()
    assert not sung.exists(), "the canary sang"
    for part in said:
        assert part in str(caught.value), caught.value
    return str(caught.value)


def test_the_canaries_are_alive(pickled, singer, sung):
    pickle.loads(pickled)
    assert sung.is_dir()
    sung.rmdir()
    exec(singer)
    assert sung.is_dir()


# --- models ----------------------------------------------------------------------------------------


def test_1_weights_in_a_pickle(model, sung, pickled):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickled)
    refused(lambda: load_model(str(model)), sung, "a pickle", "safetensors")


@pytest.mark.parametrize("name", ["../evil.safetensors", "/evil.safetensors", "evil.bin", "file:///evil.safetensors"])
def test_2_a_weight_map_that_leads_out(model, sung, pickled, tmp_path, name):
    (model / "model.safetensors").rename(tmp_path / "evil.safetensors")  # sound weights: only where they lie is wrong
    for place in (tmp_path / "evil.bin", model / "evil.bin"):
        place.write_bytes(pickled)
    index = {"metadata": {}, "weight_map": {"model.language_model.embed_tokens.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: load_model(str(model)), sung, "weight_map", name)
    (model / "model.safetensors.index.json").rename(model / "other.json")
    change(model / "config.json", transformers_weights="other.json")
    refused(lambda: load_model(str(model)), sung, "model.name")


CODE = {
    "model": ("config.json", {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}),
    "processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.Evil"}, "processor_class": "Evil"}),
    "tokenizer": (
        "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"},
    ),
    "image processor": (
        "processor_config.json",
        {"image_processor": {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "Evil"}},
    ),
}


@pytest.mark.parametrize("part", CODE)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "says it may"])
def test_3_code_that_comes_with_a_model(model, sung, singer, part, nested):
    (model / "evil.py").write_text(singer)
    file, keys = CODE[part]
    if nested:
        keys = keys | {"trust_remote_code": True}
        if part == "model":
            config = json.loads((model / file).read_text())
            keys |= {name: config[name] | keys for name in ("text_config", "vision_config")}
    change(model / file, **keys)
    try:
        load_model(str(model))  # what transformers knows by itself may be loaded without the code
    except ValueError as error:
        assert "model.trust_remote_code" in str(error)
    else:
        assert part == "tokenizer"
    assert not sung.exists()
    with pytest.raises(ValueError):  # there is no class Evil in it
        load_model(str(model), trust_remote_code=True)
    assert sung.is_dir(), "the key is the one way to run it"


def test_4_generation_code_beside_a_sound_model(model, sung, singer):
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(f"{singer}def generate(model, **_): pass\n")
    load_model(str(model))
    assert not sung.exists()
    load_model(str(model), trust_remote_code=True)
    assert sung.is_dir()


_ESCAPES = (
    "{{{{ cycler.__init__.__globals__.os.mkdir({place!r}) }}}}",
    "{{% for c in ''.__class__.__mro__[1].__subclasses__() %}}{{{{ c.__init__.__globals__ }}}}{{% endfor %}}"
    "{{{{ lipsum.__globals__['os'].mkdir({place!r}) }}}}",
    "{{{{ messages.append.__self__.__class__.__base__.__subclasses__() }}}}"
    "{{{{ namespace.__init__.__globals__.__builtins__.open({place!r}, 'w') }}}}",
)


@pytest.mark.parametrize("escape", _ESCAPES)
def test_5_chat_templates_stay_in_their_sandbox(model, sung, escape):
    (model / "chat_template.jinja").write_text(escape.format(place=str(sung)))
    loaded = load_model(str(model))
    with pytest.raises(Exception, match=r"unsafe|undefined|no attribute"):
        Pictures(*loaded).render("What is it?", 1)
    assert not sung.exists()


def test_6_an_adapter_in_the_place_of_a_model(model, sung, pickled):
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "evil"}))
    (model / "adapter_model.bin").write_bytes(pickled)
    refused(lambda: load_model(str(model)), sung, "holds an adapter", "evil")


# --- adapters, checkpoints, rewards ----------------------------------------------------------------


def test_7_adapters(model, sung, pickled, tmp_path):
    base, _ = load_model(str(model))
    folder = tmp_path / "adapter"
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(load_model(str(model))[0], lora_config(base, r=2)).save_pretrained(folder)
    check_adapter(folder, base)
    (folder / "adapter_model.bin").write_bytes(pickled)
    (folder / "adapter_model.safetensors").write_bytes(pickled)
    refused(lambda: load_adapter(base, folder), sung, "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    refused(lambda: load_adapter(base, folder), sung, "a pickle")


def a_trainer(model: Path, folder: Path) -> PPOTrainer:
    torch.manual_seed(0)
    loaded = load_model(str(model))
    policy = build_policy(*loaded, lora_config(loaded[0], r=2))
    rows = [{"id": str(i), "prompt": "say", "image": Image.new("RGB", (32, 32), (9 * i, 0, 0))} for i in range(2)]
    sizes = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 3, "num_ppo_epochs": 1}
    config = PPOConfig(output_dir=str(folder), max_steps=2, save_steps=1, report_to=(), **sizes)
    return PPOTrainer(policy, lambda completions, **_: [float(len(c)) for c in completions], config, rows)


def test_8_every_file_of_a_checkpoint(model, sung, pickled, tmp_path):
    """Adapter, value head, optimizer, random state, counters: pickles under their names, the manifest made to fit."""
    trainer = a_trainer(model, tmp_path / "run")
    trainer.config.max_steps = 1
    trainer.train()
    sound = tmp_path / "run" / "checkpoints" / "step-000001"
    files = [p.relative_to(sound) for p in sorted(sound.rglob("*")) if p.is_file() and p.name != MANIFEST]
    read = 0
    for file in files:
        if "adapter_config" in file.name:  # written for others; `check_adapter` reads it
            continue
        spoilt = Path(shutil.copytree(sound, tmp_path / "spoilt"))
        (spoilt / file).write_bytes(pickled)
        said = {
            "sha256": {p.relative_to(spoilt).as_posix(): sha256(p) for p in sorted(spoilt.rglob("*")) if p.is_file()}
        }
        said["sha256"].pop(MANIFEST)
        (spoilt / MANIFEST).write_text(json.dumps(said | {"digest": _digest(said)}))
        with pytest.raises(Exception) as caught:
            a_trainer(model, tmp_path / "again").train(spoilt)
        assert not isinstance(caught.value, TypeError | AttributeError), caught.value
        assert not sung.exists(), file
        read += 1
        shutil.rmtree(spoilt)
    assert read >= 5, files


def test_9_document_frequencies(sung, tmp_path, pickled):
    path = tmp_path / "document_frequencies.npz"
    DocumentFrequencies.from_references([["a dog runs"], ["a cat"]]).save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    for name in arrays:
        np.savez(path, **arrays | {name: np.array([Canary(sung)], dtype=object)})
        refused(lambda: DocumentFrequencies.load(path), sung)
    path.write_bytes(pickled)
    refused(lambda: DocumentFrequencies.load(path), sung)


def test_10_the_folder_of_picture_features(sung, tmp_path, pickled):
    cache = FeatureCache(0, tmp_path, fingerprint=lambda: "towers")
    cache.put("picture", {"image": [torch.ones(2, 3)]})
    (path,) = tmp_path.glob("features-*/*.safetensors")
    assert cache.get("picture") is not None
    path.write_bytes(pickled)
    assert cache.get("picture") is None and not sung.exists()


def test_11_a_preference_head(sung, tmp_path, pickled):
    from reward_models.preference.folder import FORMAT, _hashes, _identity

    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "head.safetensors").write_bytes(pickled)
    head = {"fusion": "text", "heads": 1, "width": 4}
    facts = {"format": FORMAT, "head": head, "backbone": {"name": "x"}, "adapter": False, "files": _hashes(folder)}
    (folder / "preference.json").write_text(json.dumps(facts | {"identity": _identity(facts)}))
    with pytest.raises(Exception):  # noqa: B017 (whatever is found missing first)
        PreferenceReward.load(folder)
    assert not sung.exists()


def test_12_columns_of_a_saved_data_set(sung, tmp_path, pickled):
    """A column that names a pickled type of its own, as Arrow files of before 2023 do."""
    import datasets
    import pyarrow as pa

    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"chosen": ["a"], "rejected": ["b"]}).save_to_disk(str(folder))
    (arrow,) = folder.glob("*.arrow")
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled}
    fields = [pa.field("chosen", pa.string(), metadata=extension), pa.field("rejected", pa.string())]
    table = pa.table([["a"], ["b"]], schema=pa.schema(fields))
    with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    from mmft.training.preference_pairs import _open_rows

    try:
        rows, _ = _open_rows(str(folder), "train", None)
        list(rows)
    except (ValueError, TypeError, NotImplementedError, pa.ArrowException):
        pass
    assert not sung.exists()


def test_13_tags_in_recipes_and_cards(sung, tmp_path):
    for text, load in (
        (f"seed: !!python/object/apply:os.mkdir [{str(sung)!r}]\n", load_recipe),
        (f"name: !!python/object/apply:os.mkdir [{str(sung)!r}]\nroot: .\n", lambda p: load_rows(str(p), "train")),
        (f"name: x\nroot: !!python/object/new:os.mkdir [{str(sung)!r}]\n", lambda p: load_rows(str(p), "train")),
    ):
        path = tmp_path / "file.yaml"
        path.write_text(text)
        refused(partial(load, path), sung, "tag")


def test_14_what_a_model_writes_is_text_in_the_report(sung, tmp_path):
    hostile = f"<script>alert(1)</script>{{{{ cycler.__init__.__globals__.os.mkdir({str(sung)!r}) }}}}{{{{ 6 * 7 }}}}"
    sample = {"index": 0, "id": hostile, "prompt": hostile, "references": [hostile], "picture": None}
    sample |= {"before": [hostile], "after": [hostile], "scores": {}}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (tmp_path / "recipe.yaml").write_text(f"# {hostile}\n")
    page = write_report(tmp_path).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "{{ 6 * 7 }}" in page
    assert not sung.exists()


def test_15_pickles_that_call_themselves_pictures(sung, tmp_path, pickled):
    (tmp_path / "a.png").write_bytes(pickled)
    refused(lambda: open_picture(tmp_path / "a.png", row="1"), sung, "row 1")


# --- the source ------------------------------------------------------------------------------------

_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
_CALLS = {"torch.load", "torch.save", "os.system", "os.popen", "eval", "exec", "yaml.load", "yaml.unsafe_load"}
_ALLOWED = {
    # Messages between a run and its own child, over a pair of sockets that nobody else holds.
    ("reward_models/isolation.py", "import pickle"),
    ("reward_models/own.py", "import pickle"),
    # Markdown, which has its own way of escaping.
    ("mmft/hub/card.py", "a template environment without autoescape=True"),
}


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(source: str) -> list[tuple[int, str]]:
    """(line, what) of everything in a file that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, f"import {a.name}") for a in node.names if a.name.split(".")[0] in _MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _MODULES:
            found.append((node.lineno, f"import {node.module}"))
        if not isinstance(node, ast.Call):
            continue
        name, options = _name(node.func), {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        given = {k.arg for k in node.keywords}
        last = name.rpartition(".")[2]
        if name in _CALLS:
            found.append((node.lineno, name))
        if name in ("np.load", "numpy.load") and options.get("allow_pickle", None) is not False:
            found.append((node.lineno, f"{name} without allow_pickle=False"))
        if options.get("shell") is True:
            found.append((node.lineno, "shell=True"))
        if options.get("trust_remote_code") is True:
            found.append((node.lineno, "trust_remote_code=True"))
        if last == "from_pretrained" and "Auto" in name and None not in given:
            if "trust_remote_code" not in given:
                found.append((node.lineno, f"{name} leaves trust_remote_code open"))
            if "AutoModel" in name and options.get("use_safetensors") is not True:
                found.append((node.lineno, f"{name} without use_safetensors=True"))
        if last == "Environment" and options.get("autoescape") is not True:
            found.append((node.lineno, "a template environment without autoescape=True"))
        if last == "YAML" and options.get("typ") == "unsafe":
            found.append((node.lineno, "an unsafe YAML loader"))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(p)",
        "torch.save(a, p)",
        "np.load(p)",
        "np.load(p, allow_pickle=True)",
        "eval(a)",
        "exec(a)",
        "yaml.load(a)",
        "os.system(a)",
        "subprocess.run(a, shell=True)",
        "load(a, trust_remote_code=True)",
        "AutoProcessor.from_pretrained(a)",
        "AutoModel.from_pretrained(a, trust_remote_code=False)",
        "Environment(loader=a)",
        "YAML(typ='unsafe')",
    ],
)
def test_unsafe_lines_are_found(line):
    assert len(unsafe(f"def f():\n    {line}\n")) == 1


def test_no_unsafe_load_in_the_source():
    files = [p for folder in ("mmft", "reward_models") for p in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 80
    found = [(str(p.relative_to(ROOT)), line, what) for p in files for line, what in unsafe(p.read_text())]
    assert {(file, what) for file, _, what in found} == _ALLOWED, found
