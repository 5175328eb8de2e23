"""Options of the trainers, under the names of TRL's `PPOConfig` and `GRPOConfig` where those have one.

TRL's other names are understood as well, see `mmft.training.from_trl`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from mmft.recipe.messages import expected
from mmft.recipe.sections import Algorithm, Eval, Recipe, Rollout, Train
from mmft.training.from_trl import takes_trl_names
from mmft.training.guards import DEFAULT_GUARDS, LIMITS, Guard

_CHOICES = {
    "critic": ("head", "none"),
    "critic_start": ("fit", "zero"),
    "engine": ("native", "hf", "vllm"),
    "lr_scheduler_type": ("constant", "linear", "cosine"),
    "kl_estimator": ("k1", "k2", "k3"),
    "optimizer": ("adamw", "adamw_8bit", "sgd"),
}
# Options that have the range of a recipe's key: by section, ours -> the key. Below 0 an entropy_coef is a penalty.
_RANGES: dict[type[BaseModel], dict[str, str]] = {
    Recipe: {"seed": "seed"},
    Algorithm: {name: name for name in Algorithm.model_fields if name not in ("name", "cliprange", "entropy_coef")},
    Rollout: {name: name for name in Rollout.model_fields if name != "vllm"},
    Train: {
        name: name for name in Train.model_fields if name not in ("steps", "lr_schedule", "save_every", "warmup_steps")
    }
    | {"max_steps": "steps"},
    Eval: {"patience": "patience", "eval_rows": "rows", "eval_batch": "rows", "eval_rewards": "rewards"},
}


@takes_trl_names
@dataclass
class PPOConfig:
    """Proximal policy optimisation with a critic (or, with ``critic="none"``, a leave-one-out baseline).

    Attributes:
        output_dir: the run folder.
        seed: of data order and sampling; two runs with one seed write the same responses.
        max_steps: RL steps; each samples, scores and learns from one batch.
        num_train_epochs: passes over the training rows, in place of ``max_steps``; None = that counts.
        prompts_per_step: prompts of a step, over all processes (B).
        num_generations: responses to each prompt (G).
        max_completion_length: longest response, in tokens (T).
        temperature: of sampling; log-probs are those of the tempered distribution.
        learning_rate, value_learning_rate: of the adapters and of the value head (None = the same).
        lr_scheduler_type: "constant", "linear" or "cosine" decay over ``max_steps``.
        warmup_steps: RL steps over which the learning rate rises from zero; below 1 a share of all.
        num_ppo_epochs: passes over a step's experience.
        num_mini_batches: optimizer steps per pass; minibatches are made of whole groups.
        micro_prompts: prompts per forward pass of the update (None = the whole minibatch); changes memory only.
        kl_coef: weight of the KL penalty against the reference, in reward units per nat.
        kl_estimator: "k1", "k2" or "k3" (Schulman 2020), per token, inside the reward.
        kl_target, kl_horizon: an adaptive ``kl_coef`` (Ziegler et al. 2019) when a target (nats per response) is set.
        gamma, lam: of generalised advantage estimation.
        cliprange, cliprange_value: PPO's clip of the ratio, or (lower, upper), and of the value (None = unclipped).
        vf_coef, entropy_coef: weights of the critic's loss and of the entropy bonus.
        whiten_rewards: divide token rewards by their standard deviation; the mean stays, as in TRL, which adds the
            same to every token and so pays for length (or against it) where the mean is not 0.
        whiten_advantages: normalise advantages to mean 0 and variance 1 over the step.
        missing_eos_penalty: taken off the score of a response that did not end (None = 0).
        critic: "head" or "none".
        critic_start: "fit" sets the value head to the least-squares fit of the first step's returns; "zero" leaves
            it at zero.
        reward_weights: one per reward function; None = 1 each.
        optimizer: "adamw", "adamw_8bit" (bitsandbytes) or "sgd".
        save_steps, eval_steps: every so many steps; 0 = only at the end; below 1 a share of all.
        keep_last: checkpoints kept, beside the one of the best evaluation.
        patience: evaluations without a new best before the run ends with the best state (None = never).
        skip_spikes: a gradient more than so many times its usual length is not learned from (None = it is).
        timeout: seconds one phase of a step may take before all processes are ended (None = for ever).
        eval_rows: at most this many rows of the evaluation set.
        eval_batch: prompts decoded together in evaluation.
        eval_rewards: the reward functions score held-out responses, too, for the report; needed where they are the
            metrics (no ``compute_metrics``).
        engine: what writes responses in training: "native", "hf" or "vllm" (see `mmft.training.engines`).
        vllm: options of the last: ``url``, ``memory``, ``timeout``, ``tolerance``; None = its defaults.
        gradient_checkpointing: recompute activations in the backward pass.
        compile: the decoder's layers by `torch.compile`.
        cache_bytes: memory for picture features kept across steps.
        cache_folder, cache_disk_bytes: where and how much of them is kept on disk; None = nowhere.
        guards: name -> `mmft.training.guards.Guard`; one left out is off.
        report_to: trackers beside ``metrics.jsonl``: "tensorboard", "wandb", "trackio", "mlflow", and "ledger" (a hash
            of every response); see docs/metrics.md.
    """

    output_dir: str = "runs/ppo"
    seed: int = 0
    max_steps: int = 60
    num_train_epochs: float | None = None
    prompts_per_step: int = 32
    num_generations: int = 8
    max_completion_length: int = 24
    temperature: float = 1.0
    learning_rate: float = 5e-4
    value_learning_rate: float | None = None
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    num_ppo_epochs: int = 2
    num_mini_batches: int = 1
    micro_prompts: int | None = None
    kl_coef: float = 0.02
    kl_estimator: str = "k1"
    kl_target: float | None = None
    kl_horizon: int = 10000
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float | tuple[float, float] = 0.2
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = None
    critic: str = "head"
    critic_start: str = "fit"
    reward_weights: list[float] | None = None
    optimizer: str = "adamw"
    save_steps: float = 0
    keep_last: int = 2
    skip_spikes: float | None = None
    timeout: float | None = 1800.0
    eval_steps: float = 0
    patience: int | None = None
    eval_rows: int = 512
    eval_batch: int = 64
    eval_rewards: bool = True
    engine: str = "native"
    vllm: dict[str, Any] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    cache_bytes: int = 1 << 30
    cache_folder: str | None = None
    cache_disk_bytes: int = 10 << 30
    guards: dict[str, Guard] = field(default_factory=lambda: dict(DEFAULT_GUARDS))
    report_to: tuple[str, ...] = field(default=("tensorboard",))

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(choices)}")
        _require_ranges(self)
        if self.critic == "none" and self.num_generations < 2:
            raise ValueError("critic='none' takes the other responses to a prompt as baseline: num_generations >= 2")
        if self.prompts_per_step % self.num_mini_batches:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} is not divisible by num_mini_batches={self.num_mini_batches}"
            )
        if self.patience is not None and not self.eval_steps:
            raise ValueError(f"patience={self.patience} counts evaluations: set eval_steps (eval.every)")


@takes_trl_names
@dataclass
class A2CConfig(PPOConfig):
    """Advantage actor-critic: one pass, no ratio and no clip; the rest as `PPOConfig`."""

    num_ppo_epochs: int = 1
    cliprange_value: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_ppo_epochs != 1:
            raise ValueError("A2C's gradient is right for one pass over its samples: num_ppo_epochs must be 1")


def _require_ranges(config: PPOConfig) -> None:
    """Raises ValueError naming every option that is out of range: a negative rate would unlearn, without a word."""
    wrong = []

    def check(ok: bool, name: str, words: str) -> None:
        if not ok:
            wrong.append(f"{name}={getattr(config, name)!r}: expected {words}")

    for section, keys in _RANGES.items():
        for name, key in keys.items():
            value = getattr(config, name)
            try:
                section.model_validate({key: value.item() if hasattr(value, "item") else value})
            except ValidationError:
                check(False, name, expected(section, (key,)).replace("or null", "or None"))
    bounds = config.cliprange if isinstance(config.cliprange, list | tuple) else (config.cliprange,) * 2
    check(len(bounds) == 2 and all(_is_above_0(bound) for bound in bounds), "cliprange", "a number > 0, or two of them")
    epochs, weights, guards = config.num_train_epochs, config.reward_weights, config.guards
    check(epochs is None or _is_above_0(epochs), "num_train_epochs", "a number > 0 or None")
    check(weights is None or isinstance(weights, list | tuple), "reward_weights", "a list of numbers or None")
    known = isinstance(guards, dict) and set(guards) <= set(LIMITS)
    check(
        known and all(isinstance(guard, Guard) for guard in guards.values()),
        "guards",
        f"a dict with a Guard for some of {', '.join(LIMITS)}",
    )
    if wrong:
        raise ValueError("; ".join(wrong))


def _is_above_0(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def from_recipe(recipe) -> PPOConfig:
    """The trainer's options, from a `mmft.recipe.Recipe`."""
    a, r, t = recipe.algorithm, recipe.rollout, recipe.train
    options = a.model_dump(exclude={"name"}) | r.model_dump()
    options |= t.model_dump(exclude={"steps", "lr_schedule", "save_every"})
    options |= {"max_steps": t.steps, "lr_scheduler_type": t.lr_schedule, "save_steps": t.save_every}
    cache = recipe.model.picture_cache
    return {"ppo": PPOConfig, "a2c": A2CConfig}[a.name](
        **options,
        output_dir=recipe.output.dir,
        seed=recipe.seed,
        critic=recipe.model.critic,
        compile=recipe.model.compile,
        cache_bytes=cache.memory_mib << 20,
        cache_folder=cache.folder,
        cache_disk_bytes=cache.disk_mib << 20,
        eval_steps=recipe.eval.every,
        eval_rows=recipe.eval.rows,
        eval_rewards=recipe.eval.rewards,
        patience=recipe.eval.patience,
        report_to=tuple(recipe.output.trackers),
        guards=_guards(recipe.guards),
    )


def _guards(section) -> dict[str, Guard]:
    """The guards of a recipe; what a section does not say is as in `DEFAULT_GUARDS`."""
    chosen = {name: getattr(section, name) for name in LIMITS}
    return {
        name: replace(DEFAULT_GUARDS[name], **options.model_dump())
        for name, options in chosen.items()
        if options is not None
    }
