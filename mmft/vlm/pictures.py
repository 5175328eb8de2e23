"""Rows -> prompts with visual records, and each picture through the vision tower once.

The only file that indexes pixel tensors. A record holds what the processor made of one row's pictures; records of
equal shape go through the tower together, and their features are kept: for the step always, across steps (within a
byte budget) while the tower is frozen.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmft.batch import PromptBatch, VisualRecord
from mmft.vlm.decoder import backbone, placeholder_id
from mmft.vlm.families import Family, Medium, family_of

# Processor outputs that describe the text; everything else belongs to the pictures.
_TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "special_tokens_mask")
# Those of them that positions are computed from; small, so they may be remembered.
_POSITION_KEYS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
_TOWER_BYTES = 256 << 20  # of pixels per call of the tower
_ZERO_WIDTH_SPACE = "\u200b"
_PREPARED_ROWS = 65536  # prompts whose token ids are remembered; a few hundred bytes each


class Pictures:
    """Turns dataset rows into a `PromptBatch` and encodes its pictures.

    Args:
        model: the vision-language model (already wrapped with adapters or not).
        processor: its processor.
        family: the facts about its family; by default those of `families.py`.
        cache_bytes: budget for features kept across steps; 0 keeps none. Used only while the tower is frozen.
    """

    def __init__(self, model: nn.Module, processor, family: Family | None = None, cache_bytes: int = 1 << 30):
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.family = family or family_of(model)
        self.cache_bytes = cache_bytes
        self._cached: OrderedDict[str, dict[str, list[Any]]] = OrderedDict()
        self._cached_bytes = 0
        # (prompt text, picture key) -> prompt ids and the small tensors beside the pixels (grids, sizes).
        self._prepared: OrderedDict[tuple[str, str], tuple[Tensor, dict[str, Tensor]]] = OrderedDict()
        ids = {medium.name: placeholder_id(model, medium) for medium in self.family.media}
        self.token_ids = {name: i for name, i in ids.items() if i is not None}  # medium -> its placeholder
        # Longest first, so that no marker is broken up by a shorter one inside it.
        markers = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        self._markers = sorted(markers | set(self.tokenizer.all_special_tokens), key=len, reverse=True)
        self.encoded = 0  # pictures' records that went through the tower; tests and benchmarks read it

    # ---------------------------------------------------------------- rows -> prompts

    def prompts(
        self,
        rows: Sequence[Mapping[str, Any]],
        row_ids: Sequence[str],
        device: torch.device,
        pixels: bool = False,
    ) -> PromptBatch:
        """Tokenises B rows. Each row needs ``prompt`` and may hold ``image`` or ``images``.

        Args:
            pixels: with the processor's tensors of every picture, also where its features are remembered.

        Raises:
            ValueError: naming the row, when it has no prompt, or when the number of placeholder tokens is not what
                the pictures need.
        """
        ids, records = [], []
        for row, row_id in zip(rows, row_ids, strict=True):
            row_prompt, record = self._prepare(row, row_id, pixels)
            ids.append(row_prompt)
            records.append(record)
        width = max(len(row) for row in ids)
        prompt_ids = torch.full((len(ids), width), self.tokenizer.pad_token_id or 0, dtype=torch.long)
        prompt_mask = torch.zeros(len(ids), width, dtype=torch.bool)
        for i, row_prompt in enumerate(ids):
            prompt_ids[i, : len(row_prompt)] = row_prompt
            prompt_mask[i, : len(row_prompt)] = True
        positions, next_position = self._positions(prompt_ids, prompt_mask, records)
        return PromptBatch(
            prompt_ids=prompt_ids.to(device),
            prompt_mask=prompt_mask.to(device),
            positions=positions.to(device),
            next_position=next_position.to(device),
            visuals=records,
            rows=[dict(row) for row in rows],
            row_ids=list(row_ids),
        )

    def _prepare(self, row: Mapping[str, Any], row_id: str, pixels: bool) -> tuple[Tensor, VisualRecord]:
        """Prompt ids (P,) and the visual record of one row.

        The processor is not asked again about a prompt and pictures whose features are still in the cache, unless
        the pixels themselves are wanted.
        """
        if row.get("prompt") is None:
            raise ValueError(f"row {row_id}: no column 'prompt' (columns: {', '.join(sorted(row))})")
        images = _images(row, row_id)
        key = _picture_key(images)
        text = self.render(row["prompt"], len(images), row_id)
        if not pixels and key is not None and key in self._cached and (text, key) in self._prepared:
            ids, small = self._prepared[(text, key)]
            return ids, VisualRecord(key, small)
        inputs = self._process(text, images, row_id)
        ids = inputs["input_ids"][0]
        visual = {k: v for k, v in inputs.items() if k not in _TEXT_KEYS and isinstance(v, Tensor)}
        if key is not None and self.cache_bytes:
            self._prepared[(text, key)] = ids, {k: v for k, v in visual.items() if k in _POSITION_KEYS}
            if len(self._prepared) > _PREPARED_ROWS:
                self._prepared.popitem(last=False)
        return ids, VisualRecord(key, visual)

    def _process(self, text: str, images: list[Any], row_id: str) -> Mapping[str, Tensor]:
        bos = self.tokenizer.bos_token
        options = {"return_tensors": "pt", "add_special_tokens": not (bos and text.startswith(bos))}
        try:
            if images:
                return self.processor(text=[text], images=[images], **options)
            return self.tokenizer([text], **options)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            raise ValueError(f"row {row_id}: the processor refused it ({len(images)} pictures): {error}") from error

    def render(self, prompt: str | list[dict[str, Any]], pictures: int, row_id: str = "?") -> str:
        """The text the model reads, with one placeholder per picture and the turn opened for the answer.

        A plain prompt becomes one user message with its pictures before the text; a conversation without picture
        parts gets them at the start of its first user message, as TRL does.

        Raises:
            ValueError: a conversation whose picture parts are not as many as the row's pictures.
        """
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        else:
            messages = [dict(message) for message in prompt]
        if not messages or any(not isinstance(m.get("content"), str | list) or "role" not in m for m in messages):
            raise ValueError(f"row {row_id}: a prompt is text, or a list of messages with 'role' and 'content'")
        messages = [{**m, "content": self._parts(m["content"], row_id)} for m in messages]
        placed = sum(part["type"] == "image" for m in messages for part in m["content"])
        if placed == 0 and pictures:
            first = next((m for m in messages if m["role"] == "user"), messages[0])
            first["content"] = [{"type": "image"}] * pictures + first["content"]
        elif placed != pictures:
            raise ValueError(f"row {row_id}: the prompt has places for {placed} pictures, the row has {pictures}")
        if getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None):
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        token = getattr(self.processor, "image_token", "<image>")
        parts = [token if part["type"] == "image" else part["text"] for m in messages for part in m["content"]]
        return "\n".join(parts) + "\n"

    def _parts(self, content: str | list[dict[str, Any]], row_id: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": self.as_text(part["text"])})
            elif part.get("type") == "image":
                parts.append({"type": "image"})
            else:
                raise ValueError(
                    f"row {row_id}: a part of the prompt has type {part.get('type')!r}; expected 'text' with a text, "
                    "or 'image' (the pictures themselves stand in the column 'image' or 'images')"
                )
        return parts

    def as_text(self, text: str) -> str:
        """User text in which nothing reads as a special token: an invisible space goes into any such marker.

        Without it ``<image>`` typed by a user would ask for a picture, and ``<|im_end|>`` would end the turn.
        """
        for marker in self._markers:
            if marker in text:
                text = text.replace(marker, marker[0] + _ZERO_WIDTH_SPACE + marker[1:])
        return text

    # ---------------------------------------------------------------- positions

    def _positions(self, ids: Tensor, mask: Tensor, records: list[VisualRecord]) -> tuple[Tensor, Tensor]:
        """Positions of the prompt tokens and of the first response token; see `PromptBatch`."""
        if self.family.positions == "mrope":
            grids = {
                key: torch.cat([r.tensors[key] for r in records if key in r.tensors])
                for key in _POSITION_KEYS
                if any(key in r.tensors for r in records)
            }
            types = media_types(ids, self.token_ids) * mask
            positions, _ = backbone(self.model).get_rope_index(ids, types, **grids, attention_mask=mask.long())
            highest = positions.masked_fill(~mask, -1).amax(dim=(0, 2))
            return positions, highest + 1
        first = self.family.first_position
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0) + first
        return positions, mask.sum(-1) + first

    # ---------------------------------------------------------------- the vision tower

    def encode(self, batch: PromptBatch, keep: bool, model: nn.Module | None = None) -> None:
        """Fills in ``features`` of every record, each distinct picture once.

        Args:
            keep: the tower is frozen: take and leave features in the cache that lasts across steps.
            model: whose tower; the policy's by default.
        """
        waiting: dict[str, list[VisualRecord]] = {}
        for number, record in enumerate(batch.visuals):
            if not record.key or record.features is not None:
                continue
            cached = self._cached.get(record.key) if keep else None
            if cached is not None:
                self._cached.move_to_end(record.key)
                record.features = cached
            else:
                waiting.setdefault(record.key or str(number), []).append(record)
        by_shape: dict[tuple, list[list[VisualRecord]]] = {}
        for same in waiting.values():
            shape = tuple((k, tuple(v.shape), str(v.dtype)) for k, v in sorted(same[0].tensors.items()))
            by_shape.setdefault(shape, []).append(same)
        for alike in by_shape.values():
            for same, features in zip(alike, self._tower([s[0] for s in alike], model or self.model), strict=True):
                self.encoded += 1
                for record in same:
                    record.features = features
                if keep:
                    self._remember(same[0].key, features)

    def _tower(self, records: list[VisualRecord], model: nn.Module) -> list[dict[str, list[Any]]]:
        """Features of records whose tensors have equal shapes, a bounded number of them per call of the tower."""
        size = sum(t.numel() * t.element_size() for t in records[0].tensors.values())
        most = max(1, _TOWER_BYTES // max(size, 1))
        if len(records) > most:
            return self._tower(records[:most], model) + self._tower(records[most:], model)
        features: list[dict[str, list[Any]]] = [{} for _ in records]
        for medium in self.family.media:
            if any(key in records[0].tensors for key in medium.inputs):
                self._encode(medium, records, model, features)
        return features

    def _encode(self, medium: Medium, records: list[VisualRecord], model: nn.Module, features: list[dict]) -> None:
        """Fills in one medium's features of records of equal shapes."""
        device = next(model.parameters()).device
        others = {key for other in self.family.media if other is not medium for key in other.inputs}
        own = [key for key in records[0].tensors if key not in others]
        inputs = {key: torch.cat([r.tensors[key] for r in records]).to(device) for key in own}
        output = getattr(backbone(model), medium.encoder)(**inputs, return_dict=True)
        pooled = list(output.pooler_output)
        each = len(pooled) // len(records)
        if each * len(records) != len(pooled):
            raise ValueError(f"the {medium.name} tower gave {len(pooled)} outputs for {len(records)} equal rows")
        deep = getattr(output, "deepstack_features", None)
        for i, filled in enumerate(features):
            part = slice(i * each, (i + 1) * each)
            filled[medium.name] = pooled[part]
            if deep is not None:
                filled[f"{medium.name}/deepstack"] = [list(layer)[part] for layer in deep]

    def _remember(self, key: str | None, features: dict[str, list[Any]]) -> None:
        if key is None or not self.cache_bytes or key in self._cached:
            return
        # Cloned: a slice of the tower's output would keep the whole batch's output alive.
        features = _map_tensors(features, torch.clone)
        self._cached[key] = features
        self._cached_bytes += _bytes(features)
        while self._cached_bytes > self.cache_bytes and self._cached:
            _, dropped = self._cached.popitem(last=False)
            self._cached_bytes -= _bytes(dropped)


