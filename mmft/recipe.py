"""The typed recipe: one frozen object that says everything about a run, or every problem at once.

A recipe is a YAML file plus ``key.sub=value`` overrides. All mistakes are found before anything heavy is
imported (this module must not import torch or transformers), each named by file, line, key and nearest key.

Left out on purpose: inheritance between recipe files, interpolation, environment variables. A recipe is read
from top to bottom by a person, and the resolved copy in the run folder is the whole truth about a run.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, model_validator
from ruamel.yaml import YAML

from mmft.recipe_rewards import WITH_TIMEOUT, Guards, Reward, ShareWeight
from mmft.recipe_secrets import hide_secrets, redacted, remember_secrets
from mmft.recipe_yaml import (
    Document,
    Key,
    RecipeError,
    Section,
    describe,
    dotted,
    load_document,
    override,
    parse_key,
    show,
)

__all__ = ["Recipe", "RecipeError", "load_recipe", "recipe_main"]


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021), by PEFT."""

    r: int = Field(16, ge=1)  # rank
    alpha: int = Field(32, ge=1)  # the update is scaled by alpha / r
    dropout: float = Field(0.0, ge=0, lt=1)
    target: str = Field("language", min_length=1)  # which layers; see mmft/vlm/families.py
    dora: bool = False  # weight-decomposed adapters (Liu et al. 2024)
    rslora: bool = False  # scaled by alpha / sqrt(r) (Kalajdzievski 2023)


class PictureCache(Section):
    """Features of pictures kept across steps while the tower is frozen."""

    memory_mib: int = Field(1024, ge=0)  # 0 keeps none
    folder: str | None = Field(None, min_length=1)  # also on disk, for later runs; null = in memory alone
    disk_mib: int = Field(10240, ge=1)  # the oldest go first


class Model(Section):
    """The policy: which model, what of it learns, and whether a critic stands beside it."""

    name: str = Field("scenes-vlm", min_length=1)  # bundled name, hub id or folder
    quantize: Literal["nf4", "int8"] | None = None
    tune: Literal["lora", "full", "frozen", "hybrid"] = "lora"
    lora: Lora = Lora()
    trained_layers: int = Field(2, ge=1)  # with tune frozen: the decoder's last so many layers, and its last norm
    trust_remote_code: bool = False  # run Python code that comes with the model
    critic: Literal["head", "none"] = "head"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False  # the decoder's layers by torch.compile; the first steps then take minutes
    picture_cache: PictureCache = PictureCache()


class Video(Section):
    """How a clip reaches the model."""

    frames: int = Field(8, ge=1)  # taken evenly in time from each clip
    native: bool = False  # by the processor's own video input (needs torchvision); else as that many pictures
    max_side: int = Field(768, ge=16)  # pixels; longer frames are made smaller


class Audio(Section):
    """How a sound reaches the model."""

    sampling_rate: int = Field(16_000, ge=1)  # Hz, of the model's feature extractor
    max_seconds: float = Field(30.0, gt=0)  # longer sounds are refused


class Data(Section):
    """Where rows come from; split names belong to the data set."""

    name: str = Field("scenes", min_length=1)  # bundled name, a card (YAML) or a folder
    train: str = Field("train", min_length=1)
    eval: str = Field("test", min_length=1)
    train_rows: int | None = Field(None, ge=1)  # the first so many rows only
    prompt: str | None = Field(None, min_length=1)  # replaces the prompt of every row
    bad_rows: Literal["error", "skip"] = "error"  # files that cannot be used: stop, or leave their rows out
    video: Video = Video()
    audio: Audio = Audio()


