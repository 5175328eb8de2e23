"""Facts about a family that is not listed, found by looking at the model: no forward pass, no download.

What a listed family states in `families.py` is read here off modules, signatures and configurations. Whatever cannot
be read with certainty is a note, and a family with notes takes the plain path. One without notes is tried on the
shared prefix; the start-up self-test then compares both paths in numbers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

from torch import nn

from mmft.vlm.decoder import backbone
from mmft.vlm.families import AUDIO, IMAGE, VIDEO, Family, Medium

# What a decoder of the usual kind takes; any other argument of it may be something that it cannot do without.
_DECODER_TAKES = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_position",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "logits_to_keep",
    "visual_pos_masks",  # with the next one: DeepStack, whose features the encoder gives
    "deepstack_visual_embeds",
}
_ROPE_TAKES = {
    "input_ids",
    "mm_token_type_ids",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "attention_mask",
}
# Outputs of processors that describe the text.
_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "special_tokens_mask", "labels"}
# Factors between the head and the logits, as text configurations name them.
_SCALES = ("logit_scale", "logits_scaling")


def probe(model: nn.Module, processor=None) -> Family:
    """The facts about a model's family, with ``notes`` on what could not be found.

    Args:
        model: with adapters or without.
        processor: without one the encoders' inputs are taken from their signatures alone.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body, text = backbone(model), inner.config.get_text_config()
    notes: list[str] = []
    media = _media(body, inner.config, processor, notes)
    path = _decoder(inner, body, text, notes)
    _check_logits(inner, text, notes)
    takes = _arguments(body.forward)
    attention = getattr(text, "use_bidirectional_attention", None)
    if attention == "all":
        notes.append("its text configuration asks for attention in both directions over all tokens, answers included")
    marked = "token_type_ids" in takes
    seen = "whole" if attention is True and marked else "pictures" if marked or attention == "vision" else "causal"
    return Family(
        shared_prefix=not notes,
        media=media,
        decoder=path,
        positions=_positions(body, notes),
        prompt_attention=seen,
        features_read_prompt=any(name.endswith("input_ids") for medium in media for name in medium.inputs),
        marks=_marks(inner.config, processor),
        lora_target=_lora_target(inner, body, path),
        notes=tuple(dict.fromkeys(notes)),
    )


def _media(body: nn.Module, config, processor, notes: list[str]) -> tuple[Medium, ...]:
    """Encoders that the model has, with the processor's outputs they take and their placeholders."""
    given = set(processor.model_input_names) - _TEXT if processor is not None else None
    found = []
    for medium in (IMAGE, VIDEO, AUDIO):
        encoder = getattr(body, medium.encoder, None)
        key = next((k for k in medium.token_keys if getattr(config, k, None) is not None), None)
        if encoder is None:
            continue
        takes = _arguments(encoder)
        inputs = tuple(name for name in takes if given is None or name in given)
        if medium is not IMAGE and (not inputs or key is None):
            continue  # a processor without clips or sounds: rows that hold some are refused later
        missing = [name for name, needed in takes.items() if needed and name not in inputs]
        if missing:
            notes.append(f"{medium.encoder} needs {', '.join(missing)}, which the processor does not give")
        if key is None:
            notes.append(f"the configuration names no {medium.name} placeholder ({' or '.join(medium.token_keys)})")
        found.append(Medium(medium.name, medium.encoder, inputs, (key,) if key else medium.token_keys))
    if not found:
        wanted = ", ".join(medium.encoder for medium in (IMAGE, VIDEO, AUDIO))
        notes.append(f"{type(body).__name__} has none of {wanted}")
    known = {name for medium in found for name in medium.inputs} | _ROPE_TAKES
    if found and given is not None and given - known:
        notes.append(f"the processor gives {', '.join(sorted(given - known))}, which no encoder takes")
    return tuple(found)


