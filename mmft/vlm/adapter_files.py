"""An adapter on disk, looked over before it is loaded.

PEFT fills what a file leaves out with fresh weights, takes NaN as it comes, falls back on a pickle, and for some
options imports modules or opens further files. Here an adapter is one LoRA: ``adapter_config.json`` and
``adapter_model.safetensors`` that fit each other and, where it is at hand, the model. Anything else is an error.

Left out: other kinds of PEFT, initialisations that rewrite the base model (PiSSA, OLoRA, LoftQ, ...), and adapters that
bring resized embeddings.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?)"
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Read below, or without a say in what is computed. Of every other key only PEFT's default is taken.
_FREE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type")
_READ = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "bias"),
    *("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "init_lora_weights", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "layers_pattern"),
)


def check_adapter(folder: str | Path, model: nn.Module | None = None) -> dict[str, Any]:
    """Raises ValueError naming file and field (or tensor) unless the folder holds a sound LoRA adapter.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: what it is for, a base model or a `PeftModel` whose active adapter it shall fill: then every layer it
            names must be there in its size, and none may be missing.

    Returns:
        The configuration.
    """
    folder = Path(folder)
    config = _config(folder / CONFIG)
    shapes = _shapes(folder)
    _agree(config, shapes, folder)
    if model is not None:
        if not hasattr(model, "peft_config"):
            _same_base(config, model, folder / CONFIG)
        _fits(expected_tensors(config, model, folder / CONFIG), shapes, folder / WEIGHTS)
    return config


def read_adapter(folder: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter by their names in its file, on the CPU, after `check_adapter`."""
    check_adapter(folder, model)
    with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def load_adapter(model: nn.Module, folder: str | Path):
    """A `PeftModel` around the base model that starts from an adapter on disk and goes on learning it.

    `build_policy` takes it in place of a model. Its reference is the model as it starts: the base with this adapter.

    Raises:
        ValueError: see `check_adapter`.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    if hasattr(model, "peft_config"):
        raise ValueError("the model has an adapter already; expected a base model to load one onto")
    tensors = read_adapter(folder, model)
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    config.base_model_name_or_path = None  # compared above, and PEFT would warn of a copy in another place
    wrapped = _wrapped(model, config)
    left = set_peft_model_state_dict(wrapped, tensors).unexpected_keys
    assert not left, left  # the names were compared above
    return wrapped


# --- the configuration -----------------------------------------------------------------------------


def _config(path: Path) -> dict[str, Any]:
    config = _object(path)
    if config.get("peft_type") != "LORA":
        raise _wrong(path, "peft_type", config.get("peft_type"), 'expected "LORA", the only kind that is read')
    for key in ("r", "lora_alpha"):
        whole = isinstance(config.get(key), int) and not isinstance(config[key], bool)
        scale = key == "lora_alpha" and isinstance(config.get(key), float) and math.isfinite(config[key])
        if not (whole or scale) or config[key] <= 0:
            raise _wrong(path, key, config.get(key), "expected a number above 0")
    _check_targets(path, config)
    for key, low in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        pattern = config.get(key) or {}
        good = isinstance(pattern, Mapping) and all(
            isinstance(v, low) and not isinstance(v, bool) and v > 0 for v in pattern.values()
        )
        if not good:
            raise _wrong(path, key, pattern, "expected names of layers with numbers above 0")
    dropout = config.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise _wrong(path, "lora_dropout", dropout, "expected a number from 0 to below 1")
    for key, allowed in {
        "bias": ("none",),
        "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # the others rewrite the base model
        **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out"), (True, False)),
    }.items():
        if key in config and not any(config[key] is one or config[key] == one != 1 for one in allowed):
            raise _wrong(path, key, config[key], f"expected {' or '.join(json.dumps(one) for one in allowed)}")
    base = config.get("base_model_name_or_path")
    if base is not None and (not isinstance(base, str) or not base.strip()):
        raise _wrong(path, "base_model_name_or_path", base, "expected the name of the base model, or null")
    _check_others(path, config)
    return config


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected the configuration of a LoRA adapter")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, expected at most {MAX_CONFIG_BYTES}")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); take the adapter from its source again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected an object with peft_type, r, ...")
    return config


def _check_targets(path: Path, config: dict[str, Any]) -> None:
    target = config.get("target_modules")
    names = isinstance(target, list) and target and all(isinstance(name, str) and name for name in target)
    if not names and not (isinstance(target, str) and target):
        raise _wrong(path, "target_modules", target, "expected names of layers, or a regular expression of them")
    if isinstance(target, str):
        try:
            re.compile(target)
        except re.error as error:
            raise _wrong(path, "target_modules", target, f"expected a regular expression ({error})") from None
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(n, str) and n for n in saved)):
        raise _wrong(path, "modules_to_save", saved, "expected null or names of modules")


def _check_others(path: Path, config: dict[str, Any]) -> None:
    from peft import LoraConfig, TaskType

    defaults = LoraConfig().to_dict()
    for key, value in config.items():
        if key not in (*_FREE, *_READ) and value and value != defaults.get(key):
            raise _wrong(path, key, value, f"expected {json.dumps(defaults.get(key))}: the option is not supported")
    task = config.get("task_type")
    if task is not None and task not in list(TaskType):
        raise _wrong(path, "task_type", task, f"expected null or one of {', '.join(TaskType)}")


def _wrong(path: Path, key: str, value: Any, expected: str) -> ValueError:
    said = json.dumps(value)
    return ValueError(f"{path}: {key}: got {said if len(said) < 80 else said[:80] + ' ...'}, {expected}")


# --- the tensors -----------------------------------------------------------------------------------


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape, every number looked at."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "adapter_model.bin is a pickle, which may run code and is not read" if pickled else "nothing to load"
        raise ValueError(f"{path} is missing; expected the tensors of the adapter as safetensors ({why})")
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                if not tensor.numel():
                    raise ValueError(f"{path}: {name} is empty, of shape {tuple(tensor.shape)}; save it gathered")
                if tensor.dtype not in _DTYPES:
                    raise ValueError(f"{path}: {name} is of dtype {tensor.dtype}, expected floating-point numbers")
                if not tensor.isfinite().all():
                    raise ValueError(f"{path}: {name} holds NaN or infinite numbers; take an earlier checkpoint")
                shapes[name] = tuple(tensor.shape)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); take the adapter from its source again") from None
    if not shapes:
        raise ValueError(f"{path} holds no tensors; expected those of a LoRA adapter")
    return shapes


def _agree(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Tensors against the configuration: known names, whole pairs, the ranks it says."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    path = folder / WEIGHTS
    lora = LoraConfig(**{key: config[key] for key in (*_READ, "task_type") if key != "peft_type" and key in config})
    layers: dict[str, set[str]] = {}
    for name, shape in shapes.items():
        inner = name.removeprefix(_PREFIX)
        if inner == name or inner.startswith((_PREFIX, "module.")):
            raise ValueError(f"{path}: {name} has another prefix, expected {_PREFIX!r} once; save it by PEFT")
        match = _PART.fullmatch(inner)
        if match is None and _is_saved(inner, config):
            continue
        if match is None or not check_target_module_exists(lora, match["module"]):
            raise ValueError(
                f"{path}: {name} is of no layer that target_modules or modules_to_save of {CONFIG} name; expected no "
                "such tensor"
            )
        layers.setdefault(match["module"], set()).add(match["part"].removesuffix(".weight"))
        rank = _rank(config, match["module"])
        axis = {"A": 0, "B": 1}.get(match["part"].removesuffix(".weight")[-1])
        if axis is not None and (len(shape) < 2 or shape[axis] != rank):
            raise ValueError(
                f"{path}: {name} is of shape {shape}, expected rank {rank} in place {axis}, as {CONFIG} says in r"
            )
    for module, parts in layers.items():
        pair = {"lora_embedding_A", "lora_embedding_B"} if "lora_embedding_A" in parts else {"lora_A", "lora_B"}
        wanted = pair | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
        if missing := sorted(wanted - parts):
            raise ValueError(
                f"{path}: {_PREFIX}{module}.{missing[0]} is missing; take the adapter from its source again"
            )
    if not layers:
        raise ValueError(f"{path} holds no LoRA layer; expected those that target_modules of {CONFIG} names")


def _is_saved(name: str, config: dict[str, Any]) -> bool:
    return any(f".{module}." in f".{name}" for module in config.get("modules_to_save") or ())


def _rank(config: dict[str, Any], module: str) -> int:
    from peft.utils.other import get_pattern_key

    ranks = config.get("rank_pattern") or {}
    return ranks.get(get_pattern_key(ranks.keys(), module), config["r"])


# --- the model -------------------------------------------------------------------------------------


def expected_tensors(config: dict[str, Any], model: nn.Module, path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that an adapter of this configuration has on the model."""
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    if isinstance(model, PeftModel):
        own = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0], save_embedding_layers=False)
        return {name: tuple(tensor.shape) for name, tensor in own.items()}
    # PEFT itself says which tensors there are, on a copy without numbers.
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    kept = {key: config[key] for key in (*_READ, "task_type") if key != "peft_type" and key in config}
    try:
        wrapped = _wrapped(skeleton, LoraConfig(**kept | {"init_lora_weights": False}))
    except ValueError as error:
        said = str(error).split(". ")[0]
        raise _wrong(
            path, "target_modules", config["target_modules"], f"the model has no such layers ({said})"
        ) from None
    own = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in own.items()}


