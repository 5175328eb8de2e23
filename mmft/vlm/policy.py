"""The policy: ONE trainable module that holds the vision-language model, its adapters and the value head.

One module, because Accelerate under DeepSpeed prepares one; `forward` is its only way in, so that DDP and ZeRO see
every use. The reference policy is the same weights with the adapters switched off, or a second model (see
`load.build_policy`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mmft.batch import PromptBatch, Responses, TokenOutputs
from mmft.vlm.decoder import run, share_prefixes, text_decoder
from mmft.vlm.families import Family, end_tokens, family_of, never_sampled
from mmft.vlm.logprobs import Distribution, token_logprobs
from mmft.vlm.pictures import Pictures, joined_features
from mmft.vlm.prefix import pack
from mmft.vlm.products import quicken


class ValueHead(nn.Linear):
    """The critic: one linear map of the last hidden state, (..., H) -> (...,), in fp32, starting at zero.

    Zero, so that the first advantages are the rewards themselves and not the noise of a random critic.
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype)).squeeze(-1)


class Policy(nn.Module):
    """Policy, critic and reference of one vision-language model.

    Args:
        model: any image-text-to-text model of transformers, or a `PeftModel` around one.
        processor: its processor.
        critic: "head" for a value head on the last hidden states, "none" for no critic.
        reference: a second model for the reference when the policy has no adapters to switch off, or adapters that had
            learned something before; else None. It may share the weights that are frozen.
        shared_prefix: None lets the family decide; False forces the plain path.
        cache_bytes: budget for picture features kept across steps.
        cache_folder, cache_disk_bytes: where they are kept on disk as well, and how much of them.
    """

    def __init__(
        self,
        model: nn.Module,
        processor,
        critic: str = "head",
        reference: nn.Module | None = None,
        shared_prefix: bool | None = None,
        cache_bytes: int = 1 << 30,
        cache_folder: str | None = None,
        cache_disk_bytes: int = 10 << 30,
    ):
        super().__init__()
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.family: Family = family_of(model, processor)
        self.shared_prefix = self.family.shared_prefix if shared_prefix is None else shared_prefix
        if self.family.notes:
            reasons = "; ".join(self.family.notes)
            warnings.warn(
                f"a {model.config.model_type!r} model is not known to work on the shared prefix, which is slower "
                f"without it: {reasons}",
                stacklevel=2,
            )
        for quickened in (model, *([reference] if reference is not None else [])):
            quicken(quickened)
        if hasattr(model, "peft_config"):
            from mmft.vlm.adapters import fold_lora  # PEFT; without adapters nobody waits for its import

            fold_lora(model)
        if self.shared_prefix:
            for shares in (model, *([reference] if reference is not None else [])):
                share_prefixes(shares, self.family)
        text_config = model.config.get_text_config()
        self.value_head = ValueHead(text_config.hidden_size) if critic == "head" else None
        # In a list: the reference is not the policy's to train, save or move between ranks.
        self._reference = [reference] if reference is not None else []
        self.pictures = Pictures(model, processor, self.family, cache_bytes, cache_folder, cache_disk_bytes)
        if not self.shared_prefix:
            self.pictures.forget()
        self.tower_frozen = not any(p.requires_grad for p in _sight(model, self.family))
        self._softcap = getattr(text_config, "final_logit_softcapping", None)
        self.end_ids = end_tokens(model, self.tokenizer)
        self.register_buffer("banned", torch.zeros(self.head.weight.shape[0], dtype=torch.bool), persistent=False)
        self.register_buffer("banned_ids", torch.zeros(0, dtype=torch.long), persistent=False)
        self.ban(never_sampled(model, self.tokenizer, self.family))

    def ban(self, ids: list[int]) -> None:
        """Takes tokens out of the distribution that is sampled from, and that log-probs are of."""
        self.banned[ids] = True
        self.banned_ids = self.banned.nonzero().flatten()

    def take_plain_path(self) -> None:
        """Leaves the shared prefix; features are no longer remembered, for the plain path reads raw pixels."""
        self.shared_prefix = False
        self.pictures.forget()

    def checkpoint_activations(self) -> None:
        """Keeps only each layer's input for the backward pass, which runs the layer again: less memory, more work."""
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        inner.activation_checkpointing_enable({"use_reentrant": False})

    def compile_decoder(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compiles each layer of the decoder by itself: one layer's code serves all of them."""
        for layer in text_decoder(self.model, self.family).layers:
            layer.compile(dynamic=True, backend=backend)

    @property
    def head(self) -> nn.Module:
        """The language-model head, hidden state -> logits."""
        return self.model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        return self.banned.device

    def _apply(self, function, recurse: bool = True) -> Policy:
        """What `to`, `bfloat16` and their like call; the reference copy comes along, though no part of the module."""
        for reference in self._reference:
            reference._apply(function, recurse)
        return super()._apply(function, recurse)

    def forward(
        self,
        prompts: PromptBatch,
        responses: Responses,
        temperature: float = 1.0,
        reference: bool = False,
        entropy: bool = False,
    ) -> TokenOutputs:
        """Log-probs, values and (when asked) entropy of response tokens, each (N, T), zero outside the mask.

        Args:
            prompts: B prompts.
            responses: their N = B*G responses, groups standing together.
            temperature: the sampling temperature; log-probs are those of the distribution sampled from.
            reference: of the reference policy; no values, no entropy, no gradient.
        """
        if reference:
            with torch.no_grad(), self.as_reference() as model:
                hidden, targets = self._predictors(model, prompts, responses)
                logprobs, _ = token_logprobs(self.distribution(temperature, model), hidden, targets)
            return TokenOutputs(_unpack(logprobs, responses.mask))
        hidden, targets = self._predictors(self.model, prompts, responses)
        logprobs, entropies = token_logprobs(self.distribution(temperature), hidden, targets, entropy)
        values = self.value_head(hidden) if self.value_head is not None else None
        return TokenOutputs(
            _unpack(logprobs, responses.mask),
            None if values is None else _unpack(values, responses.mask),
            None if entropies is None else _unpack(entropies, responses.mask),
        )

    def predictors(self, prompts: PromptBatch, responses: Responses) -> Tensor:
        """The last hidden states (M, H) from which the M real response tokens are predicted: what the critic reads."""
        return self._predictors(self.model, prompts, responses)[0]

    def as_reference(self):
        """A context whose value is the reference model: adapters off, or the second copy."""
        if self._reference:
            return nullcontext(self._reference[0])
        if not hasattr(self.model, "disable_adapter"):
            raise ValueError("no reference policy: the model has no adapters to switch off and no second copy")
        return _AdaptersOff(self.model)

    def features(self, prompts: PromptBatch, model: nn.Module | None = None) -> dict[str, Any] | None:
        """The batch's pictures, encoded by ``model``'s tower (the policy's by default).

        A frozen tower is asked once: records and cache remember. A tower that is trained is asked every time, and
        the reference copy has a tower of its own.
        """
        if self.tower_frozen:
            with torch.no_grad():
                self.pictures.encode(prompts, keep=True)
            return joined_features(prompts)
        for record in prompts.visuals:
            record.features = None  # of an older tower, of the other model, or of a graph already freed
        self.pictures.encode(prompts, keep=False, model=model)
        features = joined_features(prompts)
        for record in prompts.visuals:
            record.features = None
        return features

    def _predictors(self, model: nn.Module, prompts: PromptBatch, responses: Responses) -> tuple[Tensor, Tensor]:
        """The hidden states (M, H) from which the M real response tokens are predicted, and those tokens (M,)."""
        if not self.shared_prefix:
            from mmft.vlm.plain import plain_predictors

            return plain_predictors(self, model, prompts, responses)
        packed = pack(prompts, responses, self.family, list(self.pictures.token_ids.values()))
        features = self.features(prompts, model)
        hidden = run(model, self.family, packed.ids, packed.positions, packed.attention, features)
        return hidden[packed.predictor], packed.targets

    def distribution(self, temperature: float = 1.0, model: nn.Module | None = None) -> Distribution:
        """What is sampled from, and what log-probs are of: tempered, without the banned tokens.

        Args:
            model: whose head; the policy's by default. The reference copy has its own.
        """
        head = (self.model if model is None else model).get_output_embeddings()
        return Distribution(head, self.banned_ids, temperature, self._softcap)

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """(M, H) -> (M, V) fp32 logits of the distribution that is sampled from."""
        return self.distribution(temperature).logits(hidden)


def _sight(model: nn.Module, family: Family) -> Iterator[nn.Parameter]:
    """The parameters that the pictures' features depend on: all but the text decoder's and the head's. All of them
    where nobody knows which part the decoder is."""
    if not family.decoder:
        return model.parameters()
    blind = (text_decoder(model, family), model.get_output_embeddings())
    others = {id(p) for module in blind for p in module.parameters()}
    return (p for p in model.parameters() if id(p) not in others)


class _AdaptersOff:
    """`PeftModel.disable_adapter` that yields the model. Evaluation mode meanwhile: a reference has no dropout."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.context = model.disable_adapter()

    def __enter__(self) -> nn.Module:
        self.training = self.model.training
        self.context.__enter__()
        self.model.eval()
        return self.model

    def __exit__(self, *error) -> None:
        self.model.train(self.training)
        self.context.__exit__(*error)


def _unpack(flat: Tensor, mask: Tensor) -> Tensor:
    """(M,) values of the real tokens -> (N, T), zero elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)