def _decoder(inner: nn.Module, body: nn.Module, text, notes: list[str]) -> str:
    """Path from the backbone to the module that holds token embeddings and layers; "" if there is none."""
    if getattr(inner.config, "is_encoder_decoder", False):
        notes.append("an encoder-decoder: its answers are not written behind its prompt")
        return ""
    try:
        embeddings = inner.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    paths = [
        name
        for name, module in body.named_modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList)
        and any(child is embeddings for child in module.children())
    ]
    if len(paths) != 1:
        notes.append(f"found {len(paths)} modules with the token embeddings and a list of layers, expected one")
        return ""
    decoder = body.get_submodule(paths[0])
    extra = set(_arguments(decoder.forward)) - _DECODER_TAKES
    if extra:
        notes.append(f"its decoder takes {', '.join(sorted(extra))} beside embeddings, mask and positions")
    if not getattr(decoder, "_supports_attention_backend", False):
        notes.append(f"{type(decoder).__name__} does not call transformers' attention functions")
    _check_layers(decoder, text, notes)
    return paths[0]


def _check_layers(decoder: nn.Module, text, notes: list[str]) -> None:
    """Every layer has to be causal self-attention, over everything before a token or a window that it names."""
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(decoder.layers)
    odd = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if odd:
        notes.append(f"layers of kind {', '.join(odd)}")
    for number, (layer, kind) in enumerate(zip(decoder.layers, kinds, strict=False)):
        attentions = [m for m in layer.modules() if hasattr(m, "is_causal") and hasattr(m, "layer_idx")]
        if len(attentions) != 1:
            notes.append(f"layer {number} holds {len(attentions)} causal self-attentions, expected one")
            return
        if kind == "sliding_attention" and not getattr(attentions[0], "sliding_window", None):
            notes.append(f"layer {number} is a sliding one that does not name its window")
            return


def _check_logits(inner: nn.Module, text, notes: list[str]) -> None:
    """The log-probs are those of the head alone, so nothing may stand between it and the logits."""
    if inner.get_output_embeddings() is None:
        notes.append("it has no language-model head")
        return
    source = inspect.getsource(type(inner).forward)
    for name in _SCALES:
        if getattr(text, name, None) not in (None, 1, 1.0) and name in source:
            notes.append(f"its logits are scaled by {name} behind the head")


def _positions(body: nn.Module, notes: list[str]) -> str:
    index = getattr(body, "get_rope_index", None)
    if index is None:
        return "sequential"
    takes = set(_arguments(index))
    if takes - _ROPE_TAKES or "mm_token_type_ids" not in takes:
        notes.append(f"get_rope_index takes {', '.join(sorted(takes))}, which are not the usual arguments")
    return "mrope"


def _marks(config, processor) -> tuple[str, ...]:
    """Special tokens that configuration, processor or tokenizer name after pictures, clips or sounds, sorted."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        return ()
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    names = vars(config) | vars(processor) | vars(tokenizer) | getattr(tokenizer, "_special_tokens_map", {})
    about = re.compile(r"(?:image|vision|video|audio|img|boi|eoi).*(?:token|tag)(?:_id|_index)?$")
    values = [value for name, value in names.items() if about.search(name) and isinstance(value, str | int)]
    return tuple(sorted({special.get(value, str(value)) for value in values} & set(special.values())))


def _lora_target(inner: nn.Module, body: nn.Module, path: str) -> str:
    """The usual regular expression where it finds all layers, else one of the decoder's own linear layers; without a
    decoder PEFT's word for every linear layer but the head."""
    usual = Family().lora_target
    if not path:
        return "all-linear"
    decoder = body.get_submodule(path)
    own = {id(module) for module in decoder.modules() if isinstance(module, nn.Linear)}
    names = [name for name, module in inner.named_modules() if id(module) in own]
    if all(re.fullmatch(usual, name) for name in names):
        return usual
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    return rf"(?:.*\.)?{re.escape(path)}\.(?:.*\.)?(?:{'|'.join(map(re.escape, leaves))})"


def _arguments(function: Callable) -> dict[str, bool]:
    """Names of a function's arguments -> whether it needs them."""
    return {
        name: parameter.default is parameter.empty
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
