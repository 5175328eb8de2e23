"""Rewards for caption-like text, usable on their own: exact CIDEr-D and BLEU, and their weighted combination.

Only the standard library and numpy are imported here, so `import reward_models` costs what `import numpy` costs.
"""

from reward_models.metrics.bleu import Bleu, corpus_bleu
from reward_models.metrics.cider import CiderD
from reward_models.metrics.ngrams import DocumentFrequencies
from reward_models.rewards import RewardScores, WeightedRewards, build_rewards

__all__ = [
    "Bleu",
    "CiderD",
    "DocumentFrequencies",
    "RewardScores",
    "WeightedRewards",
    "build_rewards",
    "corpus_bleu",
]
