"""The recipe of a preference head put together and run: pairs, training, and a report on pairs held out.

The training itself is `reward_models.train_preference`, which knows nothing of recipes, data sets or policies.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmft.data import load_rows
from mmft.data.preferences import PICTURE_KINDS, scene_pairs
from mmft.recipe_preference import PreferenceRecipe
from mmft.training.run import plain_errors
from reward_models.preference.calibration import (
    accuracy,
    expected_calibration_error,
    pair_metrics,
    preference_loss,
    wilson_interval,
)
from reward_models.preference.pairs import Pair, Rating, read_pairs

PROMPT = "Describe the picture."
_SPLITS = ("train", "validation", "test")
_OTHER = "other picture"

Examples = list[Pair] | list[Rating]


def run_preference(recipe: PreferenceRecipe) -> dict[str, Any]:
    """Trains and reports; prints a table, returns what ``summary.json`` holds. Errors of users end the process."""
    refuse_several_processes()
    from mmft.vlm.load import resolve
    from reward_models.preference.folder import check_folder
    from reward_models.preference.reward import PreferenceReward
    from reward_models.preference.training import train_preference

    began = time.time()
    output = Path(recipe.output.dir)
    with plain_errors():
        check_folder(output)  # before the pairs are made, which may take a while
        data = gather(recipe)
        print(", ".join(f"{len(data[split])} {split}" for split in _SPLITS) + f" pairs in {time.time() - began:.0f} s")
        backbone, head, loss, train = recipe.backbone, recipe.head, recipe.loss, recipe.train
        trained = train_preference(
            as_ratings(data["train"]) if loss.name == "mse" else data["train"],
            output,
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
    recipe.dump(output / "recipe.yaml")
    reward = PreferenceReward.load(output, backbone=resolve(backbone.name))
    summary = {"examples": {split: len(data[split]) for split in _SPLITS}, "training": trained}
    summary |= report(reward, data["train"], data["test"], data.get(_OTHER, []))
    summary |= {"heads": recipe.head.heads, "signature": reward.signature, "seconds": round(time.time() - began, 1)}
    (output / "summary.json").write_text(json.dumps(summary, indent=1))
    print_table(summary)
    return summary


def refuse_several_processes() -> None:
    """Ends a launch of more than one process, each of which would train the same head into the same folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if os.environ.get("RANK", "0") == "0":
            print("error: a preference head is trained by one process; start python, not several", file=sys.stderr)
        raise SystemExit(2)


# --- where the pairs come from ---------------------------------------------------------------------


def gather(recipe: PreferenceRecipe) -> dict[str, Any]:
    """Split -> pairs or ratings; no picture is in two splits. With scenes also more pairs of `_OTHER`, for the report.

    A file is told from others by where it lies, links and dots resolved; what came as bytes or pixels by its content.

    Raises:
        ValueError: whatever is wrong with a file, row, split or model, or two named splits that share a picture.
    """
    pairs = recipe.pairs
    if pairs.source == "scenes":
        return _from_scenes(recipe)
    read = demonstrations if pairs.source == "demonstrations" else _rows
    own = {"validation": pairs.validation, "test": pairs.test}
    found: dict[str, Any] = {split: [] if name is None else read(recipe, name) for split, name in own.items()}
    root = Path(pairs.images or pairs.name or ".").expanduser().resolve()
    root = root.parent if root.is_file() else root
    examples = read(recipe, pairs.train)
    _refuse_shared({"train": examples} | {split: found[split] for split in own if own[split] is not None}, recipe, root)
    found["train"] = []
    for example, group in zip(examples, _groups(examples, root), strict=True):
        # By picture, so that none is in two splits; by hash, so that more rows about other pictures move no other row.
        tenth = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 10
        split = {0: "test", 1: "validation"}.get(tenth, "train")
        found["train" if own.get(split) is not None else split].append(example)
    if pairs.source == "rows":
        limits = dict.fromkeys(_SPLITS, pairs.held_out_rows) | {"train": pairs.train_rows}
        found = {split: found[split][: limits[split]] for split in _SPLITS}
    for split in _SPLITS:
        if not found[split]:
            raise ValueError(f"pairs.{split}: no pairs are left in this split; expected some, give more rows")
    for split in _SPLITS:
        if recipe.loss.name == "bradley_terry" and not all(isinstance(example, Pair) for example in found[split]):
            raise ValueError(f"loss.name: bradley_terry, but split {split!r} holds ratings; set loss.name to mse")
    return found


def _from_scenes(recipe: PreferenceRecipe) -> dict[str, Any]:
    pairs = recipe.pairs
    assert pairs.train_rows and pairs.held_out_rows and pairs.validation and pairs.test
    sizes = [
        (pairs.train, pairs.train_rows),
        (pairs.validation, pairs.held_out_rows),
        (pairs.test, pairs.held_out_rows),
    ]
    found = {
        split: list(scene_pairs(name, size, recipe.seed, pairs.kinds, pairs.pictures if split == "train" else None))
        for split, (name, size) in zip(_SPLITS, sizes, strict=True)
    }
    others = scene_pairs(pairs.test, max(1, pairs.held_out_rows // 2), recipe.seed + 1, [_OTHER])
    return found | {_OTHER: list(others)}


def _rows(recipe: PreferenceRecipe, split: str) -> list[Pair | Rating]:
    pairs = recipe.pairs
    rows, root = _open_rows(pairs.name or "", split, pairs.images)
    return read_pairs(rows, pairs.prompt or PROMPT, root, f"{pairs.name} ({split})")


def _open_rows(name: str, split: str, images: str | None) -> tuple[Any, Path]:
    """Rows of a .jsonl file, a folder with SPLIT.jsonl, a saved data set or the Hub; and the pictures' folder."""
    path = Path(name).expanduser()
    file = path if path.is_file() else path / f"{split}.jsonl"
    if path.is_file() and split != "train":
        raise ValueError(
            f"pairs: {name} is one file without splits; expected null for validation and test, not {split!r}"
        )
    if file.is_file():
        return _json_lines(file), Path(images).expanduser() if images else file.parent
    import datasets

    try:
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            saved = datasets.load_from_disk(str(path))
            rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"pairs.name: {name!r} (split {split!r}) is no .jsonl file, no folder with {split}.jsonl, no saved data "
            f"set, and could not be had from the Hub: {said}"
        ) from error
    if isinstance(rows.features.get("image"), datasets.Image):
        rows = rows.cast_column("image", datasets.Image(decode=False))  # bytes, opened when they are looked at
    return rows, Path(images).expanduser() if images else path if path.is_dir() else Path(".")


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not valid JSON: {error.msg}; expected one object per line"
                ) from None


