"""A recipe put together and run: rows, rewards and metrics make the task; the trainer does the rest."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from mmft.data import check_rows, load_rows
from mmft.data.scenes import attribute_claims
from mmft.evaluation.captioning import score_captions
from mmft.training.config import from_recipe
from mmft.training.evaluate import Metrics, evaluate
from mmft.training.summary import write_summary
from mmft.training.trainer import A2CTrainer, PPOTrainer
from mmft.training.warm_start import warm_start
from mmft.vlm.load import build_policy, load_model, lora_config
from reward_models import DocumentFrequencies, build_rewards


def run(recipe, resume: str | None = None) -> dict[str, Any]:
    """Runs a `mmft.recipe.Recipe` from its rows to its report; returns the summary.

    Whatever is wrong with data, rewards or model is found before the first step, and ends the process with one plain
    line and exit code 2.
    """
    try:
        trainer = assemble(recipe, resume)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return trainer.train(resume_from_checkpoint=True if resume == "latest" else resume)


def assemble(recipe, resume: str | None = None) -> PPOTrainer:
    """The trainer that a recipe describes; its warm start, if it has one, is run here."""
    train, held_out = rows_of(recipe, recipe.data.train, recipe.data.train_rows), rows_of(recipe, recipe.data.eval)
    frequencies = DocumentFrequencies.from_references(train.references())
    rewards = build_rewards([{"name": r.name, "weight": r.weight, **r.options} for r in recipe.rewards], frequencies)

    output = Path(recipe.output.dir)
    output.mkdir(parents=True, exist_ok=True)
    recipe.dump(output / "recipe.yaml")
    frequencies.save(output / "document_frequencies.json")
    name = recipe.model.name
    if recipe.warm_start is not None:
        started = output / "warm_start"
        name = str(started if resume else warm_start(recipe, train, started))

    model, processor = load_model(name, recipe.model.quantize, recipe.model.dtype)
    lora = recipe.model.lora
    policy = build_policy(
        model,
        processor,
        lora_config(model, lora.r, lora.alpha, lora.dropout, lora.target) if recipe.model.tune == "lora" else None,
        critic=recipe.model.critic,
        needs_reference=recipe.algorithm.kl_coef > 0,
    )
    return {"ppo": PPOTrainer, "a2c": A2CTrainer}[recipe.algorithm.name](
        model=policy,
        reward_funcs=rewards,
        args=from_recipe(recipe),
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=caption_metrics(frequencies, held_out),
    )


def rows_of(recipe, split: str, limit: int | None = None):
    """The rows of a split, their pictures looked at."""
    rows = load_rows(recipe.data.name, split, limit, recipe.data.prompt)
    check_rows(rows)
    return rows


def run_supervised(recipe) -> dict[str, Any]:
    """The warm start alone; prints and saves the held-out metrics before and after it."""
    if recipe.warm_start is None:
        raise ValueError("the recipe has no section warm_start, which says how to train")
    train, held_out = rows_of(recipe, recipe.data.train, recipe.data.train_rows), rows_of(recipe, recipe.data.eval)
    output = Path(recipe.output.dir)
    output.mkdir(parents=True, exist_ok=True)
    recipe.dump(output / "recipe.yaml")
    frequencies = DocumentFrequencies.from_references(train.references())
    metrics = caption_metrics(frequencies, held_out)
    began = time.time()

    def scored(name: str):
        policy = build_policy(*load_model(name, dtype=recipe.model.dtype), critic="none", needs_reference=False)
        return evaluate(policy, held_out, metrics, recipe.eval.rows, recipe.rollout.max_completion_length)

    before = scored(recipe.model.name)
    after = scored(str(warm_start(recipe, train, output / "warm_start")))
    return write_summary(output, held_out, before, after, time.time() - began)


def caption_metrics(frequencies: DocumentFrequencies, rows) -> Metrics:
    """The captioning suite for rows with references; for the built-in world also how much of a caption is true."""
    claims = None
    if hasattr(rows, "scene"):

        def claims(caption: str, i: int) -> tuple[int, int]:
            return attribute_claims(caption, rows.scene(i))

    def metrics(texts, opened):
        return score_captions(texts, [row["references"] for row in opened], frequencies, claims)

    return metrics
