"""Where training starts from an adapter that was trained before: finding it, and comparing it with the recipe."""

from __future__ import annotations

from filecmp import cmpfiles
from pathlib import Path
from typing import Any

from torch import nn

from mmft.vlm.adapter_files import CONFIG, WEIGHTS, check_adapter, expected_tensors, load_adapter
from mmft.vlm.load import tune
from mmft.vlm.model_files import own_file

# Key of model.lora -> key of PEFT's configuration. Which layers there are is compared by the layers themselves.
_SHAPE = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "dora": "use_dora", "rslora": "use_rslora"}


def start(model: nn.Module, options):
    """What a recipe's section ``model`` starts training from.

    Returns:
        Model and PEFT configuration for `build_policy`: the base model and new adapters (or none); or the base model
        with the adapter that ``options.adapter`` names, and None.

    Raises:
        ValueError: there is no such adapter, it is unsound, of another base model, or not of the recipe's shape.
    """
    wanted = tune(model, options)
    if options.adapter is None:
        return model, wanted
    try:
        folder = find_adapter(options.adapter)
        try:
            config = check_adapter(folder, model)
            _require_base(config, folder, Path(model.config._name_or_path))
        except ValueError as error:
            raise ValueError(f"{error} (model.name must be its base model, and is {options.name})") from error
        _require_shape(options, config, wanted, model, folder)
        return load_adapter(model, folder), None
    except ValueError as error:
        raise ValueError(f"model.adapter: {error}") from error


def find_adapter(name: str) -> Path:
    """The folder of an adapter: of a finished run, its own, or one fetched from the Hub (configuration, tensors).

    Raises:
        ValueError: there is none.
    """
    folder = Path(name).expanduser()
    for place in (folder, folder / "adapter"):
        if (place / CONFIG).is_file():
            return place
    if checkpoints := sorted((folder / "checkpoints").glob("step-*")):
        raise ValueError(
            f"{name} holds no finished adapter; --resume it, or name its newest checkpoint, {checkpoints[-1]}"
        )
    if folder.exists():
        raise ValueError(f"{name} holds no {CONFIG}; expected the folder of a finished run with LoRA, or of an adapter")
    if own_file(name, CONFIG) is None:
        raise ValueError(f"there is no folder {name!r}, and no adapter of that name could be had from the Hub")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))


def _require_base(config: dict[str, Any], folder: Path, base: Path) -> None:
    """Where both models lie here, their weights are compared: every warm start's folder has the same name."""
    said = Path(config.get("base_model_name_or_path") or "")
    if said.name and said.is_dir() and base.is_dir() and not said.samefile(base):
        files = {path.name for place in (said, base) for path in place.glob("*.safetensors")}
        if sorted(cmpfiles(said, base, files, shallow=False)[0]) != sorted(files):
            raise ValueError(
                f"{folder / CONFIG}: base_model_name_or_path: got {said}, whose weights are not the model's"
            )


def _require_shape(options, config: dict[str, Any], wanted: Any, model: nn.Module, folder: Path) -> None:
    """The recipe must say what is trained: its ``model.tune`` and ``model.lora`` are compared with the adapter."""
    tuned = "hybrid" if config.get("modules_to_save") else "lora"
    found = {"model.tune": (options.tune, tuned)}
    for key, theirs in _SHAPE.items():
        said = getattr(options.lora, key)
        found[f"model.lora.{key}"] = said, config.get(theirs) or type(said)()
    wrong = {key: pair for key, pair in found.items() if pair[0] != pair[1]}
    recipes, own = (expected_tensors(c, model, folder / CONFIG).keys() for c in (wanted.to_dict(), config))
    if not wrong and recipes != own:
        target = config["target_modules"]
        pattern = target if isinstance(target, str) else rf".*\.({'|'.join(sorted(target))})"
        wrong["model.lora.target"] = options.lora.target, pattern
    if wrong:
        said = "; ".join(f"{key}: got {_shown(got)}, expected {_shown(keep)}" for key, (got, keep) in wrong.items())
        mend = " ".join(f"{key}={_shown(keep)}" for key, (_, keep) in wrong.items())
        raise ValueError(
            f"{folder} has another shape than the recipe says: {said}; an adapter keeps its own, so set {mend}"
        )


def _shown(value: Any) -> str:
    if isinstance(value, str) and not value.isidentifier():
        return f"'{value}'"  # a pattern, which the shell would read
    return str(value).lower() if isinstance(value, bool) else str(value)
