"""Combinations of keys that cannot work, each with the key to blame and the others it was compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mmft.recipe.messages import show
from mmft.recipe.rewards import WITH_TIMEOUT, ShareWeight
from mmft.recipe.strict_yaml import Key, parse_key

if TYPE_CHECKING:
    from mmft.recipe.sections import Recipe


def impossible(r: Recipe) -> list[tuple[Key, list[Key], str]]:
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
        model.adapter is None or model.tune in ("lora", "hybrid"),
        "model.adapter",
        "model.tune",
        f"got {show(model.adapter)}, expected null with model.tune {model.tune} (which trains no adapter)",
    )
    check(
        model.adapter is None or r.warm_start is None,
        "model.adapter",
        "warm_start",
        f"got {show(model.adapter)}, expected null with a warm start, which would train the model under the adapter "
        "(set warm_start to null to go on from the adapter)",
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
    _engines(r, check)
    _rewards(r, check)
    return found


def _engines(r: Recipe, check: Callable[[bool, str, str, str], None]) -> None:
    """The part of `impossible` that is about who writes responses, and about clips."""
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


def _rewards(r: Recipe, check: Callable[[bool, str, str, str], None]) -> None:
    """The part of `impossible` that is about rewards."""
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
