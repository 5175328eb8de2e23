"""A recipe put together and run: rows, rewards and metrics make the task; the trainer does the rest."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from accelerate.utils import set_seed

from mmft.data import Clips, Sounds, check_rows, load_rows
from mmft.data.rows import write_skipped
from mmft.data.scenes import attribute_claims
from mmft.evaluation.captioning import score_captions
from mmft.hub import UNPUBLISHED, PublishError, push
from mmft.training import distributed
from mmft.training.config import from_recipe
from mmft.training.evaluate import Evaluation, Metrics, evaluate
from mmft.training.monitor import Monitor
from mmft.training.scoring import RewardError
from mmft.training.summary import LiveReport, write_summary
from mmft.training.trainer import A2CTrainer, PPOTrainer
from mmft.training.warm_start import warm_start
from mmft.training.watchdog import FAILED, record_cause
from mmft.vlm.load import build_policy, load_model, resolve
from mmft.vlm.start import start
from reward_models import DocumentFrequencies, WeightedRewards, build_rewards
from reward_models.preference.folder import backbone_name


def run(recipe, resume: str | None = None, allow_change: Sequence[str] = ()) -> dict[str, Any]:
    """Runs a `mmft.recipe.Recipe` from its rows to its report; returns the summary.

    Args:
        resume: "latest", a checkpoint or a run folder.
        allow_change: fields in which the checkpoint may be of another run, see `mmft.training.fingerprint`.

    Whatever is wrong with data, rewards, model or checkpoint is found before the first step, and ends the process
    with one plain line and exit code 2. What fails later ends it with its first cause in the last line and code 1. A
    finished run that could not be published ends with code 3 and the command that does it later. One of several
    processes ends here in any case.
    """
    with first_cause():
        with plain_errors():
            trainer = assemble(recipe, resume)
            trainer.begin(_checkpoint_of(recipe, resume), allow_change)
            if resume:  # and taken: from here on the folder is of this recipe
                prepare_folder(recipe, DocumentFrequencies.from_references(trainer.train_dataset.references()))
        summary = trainer.train()
        if trainer.accelerator.is_main_process:
            publish(recipe)
        distributed.close()
        return summary


def _checkpoint_of(recipe, resume: str | None) -> str | bool | None:
    """What `PPOTrainer.begin` is to resume: nothing yet, where a run was ended in its warm start."""
    started = any((Path(recipe.output.dir) / "checkpoints").glob("step-*"))
    if resume == "latest" and recipe.warm_start is not None and not started:
        return None
    return True if resume == "latest" else resume


def publish(recipe) -> None:
    """Pushes the finished run to where the recipe says, if it says so. The run keeps its result whatever happens."""
    folder, repository = recipe.output.dir, recipe.output.push_to_hub
    if repository is None:
        return
    try:
        print("published:", push(folder, repository, recipe.output.private), flush=True)
    except (PublishError, ValueError, OSError) as error:
        later = f"mmft push {folder} {repository}" + ("" if recipe.output.private else " --public")
        said = f"error: not published: {error}; the run is whole in {folder}, publish it later: {later}"
        _end(said, UNPUBLISHED, error)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors of users as one line and exit code 2; a traceback would only hide what to mend."""
    try:
        yield
    except (ValueError, OSError) as error:
        _end(f"error: {error}", 2, error)


@contextmanager
def first_cause() -> Iterator[None]:
    """Errors in the middle of a run: traceback, then a last line that says what failed first, and exit code 1."""
    try:
        yield
    except Exception as error:
        notes = [note for note in getattr(error, "__notes__", []) if note.startswith("first cause")]
        if not notes:  # else an error of another process made this one, and that one's screen has the traceback
            traceback.print_exception(error.__cause__ if isinstance(error, RewardError) else error)
        name = "" if isinstance(error, RewardError | FloatingPointError) else f"{type(error).__name__}: "
        rank = f"rank {_rank()}, " if _several() else ""
        said = notes[0] if notes else f"{name}{str(error).partition(chr(10))[0]}"
        _end(f"error: {rank}{said}", FAILED, error)