def _picture_names(example: Pair | Rating, root: Path) -> list[str]:
    """What tells each picture of a row from other pictures; a file's name starts at `root`, wherever that lies."""
    names = []
    for picture in example.images:
        if isinstance(picture, bytes):
            names.append(hashlib.sha256(picture).hexdigest())
        elif isinstance(picture, Image.Image):
            names.append(hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest())
        elif isinstance(picture, str | Path):
            names.append(os.path.relpath(Path(picture).resolve(), root))
        else:
            names.append(str(picture))
    return names


def _groups(examples: Iterable[Pair | Rating], root: Path) -> list[str]:
    """For each example the name of its group: examples that share a picture, also by way of others, share a group.

    Those without pictures are grouped by their prompts.
    """
    above: dict[str, str] = {}

    def first(name: str) -> str:
        above.setdefault(name, name)
        while above[name] != name:
            above[name] = name = above[above[name]]
        return name

    names = [_picture_names(example, root) or [json.dumps(example.prompt)] for example in examples]
    for own in names:
        for name in own[1:]:
            low, high = sorted((first(own[0]), first(name)))
            above[high] = low
    return [first(own[0]) for own in names]


def _refuse_shared(splits: dict[str, Examples], recipe: PreferenceRecipe, root: Path) -> None:
    """Raises ValueError where a picture is in two of the splits that the recipe names."""
    seen: dict[str, tuple[str, int]] = {}
    for split, examples in splits.items():
        for i, example in enumerate(examples):
            for name in _picture_names(example, root):
                other, row = seen.setdefault(name, (split, i))
                if other != split:
                    raise ValueError(
                        f"pairs.{split}: row {i} of {getattr(recipe.pairs, split)!r} shows the picture {name} of row "
                        f"{row} of pairs.{other} {getattr(recipe.pairs, other)!r}; expected splits without a picture "
                        f"in common: take such rows out, or set pairs.{split} to null"
                    )


@dataclass(frozen=True)
class _Shown:
    """The picture of a row, opened when called."""

    rows: Any
    index: int

    def __str__(self) -> str:
        return self.rows.text(self.index)["picture"]

    def __call__(self) -> Any:
        return self.rows[self.index]["image"]


def demonstrations(recipe: PreferenceRecipe, split: str) -> list[Pair]:
    """A reference of each row of a split against what the policy writes itself: a reward learned from experts.

    Inverse reinforcement learning in its simplest form: what an expert wrote is taken to be better than a sample of
    the policy (Finn et al. 2016, arXiv 1611.03852, show how this relates to maximum-entropy IRL). A sample that is
    one of the row's references says nothing and is left out.
    """
    from mmft.training.rollout import decode
    from mmft.vlm.generate import generate
    from mmft.vlm.load import build_policy, load_model

    pairs, writer = recipe.pairs, recipe.pairs.policy
    limit = pairs.train_rows if split == pairs.train else pairs.held_out_rows
    rows = load_rows(pairs.name or "scenes", split, limit, pairs.prompt)
    policy = build_policy(*load_model(writer.name, dtype=recipe.backbone.dtype), critic="none", needs_reference=False)
    found = []
    for start in range(0, len(rows), 64):
        opened = [rows[i] for i in range(start, min(start + 64, len(rows)))]
        prompts = policy.pictures.prompts(opened, [str(row["id"]) for row in opened], policy.device)
        length = writer.max_completion_length
        responses, _ = generate(policy, prompts, writer.samples, length, writer.temperature, recipe.seed)
        for k, text in enumerate(decode(policy, responses)):
            row = opened[k // writer.samples]
            if text not in row["references"]:
                name = f"{row['id']}-{k % writer.samples}"
                chosen = random.Random(f"{recipe.seed}/{name}").choice(row["references"])
                shown = _Shown(rows, start + k // writer.samples)
                found.append(Pair(row["prompt"], (shown,), chosen, text, kind="demonstration", id=name))
    return found


def as_ratings(examples: Sequence[Pair | Rating]) -> list[Rating]:
    """Pairs as ratings: 1 for the chosen text, 0 for the rejected one."""
    ratings = []
    for example in examples:
        if isinstance(example, Rating):
            ratings.append(example)
        else:
            for text, rating in ((example.chosen, 1.0), (example.rejected, 0.0)):
                ratings.append(Rating(example.prompt, example.images, text, rating, example.id))
    return ratings


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
            made.append(Pair(pair.prompt, pair.images, pair.chosen, other.chosen, kind=_OTHER, id=pair.id))
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
