"""What a recipe is going to do, in words, and what it needs that is not there. Loads neither data nor model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from mmft.training.doctor.machine import requirements, unmet
from mmft.training.doctor.page import Section

ALGORITHMS = {"ppo": "PPO", "a2c": "A2C"}
TRAINED = {
    "lora": "LoRA adapters of rank {r}",
    "hybrid": "LoRA adapters of rank {r} and the connector",
    "frozen": "the decoder's last {layers} layers",
    "full": "every weight",
}


# With every weight trained by reinforcement learning, published recipes mostly take 1e-7 to 1e-5: ten times the most.
HIGH_FULL_RATE = 1e-4


def look_at_recipe(section: Section, recipe, supervised: bool = False) -> None:
    """Says what will be run, and what in the recipe cannot work on this machine.

    Args:
        supervised: it is trained on captions alone, by recipes/caption_sft.py.
    """
    if supervised:
        _supervised_words(section, recipe)
    else:
        _words(section, recipe)
        _rate(section, recipe)
    _extras(section, recipe, supervised)
    _output(section, recipe)
    if recipe.output.push_to_hub:
        _publishing(section, recipe, supervised)


def _words(section: Section, recipe) -> None:
    model, rollout, train = recipe.model, recipe.rollout, recipe.train
    responses = rollout.prompts_per_step * rollout.num_generations
    trained = TRAINED[model.tune].format(r=model.lora.r, layers=model.trained_layers)
    if model.adapter is not None:
        trained += f", going on from {model.adapter}"
    section.numbers |= {"steps": train.steps, "responses": train.steps * responses}
    if recipe.warm_start is not None:
        start = recipe.warm_start
        times = "once" if start.epochs == 1 else f"{start.epochs:g} times"
        section.fine(f"first supervised training on all captions, {times} (recipes/caption_sft.py does that alone)")
    beside = "a critic beside it" if model.critic == "head" else "no critic: the other responses are the baseline"
    section.fine(f"{ALGORITHMS[recipe.algorithm.name]} on {model.name}, training {trained}; {beside}")
    section.fine(
        f"{train.steps:,} steps of {rollout.prompts_per_step} pictures x {rollout.num_generations} responses: "
        f"{train.steps * responses:,} responses of at most {rollout.max_completion_length} tokens"
    )
    paid = [f"{_weight(r.weight)} x {r.name}" for r in recipe.rewards if r.weight != 0.0]
    logged = [r.name for r in recipe.rewards if r.weight == 0.0]
    section.fine(f"the reward is {' + '.join(paid)}" + (f"; {', '.join(logged)} is only logged" if logged else ""))
    if not paid:
        section.wrong("every reward has weight 0: nothing is learned", "give one a weight, such as 1.0")
    every = f", every {recipe.eval.every} steps" if recipe.eval.every else ""
    section.fine(f"held-out rows are captioned before{every} and after: at most {recipe.eval.rows:,} of each time")


def _supervised_words(section: Section, recipe) -> None:
    start, model = recipe.warm_start, recipe.model
    times = "once" if start.epochs == 1 else f"{start.epochs:g} times"
    trained = "every weight" if start.tune == "full" else f"LoRA adapters of rank {model.lora.r}, merged at the end"
    section.fine(f"supervised training of {model.name} on all captions, {times}, training {trained}")
    most = f", {start.max_steps:,} steps at most" if start.max_steps else ""
    section.fine(f"{start.batch_size} (picture, caption) pairs a step, learning rate {start.learning_rate:g}{most}")
    section.fine(f"held-out rows are captioned before and after: at most {recipe.eval.rows:,} of each time")
    section.note(
        "no reinforcement learning: nothing is rewarded, and no critic is trained",
        f"for that, afterwards: recipes/caption_ppo.py with model.name={Path(recipe.output.dir) / 'warm_start'}",
    )


def _rate(section: Section, recipe) -> None:
    rate = recipe.train.learning_rate
    if recipe.model.tune == "full" and rate >= HIGH_FULL_RATE:
        section.warn(
            f"train.learning_rate {rate:g} is a rate for adapters, and here every weight is trained: such steps can "
            "make a model forget what it knew within a few updates. Reinforcement learning of all weights is mostly "
            f"done with 1e-7 to 1e-5; this warning begins at {HIGH_FULL_RATE:g}, and small models may bear more",
            "train.learning_rate=1e-5, or model.tune=lora",
        )


def _weight(weight) -> str:
    return f"{weight:g}" if isinstance(weight, int | float) else "(changing)"


def _extras(section: Section, recipe, supervised: bool) -> None:
    """Libraries that single keys need."""
    optional, wanted = requirements(), {}
    if recipe.model.quantize and not (supervised and recipe.warm_start.tune == "full"):
        wanted["model.quantize"] = "quant"
    if not supervised and recipe.train.optimizer == "adamw_8bit":
        wanted["train.optimizer"] = "quant"
    for key, extra in wanted.items():
        for said in unmet(optional.get(extra, [])):
            section.wrong(f"{key}: {said}", f"pip install 'mmft[{extra}]'")
    if supervised:
        return
    for tracker in recipe.output.trackers:
        if tracker != "ledger" and importlib.util.find_spec(tracker) is None:
            section.wrong(f"output.trackers: {tracker} is not installed", f"pip install {tracker}")
    if recipe.rollout.engine == "vllm" and recipe.rollout.vllm.url is None and importlib.util.find_spec("vllm") is None:
        section.wrong("rollout.engine: vllm is not installed", "see docs/generation.md")


def _output(section: Section, recipe) -> None:
    folder = Path(recipe.output.dir)
    if (folder / "summary.json").is_file() or (folder / "metrics.jsonl").is_file():
        ended = "finished" if (folder / "summary.json").is_file() else "unfinished"
        section.warn(
            f"{folder} holds {_steps(folder)} of an earlier, {ended} run; a new run there writes over it",
            "take another output.dir, or go on with it by --resume",
        )
    else:
        section.fine(f"results go to {folder}")


def _publishing(section: Section, recipe, supervised: bool) -> None:
    from huggingface_hub import get_token

    if supervised:
        section.wrong("output.push_to_hub: only runs of PPO and A2C are published", "output.push_to_hub=null")
        return
    kind = "privately" if recipe.output.private else "publicly"
    section.fine(f"the result is published {kind} as {recipe.output.push_to_hub}")
    if get_token() is None:
        section.wrong("output.push_to_hub: nobody is logged in to the Hub", "hf auth login, or HF_TOKEN")


def _steps(folder: Path) -> str:
    try:
        last = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        return f"{json.loads(last)['step']} steps"
    except (OSError, ValueError, KeyError, IndexError):
        return "the files"
