"""`mmft doctor`: what is wrong with a recipe, found before a run costs anything."""

from __future__ import annotations

from mmft.training.run import rewards_of, rows_of
from reward_models import DocumentFrequencies
from reward_models.probes import RewardReport, probe_rewards


def doctor_rewards(recipe, rows: int = 64) -> RewardReport:
    """Probes every reward of a recipe with adversarial responses to held-out rows; no model is loaded.

    Raises:
        ValueError: data or rewards of the recipe are missing or wrong.
    """
    train, held_out = rows_of(recipe, recipe.data.train, recipe.data.train_rows), rows_of(recipe, recipe.data.eval)
    corpus = train.references()
    rewards = rewards_of(recipe, DocumentFrequencies.from_references(corpus))
    return probe_rewards(rewards, [held_out[i] for i in range(min(rows, len(held_out)))], corpus)
