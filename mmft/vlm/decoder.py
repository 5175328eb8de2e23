"""The text decoder of a vision-language model, driven by itself: token ids and picture features -> hidden states.

Every family of `families.py` comes down to this: embed the tokens, put the features where the placeholders stand, run
the decoder with positions and an attention that the caller names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmft.vlm.attention import NAME, DecodeAttention, PrefixAttention
from mmft.vlm.families import Family


def backbone(model: nn.Module) -> nn.Module:
    """The model below the language-model head, under adapters or not (``LlavaModel``, ``Qwen3VLModel``, ...)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, inner.base_model_prefix, inner)


def text_decoder(model: nn.Module, family: Family) -> nn.Module:
    """The stack of decoder layers below the head, by the family's path.

    Raises:
        ValueError: there is no such module.
    """
    try:
        return backbone(model).get_submodule(family.decoder)
    except AttributeError as error:
        raise ValueError(
            f"a {model.config.model_type!r} model has no {family.decoder!r}, which families.py names as its decoder"
        ) from error


def share_prefixes(model: nn.Module, family: Family) -> None:
    """Lets the decoder's layers take a layout; without one they attend as before.

    And spares the last layer's feed-forward block the tokens that nobody reads: of a prompt's, the last alone is read.
    """
    decoder = text_decoder(model, family)
    if decoder.config._attn_implementation == NAME:
        return
    decoder.config._attn_implementation = NAME
    last = decoder.layers[-1]
    attention, block = getattr(last, "self_attn", None), getattr(last, "mlp", None)
    if isinstance(attention, nn.Module) and isinstance(block, nn.Module) and not hasattr(block, "experts"):
        # Told by hooks inside the layer, not by a variable around the call: they run again when checkpointing runs the
        # layer again. A list of one, so that a copy of the model has one of its own.
        attention.read = block.read = [None]
        attention.register_forward_pre_hook(_tell_block, with_kwargs=True)
        block.register_forward_pre_hook(_take_read_tokens)
        block.register_forward_hook(_put_them_back)


def _tell_block(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    attention.read[0] = getattr(kwargs.get("layout"), "read", None)


def _take_read_tokens(block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    block.tokens = args[0].shape[1]
    return None if block.read[0] is None else (args[0].index_select(1, block.read[0]),)


def _put_them_back(block: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
    if block.read[0] is None:
        return None
    return out.new_zeros(out.shape[0], block.tokens, out.shape[2]).index_copy(1, block.read[0], out)


def run(
    model: nn.Module,
    family: Family,
    ids: Tensor,
    positions: Tensor,
    layout: PrefixAttention | DecodeAttention,
    features: dict[str, Any] | None = None,
) -> Tensor:
    """Last hidden states (M, H) of M flat tokens.

    Args:
        ids: (1, M).
        positions: (1, M), or (3, 1, M) with multimodal rotary positions.
        features: medium name -> one (tokens, H) tensor per picture, in the order of their placeholders.
    """
    places = {m.name: ids == placeholder_id(model, m) for m in family.media if features and m.name in features}
    known = ids
    for place in places.values():
        known = known.masked_fill(place, 0)  # a placeholder's id may lie outside the vocabulary
    embeddings = backbone(model).get_input_embeddings()(known)
    for name, place in places.items():
        pictures = torch.cat([f.flatten(0, -2) for f in features[name]]).to(embeddings)
        if int(place.sum()) != len(pictures):  # scattered all the same, every later picture would be shifted
            raise ValueError(f"{int(place.sum())} {name} tokens in the prompts, {len(pictures)} {name} features")
        embeddings = embeddings.masked_scatter(place[..., None], pictures)
    return text_decoder(model, family)(
        inputs_embeds=embeddings,
        # Four dimensions mean to transformers that the mask is ready; the layout makes its own.
        attention_mask=embeddings.new_zeros(1, 1, 1, 1),
        position_ids=positions,
        use_cache=False,
        layout=layout,
        **_deepstack(features, places),
    ).last_hidden_state[0]


def placeholder_id(model: nn.Module, medium) -> int | None:
    """The id of the token that stands for one feature of a picture, clip or sound."""
    return next((i for key in medium.token_keys if (i := getattr(model.config, key, None)) is not None), None)


def _deepstack(features: dict[str, Any] | None, places: dict[str, Tensor]) -> dict[str, Any]:
    """Features that are added behind the first layers (Qwen3-VL; DeepStack, Meng et al. 2024), in token order."""
    deep = {name: features[f"{name}/deepstack"] for name in places if f"{name}/deepstack" in features}
    if not deep:
        return {}
    everywhere = torch.stack(list(places.values())).any(0)
    layers = []
    for number in range(len(next(iter(deep.values())))):
        joined = None
        for name, per_layer in deep.items():
            own = torch.cat(list(per_layer[number]))
            joined = own.new_zeros(int(everywhere.sum()), own.shape[-1]) if joined is None else joined
            joined = joined.masked_scatter(places[name][everywhere][:, None], own)
        layers.append(joined)
    return {"visual_pos_masks": everywhere, "deepstack_visual_embeds": layers}
