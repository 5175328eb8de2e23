"""From the name of a reward in a recipe to the function it stands for. Modules are imported when a reward is used."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward_models.metrics.ngrams import DocumentFrequencies

BUILT_IN = {
    "cider_d": "reward_models.metrics.cider:CiderD",
    "cider": "reward_models.metrics.cider:Cider",
    "bleu": "reward_models.metrics.bleu:Bleu",
    "rouge_l": "reward_models.metrics.rouge:RougeL",
    "meteor": "reward_models.metrics.java:Meteor",
    "spice": "reward_models.metrics.java:Spice",
    "coverage": "reward_models.terms:Coverage",
    "hallucination": "reward_models.terms:Hallucination",
    "length": "reward_models.terms:LengthWindow",
    "repetition": "reward_models.terms:Repetition",
    "missing_eos": "reward_models.terms:MissingEos",
    "novelty": "reward_models.terms:Novelty",
    "richness": "reward_models.terms:Richness",
    "format": "reward_models.terms:Format",
    "preference": "reward_models.preference.reward:PreferenceReward",
    "http": "reward_models.client:HttpReward",
}
_NEEDS_DF = ("cider_d", "cider")  # and classes that say so themselves, by `needs_training = True`


def load_reward(
    name: str, options: Mapping[str, Any], df: DocumentFrequencies | None = None, timeout: float | None = None
) -> Callable[..., Any]:
    """The reward function of that name, options bound.

    name: one of `BUILT_IN`, or `package.module:attribute` or `path/to/file.py:attribute` for a function (sync or
    async) or a class, which is instantiated with the options. df: document frequencies of the training captions, for
    the rewards that need them. timeout: seconds that a reward of your own may take per call, in a child process;
    built-in rewards get it as an option.
    Raises ValueError for an unknown name (with the nearest one), a file or module that is not there, or df missing.
    """
    if ":" in name:
        if timeout is not None:
            from reward_models.isolation import Isolated

            return Isolated(name, dict(options), timeout)
        from reward_models.own import load_function

        try:
            return load_function(name, options)
        except ModuleNotFoundError as error:
            raise ValueError(f"cannot import {name.rpartition(':')[0]!r}: {error}") from error
    if name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown reward {name!r}; {hint}There are {', '.join(BUILT_IN)}, and your own as "
            "'package.module:function' or 'path/to/file.py:function'"
        )
    from reward_models.own import check_options

    if timeout is not None:
        options = {**options, "timeout": timeout}
    kind = built_in(name)
    if name == "preference":
        if "path" not in options:
            raise ValueError("option 'path' is missing: the folder of a trained preference head")
        return kind.load(**options)
    check_options(name, kind, options)
    if name in _NEEDS_DF or getattr(kind, "needs_training", False):
        return kind(_required(df), **options)
    if name in ("bleu", "rouge_l") and df is not None:
        options = {"tokenizer": df.tokenizer, **options}
    return kind(**options)


def built_in(name: str) -> Any:
    """The class behind a built-in name."""
    module, _, attribute = BUILT_IN[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def with_increments() -> list[str]:
    """Names of the built-in rewards that can give credit per token; used in error messages. Imports the light ones."""
    names = []
    for name in BUILT_IN:
        if name in ("preference", "http"):  # neither can have any
            continue
        try:
            if hasattr(built_in(name), "increments"):
                names.append(name)
        except ImportError:  # an optional dependency is missing; this message is about something else
            continue
    return names


def _required(df: DocumentFrequencies | None) -> DocumentFrequencies:
    if df is None:
        raise ValueError(
            "document frequencies are needed, which tell how rare a word is in the training captions, and they are not "
            "known here (df=DocumentFrequencies.from_references(captions))"
        )
    return df
