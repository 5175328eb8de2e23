"""A finished run -> the folder that is published: chosen files, no secrets, no places on this machine.

Nothing gets in because it lies in the run folder: every file has a name that `ALLOWED` knows, and every text is looked
through before anything leaves.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from ruamel.yaml import YAML

from mmft.data.sources import BUNDLED as DRAWN
from mmft.evaluation.charts import charts
from mmft.hub.card import write_card
from mmft.hub.drawing import draw_charts
from mmft.recipe import load_recipe
from mmft.recipe.secrets import redact, redacted

PROCESSOR = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json processor_config.json "
    "preprocessor_config.json video_preprocessor_config.json"
).split()
_MODEL = r"(config|generation_config|model\.safetensors\.index)\.json|model(-\d{5}-of-\d{5})?\.safetensors"
_ADAPTER = r"adapter_config\.json|adapter_model\.safetensors"
ALLOWED = re.compile(
    rf"README\.md|recipe\.yaml|value_head\.safetensors|curves\.png|pictures/\d{{5}}\.jpg|{_ADAPTER}"
    rf"|(base_model/)?({_MODEL})|{'|'.join(map(re.escape, PROCESSOR))}"
)
SAMPLES = 6  # held-out rows in the card
_CURVES = ("Reward", "Held-out", "KL to the reference", "Entropy")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# The folders of an absolute path: they name a machine, and often its user.
_FOLDERS = re.compile(r"(?<![\w/.<)])(?:/(?:[\w.~+-]+/)+|~/(?:[\w.~+-]+/)*|[A-Z]:\\(?:[^\\\n]+\\)*)(?=[\w.-])")


@dataclass
class Run:
    """What a finished run left behind, as it may be shown.

    Attributes:
        recipe: plain data, without secrets and absolute paths.
        base: what the adapters stand on; see `Base`.
    """

    folder: Path
    recipe: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    base: Base

    @property
    def whole_model(self) -> bool:
        """Every weight is published, not adapters."""
        return self.recipe["model"]["tune"] in ("full", "frozen")


@dataclass
class Base:
    """The model that was trained, under the name that others can use.

    kind: "hub", "bundled" (comes with mmft), "here" (warmed up by the run: published in base_model/) or "folder" (of
    the trainer's own and published nowhere).
    """

    name: str
    kind: str


def read_run(folder: str | Path, base: str | None = None) -> Run:
    """Reads a run folder.

    Args:
        base: id on the Hub of the base model, where the recipe names a folder.

    Raises:
        ValueError: the run is not finished, or was not made by a recipe.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder} has no recipe.yaml: it is no run folder of a recipe")
    if not (folder / "summary.json").is_file():
        raise ValueError(f"{folder} has no summary.json: the run did not finish; --resume it first")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if not summary.get("after"):
        raise ValueError(f"{folder / 'summary.json'} holds no held-out result; there is nothing to make a card from")
    recipe = load_recipe(folder / "recipe.yaml").model_dump()
    found = base_of(recipe, base)
    recipe["output"]["push_to_hub"] = None  # whoever runs the recipe again pushes nothing to its first owner
    recipe["model"]["name"] = found.name  # so that `pull` finds it, and so does the recipe when it runs again
    samples = [redacted(line) for line in _lines(folder / "samples.jsonl")]
    run = Run(folder, _public(recipe), _public(summary), _lines(folder / "metrics.jsonl"), samples, found)
    wanted = ["model" if run.whole_model else "adapter", "processor"]
    for name in [*wanted, *(["warm_start"] if run.base.kind == "here" else [])]:
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} has no folder {name}/: expected a finished run of PPO or A2C")
    return run


def make_folder(
    run_folder: str | Path,
    target: str | Path,
    repository: str,
    base: str | None = None,
    licence: str | None = None,
    pictures: bool = False,
) -> list[Path]:
    """Writes what is published, model card included.

    Args:
        run_folder: of a finished run.
        target: a folder that does not exist yet, or is empty.
        repository: user/name, for the lines of the card that load it.
        base: id on the Hub of the base model, where the recipe names a folder.
        licence: of what is published, for the card.
        pictures: publish sample pictures of data that is not drawn by the program.

    Returns:
        The files, relative to the target, in alphabetical order.

    Raises:
        ValueError: the run is not finished, or something in the folder should not leave this machine.
    """
    target = Path(target)
    run = read_run(run_folder, base)
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; name a new folder")
    target.mkdir(parents=True, exist_ok=True)
    _copy_weights(run, target)
    samples = run.samples[:SAMPLES]
    if pictures or run.recipe["data"]["name"] in DRAWN:
        samples = [sample for sample in run.samples if sample.get("picture")][:SAMPLES]
        _copy_pictures(run, samples, target / "pictures")
    else:
        samples = [sample | {"picture": None} for sample in samples]
    drawn = {chart.title.split(":")[0]: chart for chart in reversed(charts(run.metrics, run.summary))}
    if shown := [drawn[title] for title in _CURVES if title in drawn]:
        draw_charts(shown, target / "curves.png")
    yaml = YAML()
    yaml.default_flow_style = False
    with (target / "recipe.yaml").open("w", encoding="utf-8") as stream:
        yaml.dump(run.recipe, stream)
    write_card(run, samples, target, repository, licence)
    files = sorted(path.relative_to(target) for path in target.rglob("*") if path.is_file())
    _look_through(files, target, Path(run_folder))
    return files


