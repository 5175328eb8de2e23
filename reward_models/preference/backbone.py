"""The vision-language model below the head: (prompt, pictures, response) -> response states and picture features.

Each distinct picture goes through the vision tower once, and its features are kept within a byte budget while the
tower is frozen. Rows are padded on the right and carry explicit positions, so that a row's states do not depend on
its batch-mates.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from reward_models.preference.pairs import Prompt, open_picture

if TYPE_CHECKING:
    from reward_models.preference.pairs import Picture

_TOWER = ("vision", "visual", "projector", "connector", "merger", "tower")
# Not quantised: the towers, which are small and whose features the head reads, and the unused output layer.
_IN_FULL = [rf".*{n}" for n in ("lm_head", "vision_tower", "vision_model", "visual", "projector", "connector")]
_TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "special_tokens_mask")
_SMALL_KEYS = ("image_grid_thw",)  # of the processor's visual outputs, those that positions are computed from
_LOGITS_BYTES = 48 << 20
_REMEMBERED = 65536
_ZERO_WIDTH_SPACE = "\u200b"
# Where in each tensor the fingerprint looks: multiples of the golden ratio modulo 1 lie evenly and, unlike equal steps,
# do not fall into one column of a matrix.
_LOOKED_AT = [k * 0.6180339887498949 % 1.0 for k in range(64)]


class Row(NamedTuple):
    """One text to be judged."""

    prompt: Prompt
    images: tuple[Picture, ...]
    response: str


class States(NamedTuple):
    """What the head reads of N rows; masks are bool, True = real."""

    text: Tensor  # (N, T, H) last hidden states of the response tokens, the end token included
    logprobs: (
        Tensor  # (N, T) log-probability of each, in nats, given picture, prompt and the tokens before; 0 in padding
    )
    text_mask: Tensor  # (N, T)
    picture: Tensor  # (N, M, H) what the vision tower hands to the language model
    picture_mask: Tensor  # (N, M)


class _Seen(NamedTuple):
    """The pictures of one row as the language model reads them."""

    pooled: list[Tensor]
    deep: list[list[Tensor]] | None  # per layer, for models with deepstack features

    @property
    def bytes(self) -> int:
        tensors = [*self.pooled, *(f for layer in self.deep or () for f in layer)]
        return sum(t.numel() * t.element_size() for t in tensors)


def load_backbone(name: str | Path, quantize: str | None = None, dtype: str = "auto", device: str | None = None):
    """Any image-text-to-text model of transformers, frozen, and its processor.

    Args:
        name: folder or hub id.
        quantize: None, "nf4" (4-bit) or "int8", by bitsandbytes.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own on a GPU, float32 on a CPU.
        device: None takes the GPU where there is one.

    Raises:
        ValueError: the model cannot be loaded, with what was looked for.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if quantize not in (None, "nf4", "int8"):
        raise ValueError(f"quantize: unknown {quantize!r}; expected nf4, int8 or nothing")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype) if dtype != "auto" else "auto"}
    if dtype == "auto" and device == "cpu":
        options["dtype"] = torch.float32
    if quantize == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_IN_FULL)
    elif quantize == "nf4":
        compute = options["dtype"] if dtype != "auto" or device == "cpu" else torch.bfloat16
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=_IN_FULL,  # read for 4 bits too, in spite of its name
        )
    if quantize:
        options["device_map"] = {"": device}
    try:
        # Said in words: transformers would ask on the terminal, and take a pickle where there is nothing else.
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"backbone: {str(name)!r} could not be loaded as an image-text-to-text model; expected a folder with "
            f"config.json and weights, or a hub id ({str(error).splitlines()[0]})"
        ) from error
    if quantize:
        from peft import prepare_model_for_kbit_training

        # What is not quantised becomes fp32, in training and in scoring alike: one set of weights, one fingerprint.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():  # else repacked at the first pass without gradient, for a product that has none
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    else:
        model = model.to(device)
    return model.requires_grad_(False).eval(), processor


