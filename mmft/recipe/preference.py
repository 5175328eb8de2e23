"""The typed recipe of `recipes/train_preference.py`: everything about the training of a preference head.

Read like every other recipe: strict, all mistakes at once, each with its line. Imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mmft.recipe.load import read_recipe
from mmft.recipe.messages import show
from mmft.recipe.root import Impossible, Root
from mmft.recipe.strict_yaml import Section, parse_key

__all__ = ["PreferenceRecipe", "load_preference_recipe"]


class Adapters(Section):
    """Low-rank adapters (Hu et al. 2021), by PEFT, with alpha = 2 r."""

    r: int = Field(16, ge=1, description="rank of the adapters")
    target: str = Field(
        "language", min_length=1, description="which layers: language, all, or a regular expression of module names"
    )


class Backbone(Section):
    """The model that reads picture and text; what of it learns."""

    name: str = Field(
        "scenes-vlm", min_length=1, description="bundled model, or a hub id or folder of an image-text-to-text model"
    )
    tune: Literal["lora", "frozen"] = Field(
        "frozen", description="frozen: the head alone learns, texts are read once; lora: adapters learn with it"
    )
    lora: Adapters = Field(Adapters(), description="the adapters; read with tune lora")
    quantize: Literal["nf4", "int8"] | None = Field(
        None, description="frozen weights in 4 or 8 bits (needs a GPU and the extra `quant`); null = as they are"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the weights; auto: float32 on a CPU, the checkpoint's own on a GPU"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")


class Head(Section):
    """What stands on the backbone and says one number."""

    fusion: Literal["concat", "sum", "gated", "cross_attention"] = Field(
        "cross_attention", description="how picture and text meet"
    )
    heads: int = Field(
        1, ge=1, description="size of the ensemble; 2 or more say how sure they are (kappa of the reward)"
    )
    width: int = Field(128, ge=4, description="features inside the head; with cross_attention a multiple of 4")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of them dropped in training")


class Loss(Section):
    """Bradley-Terry on pairs, or squared error on ratings (a pair counts as the ratings 1 and 0)."""

    name: Literal["bradley_terry", "mse"] = Field("bradley_terry", description="of pairs, or of ratings")
    margin: float = Field(
        1.0, ge=0, description="factor on the margins of the pairs, where they have any; 0 = ignore them"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="chance that a pair is labelled the wrong way round; 0 with mse"
    )


class Policy(Section):
    """Who writes the rejected texts when the data are demonstrations."""

    name: str = Field("scenes-vlm", min_length=1, description="bundled model, hub id or folder")
    samples: int = Field(1, ge=1, description="per picture")
    temperature: float = Field(1.0, gt=0, description="of sampling")
    max_completion_length: int = Field(24, ge=1, description="tokens, end token included")


class Pairs(Section):
    """Where the pairs come from."""

    source: Literal["scenes", "rows", "demonstrations"] = Field(
        "scenes", description="made by the program; a file, folder or hub id; or human captions against a policy's"
    )
    name: str | None = Field(
        None,
        min_length=1,
        description="rows: where they are; demonstrations: a data set as data.name of the other recipes; scenes: null",
    )
    images: str | None = Field(None, min_length=1, description="rows: folder of the pictures; null = beside the file")
    train: str = Field("train", min_length=1, description="split that is trained on")
    validation: str | None = Field(
        "validation",
        min_length=1,
        description="split for calibration; null = a tenth of the pictures of `train` (not scenes)",
    )
    test: str | None = Field(
        "test", min_length=1, description="split for the report; null = another tenth of them (not scenes)"
    )
    train_rows: int | None = Field(
        None, ge=1, description="this many pairs (demonstrations: pictures) at most; null = all (not scenes)"
    )
    held_out_rows: int | None = Field(None, ge=1, description="the same for validation and for test")
    pictures: int | None = Field(
        None, ge=1, description="scenes: draw pairs from the first so many pictures only; null = all"
    )
    kinds: list[str] | None = Field(
        None, min_length=1, description="scenes: some kinds of fault, such as [colour, relation]; null = all"
    )
    prompt: str | None = Field(
        None,
        min_length=1,
        description='for rows without a prompt; demonstrations: for all; null = "Describe the picture."',
    )
    policy: Policy = Field(Policy(), description="demonstrations: who writes the rejected texts")


class Train(Section):
    """The optimiser and its schedule."""

    steps: int = Field(1500, ge=1, description="optimizer steps")
    batch_size: int = Field(32, ge=1, description="pairs per step")
    learning_rate: float = Field(1.0e-3, gt=0, description="of the adapters, AdamW")
    head_learning_rate: float = Field(1.0e-3, gt=0, description="of the head")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's")
    warmup: float = Field(
        0.05, ge=0, lt=1, description="share of the steps over which the rates rise from 0; then they fall to 0"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients longer than this are shortened")
    save_every: int = Field(200, ge=0, description="steps between checkpoints, kept until the head is done; 0 = none")


class Output(Section):
    """Where the head goes."""

    dir: str = Field(
        "runs/preference",
        min_length=1,
        description="new, empty or of an earlier head: the head, its adapter, recipe.yaml and summary.json",
    )


class PreferenceRecipe(Root):
    """Everything about the training of a preference head."""

    launched_by = "python recipes/train_preference.py"

    backbone: Backbone = Field(Backbone(), description="the model that reads picture and text")
    head: Head = Field(Head(), description="what says one number")
    loss: Loss = Field(Loss(), description="what it learns from")
    pairs: Pairs = Field(Pairs(), description="where the pairs come from")
    train: Train = Field(Train(), description="the optimiser")
    output: Output = Field(Output(), description="where the head goes")

    def impossible(self) -> list[Impossible]:
        return [(parse_key(key), [parse_key(other)], text) for key, other, text in _impossible(self)]


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
    return read_recipe(path, overrides, PreferenceRecipe)[0]