def _copy_weights(run: Run, target: Path) -> None:
    """Adapter or model, value head, processor, and the warmed-up base where there is one."""
    if run.whole_model:
        _copy(run.folder / "model", target, _MODEL)
    else:
        from mmft.vlm.adapter_files import check_adapter  # imports torch

        check_adapter(run.folder / "adapter")
        _copy(run.folder / "adapter", target, _ADAPTER)
        # A place on this machine means nothing to others; the card says how to get the base.
        known = run.base.name if run.base.kind == "hub" else None
        _edit(target / "adapter_config.json", {"base_model_name_or_path": known})
        if run.base.kind == "here":
            _copy(run.folder / "warm_start", target / "base_model", _MODEL)
    for config in target.rglob("config.json"):
        _edit(config, {"_name_or_path": run.base.name})
    _copy(run.folder / "processor", target, "|".join(map(re.escape, PROCESSOR)))
    _edit(target / "tokenizer_config.json", {"name_or_path": run.base.name})
    if (run.folder / "value_head.safetensors").is_file() and run.recipe["model"]["critic"] == "head":
        shutil.copyfile(run.folder / "value_head.safetensors", target / "value_head.safetensors")


def _copy(source: Path, target: Path, names: str) -> None:
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if re.fullmatch(names, path.name) and path.is_file():
            shutil.copyfile(path, target / path.name)


def _edit(path: Path, values: dict[str, str | None]) -> None:
    """Replaces values that a JSON file has; it stays byte by byte where it has none of them."""
    if path.is_file():
        data = json.loads(path.read_text(encoding="utf-8"))
        if found := {key: value for key, value in values.items() if data.get(key)}:
            path.write_text(json.dumps(data | found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_pictures(run: Run, samples: list[dict[str, Any]], target: Path) -> None:
    """Encoded anew: pixels alone, without what a camera or a program may have written beside them."""
    for sample in samples:
        path = run.folder / sample["picture"]
        if not re.fullmatch(r"pictures/\d{5}\.jpg", sample["picture"]) or not path.is_file():
            raise ValueError(f"{run.folder / 'samples.jsonl'} names the picture {sample['picture']!r}; it is not there")
        target.mkdir(exist_ok=True)
        with Image.open(path) as picture:
            Image.frombytes("RGB", picture.size, picture.convert("RGB").tobytes()).save(target / path.name, quality=88)


def _look_through(files: list[Path], target: Path, run_folder: Path) -> None:
    """The last look before anything leaves: names, secrets, places."""
    # Shorter ones (/root) are words of large vocabularies.
    own = {str(place) for place in (Path.home(), Path.cwd(), run_folder.resolve()) if len(place.parts) > 2}
    for name in files:
        if not ALLOWED.fullmatch(name.as_posix()):
            raise ValueError(f"{name} is not published: expected one of the files that docs/hub.md names")
        text = _text(target / name)
        if redact(text) != text:
            raise ValueError(f"{name} would hold a token or password; take it out of the run folder's files first")
        found = [] if name.name in PROCESSOR else _FOLDERS.findall(text)
        if found := sorted([*found, *(place for place in own if re.search(re.escape(place) + r"\b", text))]):
            raise ValueError(f"{name} would hold {found[0]!r}, a place on this machine; give a relative path instead")


def _text(path: Path) -> str:
    """What a file says in words: all of it, or the header of a file of tensors; nothing of a picture."""
    if path.suffix in (".jpg", ".png"):
        return ""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else -1
        if size < 0:
            file.seek(0)
        return file.read(size).decode("utf-8", errors="replace")


def base_of(recipe: dict[str, Any], given: str | None = None) -> Base:
    """What the adapters of a recipe stand on; given: its id on the Hub, where the recipe names a folder."""
    name = recipe["model"]["name"]
    if given and (Path(given).exists() or not _HUB_ID.fullmatch(given)):
        raise ValueError(
            f"--base: {given!r} is a place on this machine, where nobody else finds it; expected the id of the base "
            "model on the Hub, user/name"
        )
    if recipe.get("warm_start"):
        return Base(given or _without_place(name), "here")
    if given:
        return Base(given, "hub")
    if re.fullmatch(r"[\w-]+", name) and (Path(__file__).parents[1] / "assets" / name.replace("-", "_")).is_dir():
        return Base(name, "bundled")
    here = Path(name).exists() or not _HUB_ID.fullmatch(name)
    return Base(_without_place(name), "folder" if here else "hub")


def _public(data: Any) -> Any:
    """Without secrets, and with paths cut to their last part."""
    data = redacted(data)
    if isinstance(data, dict):
        return {key: _public(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_public(value) for value in data]
    return _without_place(data) if isinstance(data, str) else data


def _without_place(text: str) -> str:
    """``/home/ann/photos`` -> ``photos``, within a longer text too; ``../ann/photos`` likewise."""
    path = PurePosixPath(text)
    return path.name if ".." in path.parts or path.is_absolute() else _FOLDERS.sub("", text)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def sizes(folder: Path, files: list[Path]) -> Iterator[str]:
    """One line per file, for people."""
    for name in files:
        yield f"{(folder / name).stat().st_size:>14,}  {name.as_posix()}"