def _end(line: str, code: int, error: Exception) -> NoReturn:
    """Ends the process; one of several at once, for the farewell to a group whose others hang may hang as well."""
    print(line, file=sys.stderr, flush=True)
    record_cause(line.removeprefix("error: "))
    if _several():
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code) from error


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def assemble(recipe, resume: str | None = None) -> PPOTrainer:
    """The trainer that a recipe describes; its warm start, if it has one, is run here.

    Raises:
        ValueError: anything that the recipe names is missing or wrong.
    """
    set_seed(recipe.seed)  # of new weights: adapters start at random
    train, held_out = rows_of(recipe, recipe.data.train, recipe.data.train_rows), rows_of(recipe, recipe.data.eval)
    frequencies = DocumentFrequencies.from_references(train.references())
    rewards = rewards_of(recipe, frequencies)
    output = prepare_folder(recipe, None if resume else frequencies)
    if os.environ.get("RANK", "0") == "0":
        write_skipped(output, train=train, eval=held_out)
        print(_said_of(recipe, len(train), min(len(held_out), recipe.eval.rows)), flush=True)

    trainer = partial(trainer_of, recipe, train=train, held_out=held_out, frequencies=frequencies, rewards=rewards)
    if recipe.warm_start is None:
        return trainer(recipe.model.name)
    trainer(recipe.model.name)  # thrown away: what cannot work is said now, not after hours of warm start
    started = output / "warm_start"
    warm_start(recipe, train, started, resume=bool(resume))
    set_seed(recipe.seed)
    return trainer(str(started))


def trainer_of(recipe, name: str, *, train, held_out, frequencies: DocumentFrequencies, rewards: WeightedRewards):
    """The trainer of a recipe for the model called ``name``, which may be the recipe's after a warm start."""
    options, trust = recipe.model, recipe.model.trust_remote_code
    model, processor = load_model(name, options.quantize, options.dtype, trust_remote_code=trust)
    model, adapters = start(model, options)
    made = {"ppo": PPOTrainer, "a2c": A2CTrainer}[recipe.algorithm.name](
        model=model,
        reward_funcs=rewards,
        args=from_recipe(recipe),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=adapters,
        compute_metrics=caption_metrics(frequencies, held_out),
    )
    made.has_recipe = True
    return made


def _said_of(recipe, train: int, held_out: int) -> str:
    """What is learned from and what is held out, in one line."""
    data = recipe.data
    said = f"data {data.name}: {train} rows to learn from ({data.train}), {held_out} held out ({data.eval})"
    return said + ("; so few say little, the intervals will be wide" if held_out < 30 else "")


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


def prepare_folder(recipe, frequencies: DocumentFrequencies | None) -> Path:
    """The run folder with the resolved recipe and the document frequencies, written by the main process.

    Without frequencies the folder alone: a resume that may still be refused must not change what is in it.
    """
    output = Path(recipe.output.dir)
    if os.environ.get("RANK", "0") == "0":
        try:
            output.mkdir(parents=True, exist_ok=True)
            if frequencies is not None:
                recipe.dump(output / "recipe.yaml")
                frequencies.save(output / "document_frequencies.npz")
        except OSError as error:
            raise ValueError(f"output.dir: {output} cannot be written to ({error.strerror}); take another") from error
    return output


def rows_of(recipe, split: str, limit: int | None = None):
    """The rows of a split, their pictures looked at."""
    data = recipe.data
    media = Clips(**data.video.model_dump()), Sounds(**data.audio.model_dump())
    # Held-out rows are looked at in full: a row that gave its place to another would be scored by wrong references.
    decode = None if split == data.train else sys.maxsize
    rows = load_rows(data.name, split, limit, data.prompt, *media, data.bad_rows, decode)
    check_rows(rows)
    return rows


def run_supervised(recipe, resume: bool = False) -> dict[str, Any]:
    """The warm start alone; prints and saves the held-out metrics before and after it. Errors as in `run`."""
    began = time.time()
    with plain_errors():
        if recipe.warm_start is None:
            raise ValueError("the recipe has no section warm_start, which says how to train")
        if recipe.output.push_to_hub:
            raise ValueError("output.push_to_hub: only runs of PPO and A2C are published; expected null here")
        set_seed(recipe.seed)
        train, held_out = rows_of(recipe, recipe.data.train, recipe.data.train_rows), rows_of(recipe, recipe.data.eval)
        frequencies = DocumentFrequencies.from_references(train.references())
        output = prepare_folder(recipe, None if resume else frequencies)
        metrics = caption_metrics(frequencies, held_out)

        def scored(name: str) -> Evaluation:
            loaded = load_model(name, dtype=recipe.model.dtype, trust_remote_code=recipe.model.trust_remote_code)
            policy = build_policy(*loaded, critic="none", needs_reference=False)
            return evaluate(policy, held_out, metrics, recipe.eval.rows, recipe.rollout.max_completion_length)

        before = scored(recipe.model.name)
        trained = warm_start(recipe, train, output / "warm_start", resume)
        if resume:
            prepare_folder(recipe, frequencies)
    after = scored(str(trained))
    summary = write_summary(output, before, after, time.time() - began)
    monitor = Monitor(output, 0, trackers=(), progress=False)
    monitor.table(*(summary[part] for part in ("before", "after", "difference", "signatures", "rows")))
    if problem := LiveReport(output, held_out).finish(recipe.warm_start.max_steps, before, after):
        monitor.say(problem)
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
