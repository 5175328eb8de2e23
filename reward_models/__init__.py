"""Rewards for image and video text, usable on their own: exact caption metrics, shaping terms, a learned preference
head, and their weighted combination.

Only the standard library and numpy are imported here, so `import reward_models` costs little more than `import numpy`;
what needs more is imported when it is first asked for (`_LATER`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reward_models.metrics.bleu import Bleu, corpus_bleu
from reward_models.metrics.cider import Cider, CiderD
from reward_models.metrics.ngrams import DocumentFrequencies
from reward_models.metrics.rouge import RougeL
from reward_models.rewards import RewardPart, RewardScores, Scored, WeightedRewards, build_rewards

if TYPE_CHECKING:
    from reward_models.client import HttpReward
    from reward_models.isolation import Isolated
    from reward_models.metrics.java import Meteor, Spice
    from reward_models.preference.reward import PreferenceReward
    from reward_models.probes import probe_rewards
    from reward_models.terms import TERMS

_LATER = {
    "HttpReward": "reward_models.client",
    "Isolated": "reward_models.isolation",
    "Meteor": "reward_models.metrics.java",
    "PreferenceReward": "reward_models.preference.reward",
    "Spice": "reward_models.metrics.java",
    "TERMS": "reward_models.terms",
    "probe_rewards": "reward_models.probes",
}

__all__ = [
    "TERMS",
    "Bleu",
    "Cider",
    "CiderD",
    "DocumentFrequencies",
    "HttpReward",
    "Isolated",
    "Meteor",
    "PreferenceReward",
    "RewardPart",
    "RewardScores",
    "RougeL",
    "Scored",
    "Spice",
    "WeightedRewards",
    "build_rewards",
    "corpus_bleu",
    "probe_rewards",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
