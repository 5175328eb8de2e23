"""A recipe put together and run: rows, rewards and metrics make the task; the trainer does the rest."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import set_seed

from mmft.data import Clips, Sounds, check_rows, load_rows
from mmft.data.scenes import attribute_claims
from mmft.evaluation.captioning import score_captions
from mmft.evaluation.report import write_report
from mmft.training.config import from_recipe
from mmft.training.evaluate import Evaluation, Metrics, evaluate
from mmft.training.monitor import Monitor
from mmft.training.scoring import RewardError
from mmft.training.summary import write_summary
from mmft.training.trainer import A2CTrainer, PPOTrainer
from mmft.training.warm_start import warm_start
from mmft.vlm.load import build_policy, load_model, lora_config, resolve
from reward_models import DocumentFrequencies, WeightedRewards, build_rewards
from reward_models.preference.folder import backbone_name


def run(recipe, resume: str | None = None) -> dict[str, Any]:
    """Runs a `mmft.recipe.Recipe` from its rows to its report; returns the summary.

    Whatever is wrong with data, rewards, model or checkpoint is found before the first step, and ends the process
    with one plain line and exit code 2. A reward that fails later ends it with the step in the last line and code 1.
    """
    with plain_errors():
        trainer = assemble(recipe, resume)
        trainer.begin(True if resume == "latest" else resume)
    try:
        return trainer.train()
    except RewardError as error:
        traceback.print_exception(error.__cause__)  # of the user's own function, perhaps; the plain line comes last
        print("error:", str(error).partition("\n")[0], file=sys.stderr)
        raise SystemExit(1) from error


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors of users as one line and exit code 2; a traceback would only hide what to mend."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def assemble(recipe, resume: str | None = None) -> PPOTrainer:
    """The trainer that a recipe describes; its warm start, if it has one, is run here.

    Raises:
        ValueError: anything that the recipe names is missing or wrong.
    """
    set_seed(recipe.seed)  # of new weights: adapters start at random
    train, held_out = rows_of(recipe, recipe.data.train, recipe.data.train_rows), rows_of(recipe, recipe.data.eval)
    frequencies = DocumentFrequencies.from_references(train.references())
    rewards = rewards_of(recipe, frequencies)
    output = prepare_folder(recipe, frequencies)

    def trainer(name: str) -> PPOTrainer:
        model, processor = load_model(name, recipe.model.quantize, recipe.model.dtype)
        lora = recipe.model.lora
        adapters = lora_config(model, lora.r, lora.alpha, lora.dropout, lora.target)
        return {"ppo": PPOTrainer, "a2c": A2CTrainer}[recipe.algorithm.name](
            model=model,
            reward_funcs=rewards,
            args=from_recipe(recipe),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=processor,
            peft_config=adapters if recipe.model.tune == "lora" else None,
            compute_metrics=caption_metrics(frequencies, held_out),
        )

    if recipe.warm_start is None:
        return trainer(recipe.model.name)
    trainer(recipe.model.name)  # thrown away: what cannot work is said now, not after hours of warm start
    started = output / "warm_start"
    if not (resume and (started / "config.json").is_file()):
        warm_start(recipe, train, started)
        set_seed(recipe.seed)
    return trainer(str(started))


def rewards_of(recipe, frequencies: DocumentFrequencies) -> WeightedRewards:
    """The rewards of a recipe. A preference head that was trained on a bundled model is told where that is here."""
    specs = [reward.model_dump() for reward in recipe.rewards]
    for i, spec in enumerate(specs):
        options = spec["options"]
        if spec["name"] == "preference" and "path" in options and "backbone" not in options:
            try:
                spec["options"] = options | {"backbone": resolve(backbone_name(options["path"]))}
            except (ValueError, TypeError) as error:
                raise ValueError(f"rewards[{i}] (preference): {error}") from error
    return build_rewards(specs, frequencies)


def prepare_folder(recipe, frequencies: DocumentFrequencies) -> Path:
    """The run folder with the resolved recipe and the document frequencies, written by the main process."""
    output = Path(recipe.output.dir)
    if os.environ.get("RANK", "0") == "0":
        output.mkdir(parents=True, exist_ok=True)
        recipe.dump(output / "recipe.yaml")
        frequencies.save(output / "document_frequencies.npz")
    return output


def rows_of(recipe, split: str, limit: int | None = None):
    """The rows of a split, their pictures looked at."""
    data = recipe.data
    media = Clips(**data.video.model_dump()), Sounds(**data.audio.model_dump())
    rows = load_rows(data.name, split, limit, data.prompt, *media)
    check_rows(rows)
    return rows


def run_supervised(recipe) -> dict[str, Any]:
    """The warm start alone; prints and saves the held-out metrics before and after it. Errors as in `run`."""
    began = time.time()
    with plain_errors():
        if recipe.warm_start is None:
            raise ValueError("the recipe has no section warm_start, which says how to train")
        set_seed(recipe.seed)
        train, held_out = rows_of(recipe, recipe.data.train, recipe.data.train_rows), rows_of(recipe, recipe.data.eval)
        frequencies = DocumentFrequencies.from_references(train.references())
        output = prepare_folder(recipe, frequencies)
        metrics = caption_metrics(frequencies, held_out)

        def scored(name: str) -> Evaluation:
            policy = build_policy(*load_model(name, dtype=recipe.model.dtype), critic="none", needs_reference=False)
            return evaluate(policy, held_out, metrics, recipe.eval.rows, recipe.rollout.max_completion_length)

        before = scored(recipe.model.name)
    after = scored(str(warm_start(recipe, train, output / "warm_start")))
    summary = write_summary(output, held_out, before, after, time.time() - began)
    table = Monitor(output, 0, trackers=(), progress=False).table
    table(summary["before"], summary["after"], summary["difference"], summary["signatures"])
    write_report(output)
    return summary


def caption_metrics(frequencies: DocumentFrequencies, rows) -> Metrics:
    """The captioning suite for rows with references; for the built-in world also how much of a caption is true."""
    claims = None
    if hasattr(rows, "scene"):

        def claims(caption: str, i: int) -> tuple[int, int]:
            return attribute_claims(caption, rows.scene(i))

    def metrics(texts: list[str], opened: Sequence[dict[str, Any]], ended: list[bool]) -> dict[str, np.ndarray]:
        return score_captions(texts, [row["references"] for row in opened], frequencies, claims)

    return metrics
