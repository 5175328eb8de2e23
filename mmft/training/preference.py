"""The recipe of a preference head put together and run: pairs, training, and a report on pairs held out.

The training itself is `reward_models.train_preference`, which knows nothing of recipes, data sets or policies.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmft.data.preferences import PICTURE_KINDS
from mmft.recipe.preference import PreferenceRecipe
from mmft.training.interrupts import Interrupted, Interrupts
from mmft.training.preference_pairs import OTHER, SPLITS, Examples, as_ratings, gather
from mmft.training.run import plain_errors
from mmft.training.transaction import Checkpoints
from reward_models.preference.calibration import (
    accuracy,
    expected_calibration_error,
    pair_metrics,
    preference_loss,
    wilson_interval,
)
from reward_models.preference.pairs import Pair, Rating


def run_preference(recipe: PreferenceRecipe, resume: bool = False) -> dict[str, Any]:
    """Trains and reports; prints a table, returns what ``summary.json`` holds. Errors of users end the process.

    Args:
        resume: go on from the newest whole checkpoint of an unfinished training in ``output.dir``.

    Raises:
        Interrupted: after a SIGTERM or SIGINT, once the state is saved.
    """
    refuse_several_processes()
    from mmft.vlm.load import resolve
    from reward_models.preference.folder import check_folder
    from reward_models.preference.reward import PreferenceReward
    from reward_models.preference.training import train_preference

    began = time.time()
    output = Path(recipe.output.dir)
    with plain_errors():
        fresh = output / ".head"  # where the head is saved whole before its files go to their places
        put_in_place(fresh, output)
        check_folder(output)  # before the pairs are made, which may take a while
        data = gather(recipe)
        print(", ".join(f"{len(data[split])} {split}" for split in SPLITS) + f" pairs in {time.time() - began:.0f} s")
        backbone, head, loss, train = recipe.backbone, recipe.head, recipe.loss, recipe.train
        with Interrupts() as interrupts:
            saver = KeepState(Checkpoints(output / ".checkpoints"), train.save_every, interrupts, resume)
            trained = train_preference(
                as_ratings(data["train"]) if loss.name == "mse" else data["train"],
                fresh,
                saver=saver,
                calibration=[pair for pair in data["validation"] if isinstance(pair, Pair)],
                backbone=resolve(backbone.name),
                backbone_name=backbone.name,
                lora=backbone.lora.r if backbone.tune == "lora" else 0,
                lora_target=backbone.lora.target,
                quantize=backbone.quantize,
                dtype=backbone.dtype,
                gradient_checkpointing=backbone.gradient_checkpointing,
                fusion=head.fusion,
                heads=head.heads,
                width=head.width,
                dropout=head.dropout,
                margin_scale=loss.margin,
                label_smoothing=loss.label_smoothing,
                steps=train.steps,
                batch_size=train.batch_size,
                learning_rate=train.learning_rate,
                head_learning_rate=train.head_learning_rate,
                weight_decay=train.weight_decay,
                warmup=train.warmup,
                max_grad_norm=train.max_grad_norm,
                seed=recipe.seed,
            )
        put_in_place(fresh, output)
    recipe.dump(output / "recipe.yaml")
    reward = PreferenceReward.load(output, backbone=resolve(backbone.name))
    summary = {"examples": {split: len(data[split]) for split in SPLITS}, "training": trained}
    summary |= report(reward, data["train"], data["test"], data.get(OTHER, []))
    summary |= {"heads": recipe.head.heads, "signature": reward.signature, "seconds": round(time.time() - began, 1)}
    (output / "summary.json").write_text(json.dumps(summary, indent=1))
    saver.checkpoints.clear()
    print_table(summary)
    return summary


@dataclass
class KeepState:
    """Checkpoints of a preference head on its way: every so many steps, and when a signal asks the training to end."""

    checkpoints: Checkpoints
    every: int
    interrupts: Interrupts
    resume: bool

    def due(self, step: int) -> bool:
        return bool(self.interrupts.asked() or (self.every and step % self.every == 0))

    def save(self, step: int, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        self.checkpoints.save_state(step, tensors, plain)
        if number := self.interrupts.asked():
            print(f"the training of the head ended after step {step}; go on by --resume", flush=True)
            raise Interrupted(number)

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        if not self.resume:
            self.checkpoints.clear()
            return None
        found = self.checkpoints.latest_state()
        if found is None:
            raise ValueError(f"nothing to resume: {self.checkpoints.folder} holds no checkpoint")
        return found


def put_in_place(fresh: Path, output: Path) -> None:
    """Copies a head that was saved whole over whatever is in its folder; a process killed meanwhile does it again."""
    if (fresh / "preference.json").is_file():
        shutil.rmtree(output / "adapter", ignore_errors=True)  # of an earlier head; the new one may have none
        shutil.copytree(fresh, output, dirs_exist_ok=True)
    shutil.rmtree(fresh, ignore_errors=True)


def refuse_several_processes() -> None:
    """Ends a launch of more than one process, each of which would train the same head into the same folder."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        if os.environ.get("RANK", "0") == "0":
            said = f"WORLD_SIZE is {processes}, expected 1: one process trains a preference head; start it with python"
            print(f"error: {said}", file=sys.stderr)
        raise SystemExit(2)


# --- how good the head is --------------------------------------------------------------------------