class Algorithm(Section):
    """Option names follow TRL's PPOConfig."""

    name: Literal["ppo", "a2c"] = "ppo"
    num_ppo_epochs: int = Field(2, ge=1)
    num_mini_batches: int = Field(1, ge=1)
    kl_coef: float = Field(0.02, ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: float | None = Field(None, gt=0)  # nats per response; null = kl_coef stays fixed
    kl_horizon: int = Field(10_000, ge=1)  # responses over which the adaptive coefficient reacts
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    cliprange: float = Field(0.2, gt=0)
    vf_coef: float = Field(0.1, ge=0)
    cliprange_value: float | None = Field(0.2, gt=0)  # null = values are not clipped
    critic_start: Literal["fit", "zero"] = "fit"  # the value head: fitted to the first step's returns, or zero
    entropy_coef: float = Field(0.0, ge=0)
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = Field(None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _one_epoch_of_a2c(cls, data: Any) -> Any:
        # A2C takes one step on fresh samples, so the PPO default of two epochs would never be what is meant.
        if isinstance(data, dict) and data.get("name") == "a2c":
            return {"num_ppo_epochs": 1, **data}
        return data


class Vllm(Section):
    """vLLM: a server started as docs/generation.md says, or in this process."""

    url: str | None = Field(
        "http://127.0.0.1:8000", pattern=r"^https?://", description="an http(s) address or null"
    )  # null = in this process
    memory: float = Field(0.3, gt=0, lt=1)  # with url null: share of the GPU that it takes
    timeout: float = Field(240.0, gt=0)  # seconds
    tolerance: float = Field(0.1, gt=0)  # nats a token between its log-probs and the policy's own, mean of a prompt


class Rollout(Section):
    """How much is sampled per step: prompts_per_step x num_generations responses, over all processes."""

    prompts_per_step: int = Field(32, ge=1)
    num_generations: int = Field(8, ge=1)
    max_completion_length: int = Field(24, ge=1)  # tokens, end token included
    temperature: float = Field(1.0, gt=0)
    engine: Literal["native", "hf", "vllm"] = "native"  # the shared prefix, model.generate, or vLLM
    vllm: Vllm = Vllm()


class Train(Section):
    """The optimiser and its schedule."""

    steps: int = Field(60, ge=1)
    learning_rate: float = Field(5.0e-4, gt=0)
    value_learning_rate: float | None = Field(None, gt=0)  # null = learning_rate
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    optimizer: Literal["adamw", "adamw_8bit", "sgd"] = "adamw"
    save_every: int = Field(20, ge=0)  # steps; 0 = only at the end
    keep_last: int = Field(2, ge=1)  # checkpoints; the one of the best evaluation is kept beside them
    skip_spikes: float | None = Field(None, gt=1)  # a loss this many times its usual size is not learned from
    timeout: float | None = Field(1800.0, gt=0)  # seconds one phase of a step may take; null = for ever
    micro_prompts: int | None = Field(None, ge=1)  # prompts per forward pass; null = the whole minibatch
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more work


class WarmStart(Section):
    """Supervised training on the references before reinforcement learning begins."""

    epochs: float = Field(1.0, gt=0)
    learning_rate: float = Field(1.0e-3, gt=0)
    batch_size: int = Field(32, ge=1)  # (picture, caption) pairs per step
    tune: Literal["full", "lora"] = "full"
    max_steps: int | None = Field(None, ge=1)  # stop early; null = all epochs
    save_every: int = Field(200, ge=0)  # steps between checkpoints of the warm start; 0 = none


class Eval(Section):
    """Held-out evaluation, on the split ``data.eval``."""

    every: int = Field(20, ge=0)  # steps; 0 = only before and after
    patience: int | None = Field(None, ge=1)  # evaluations without a new best before the run ends with the best state
    rows: int = Field(512, ge=1)


class Output(Section):
    """Where results go."""

    dir: str = Field("runs/caption_ppo", min_length=1)
    push_to_hub: str | None = Field(
        None, pattern=r"^[\w.-]+/[\w.-]+$", description="user/name of a repository on the Hub, or null"
    )
    private: bool = True  # the repository that is pushed to, if it is made
    trackers: list[Literal["tensorboard", "ledger"]] = ["tensorboard"]  # beside metrics.jsonl


class Recipe(Section):
    """Everything about a run. Immutable; ``dump`` writes it with every default filled in."""

    seed: int = Field(0, ge=0, lt=2**32)
    model: Model = Model()
    data: Data = Data()
    rewards: list[Reward] = Field([Reward(name="cider_d"), Reward(name="bleu", weight=0.0)], min_length=1)
    algorithm: Algorithm = Algorithm()
    rollout: Rollout = Rollout()
    train: Train = Train()
    warm_start: WarmStart | None = None
    eval: Eval = Eval()
    guards: Guards = Guards()
    output: Output = Output()

    @model_validator(mode="after")
    def _possible(self, info: ValidationInfo) -> Recipe:
        if not info.context:  # load_recipe reports combinations itself, with their lines
            problems = [f"{dotted(key)}: {text}" for key, _, text in _impossible(self)]
            if problems:
                raise ValueError("; ".join(problems))
        return self

    def dump(self, path: str | Path) -> None:
        """Write the resolved recipe as YAML, without secrets; ``load_recipe`` of that file gives an equal recipe."""
        yaml = YAML()
        yaml.default_flow_style = False
        with Path(path).open("w", encoding="utf-8") as stream:
            yaml.dump(redacted(self.model_dump()), stream)


def _impossible(r: Recipe) -> list[tuple[Key, list[Key], str]]:
    """Combinations that cannot work, as (key to blame, other keys looked at, what was got and expected)."""
    found: list[tuple[Key, list[Key], str]] = []

    def check(ok: bool, key: str, others: str, text: str) -> None:
        if not ok:
            found.append((parse_key(key), [parse_key(other) for other in others.split()], text))

    a, rollout, train, model = r.algorithm, r.rollout, r.train, r.model
    check(
        model.critic != "none" or rollout.num_generations >= 2,
        "rollout.num_generations",
        "model.critic",
        f"got {rollout.num_generations}, expected 2 or more with model.critic none "
        "(each response is compared with the others of its prompt)",
    )
    check(
        rollout.prompts_per_step % a.num_mini_batches == 0,
        "algorithm.num_mini_batches",
        "rollout.prompts_per_step",
        f"got {a.num_mini_batches}, expected a divisor of rollout.prompts_per_step ({rollout.prompts_per_step})",
    )
    check(
        a.name != "a2c" or a.num_ppo_epochs == 1,
        "algorithm.num_ppo_epochs",
        "algorithm.name",
        f"got {a.num_ppo_epochs}, expected 1 with algorithm.name a2c (only ppo may use samples again)",
    )
    check(
        a.kl_target is None or a.kl_coef > 0,
        "algorithm.kl_target",
        "algorithm.kl_coef",
        f"got {show(a.kl_target)}, expected null with kl_coef 0 (an adaptive coefficient never leaves 0)",
    )
    check(
        model.quantize is None or model.tune in ("lora", "hybrid"),
        "model.quantize",
        "model.tune",
        f"got {model.quantize}, expected null with model.tune {model.tune} (quantized weights cannot be trained)",
    )
    check(
        r.eval.patience is None or r.eval.every > 0,
        "eval.patience",
        "eval.every",
        f"got {show(r.eval.patience)}, expected null with eval.every 0 (nothing is evaluated on the way)",
    )
    check(
        train.warmup_steps <= train.steps,
        "train.warmup_steps",
        "train.steps",
        f"got {train.warmup_steps}, expected at most train.steps ({train.steps})",
    )
    _impossible_engines(r, check)
    _impossible_rewards(r, check)
    return found


def _impossible_engines(r: Recipe, check: Callable[[bool, str, str, str], None]) -> None:
    """The part of `_impossible` that is about who writes responses, and about clips."""
    vllm, native = r.rollout.engine == "vllm", r.data.video.native
    check(
        not vllm or r.model.tune == "lora",
        "rollout.engine",
        "model.tune",
        f"got vllm, expected native or hf with model.tune {r.model.tune} (vLLM is sent adapters alone)",
    )
    check(
        not vllm or r.model.lora.target == "language",
        "rollout.engine",
        "model.lora.target",
        f"got vllm, expected native or hf with model.lora.target {r.model.lora.target} "
        "(vLLM adapts the language model alone)",
    )
    check(
        not vllm or not r.model.lora.dora,
        "rollout.engine",
        "model.lora.dora",
        "got vllm, expected native or hf with model.lora.dora true (vLLM has no such adapters)",
    )
    check(
        not vllm or r.warm_start is None or r.rollout.vllm.url is None,
        "rollout.engine",
        "warm_start",
        "got vllm with a server, expected warm_start null: the server would serve the model before it "
        "(warm up by recipes/caption_sft.py first, and serve that)",
    )
    check(
        not vllm or not native,
        "rollout.engine",
        "data.video.native",
        "got vllm, expected data.video.native false (vLLM is given pictures alone)",
    )
    check(
        r.warm_start is None or not native,
        "warm_start",
        "data.video.native",
        "got a warm start, expected data.video.native false (the warm start takes pictures alone)",
    )


def _impossible_rewards(r: Recipe, check: Callable[[bool, str, str, str], None]) -> None:
    """The part of `_impossible` that is about rewards."""
    check(
        any(reward.weight != 0 for reward in r.rewards),
        "rewards",
        "rewards",
        "got weight 0 everywhere, expected at least one reward with another weight",
    )
    for index, reward in enumerate(r.rewards):
        at = f"rewards.{index}"
        check(
            reward.credit == "last" or reward.weight == 0 or r.model.critic != "none",
            f"{at}.credit",
            "model.critic",
            f"got {reward.credit}, expected last with model.critic none "
            "(without a critic the whole response is one action, so credit within it is lost)",
        )
        check(
            reward.label not in [other.label for other in r.rewards[:index]],
            f"{at}.as" if reward.as_ else f"{at}.name",
            "rewards",
            f'got "{reward.label}" a second time, expected each reward once (or another name by "as")',
        )
        check(
            reward.clip is None or reward.credit != "dense",
            f"{at}.clip",
            f"{at}.credit",
            "got limits, expected null with credit dense (a clipped score cannot be shared out over tokens)",
        )
        check(
            reward.credit != "shaping" or reward.normalize not in ("batch", "group"),
            f"{at}.normalize",
            f"{at}.credit",
            f"got {reward.normalize}, expected null or running with credit shaping "
            "(potentials may not depend on how the response goes on)",
        )
        check(
            reward.timeout is None or ":" in reward.name or reward.name in WITH_TIMEOUT,
            f"{at}.timeout",
            f"{at}.name",
            f"got {show(reward.timeout)}, expected null with {reward.name} "
            f"(only rewards of your own, {', '.join(WITH_TIMEOUT)} take a time limit)",
        )
        check(
            reward.normalize != "group" or r.rollout.num_generations >= 2,
            f"{at}.normalize",
            "rollout.num_generations",
            f"got group, expected null, running or batch with rollout.num_generations {r.rollout.num_generations}",
        )
    shares = sum(abs(reward.weight.share) for reward in r.rewards if isinstance(reward.weight, ShareWeight))
    others = any(reward.weight != 0 and not isinstance(reward.weight, ShareWeight) for reward in r.rewards)
    check(
        not shares or (shares < 1 and others),
        "rewards",
        "rewards",
        f"got shares of {show(shares)} together, expected less than 1 and another reward that takes the rest",
    )


def _without(data: dict[str, Any], keys: list[Key]) -> dict[str, Any]:
    """A copy of the data in which wrong keys fall back to their defaults; lists go as a whole."""
    data = copy.deepcopy(data)
    for key in keys:
        while any(isinstance(part, int) for part in key):
            key = key[:-1]
        here: Any = data
        for part in key[:-1]:
            here = here.get(part) if isinstance(here, dict) else None
        if isinstance(here, dict) and key:
            here.pop(key[-1], None)
    return data


def _overlap(one: Key, two: Key) -> bool:
    return one[: len(two)] == two or two[: len(one)] == one


def _check(document: Document) -> Recipe | None:
    wrong: list[Key] = []
    recipe: Recipe | None
    try:
        recipe = Recipe.model_validate(document.data, context={"lines": True})
    except ValidationError as error:
        wrong = describe(Recipe, document, error)
        try:  # the rest of the file may hold impossible combinations: say so in the same breath
            recipe = Recipe.model_validate(_without(document.data, wrong), context={"lines": True})
        except ValidationError:
            return None
    for key, others, text in _impossible(recipe):
        if not any(_overlap(bad, part) for bad in wrong for part in [key, *others]):
            given = [part for part in [key, *others] if part in document.places] or [key]
            # Look first at what the command line changed, else at the first that the file mentions.
            typed = next((part for part in given if document.line(part) == 0), given[0])
            document.add(document.line(typed), f"{dotted(key)}: {text}")
    return recipe


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: the YAML file.
        overrides: ``key.sub=value`` each, the value read as YAML, for example
            ``["train.steps=10", "rewards.1.weight=0.5"]``.

    Raises:
        RecipeError: anything at all is wrong; ``problems`` lists every mistake as
            ``file:line: key: got VALUE, expected ..., did you mean ...?`` (``command line:`` for overrides).
    """
    document = load_document(path)
    for text in overrides or []:
        override(document, text)
    remember_secrets(document.data)
    recipe = _check(document)
    document.raise_if_any()
    assert recipe is not None
    card = recipe.data.name
    beside = Path(path).parent / card
    if card.endswith((".yaml", ".yml")) and not Path(card).exists() and beside.is_file():
        data = recipe.data.model_copy(update={"name": str(beside)})  # a card kept next to its recipe
        recipe = recipe.model_copy(update={"data": data})
    return recipe


def recipe_main(
    description: str,
    argv: list[str] | None = None,
    default: str | Path | None = None,
    load: Callable[[str | Path, list[str]], Any] = load_recipe,
) -> tuple[Any, str | None, list[str]]:
    """The command line of every recipe: ``[recipe.yaml] [key.sub=value ...] [--resume [PATH]]``.

    Call it before importing anything heavy: a wrong recipe ends the process with code 2, all problems on
    stderr.

    Args:
        description: first line of ``--help``.
        argv: arguments; default ``sys.argv[1:]``.
        default: recipe used when none is named; default: the YAML next to the script, of the same stem.
        load: what reads the file and its overrides; another one for recipes of another kind.

    Returns:
        the recipe; what to resume: None, ``"latest"`` (newest whole checkpoint of ``output.dir``) or a path; and the
        fields that may have changed since that checkpoint was made.
    """
    hide_secrets()
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Overrides are written key.sub=value, for example: train.steps=10 output.dir=runs/short",
    )
    parser.add_argument("words", nargs="*", metavar="recipe.yaml | key.sub=value")
    parser.add_argument(
        "--resume", nargs="?", const="latest", metavar="PATH", help="go on from the newest whole checkpoint, or from it"
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="resume although FIELD is another than in the checkpoint (dataset, seed ...; may be repeated)",
    )
    arguments = parser.parse_intermixed_args(argv)
    words, resume = arguments.words, arguments.resume
    if arguments.allow_change and resume is None:
        parser.error("--allow-change goes with --resume")
    if resume is not None and resume != "latest" and not os.path.isdir(resume):
        if "=" not in resume and not resume.endswith((".yaml", ".yml")):
            parser.error(f"--resume {resume}: no such folder, expected a checkpoint or a run folder")
        words, resume = [*words, resume], "latest"  # `--resume train.steps=10` means resume, then an override
    files = [word for word in words if "=" not in word or os.path.isfile(word)]  # Path's raises for a long word
    if len(files) > 1:
        parser.error(f"got {' and '.join(files)}, expected one recipe file (overrides: key.sub=value)")
    path = files[0] if files else default or Path(sys.argv[0]).with_suffix(".yaml")
    try:
        return load(path, [word for word in words if word not in files]), resume, arguments.allow_change
    except RecipeError as error:
        if os.environ.get("RANK", "0") == "0":  # one copy of the list, not one per process
            print("\n".join([*error.problems, _count(len(error.problems))]), file=sys.stderr)
        sys.exit(2)


def _count(number: int) -> str:
    return f"{number} problem{'s' if number != 1 else ''} in the recipe; nothing was started."
