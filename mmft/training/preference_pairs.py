"""Where the pairs of a preference recipe come from, and how they are split: no picture is in two splits."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmft.data import load_rows
from mmft.data.preferences import scene_pairs
from mmft.data.rows import Prompted
from mmft.recipe.preference import PreferenceRecipe
from reward_models.preference.pairs import Pair, Rating, read_pairs

PROMPT = "Describe the picture."
SPLITS = ("train", "validation", "test")
OTHER = "other picture"

Examples = list[Pair] | list[Rating]


def gather(recipe: PreferenceRecipe) -> dict[str, Any]:
    """Split -> pairs or ratings; no picture is in two splits. With scenes also more pairs of `OTHER`, for the report.

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
    if any(own.values()):
        _refuse_shared(recipe, {"train": examples} | found)
    found["train"] = []
    for example, group in zip(examples, _groups(examples, root), strict=True):
        # By picture, so that none is in two splits; by hash, so that more rows about other pictures move no other row.
        tenth = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 10
        split = {0: "test", 1: "validation"}.get(tenth, "train")
        found["train" if own.get(split) is not None else split].append(example)
    if pairs.source == "rows":
        limits = dict.fromkeys(SPLITS, pairs.held_out_rows) | {"train": pairs.train_rows}
        found = {split: found[split][: limits[split]] for split in SPLITS}
    for split in SPLITS:
        if not found[split]:
            raise ValueError(f"pairs.{split}: no pairs are left in this split; expected some, give more rows")
    for split in SPLITS:
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
        for split, (name, size) in zip(SPLITS, sizes, strict=True)
    }
    others = scene_pairs(pairs.test, max(1, pairs.held_out_rows // 2), recipe.seed + 1, [OTHER])
    return found | {OTHER: list(others)}


def _rows(recipe: PreferenceRecipe, split: str) -> list[Pair | Rating]:
    pairs = recipe.pairs
    rows, root = _open_rows(pairs.name or "", split, pairs.images)
    return read_pairs(rows, pairs.prompt or PROMPT, root, f"{pairs.name} ({split})")


def _open_rows(name: str, split: str, images: str | None) -> tuple[Any, Path | None]:
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
        # Bytes, opened when they are looked at, or absolute paths that the library has made.
        return rows.cast_column("image", datasets.Image(decode=False)), None
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


def _picture_names(example: Pair | Rating, root: Path | None = None) -> list[str]:
    """What tells each picture of a row from other pictures; with `root`, files are named from there on."""
    names = []
    for picture in example.images:
        if isinstance(picture, bytes):
            names.append(hashlib.sha256(picture).hexdigest())
        elif isinstance(picture, Image.Image):
            names.append(hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest())
        elif isinstance(picture, str | Path):
            file = Path(picture).resolve()
            names.append(os.path.relpath(file, root) if root else str(file))
        else:
            assert isinstance(picture, _Shown)
            names.append(picture.name if root else picture.file)
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


def _refuse_shared(recipe: PreferenceRecipe, splits: dict[str, Examples]) -> None:
    """Raises ValueError where a picture is in two of the splits that the recipe names."""
    seen: dict[str, tuple[str, int]] = {}
    for split, examples in splits.items():
        for i, example in enumerate(examples):
            for name in _picture_names(example):
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

    @property
    def name(self) -> str:
        return self.rows.text(self.index)["picture"]

    @property
    def file(self) -> str:
        """Where it lies; the name of a picture that is drawn."""
        rows = self.rows.rows if isinstance(self.rows, Prompted) else self.rows
        return str(rows.path(self.index)) if hasattr(rows, "path") else self.name

    def __call__(self) -> Any:
        return self.rows[self.index]["image"]


def demonstrations(recipe: PreferenceRecipe, split: str) -> list[Pair]:
    """A reference of each row of a split against what the policy writes itself: a reward learned from experts.

    Inverse reinforcement learning in its simplest form: what an expert wrote is taken to be better than a sample of
    the policy (Finn et al. 2016, arXiv 1611.03852, show how this relates to maximum-entropy IRL). A sample that is
    one of the row's references says nothing and is left out.
    """
    from mmft.vlm.generate import decode, generate
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