def report(reward: Any, train: Examples, test: Examples, others: Sequence[Pair] = ()) -> dict[str, Any]:
    """What the head is worth on examples it has not seen.

    Args:
        reward: a `PreferenceReward`.
        train: what it was trained on; from these a bag of words learns how far the text alone would lead.
        others: pairs whose rejected text is right of another picture; else they are made from `test`.

    Returns:
        For pairs: accuracy (share, interval), by kind; ECE before and after calibration; accuracy on blank pictures;
        the text-only level; how often the right text of another picture is preferred. For ratings: the correlation.
    """
    rated = [example for example in test if isinstance(example, Rating)]
    pairs = [example for example in test if isinstance(example, Pair)]
    found: dict[str, Any] = {}
    if rated:
        from reward_models.preference.backbone import Row

        given = reward.mean_and_std([Row(r.prompt, r.images, r.completion) for r in rated])[0]
        found["correlation"] = float(np.corrcoef(given, [r.rating for r in rated])[0, 1])
    if not pairs:
        return found
    judge, temperature = reward.judge, reward.facts["temperature"]
    kinds = [pair.kind for pair in pairs]
    learned = text_only([pair for pair in train if isinstance(pair, Pair)], pairs)
    seen, blank = judge.differences(pairs), judge.differences(pairs, blank=True)
    found |= pair_metrics(seen, temperature, kinds)
    for kind, entry in found["by_kind"].items():
        own = np.array([k == kind for k in kinds])
        entry["blank"] = accuracy(blank[own])
        if learned is not None:
            entry["text_only"] = accuracy(learned[own])
        entry["accuracy_low"], entry["accuracy_high"] = wilson_interval(entry["accuracy"], entry["pairs"])
    found["ece_before"], found["loss_before"] = expected_calibration_error(seen), preference_loss(seen)
    found["blank"] = accuracy(blank)
    pictured = np.array([kind in PICTURE_KINDS for kind in kinds])
    if learned is not None:
        found["text_only"] = accuracy(learned)
    if pictured.any():
        found["picture_kinds"] = {"pairs": int(pictured.sum()), "accuracy": accuracy(seen[pictured])}
        found["picture_kinds"] |= {"blank": accuracy(blank[pictured])}
        if learned is not None:
            found["picture_kinds"]["text_only"] = accuracy(learned[pictured])
    swapped = list(others) or _swapped(pairs)
    if swapped:
        wrong = 1.0 - accuracy(judge.differences(swapped))
        low, high = wilson_interval(wrong, len(swapped))
        found["other_picture"] = {"pairs": len(swapped), "preferred": wrong, "low": low, "high": high}
    return found


def _swapped(pairs: Sequence[Pair]) -> list[Pair]:
    """Each chosen text against the chosen text of the next pair that shows another picture."""
    made = []
    for i, pair in enumerate(pairs):
        following = (pairs[(i + k) % len(pairs)] for k in range(1, len(pairs)))
        other = next((o for o in following if o.images != pair.images and o.chosen != pair.chosen), None)
        if other is not None and pair.images:
            made.append(Pair(pair.prompt, pair.images, pair.chosen, other.chosen, kind=OTHER, id=pair.id))
    return made


def text_only(train: Sequence[Pair], test: Sequence[Pair], epochs: int = 5, rate: float = 0.1) -> np.ndarray | None:
    """(N,) differences by a linear judge of words, pairs of words and length: what can be told without the picture.

    Logistic regression on the difference of counts, by stochastic gradient, averaged over the last epoch. None
    without pairs to learn from.
    """

    def counted(pair: Pair) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for text, sign in ((pair.chosen, 1), (pair.rejected, -1)):
            words = ["<", *text.lower().split(), ">"]
            for gram in (*words, *map(" ".join, zip(words, words[1:])), f"{len(words)} words"):
                counts[gram] += sign
        return {gram: count for gram, count in counts.items() if count}

    if not train:
        return None
    counts = [counted(pair) for pair in train]
    names = {gram: i for i, gram in enumerate(dict.fromkeys(gram for row in counts for gram in row))}
    rows = [(np.array([names[g] for g in row], dtype=int), np.array(list(row.values()), float)) for row in counts]
    weight, total = np.zeros(len(names)), np.zeros(len(names))
    order = np.random.default_rng(0)
    for epoch in range(epochs):
        for i in order.permutation(len(rows)):
            columns, values = rows[i]
            weight[columns] += rate * values / (1.0 + np.exp(np.clip(weight[columns] @ values, -30, 30)))
            if epoch == epochs - 1:
                total += weight / len(rows)
    return np.array([sum(total[names[g]] * c for g, c in counted(pair).items() if g in names) for pair in test])


def print_table(summary: dict[str, Any]) -> None:
    """The report as a table."""
    from rich.console import Console
    from rich.table import Table

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f} %"

    console = Console()
    if "correlation" in summary:
        console.print(f"correlation with the ratings: {summary['correlation']:.3f}")
    if "accuracy" not in summary:
        return
    table = Table(title="Held-out pairs: how often the better text gets the higher reward", title_justify="left")
    for name in ("", "pairs", "accuracy", "95 %", "blank picture", "text only"):
        table.add_column(name, justify="right" if name else "left")

    def line(name: str, entry: dict[str, Any]) -> None:
        known = "accuracy_low" in entry
        span = f"{100 * entry['accuracy_low']:.1f} to {100 * entry['accuracy_high']:.1f}" if known else ""
        shares = [percent(entry["accuracy"]), span, percent(entry.get("blank")), percent(entry.get("text_only"))]
        table.add_row(name, str(entry["pairs"]), *shares)

    for kind, entry in summary["by_kind"].items():
        line(kind, entry)
    if "picture_kinds" in summary:
        line("kinds that need the picture", summary["picture_kinds"])
    line("all", summary)
    console.print(table)
    console.print(f"ECE {summary['ece_before']:.3f} before calibration, {summary['ece']:.3f} after")
    if "other_picture" in summary:
        other = summary["other_picture"]
        console.print(f"right text of another picture preferred: {percent(other['preferred'])} of {other['pairs']}")
