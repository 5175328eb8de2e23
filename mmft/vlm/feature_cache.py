"""Features of pictures, clips and sounds that outlive a step: in memory, and on disk if a folder is given.

Sound only while the towers are frozen. Memory drops what was used longest ago. Files are written once, under the
identity of the pictures and a fingerprint of towers and processor, so that another run (or another process of this
one) finds them and another model does not. The folder is a cache and may be deleted at any time: a file that is
gone, cut short or damaged is encoded again, and a full disk only ends the writing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Features = dict[str, Any]  # medium -> tensors (tokens, H), in lists that may be nested
_SAMPLES = 64  # numbers of each weight that the fingerprint looks at
_STALE = 3600  # seconds after which a half-written file is nobody's any more


class FeatureCache:
    """Features by key.

    Args:
        max_bytes: of tensors kept in memory (on the device that they were made on); 0 keeps none.
        folder: where features are written as well; None = nowhere.
        disk_bytes: bound of all features in ``folder``, of whatever model; passed by at most a sixteenth for each
            process that writes. The files used longest ago go first.
        fingerprint: what tells the features of one model from another's; asked when a file is first needed. See
            `tower_fingerprint`.
    """

    def __init__(
        self,
        max_bytes: int = 1 << 30,
        folder: str | os.PathLike | None = None,
        disk_bytes: int = 10 << 30,
        fingerprint: Callable[[], str] | None = None,
    ) -> None:
        if folder is not None and fingerprint is None:
            raise ValueError("a folder of features needs a fingerprint of the model that they are of")
        self.max_bytes, self.disk_bytes = max_bytes, disk_bytes
        self.folder = None if folder is None else Path(folder).expanduser()
        self._fingerprint, self._known = fingerprint, None
        self._kept: OrderedDict[str, Features] = OrderedDict()
        self.bytes = 0  # of tensors in memory
        self._unseen = disk_bytes  # bytes written since the folder was last looked through; at first: look
        self.read = 0  # features that came from disk

    @property
    def active(self) -> bool:
        """Whether anything is kept at all."""
        return self.max_bytes > 0 or self.folder is not None

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: str) -> bool:
        """Whether the features are in memory."""
        return key in self._kept

    def get(self, key: str, device: torch.device | str = "cpu") -> Features | None:
        """The features, from memory or else from disk (then on ``device``); None where they have to be made."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        features = self._load(key, device) if self.folder is not None else None
        if features is not None:
            self.read += 1
            self._keep(key, features)
        return features

    def put(self, key: str, features: Features) -> None:
        """Keeps a copy: a slice of the tower's output would keep the whole batch's output alive."""
        if key in self._kept or not self.active:
            return
        features = _mapped(features, lambda tensor: tensor.detach().clone())
        self._keep(key, features)
        if self.folder is not None:
            self._save(key, features)

    def clear(self) -> None:
        """Forgets what is in memory, and the fingerprint: the weights may have changed. Files stay."""
        self._kept.clear()
        self.bytes, self._known = 0, None

    def _keep(self, key: str, features: Features) -> None:
        size = _size(features)
        if size > self.max_bytes:  # it would drive out all the others, and itself
            return
        self._kept[key] = features
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.bytes -= _size(dropped)

    # ---------------------------------------------------------------- disk

    def _path(self, key: str) -> Path:
        if self._known is None:
            self._known = self._fingerprint()
        # Hashed: a key may be any text.
        name = hashlib.sha256(key.encode()).hexdigest()[:40]
        return self.folder / f"features-{self._known}" / f"{name}.safetensors"

    def _load(self, key: str, device: torch.device | str) -> Features | None:
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata()
                tensors = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
            if int(said["crc32"]) != _checksum(tensors):
                raise ValueError("checksum")
            with suppress(OSError):
                os.utime(path)  # used just now; of another user's file that stays unsaid
            return _mapped(json.loads(said["places"]), lambda i: tensors[i].to(device))
        except OSError:  # not there, or not ours to read
            return None
        except (SafetensorError, ValueError, KeyError, TypeError, IndexError):
            with suppress(OSError):
                path.unlink(missing_ok=True)  # damaged: made again
            return None

    def _save(self, key: str, features: Features) -> None:
        tensors: list[Tensor] = []

        def place(tensor: Tensor) -> int:
            tensors.append(tensor.cpu().contiguous())
            return len(tensors) - 1

        metadata = {"places": json.dumps(_mapped(features, place)), "crc32": str(_checksum(tensors))}
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, half = tempfile.mkstemp(prefix=".", suffix=".half", dir=path.parent)
            os.close(handle)
            try:
                save_file({str(i): tensor for i, tensor in enumerate(tensors)}, half, metadata)
                os.replace(half, path)  # readers see all of it or nothing; of two writers one wins, with equal files
            except BaseException:
                Path(half).unlink(missing_ok=True)
                raise
            self._unseen += path.stat().st_size
            if self._unseen > self.disk_bytes // 16:
                self._tidy()
        except (OSError, SafetensorError) as error:
            warnings.warn(f"model.picture_cache: writing to {self.folder} ends here: {error}", stacklevel=2)
            self.folder = None

    def _tidy(self) -> None:
        """Deletes the files used longest ago until the folder is within its bound. Other files are left alone."""
        self._unseen = 0
        found = []
        for path in self.folder.glob("features-*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process was quicker
                continue
            if path.suffix == ".safetensors":
                found.append((status.st_mtime, status.st_size, path))
            elif path.suffix == ".half" and time.time() - status.st_mtime > _STALE:
                path.unlink(missing_ok=True)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.disk_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def tower_fingerprint(model: nn.Module, decoder: nn.Module, processor: Any) -> str:
    """32 hex digits that change with the checkpoint's name and configuration, the towers' weights and dtypes,
    autocast's dtype, and the processor.

    Of every weight outside the text decoder some numbers are looked at, evenly spread: training changes nearly all
    of them, and reading all of a 7 B model's tower would take longer than encoding a few pictures.

    Args:
        model: below any adapters, or the names of its weights would differ with and without them.
        decoder: the part that pictures do not go through.
    """
    import transformers

    digest = hashlib.sha256()
    name = getattr(model.config, "name_or_path", "")
    settings = [
        part.to_dict() if hasattr(part, "to_dict") else None
        for part in (getattr(processor, n, None) for n in ("image_processor", "video_processor", "feature_extractor"))
    ]
    settings.append(model.config.to_dict() if hasattr(model.config, "to_dict") else None)  # which layer is read, ...
    device = next(model.parameters()).device.type
    settings.append(str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None)
    digest.update(json.dumps([transformers.__version__, name, settings], sort_keys=True, default=str).encode())
    passed_by = {id(parameter) for parameter in decoder.parameters()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    passed_by |= {id(parameter) for parameter in (head.parameters() if head is not None else ())}
    for name, parameter in model.named_parameters():
        if id(parameter) in passed_by:
            continue
        flat = getattr(parameter, "ds_tensor", parameter).detach().flatten()  # ZeRO-3 leaves this rank's share there
        places = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLES, len(flat)), dtype=torch.float64).long()
        sample = flat[places.to(flat.device)].cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _checksum(tensors: list[Tensor]) -> int:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.view(torch.uint8).numpy() if tensor.numel() else b"", total)
    return total


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same dicts and lists with every leaf changed."""
    if isinstance(value, dict):
        return {key: _mapped(part, function) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(part, function) for part in value]
    return function(value)


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_size(part) for part in (value.values() if isinstance(value, dict) else value))
