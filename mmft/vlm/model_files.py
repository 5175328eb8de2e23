"""A model's files, looked over before transformers loads them: no code, no pickle, nothing outside of its folder."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"


def check_model(name: str) -> None:
    """Raises ValueError for a model whose own files name weights outside of it, pickles, or another model.

    Args:
        name: a folder or a hub id, of which only the small JSON files that loading needs anyway are fetched.
    """
    where = f"model.name: {name}"
    if (adapter := own_file(name, ADAPTER)) is not None:
        # transformers would load the base model that the file names, and the adapter unchecked.
        base = _object(adapter, f"{where}: {ADAPTER}").get("base_model_name_or_path")
        raise ValueError(f"{where} holds an adapter ({ADAPTER}), expected a whole model, such as its base: {base}")
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors*")) and any(Path(name).glob("*.bin")):
        raise ValueError(
            f"{where} has its weights in a pickle (.bin), which may run code and is not read; expected safetensors "
            "(in transformers, save_pretrained writes them)"
        )
    config = own_file(name, "config.json")
    named = _object(config, f"{where}: config.json").get("transformers_weights") if config is not None else None
    for index in {INDEX, named} if isinstance(named, str) and named.endswith(".json") else {INDEX}:
        if index is not INDEX:
            _check_weights(index, f"{where}: config.json: transformers_weights", ".json")
        if (path := own_file(name, index)) is not None:
            weights = _object(path, f"{where}: {index}").get("weight_map")
            if not isinstance(weights, dict):
                raise ValueError(f"{where}: {index}: no weight_map; expected one, from tensors to files")
            for file in dict.fromkeys(str(file) for file in weights.values()):
                _check_weights(file, f"{where}: {index}: weight_map", ".safetensors")


def _check_weights(file: str, where: str, suffix: str) -> None:
    parts = (*PurePosixPath(file).parts, *PureWindowsPath(file).parts)
    outward = PurePosixPath(file).is_absolute() or PureWindowsPath(file).anchor or ".." in parts or "://" in file
    if outward or not file.endswith(suffix):
        raise ValueError(f"{where} names {file!r}; expected a {suffix} file of the model's own")


def own_file(name: str, file: str) -> Path | None:
    """A file of a folder, or of a repository of the Hub; None where it has none, or cannot be reached."""
    from transformers.utils import cached_file

    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    try:
        found = cached_file(name, file, **{f"_raise_exceptions_for_{kind}": False for kind in quiet})
    except (OSError, ValueError):  # no such repository, or no name of one: loading says it in full
        return None
    return None if found is None else Path(found)


def _object(path: Path, where: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}); take the model from its source again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where} holds a {type(data).__name__}, expected an object")
    return data
