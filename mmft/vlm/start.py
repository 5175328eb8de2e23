"""Where training starts from an adapter that was trained before: finding it, and comparing it with the recipe."""

from __future__ import annotations

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
        config = check_adapter(folder, model)
        _require_shape(options, config, wanted, model, folder)
        return load_adapter(model, folder), None
    except ValueError as error:
        raise ValueError(f"model.adapter: {error} (model.name: {options.name})") from error


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
        raise ValueError(f"{name} holds no finished adapter; --resume it, or name its newest checkpoint, {checkpoints[-1]}")
    if folder.exists():
        raise ValueError(f"{name} holds no {CONFIG}; expected the folder of a finished run with LoRA, or of an adapter")
    if own_file(name, CONFIG) is None:
        raise ValueError(f"there is no folder {name!r}, and no adapter of that name could be had from the Hub")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))


def _require_shape(options, config: dict[str, Any], wanted: Any, model: nn.Module, folder: Path) -> None:
    """The recipe must say what is trained: its ``model.tune`` and ``model.lora`` are compared with the adapter."""
    tuned = "hybrid" if config.get("modules_to_save") else "lora"
    found = {"model.tune": (options.tune, tuned)}
    for key, theirs in _SHAPE.items():
        found[f"model.lora.{key}"] = getattr(options.lora, key), config.get(theirs) or type(getattr(options.lora, key))()
    wrong = {key: pair for key, pair in found.items() if pair[0] != pair[1]}
    if not wrong and expected_tensors(wanted.to_dict(), model, folder / CONFIG).keys() != expected_tensors(
        config, model, folder / CONFIG
    ).keys():
        target = config["target_modules"]
        pattern = target if isinstance(target, str) else rf".*\.({'|'.join(sorted(target))})"
        wrong["model.lora.target"] = options.lora.target, pattern
    if wrong:
        said = "; ".join(f"{key}: got {_shown(got)}, expected {_shown(own)}" for key, (got, own) in wrong.items())
        mend = " ".join(f"{key}={_shown(own)}" for key, (_, own) in wrong.items())
        raise ValueError(f"{folder} has another shape than the recipe says: {said}; an adapter keeps its own, so set {mend}")


def _shown(value: Any) -> str:
    if isinstance(value, str) and not value.isidentifier():
        return f"'{value}'"  # a pattern, which the shell would read
    return str(value).lower() if isinstance(value, bool) else str(value)