def joined_features(batch: PromptBatch) -> dict[str, list[Any]] | None:
    """The batch's features, medium name -> one tensor per picture in the order of the rows; None without any."""
    joined: dict[str, list[Any]] = {}
    for record in batch.visuals:
        for name, features in (record.features or {}).items():
            if name.endswith("/deepstack"):
                layers = joined.setdefault(name, [[] for _ in features])
                for layer, own in zip(layers, features, strict=True):
                    layer.extend(own)
            else:
                joined.setdefault(name, []).extend(features)
    return joined or None


def media_types(ids: Tensor, token_ids: dict[str, int]) -> Tensor:
    """int32 in the shape of ``ids``: 0 text, 1 image, 2 video tokens, as multimodal rotary positions ask for."""
    types = torch.zeros_like(ids, dtype=torch.int32)
    for number, name in enumerate(("image", "video"), 1):
        if name in token_ids:
            types[ids == token_ids[name]] = number
    return types


def check_placeholders(batch: PromptBatch, token_ids: dict[str, int]) -> None:
    """Raises ValueError naming the first row whose placeholder tokens are not as many as its picture features.

    Args:
        token_ids: medium name -> id of its placeholder.
    """
    for i, record in enumerate(batch.visuals):
        for name, token_id in token_ids.items():
            if record.features is None or name not in record.features:
                continue
            places = int((batch.prompt_ids[i] == token_id).sum())
            features = sum(f.shape[:-1].numel() for f in record.features[name])
            if places != features:
                raise ValueError(
                    f"row {batch.row_ids[i]}: {places} {name} tokens in the prompt, {features} {name} features; "
                    "the prompt was cut, or the processor does not belong to this model"
                )


def _images(row: Mapping[str, Any], row_id: str) -> list[Image.Image]:
    images = row.get("images")
    if images is None:
        images = row.get("image")
    if images is None:
        return []
    images = list(images) if isinstance(images, list | tuple) else [images]
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"row {row_id}: a picture is {type(image).__name__}, expected PIL.Image.Image; "
                "mmft.data.load_rows opens paths"
            )
    return images


def _picture_key(images: list[Any]) -> str | None:
    """An identity of pictures by their pixels, so that one picture in many rows (VQA) is encoded once."""
    if not images:
        return None
    digest = hashlib.sha1(usedforsecurity=False)
    for image in images:
        # A palette is part of the picture, and its indices are not: hash what is seen.
        image = image if image.mode in ("RGB", "L") else image.convert("RGBA")
        digest.update(f"{image.mode}{image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def _map_tensors(value: Any, function) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: _map_tensors(v, function) for k, v in value.items()}
    return [_map_tensors(v, function) for v in value]


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(v) for v in (value.values() if isinstance(value, dict) else value))
