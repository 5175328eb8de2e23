"""What is in the rows: how many, which cannot be used, which stand in both splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable
from pathlib import Path

from mmft.data.rows import FileRows, Prompted, UsableRows
from mmft.data.scenes import SceneRows
from mmft.training.doctor.page import Section
from mmft.training.doctor.parts import Parts
from mmft.training.run import rows_of

MOST_COMPARED = 10_000  # rows of a split whose pictures are compared
FEW = 50  # held-out rows below which hardly any difference can be told from chance
ALIKE = 0.2  # share of all captions that one sentence may have


def look_at_rows(section: Section, recipe, parts: Parts, supervised: bool = False) -> None:
    """Reads both splits into ``parts``; a split that cannot be read does not keep the other from being looked at.

    Args:
        supervised: the rows' captions are learned from, and there are neither steps of pictures nor rewards.
    """
    kept = recipe.model_copy(update={"data": recipe.data.model_copy(update={"bad_rows": "skip"})})
    data = recipe.data
    for name, split, limit in (("train", data.train, data.train_rows), ("held_out", data.eval, None)):
        try:
            rows = rows_of(kept, split, limit)
        except (ValueError, OSError) as error:
            if section.findings and section.findings[-1].text.endswith(f": {error}"):
                section.note(f"split {split!r}: not possible, for the reason above")
            else:
                section.wrong(f"split {split!r}: {error}")
            continue
        setattr(parts, name, rows)
        references = rows.references()
        if name == "train":
            parts.references = references
        _count(section, name, split, rows, references, recipe)
        if name == "train" and not supervised and max(len(texts) for texts in references) == 1:
            _one_caption(section)
    if parts.held_out is not None and len(parts.held_out) < FEW:
        section.warn(
            f"only {_rows(len(parts.held_out))} held out: hardly any difference will be told from chance",
            f"hold out {FEW} pictures or more",
        )
    if parts.train is not None and not supervised and recipe.rollout.prompts_per_step > len(parts.train):
        section.warn(
            f"a step takes {recipe.rollout.prompts_per_step} pictures, more than the {_rows(len(parts.train))}: "
            "each step sees some of them twice",
            f"rollout.prompts_per_step={max(len(parts.train) // 2, 1)}",
        )
    if parts.train is not None and parts.held_out is not None:
        _same_pictures(section, parts.train, parts.held_out)


def _count(section: Section, name: str, split: str, rows, references: list[list[str]], recipe) -> None:
    """Rows, captions and what had to be left out of one split."""
    counts = [len(texts) for texts in references]
    section.numbers[name] = {"rows": len(rows), "captions": sum(counts)}
    used = f", {min(recipe.eval.rows, len(rows)):,} of them used" if name == "held_out" else ""
    least, most = min(counts), max(counts)
    each = f"{least}" if least == most else f"{least} to {most}"
    kind = "to learn from" if name == "train" else "held out"
    section.fine(f"{kind} ({split}): {_rows(len(rows))}{used}, {each} caption{'s' * (most != 1)} each")
    skipped = getattr(rows, "skipped", {})
    section.numbers[name]["skipped"] = len(skipped)
    if skipped:
        some = "\n".join(f"  {why}" for why in list(skipped.values())[:3])
        more = f"\n  … and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        text = f"{_rows(len(skipped))} of {split} cannot be used:\n{some}{more}"
        if recipe.data.bad_rows == "skip":
            section.warn(text, "they are left out (data.bad_rows: skip)")
        else:
            section.wrong(text, "mend or remove them, or leave them out: data.bad_rows=skip")
    texts = Counter(" ".join(text.lower().split()) for several in references for text in several)
    text, times = texts.most_common(1)[0]
    if times > max(ALIKE * sum(counts), 3):
        section.warn(
            f"{times / sum(counts):.0%} of the captions of {split} are the same: {text!r}",
            "a model that always says this will score well; look at the captions",
        )


def _one_caption(section: Section) -> None:
    section.note(
        "one caption for each picture: a metric then pays for that wording alone; three to five "
        "captions by different people make a better reward"
    )


def _rows(number: int) -> str:
    return f"{number:,} row{'s' * (number != 1)}"


# ---------------------------------------------------------------- pictures


def _same_pictures(section: Section, train, held_out) -> None:
    """Pictures that stand in both splits, or twice in one, by their contents."""
    ours, theirs = contents(train, held_out)
    shared = set(ours.values()) & set(theirs.values())
    section.numbers["in_both"] = len(shared)
    looked = "" if max(len(train), len(held_out)) <= MOST_COMPARED else f" (the first {MOST_COMPARED:,} of each)"
    if shared:
        place = next(i for i, key in theirs.items() if key in shared)
        section.wrong(
            f"{len(shared)} held-out picture{'s are' if len(shared) > 1 else ' is'} in the training set as "
            f"well{looked}, such as {_name(held_out, place)}: the result would look better than it is",
            "take them out of one of the two",
        )
    else:
        section.fine(f"no picture is in both splits{looked}")
    for name, keys in (("training", ours), ("held-out", theirs)):
        twice = len(keys) - len(set(keys.values()))
        if twice:
            section.warn(f"{twice} of {len(keys):,} {name} pictures are there twice or more", "they count double")


def contents(*splits) -> list[dict[int, Hashable]]:
    """Of each split: place of a row -> something that is equal for equal pictures.

    Rows without files, other than drawn ones, are left out. Only files that are as long as another one are read.
    """
    files = [_files(rows) for rows in splits]
    sizes = Counter(file.stat().st_size for each in files for file in each.values())
    found: list[dict[int, Hashable]] = []
    for rows, each in zip(splits, files, strict=True):
        keys: dict[int, Hashable] = {}
        for i, file in each.items():
            size = file.stat().st_size
            keys[i] = (size, _hash(file) if sizes[size] > 1 else b"")
        if isinstance(rows, SceneRows):
            keys = dict(enumerate(rows.seeds))  # equal seeds, equal pictures
        found.append(keys)
    return found


def _files(rows) -> dict[int, Path]:
    found = ((i, _file(rows, i)) for i in range(min(len(rows), MOST_COMPARED)))
    return {i: file for i, file in found if file is not None}


def _file(rows, i: int) -> Path | None:
    if isinstance(rows, UsableRows):
        return _file(rows.rows, rows.places[i])
    if isinstance(rows, Prompted):
        return _file(rows.rows, i)
    return rows.path(i) if isinstance(rows, FileRows) else None


def _hash(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()


def _name(rows, i: int) -> str:
    return str(rows.text(i).get("picture", i))
