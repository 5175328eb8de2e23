"""The typed recipe of `recipes/train_preference.py`: everything about the training of a preference head.

Read like every other recipe (mmft/recipe.py): strict, all mistakes at once, each with its line. Imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from ruamel.yaml import YAML

from mmft.recipe.secrets import redacted
from mmft.recipe.strict_yaml import Section, describe, dotted, load_document, override, parse_key, show

__all__ = ["PreferenceRecipe", "load_preference_recipe"]


class Adapters(Section):
    """Low-rank adapters (Hu et al. 2021), by PEFT, with alpha = 2 r."""

    r: int = Field(16, ge=1)
    target: str = Field("language", min_length=1)  # language, all, or a regular expression of module names


class Backbone(Section):
    """The model that reads picture and text; what of it learns."""

    name: str = Field("scenes-vlm", min_length=1)  # bundled name, hub id or folder
    tune: Literal["lora", "frozen"] = "frozen"
    lora: Adapters = Adapters()
    quantize: Literal["nf4", "int8"] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False


class Head(Section):
    """What stands on the backbone and says one number."""

    fusion: Literal["concat", "sum", "gated", "cross_attention"] = "cross_attention"
    heads: int = Field(1, ge=1)
    width: int = Field(128, ge=4)
    dropout: float = Field(0.1, ge=0, lt=1)


class Loss(Section):
    """Bradley-Terry on pairs, or squared error on ratings (a pair counts as the ratings 1 and 0)."""

    name: Literal["bradley_terry", "mse"] = "bradley_terry"
    margin: float = Field(1.0, ge=0)  # factor on the pairs' margins
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)


class Policy(Section):
    """Who writes the rejected texts when the data are demonstrations."""

    name: str = Field("scenes-vlm", min_length=1)  # bundled name, hub id or folder
    samples: int = Field(1, ge=1)  # per picture
    temperature: float = Field(1.0, gt=0)
    max_completion_length: int = Field(24, ge=1)


class Pairs(Section):
    """Where the pairs come from."""

    source: Literal["scenes", "rows", "demonstrations"] = "scenes"
    name: str | None = Field(None, min_length=1)
    images: str | None = Field(None, min_length=1)
    train: str = Field("train", min_length=1)
    validation: str | None = Field("validation", min_length=1)
    test: str | None = Field("test", min_length=1)
    train_rows: int | None = Field(None, ge=1)
    held_out_rows: int | None = Field(None, ge=1)
    pictures: int | None = Field(None, ge=1)
    kinds: list[str] | None = Field(None, min_length=1)
    prompt: str | None = Field(None, min_length=1)
    policy: Policy = Policy()


class Train(Section):
    """The optimiser and its schedule."""

    steps: int = Field(1500, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(1.0e-3, gt=0)  # of the adapters
    head_learning_rate: float = Field(1.0e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the steps
    max_grad_norm: float = Field(1.0, gt=0)
    save_every: int = Field(200, ge=0)  # steps between checkpoints, kept until the head is done; 0 = none


class Output(Section):
    """Where the head goes."""

    dir: str = Field("runs/preference", min_length=1)


class PreferenceRecipe(Section):
    """Everything about the training of a preference head. Immutable."""

    seed: int = Field(0, ge=0, lt=2**32)
    backbone: Backbone = Backbone()
    head: Head = Head()
    loss: Loss = Loss()
    pairs: Pairs = Pairs()
    train: Train = Train()
    output: Output = Output()

    def dump(self, path: str | Path) -> None:
        """Write the resolved recipe as YAML."""
        yaml = YAML()
        yaml.default_flow_style = False
        with Path(path).open("w", encoding="utf-8") as stream:
            yaml.dump(redacted(self.model_dump()), stream)


def _impossible(r: PreferenceRecipe) -> list[tuple[str, str, str]]:
    """Combinations that cannot work: (key to blame, other key looked at, what was got and expected)."""
    pairs, found = r.pairs, []

    def check(ok: bool, key: str, other: str, text: str) -> None:
        if not ok:
            found.append((key, other, text))

    source = f"with pairs.source {pairs.source}"
    rows = "a .jsonl file, a folder or a hub id"
    check(
        pairs.source != "rows" or pairs.name is not None,
        "pairs.name",
        "pairs.source",
        f"got null, expected {rows} {source}",
    )
    check(
        pairs.source != "scenes" or pairs.name in (None, "scenes"),
        "pairs.name",
        "pairs.source",
        f"got {show(pairs.name)}, expected null {source}",
    )
    for key in ("train_rows", "held_out_rows", "validation", "test"):
        given = getattr(pairs, key) is not None
        check(given or pairs.source != "scenes", f"pairs.{key}", "pairs.source", f"got null, expected a value {source}")
    for key, only in (("images", "rows"), ("kinds", "scenes"), ("pictures", "scenes")):
        fits = getattr(pairs, key) is None or pairs.source == only
        check(fits, f"pairs.{key}", "pairs.source", f"expected null {source} (it belongs to {only})")
    for key, others in (("validation", ("train",)), ("test", ("train", "validation"))):
        same = next(
            (o for o in others if getattr(pairs, key) is not None and getattr(pairs, key) == getattr(pairs, o)), ""
        )
        text = f"got {show(getattr(pairs, key))}, expected another split than pairs.{same}"
        check(not same, f"pairs.{key}", f"pairs.{same}", text)
    check(
        r.loss.name != "mse" or not r.loss.label_smoothing,
        "loss.label_smoothing",
        "loss.name",
        f"got {r.loss.label_smoothing}, expected 0 with loss.name mse",
    )
    check(
        r.head.fusion != "cross_attention" or r.head.width % 4 == 0,
        "head.width",
        "head.fusion",
        f"got {r.head.width}, expected a multiple of 4 with head.fusion cross_attention",
    )
    return found


def load_preference_recipe(path: str | Path, overrides: list[str] | None = None) -> PreferenceRecipe:
    """Read, override and check the recipe of a preference head.

    Raises:
        RecipeError: as `mmft.recipe.load_recipe` does, every mistake with file and line.
    """
    document = load_document(path)
    for text in overrides or []:
        override(document, text)
    recipe = None
    try:
        recipe = PreferenceRecipe.model_validate(document.data)
    except ValidationError as error:
        describe(PreferenceRecipe, document, error)
    for name, other, text in _impossible(recipe) if recipe is not None else []:
        key, looked_at = parse_key(name), parse_key(other)
        # Look first at what the command line changed.
        typed = looked_at in document.places and document.line(looked_at) == 0
        document.add(0 if typed else document.line(key), f"{dotted(key)}: {text}")
    document.raise_if_any()
    assert recipe is not None
    return recipe
