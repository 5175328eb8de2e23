"""Rows -> prompts with visual records, and each picture through the vision tower once.

The only file that indexes pixel tensors. A record holds what the processor made of one row's pictures; records of
equal shape go through the tower together, and their features are kept: for the step always, across steps (within a
byte budget) while the tower is frozen.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmft.batch import PromptBatch, VisualRecord
from mmft.vlm.decoder import backbone, placeholder_id, text_decoder
from mmft.vlm.families import Family, Medium, family_of
from mmft.vlm.feature_cache import FeatureCache, tower_fingerprint
from mmft.vlm.media import NAMES, media_key, media_of, process

# Processor outputs that positions are computed from; small, so they may be remembered.
_POSITION_KEYS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
_TOWER_BYTES = 256 << 20  # of pixels per call of the tower
_ZERO_WIDTH_SPACE = "\u200b"
_PREPARED_ROWS = 16384  # prompts whose token ids are remembered; about a kilobyte each, and four bytes a token


class Pictures:
    """Turns dataset rows into a `PromptBatch` and encodes its pictures.

    Args:
        model: the vision-language model (already wrapped with adapters or not).
        processor: its processor.
        family: the facts about its family; by default those of `families.py`.
        cache_bytes: budget for features kept across steps; 0 keeps none. Used only while the tower is frozen.
        cache_folder, disk_bytes: where features are written as well, and how much of them; see `FeatureCache`.
    """

    def __init__(
        self,
        model: nn.Module,
        processor,
        family: Family | None = None,
        cache_bytes: int = 1 << 30,
        cache_folder: str | None = None,
        disk_bytes: int = 10 << 30,
    ):
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.family = family or family_of(model)
        self.cache = FeatureCache(cache_bytes, cache_folder, disk_bytes, self._fingerprint)
        # (prompt text, picture key) -> prompt ids and the small tensors beside the pixels (grids, sizes).
        self._prepared: OrderedDict[tuple[str, str], tuple[Tensor, dict[str, Tensor]]] = OrderedDict()
        ids = {medium.name: placeholder_id(model, medium) for medium in self.family.media}
        self.token_ids = {name: i for name, i in ids.items() if i is not None}  # medium -> its placeholder
        self._markers = _markers(processor)
        self._keys = {key for medium in self.family.media for key in medium.inputs} | set(_POSITION_KEYS)
        self.encoded = 0  # pictures' records that went through the tower; tests and benchmarks read it

    def _fingerprint(self) -> str:
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return tower_fingerprint(inner, text_decoder(self.model, self.family), self.processor)

    def forget(self) -> None:
        """Remembers nothing from here on: every prompt comes with its pixels."""
        self.cache = FeatureCache(0, None, 0, self._fingerprint)
        self._prepared.clear()

    # ---------------------------------------------------------------- rows -> prompts

    def prompts(
        self,
        rows: Sequence[Mapping[str, Any]],
        row_ids: Sequence[str],
        device: torch.device,
        pixels: bool = False,
    ) -> PromptBatch:
        """Tokenises B rows. Each row needs ``prompt`` and may hold pictures, clips and sounds; see `mmft.vlm.media`.

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
        media = media_of(row, row_id)
        key = media_key(media)
        text = self.render(row["prompt"], {name: len(values) for name, values in media.items()}, row_id)
        if key is not None and self.family.features_read_prompt:
            key = f"{key}/{hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()}"
        if not pixels and key is not None and key in self.cache and (text, key) in self._prepared:
            ids, small = self._prepared[(text, key)]
            ids = ids.long()
            # Taken now: by the time of encoding the cache may have dropped them, and the pixels are not there.
            return ids, VisualRecord(key, small, self.cache.get(key))
        inputs = process(self.processor, text, media, row_id)
        ids = inputs["input_ids"][0]
        visual = {k: v for k, v in inputs.items() if k in self._keys and isinstance(v, Tensor)} if media else {}
        if key is not None and self.cache.active:
            self._prepared[(text, key)] = ids.int(), {k: v for k, v in visual.items() if k in _POSITION_KEYS}
            if len(self._prepared) > _PREPARED_ROWS:
                self._prepared.popitem(last=False)
        return ids, VisualRecord(key, visual)

    def render(self, prompt: str | list[dict[str, Any]], counts: Mapping[str, int] | int = 0, row_id: str = "?") -> str:
        """The text the model reads: a placeholder for each picture, clip and sound, and the turn opened for the answer.

        A plain prompt becomes one user message with its pictures before the text; a conversation without such
        parts gets them at the start of its first user message, as TRL does.

        Args:
            counts: medium -> how many the row has; a plain number counts the family's first medium.

        Raises:
            ValueError: a conversation whose parts are not as many as what the row has.
        """
        if isinstance(counts, int):
            counts = {self.family.media[0].name: counts}
        if self.family.most is not None and sum(counts.values()) > self.family.most:
            raise ValueError(
                f"row {row_id}: {sum(counts.values())} pictures, a {self.model.config.model_type!r} model takes at "
                f"most {self.family.most}"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        if not messages or any(not isinstance(m.get("content"), str | list) or "role" not in m for m in messages):
            raise ValueError(f"row {row_id}: a prompt is text, or a list of messages with 'role' and 'content'")
        # Templates print the role as it stands, and some print further keys.
        messages = [{**self._as_texts(m), "content": self._parts(m["content"], row_id)} for m in messages]
        placed = [part["type"] for m in messages for part in m["content"] if part["type"] in NAMES]
        if not placed:
            first = next((m for m in messages if m["role"] == "user"), messages[0])
            first["content"] = [{"type": n} for n in NAMES for _ in range(counts.get(n, 0))] + first["content"]
        for name, called in NAMES.items():
            if placed and placed.count(name) != counts.get(name, 0):
                raise ValueError(
                    f"row {row_id}: the prompt has places for {placed.count(name)} {called}, the row has "
                    f"{counts.get(name, 0)}"
                )
        if getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None):
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if self.family.template is not None:
            return self.processor.apply_chat_template(messages, chat_template=self.family.template, tokenize=False)
        parts = [part.get("text", self._token(part["type"])) for m in messages for part in m["content"]]
        return "\n".join(parts) + "\n"

    def _token(self, medium: str) -> str:
        """What the processor looks for in a text to put a picture, clip or sound there."""
        return str(getattr(self.processor, f"{medium}_token", None) or f"<{medium}>")

    def _parts(self, content: str | list[dict[str, Any]], row_id: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": self.as_text(part["text"])})
            elif part.get("type") in NAMES:
                parts.append({"type": part["type"]})
            else:
                raise ValueError(
                    f"row {row_id}: a part of the prompt has type {part.get('type')!r}; expected 'text' with a text, "
                    "or 'image', 'video' or 'audio' (the pictures themselves stand in the columns)"
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

    def _as_texts(self, value: Any) -> Any:
        """`as_text` of every text in dicts and lists."""
        if isinstance(value, Mapping):
            return {key: self._as_texts(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._as_texts(part) for part in value]
        return self.as_text(value) if isinstance(value, str) else value

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
        device = next((model or self.model).parameters()).device
        waiting: dict[str, list[VisualRecord]] = {}
        for number, record in enumerate(batch.visuals):
            if not record.tensors and record.key is None or record.features is not None:
                continue
            record.features = self.cache.get(record.key, device) if keep and record.key else None
            if record.features is None:
                waiting.setdefault(record.key or str(number), []).append(record)
        by_shape: dict[tuple, list[list[VisualRecord]]] = {}
        for same in waiting.values():
            shape = tuple((k, tuple(v.shape), str(v.dtype)) for k, v in sorted(same[0].tensors.items()))
            by_shape.setdefault(shape, []).append(same)
        for alike in by_shape.values():
            try:
                found = self._tower([same[0] for same in alike], model or self.model)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError) as error:  # of sizes that a family's code was not written for
                shown = {id(same[0]) for same in alike}
                ids = [i for i, record in zip(batch.row_ids, batch.visuals, strict=True) if id(record) in shown]
                raise RuntimeError(f"row {', '.join(ids)}: the model refused what it shows: {error}") from error
            for same, features in zip(alike, found, strict=True):
                self.encoded += 1
                for record in same:
                    record.features = features
                if keep and same[0].key:
                    self.cache.put(same[0].key, features)
        if not keep:  # kept by nobody, so this is the last time that rows and features stand together
            check_placeholders(batch, self.token_ids)

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
        body = backbone(model)
        encode = partial(medium.encoder, body) if callable(medium.encoder) else getattr(body, medium.encoder)
        output = encode(**inputs, return_dict=True)
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


def _markers(processor: Any) -> list[str]:
    """What a tokenizer or processor would read as more than text; the longest first, so that none is broken up by a
    shorter one inside it."""
    said = [value for name, value in vars(processor).items() if name.endswith("_token") and value is not None]
    markers = {str(value) for value in said}  # SmolVLM's <video> is no token, and yet it is replaced
    markers |= {f"<{name}>" for name in NAMES if not hasattr(processor, f"{name}_token")}  # as `Pictures._token`
    tokenizer = getattr(processor, "tokenizer", processor)
    for reader in (tokenizer, getattr(processor, "qformer_tokenizer", tokenizer)):
        markers |= {str(token) for token in reader.added_tokens_decoder.values()} | set(reader.all_special_tokens)
    # Spaces and line breaks are tokens of their own here and there; they stay what they are.
    return sorted((marker for marker in markers if len(marker) > 1 and marker.strip(" \n\t▁")), key=len, reverse=True)


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
            if record.features is None and (record.tensors or record.key):
                continue  # not encoded yet, or not kept
            places = int((batch.prompt_ids[i] == token_id).sum())
            features = sum(f.shape[:-1].numel() for f in (record.features or {}).get(name, ()))
            if places != features:
                raise ValueError(
                    f"row {batch.row_ids[i]}: {places} {name} tokens in the prompt, {features} {name} features; "
                    "the prompt was cut, or the processor does not belong to this model"
                )