class Backbone:
    """Reads rows with a model, adapters and all.

    Args:
        model: an image-text-to-text model, or a `PeftModel` around one.
        processor: its processor.
        cache_bytes: budget for picture features; 0 keeps none. Unused while the tower is trained.

    Raises:
        ValueError: a model that does not take features of pictures, or whose attention over them is not causal.
    """

    def __init__(self, model: nn.Module, processor: Any, cache_bytes: int = 1 << 30):
        self.model: Any = model
        self.processor, self.cache_bytes = processor, cache_bytes
        self.tokenizer = getattr(processor, "tokenizer", processor)
        config: Any = model.config
        if "mm_encoder_outputs" not in inspect.signature(inner_model(model).forward).parameters:
            raise ValueError(
                f"backbone: a {config.model_type!r} model of this version of transformers does not take the "
                "features of its pictures (mm_encoder_outputs); choose another, such as LLaVA, SmolVLM or Qwen-VL"
            )
        self.hidden_size: int = config.get_text_config().hidden_size
        keys = ("image_token_id", "image_token_index")
        self.image_token_id: int = next((i for k in keys if (i := getattr(config, k, None)) is not None), -1)
        generation: Any = getattr(model, "generation_config", None)
        ends = generation.eos_token_id if generation is not None else None
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.end_id: int = ends[0] if isinstance(ends, list) else ends
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        # Longest first, so that no marker is broken up by a shorter one inside it.
        self._markers = sorted(added | set(self.tokenizer.all_special_tokens), key=len, reverse=True)
        self._features: OrderedDict[str, _Seen] = OrderedDict()
        self._bytes = 0
        self._rendered: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._prompts: OrderedDict[tuple[str, str], tuple[Tensor, dict[str, Tensor]]] = OrderedDict()
        self._keys: OrderedDict[int, tuple[Any, str]] = OrderedDict()
        self.encoded = 0  # rows of pictures that went through the tower

    @property
    def tower_frozen(self) -> bool:
        return not any(p.requires_grad for n, p in self.model.named_parameters() if any(t in n for t in _TOWER))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def read(self, rows: Sequence[Row]) -> States:
        """States of N rows, with gradients where the model has trainable weights."""
        prompts, grids, seen = self._prepare(rows)
        ends = torch.tensor([self.end_id])
        responses = [torch.cat([self._response(row.response), ends]) for row in rows]
        sequences = [torch.cat(both) for both in zip(prompts, responses, strict=True)]
        ids = pad_sequence(sequences, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)
        mask = length_mask(sequences)
        hidden = (
            inner_model(self.model)(
                input_ids=ids.to(self.device),
                attention_mask=mask.long().to(self.device),
                position_ids=self._positions(ids, mask, grids).to(self.device),
                mm_encoder_outputs=_joined([s for s in seen if s is not None]),
                use_cache=False,
            )
        ).last_hidden_state
        text_mask = length_mask(responses)
        column = torch.tensor([len(p) for p in prompts])[:, None] + torch.arange(text_mask.shape[1])
        row, last = torch.arange(len(rows))[:, None], ids.shape[1] - 1
        text = hidden[row, column.clamp_max(last)]
        text_mask = text_mask.to(hidden.device)
        before = hidden[row, (column - 1).clamp_max(last)][text_mask]
        written = self._logprobs(before, torch.cat(responses).to(hidden.device))
        logprobs = torch.zeros(text_mask.shape, device=hidden.device).masked_scatter(text_mask, written)
        return States(text, logprobs, text_mask, *self._padded(seen))

    def _logprobs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(M, H), (M,) -> (M,) fp32; the logits of all tokens never stand in memory together."""
        head = base_model(self.model).get_output_embeddings()
        several = max(1, _LOGITS_BYTES // (4 * head.weight.shape[0]))

        def some(h: Tensor, y: Tensor) -> Tensor:
            return -cross_entropy(head(h).float(), y, reduction="none")

        parts = list(zip(hidden.split(several), tokens.split(several), strict=True))
        if len(parts) > 1 and torch.is_grad_enabled():
            return torch.cat([checkpoint(some, h, y, use_reentrant=False) for h, y in parts])
        return torch.cat([some(h, y) for h, y in parts])

    def look(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Picture features (N, M, H) and their mask (N, M) alone."""
        return self._padded(self._prepare(rows)[2])

    # ---------------------------------------------------------------- text

    def render(self, prompt: Prompt, pictures: int) -> str:
        """The text before the response: one placeholder per picture, and the turn opened for the answer.

        A plain prompt becomes one user message; pictures without a place of their own stand before its text.

        Raises:
            ValueError: the conversation has places for another number of pictures.
        """
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages: list[dict[str, Any]] = [dict(message) for message in turns]
        if not messages or not all("role" in m and isinstance(m.get("content"), str | list) for m in messages):
            raise ValueError("a prompt is text, or a list of messages with 'role' and 'content'")
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            message["content"] = [
                {"type": "image"} if p.get("type") == "image" else {"type": "text", "text": self.as_text(p["text"])}
                for p in parts
            ]
        places = sum(part["type"] == "image" for m in messages for part in m["content"])
        if not places:
            first = next((m for m in messages if m["role"] == "user"), messages[0])
            first["content"] = [{"type": "image"}] * pictures + first["content"]
        elif places != pictures:
            raise ValueError(f"the prompt has places for {places} pictures, the row has {pictures}")
        if getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None):
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        token = getattr(self.processor, "image_token", "<image>")
        texts = [token if p["type"] == "image" else p["text"] for m in messages for p in m["content"]]
        return "\n".join(texts) + "\n"

    def _render(self, prompt: Prompt, pictures: int) -> str:
        """`render`, which runs a template, once for each plain prompt."""
        if not isinstance(prompt, str):
            return self.render(prompt, pictures)
        if (prompt, pictures) not in self._rendered:
            _remember(self._rendered, (prompt, pictures), self.render(prompt, pictures))
        return self._rendered[prompt, pictures]

    def as_text(self, text: str) -> str:
        """Text in which nothing reads as a special token: an invisible space goes into every such marker."""
        for marker in self._markers:
            if marker in text:
                text = text.replace(marker, marker[0] + _ZERO_WIDTH_SPACE + marker[1:])
        return text

    def _response(self, text: str) -> Tensor:
        ids = self.tokenizer(self.as_text(text), add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def _positions(self, ids: Tensor, mask: Tensor, grids: list[Tensor]) -> Tensor:
        inner = inner_model(self.model)
        if not hasattr(inner, "get_rope_index"):
            return (mask.long().cumsum(-1) - 1).clamp_min(0)
        types = torch.eq(ids, self.image_token_id).int() * mask
        grid = torch.cat(grids) if grids else None
        return inner.get_rope_index(ids, types, image_grid_thw=grid, attention_mask=mask.long())[0]

    # ---------------------------------------------------------------- pictures

    def _prepare(self, rows: Sequence[Row]) -> tuple[list[Tensor], list[Tensor], list[_Seen | None]]:
        """Prompt ids per row, the grids that positions need, and the row's picture features (None without any)."""
        keep = self.tower_frozen
        found: dict[str, _Seen] = {}
        prompts, grids, seen = [], [], []
        for i, row in enumerate(rows):
            key = " ".join(self._key(picture) for picture in row.images)
            try:
                text = self._render(row.prompt, len(row.images))
                features = found.get(key) or (self._features.get(key) if keep else None)
                if (text, key) in self._prompts and (features is not None or not key):
                    ids, small = self._prompts[text, key]
                else:
                    ids, small, tensors = self._process(text, row.images)
                    _remember(self._prompts, (text, key), (ids, small))
                    if key and features is None:
                        features = self._encode(tensors)
            except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
                raise ValueError(f"row {i}: prompt and {len(row.images)} pictures were refused: {error}") from error
            if key and features is not None:
                found[key] = features
                self._check_places(i, ids, features)
                if keep:
                    self._keep(key, features)
            prompts.append(ids)
            grids += list(small.values())
            seen.append(features)
        return prompts, grids, seen

    def _process(self, text: str, images: tuple[Picture, ...]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        bos = self.tokenizer.bos_token
        options = {"return_tensors": "pt", "add_special_tokens": not (bos and text.startswith(bos))}
        if images:
            inputs = self.processor(text=[text], images=[[open_picture(image) for image in images]], **options)
        else:
            inputs = self.tokenizer([text], **options)
        if "token_type_ids" in inputs and bool(inputs["token_type_ids"].any()):
            raise ValueError(f"{self.model.config.model_type!r} marks pictures by token_type_ids: not supported yet")
        visual = {k: v for k, v in inputs.items() if k not in _TEXT_KEYS and isinstance(v, Tensor)}
        return inputs["input_ids"][0], {k: v for k, v in visual.items() if k in _SMALL_KEYS}, visual

    def _encode(self, tensors: Mapping[str, Tensor]) -> _Seen:
        inputs = {k: v.to(self.device) for k, v in tensors.items()}
        output = inner_model(self.model).get_image_features(**inputs, return_dict=True)
        self.encoded += 1
        deep = getattr(output, "deepstack_features", None)
        return _Seen(list(output.pooler_output), None if deep is None else [list(layer) for layer in deep])

    def _keep(self, key: str, features: _Seen) -> None:
        if key in self._features:
            self._features.move_to_end(key)
            return
        if features.bytes <= self.cache_bytes:
            self._features[key] = features
            self._bytes += features.bytes
        while self._bytes > self.cache_bytes:
            self._bytes -= self._features.popitem(last=False)[1].bytes

    def _check_places(self, i: int, ids: Tensor, features: _Seen) -> None:
        places = int(torch.eq(ids, self.image_token_id).sum())
        have = sum(f.shape[0] for f in features.pooled)
        if places != have:
            raise ValueError(f"row {i}: {places} picture tokens in the prompt but {have} picture features")

    def _key(self, picture: Picture) -> str:
        """An identity of a picture: a path by its name, bytes by their hash, anything else by its pixels."""
        if isinstance(picture, str | Path):
            return f"path:{picture}"
        if isinstance(picture, bytes):
            return hashlib.sha1(picture, usedforsecurity=False).hexdigest()
        # A function is kept as long as its id is, so that no other object can come to have the same id.
        known = self._keys.get(id(picture)) if callable(picture) else None
        if known is not None:
            return known[1]
        image = open_picture(picture)
        key = hashlib.sha1(f"{image.size}".encode() + image.tobytes(), usedforsecurity=False).hexdigest()
        if callable(picture):
            _remember(self._keys, id(picture), (picture, key))
        return key

    def _padded(self, seen: list[_Seen | None]) -> tuple[Tensor, Tensor]:
        empty = torch.zeros(0, self.hidden_size, device=self.device)
        tokens = [empty if s is None else torch.cat(s.pooled) for s in seen]
        return pad_sequence(tokens, batch_first=True), length_mask(tokens).to(empty.device)


def base_model(model: Any) -> Any:
    """The model of transformers, under adapters or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def inner_model(model: nn.Module) -> Any:
    """The model below the language-model head, under adapters or not."""
    base = base_model(model)
    return getattr(base, base.base_model_prefix, base)


def fingerprint(model: nn.Module) -> str:
    """Which base weights a model has: a hash over the names, shapes and types of all, and 64 values spread over each.

    Noise on any one tensor shows; a change of single values may not. Adapters do not count, loaded or not, so the same
    base has the same fingerprint inside any `PeftModel`.
    """
    weights = {
        name.replace(".base_layer", "").replace(".original_module", ""): p
        for name, p in base_model(model).named_parameters()
        if not any(mark in name for mark in (".lora_", ".modules_to_save."))
    }
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        if weight.numel():
            places = torch.tensor([int(share * weight.numel()) for share in _LOOKED_AT], device=weight.device)
            digest.update(weight.flatten()[places].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _joined(seen: list[_Seen]) -> dict[str, Any] | None:
    if not seen:
        return None
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    output = BaseModelOutputWithPooling(pooler_output=[f for s in seen for f in s.pooled])  # type: ignore[arg-type]
    if seen[0].deep is not None:
        layers = zip(*(s.deep or [] for s in seen), strict=True)
        output["deepstack_features"] = [[f for row in layer for f in row] for layer in layers]
    return {"image": output}


def length_mask(sequences: Sequence[Tensor]) -> Tensor:
    length = torch.tensor([len(s) for s in sequences])[:, None]
    return torch.lt(torch.arange(int(length.max()))[None], length)


def _remember(memory: OrderedDict, key: Any, value: Any) -> None:
    memory[key] = value
    if len(memory) > _REMEMBERED:
        memory.popitem(last=False)
