"""What a captioner is made of: which base model, which adapter on it, which processor and recipe.

A source is a run folder, an adapter's folder, a checkpoint, a published run (its folder or its name on the Hub) or a
model. Where the base model lies is read from the recipe, for a run's adapters know it only by a path of the machine
that trained them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mmft.recipe import Recipe, RecipeError, load_recipe
from mmft.vlm.adapter_files import CONFIG, WEIGHTS
from mmft.vlm.load import BUNDLED
from mmft.vlm.model_files import own_file


@dataclass(frozen=True)
class Source:
    """Where the parts are.

    Attributes:
        name: as it was given.
        model: what `load_model` takes: the base of the adapter, or a whole model.
        adapter: folder of the adapter; None for a whole model.
        processor: folder of the processor; None where it lies beside the model.
        root: the folder of the run, where there is one.
        recipe: of the run, where it is known.
        base_given: the base was named by the user, and may be a copy under another name.
    """

    name: str
    model: str
    adapter: Path | None = None
    processor: str | None = None
    root: Path | None = None
    recipe: Recipe | None = None
    base_given: bool = False


def find_source(source: str | Path, base: str | Path | None = None) -> Source:
    """Looks a source up; loads nothing.

    Args:
        base: the model that an adapter stands on, where the source does not say or cannot know.

    Raises:
        ValueError: there is no such thing, it is not finished, or its base model is not known.
    """
    name = str(source)
    folder = Path(name).expanduser()
    if name not in BUNDLED and folder.is_dir():
        found = _in_folder(folder, None if base is None else str(base))
    elif name not in BUNDLED and folder.exists():
        raise ValueError(f"{name} is a file; expected a run folder, an adapter, a model, or a name on the Hub")
    elif name not in BUNDLED and own_file(name, CONFIG) is not None:
        found = _in_folder(_fetched(name), None if base is None else str(base))
    else:
        found = Source(name, name, recipe=None if name in BUNDLED else _recipe(own_file(name, "recipe.yaml")))
    if base is not None and found.adapter is None:
        raise ValueError(f"{name} is a whole model and stands on no other; leave out the base {str(base)!r}")
    return replace(found, name=name, base_given=base is not None)


def _in_folder(folder: Path, base: str | None) -> Source:
    root = next((place for place in _upwards(folder) if (place / "recipe.yaml").is_file()), folder)
    recipe = _recipe(root / "recipe.yaml")
    processor = next((str(place) for place in (root / "processor", *_upwards(folder)) if _has_processor(place)), None)
    for adapter in (folder, folder / "adapter"):
        if (adapter / CONFIG).is_file():
            return Source(str(folder), base or _base(adapter, root, recipe), adapter, processor, root, recipe)
    for model in (folder, folder / "model"):
        if (model / "config.json").is_file():
            return Source(str(folder), str(model), None, processor, root, recipe)
    if (folder / "summary.json").is_file() and (folder / "warm_start" / "config.json").is_file():  # supervised alone
        return Source(str(folder), str(folder / "warm_start"), None, None, root, recipe)
    if (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder / CONFIG} is missing; take the adapter from its source again")
    if checkpoints := sorted((folder / "checkpoints").glob("step-*")):
        raise ValueError(
            f"{folder} holds an unfinished run: --resume it, or name its newest checkpoint, {checkpoints[-1]}"
        )
    if (folder / "weights.safetensors").is_file():
        raise ValueError(f"{folder} is a checkpoint of a run without adapters; name the folder of the finished run")
    raise ValueError(
        f"{folder} holds nothing to write captions with; expected a finished run (adapter/ or model/), an adapter "
        f"({CONFIG}) or a model (config.json)"
    )


def _upwards(folder: Path) -> Iterator[Path]:
    """The folder, and those around it that may be the run's: of adapter/, and of checkpoints/step-000020/adapter/."""
    yield folder
    here = folder.resolve()
    if here.name in ("adapter", "model"):
        here = here.parent
        yield here
    if here.name.startswith("step-") and here.parent.name == "checkpoints":
        yield here.parents[1]


def _has_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def _recipe(path: Path | None) -> Recipe | None:
    """The recipe of a run; None where there is none, or one that is not ours."""
    if path is None or not path.is_file():
        return None
    try:
        return load_recipe(path)
    except RecipeError as error:
        warnings.warn(f"the recipe is left aside: {error.problems[0]}", stacklevel=2)
        return None


def _base(adapter: Path, root: Path, recipe: Recipe | None) -> str:
    """The model that an adapter stands on: warmed up by the run itself, named by its recipe, or by the adapter."""
    if recipe is not None and recipe.warm_start is not None:
        for name in ("base_model", "warm_start"):
            if (root / name / "config.json").is_file():
                return str(root / name)
        raise ValueError(
            f"{adapter} stands on a model that its run warmed up first, and {root / 'warm_start'} is not there; put it "
            "back, or name a copy as base (--base)"
        )
    if recipe is not None:
        return recipe.model.name
    try:
        said = json.loads((adapter / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        said = None  # what is wrong with the file is said when it is loaded
    if not said:
        raise ValueError(f"{adapter} does not say which model it stands on; name it as base (--base)")
    # A bundled model is known to its adapters by the place where it was installed.
    places = {folder.name: name for name, folder in BUNDLED.items()}
    return said if Path(said).is_dir() else places.get(Path(said).name, said)


def _fetched(name: str) -> Path:
    """An adapter of the Hub with what belongs to it, from the cache or the network; no code, no pickle."""
    from huggingface_hub import snapshot_download

    from mmft.hub.folder import PROCESSOR

    files = [CONFIG, WEIGHTS, "recipe.yaml", *PROCESSOR, "base_model/*.json", "base_model/*.safetensors"]
    return Path(snapshot_download(name, allow_patterns=files))
