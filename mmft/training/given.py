"""What a trainer is given: the policy made of it, and what is refused before anything is loaded."""

from __future__ import annotations

from accelerate.utils import set_seed

from mmft.training.config import PPOConfig
from mmft.training.evaluate import Metrics
from mmft.training.from_trl import loading
from mmft.training.guards import Guards
from mmft.vlm.load import build_policy, load_model
from mmft.vlm.policy import Policy


def policy_of(model, processor, peft_config, config: PPOConfig, quantization_config) -> Policy:
    """The policy to train, made of a name, a model or a policy."""
    if not isinstance(model, Policy):
        if isinstance(model, str):
            set_seed(config.seed)  # of new weights: adapters start at random
            model, loaded = load_model(model, **loading(config, quantization_config))
            processor = processor or loaded
        model = build_policy(
            model,
            processor,
            peft_config,
            config.critic,
            needs_reference=config.kl_coef > 0,
            cache_bytes=config.cache_bytes,
            cache_folder=config.cache_folder,
            cache_disk_bytes=config.cache_disk_bytes,
        )
    if config.gradient_checkpointing:
        model.checkpoint_activations()
    if config.compile:
        model.compile_decoder()
    return model


def require_possible(config: PPOConfig, rewards, guards: Guards, held_out, metrics: Metrics | None) -> None:
    """ValueError for rewards, guards and options that do not go together."""
    dense = [part.name for part in rewards.parts if part.credit != "last" and part.weight != 0.0]
    if config.critic == "none" and dense:
        raise ValueError(
            f"reward {dense[0]!r} is credited token by token, but critic='none' takes a response as one action: "
            "train a critic, or credit the last token"
        )
    if guards.may_roll_back and (held_out is None or not config.eval_steps):
        raise ValueError("a guard with action 'rollback' returns to the best evaluation: set eval_steps (eval.every)")
    if held_out is not None and metrics is None and not config.eval_rewards:
        raise ValueError(
            "eval_rewards=False, and without compute_metrics the rewards are the only metrics of eval_dataset: give "
            "compute_metrics, or leave out eval_dataset"
        )


def require_rows(train, held_out) -> None:
    """ValueError for rows that cannot be counted, and for none at all."""
    for name, rows in (("train_dataset", train), ("eval_dataset", held_out)):
        if isinstance(rows, dict) or (rows is not None and not hasattr(rows, "__len__")):
            raise ValueError(f"{name} is {type(rows).__name__}; expected rows that can be counted: one Dataset or list")
    if train is None or len(train) == 0:
        raise ValueError("train_dataset is empty; PPO needs rows with 'prompt' and 'image'")
    if held_out is not None and len(held_out) == 0:
        raise ValueError("eval_dataset is empty; leave it out to train without evaluation")


def require_columns(dataset, name: str) -> None:
    """ValueError for rows without a prompt."""
    columns = getattr(dataset, "column_names", None) or list(dataset[0])
    if "prompt" not in columns:
        raise ValueError(f"{name} has no column 'prompt'; its columns are: {', '.join(columns)}")