def _wrapped(model: nn.Module, config: Any):
    from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT asks transformers for a name that is about to change; nothing a user could mend.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(model, config)


def _fits(expected: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    for name, shape in expected.items():
        if name not in shapes:
            raise ValueError(f"{path}: {name} is missing, which the model needs; is the adapter of another base model?")
        if shapes[name] != shape:
            raise ValueError(
                f"{path}: {name} is of shape {shapes[name]}, the model's is {shape}; expected an adapter of this base "
                "model"
            )
    if extra := sorted(set(shapes) - set(expected)):
        raise ValueError(f"{path}: {extra[0]} is of a layer that the model has not; expected an adapter of this model")


def _same_base(config: dict[str, Any], model: nn.Module, path: Path) -> None:
    """Compares the last parts of the names: a copy of the base model may lie anywhere."""
    said, here = config.get("base_model_name_or_path"), getattr(model.config, "_name_or_path", None)
    if said and here and _called(said) != _called(here):
        raise _wrong(
            path, "base_model_name_or_path", said, f"the model is {here}; expected an adapter of that base model"
        )


def _called(name: str) -> str:
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    cached = next((part for part in parts if part.startswith("models--")), None)  # a folder of the Hub's cache
    return (cached.split("--")[-1] if cached else parts[-1] if parts else "").lower()
