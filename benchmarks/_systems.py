"""One system's iterations: "ppo" and "loo" of mmft, "grpo" and "rloo" of TRL, on the same rows and rewards."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import _trl
from benchmarks._iteration import peak, reset_peak
from benchmarks._models import SHAPES, Shape
from benchmarks._turns import Turn

OURS, THEIRS = ("ppo", "loo"), ("grpo", "rloo")
BETA, LEARNING_RATE, SEED = 0.02, 1e-5, 0
PHASES = ("rollout", "reference", "reward", "update")


def reward(text: str) -> float:
    """A cheap score that differs between responses: how many different characters."""
    return len(set(text.strip())) / 64


def measure(
    system: str, shape: Shape, folder: Path, dataset: Path, setting: str | int | None, turn: Turn
) -> dict[str, Any]:
    """Runs the iterations that the rows are enough for; each is handed to ``turn``, together with its peak memory.

    Args:
        dataset: rows of all iterations, and one more that both sides score before the first.
        setting: a `_trl.Setting` as text; for mmft, prompts per forward pass of the update.
        turn: gets {"logprobs"} before the first iteration, {"seconds", "phases", "peak_mib", "increase_mib"} after
            each.

    Returns:
        what all sides must agree on: mean reward, and some of the texts with their scores.
    """
    from datasets import load_from_disk

    from mmft.vlm.load import load_model, lora_config

    seen: list[tuple[str, float]] = []

    def score(completions, **columns) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        scores = [reward(text) for text in texts]
        seen.extend(zip(texts, scores))
        return scores

    model, processor = load_model(str(folder), dtype="float32")
    data = load_from_disk(str(dataset))
    steps = (len(data) - 1) // shape.prompts
    base: list[float] = []  # MiB held with libraries, model and trainer loaded

    def watched(measured: dict[str, Any]) -> bool:
        if "seconds" in measured:
            measured = measured | {"peak_mib": peak(), "increase_mib": peak() - base[0]}
        go_on = turn(measured)
        base.append(reset_peak())
        return go_on

    side = _ours if system in OURS else _theirs
    with tempfile.TemporaryDirectory() as scratch:
        arguments = (model, processor, lora_config(model), score, data)
        reward_mean, length = side(system, shape, steps, setting, *arguments, scratch, watched)
    samples = steps * shape.samples
    if len(seen) != samples or length != shape.length:
        raise RuntimeError(f"{system}: {len(seen)} responses of {length} tokens, expected {samples} of {shape.length}")
    # What the trainer says it learned from is what the function gave it.
    given = sum(score for _, score in seen) / samples
    if abs(given - reward_mean) > 1e-5:
        raise RuntimeError(f"{system}: the trainer's mean reward is {reward_mean}, the given one {given}")
    return {"reward": reward_mean, "seen": seen[:4]}


def _ours(system, shape, steps, setting, model, processor, adapters, score, dataset, scratch, turn):
    from mmft.training.config import PPOConfig
    from mmft.training.trainer import PPOTrainer

    config = PPOConfig(
        output_dir=scratch,
        seed=SEED,
        max_steps=steps,
        prompts_per_step=shape.prompts,
        num_generations=shape.group,
        max_completion_length=shape.length,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        num_ppo_epochs=1,
        num_mini_batches=1,
        micro_prompts=setting,
        kl_coef=BETA,
        critic="head" if system == "ppo" else "none",
        report_to=(),
    )
    used = dataset.select(range(steps * shape.prompts))
    trainer = PPOTrainer(model, score, config, used, None, processor, adapters)
    turn({"logprobs": _our_logprobs(trainer.policy, dataset[len(dataset) - 1], shape.length)})
    trainer.policy.ban(trainer.policy.end_ids)  # never sampled: every response runs to its full length
    logs = []
    for step in range(1, steps + 1):
        start = time.perf_counter()
        logs.append(trainer.step(step))
        seconds = time.perf_counter() - start
        turn({"seconds": seconds, "phases": {phase: logs[-1][f"time/{phase}"] for phase in PHASES}})
    return tuple(sum(log[key] for log in logs) / steps for key in ("reward", "response_length"))


def _theirs(system, shape, steps, setting, model, processor, adapters, score, dataset, scratch, turn):
    from mmft.vlm.families import end_tokens, never_sampled

    trainer = _trl.build(
        system,
        _trl.Setting.parse(setting),
        model,
        processor,
        adapters,
        score,
        dataset.select(range(steps * shape.prompts)),
        scratch=scratch,
        steps=steps,
        prompts=shape.prompts,
        group=shape.group,
        length=shape.length,
        # The same that mmft bans.
        banned=sorted({*never_sampled(model, processor.tokenizer), *end_tokens(model, processor.tokenizer)}),
        seed=SEED,
        learning_rate=LEARNING_RATE,
        beta=BETA,
    )
    response = _fixed_response(processor.tokenizer, shape.length)
    first = {"logprobs": _trl.reference_logprobs(trainer, processor, dataset[len(dataset) - 1], response)}
    logs = _trl.run(trainer, lambda measured: turn(measured or first))
    return logs["reward"], logs["completions/mean_length"]


def _fixed_response(tokenizer, length: int) -> list[int]:
    """The same tokens on both sides: ordinary ones, spread over the vocabulary."""
    words = [i for i in range(len(tokenizer)) if i not in set(tokenizer.all_special_ids)]
    return [words[(7919 * (i + 1)) % len(words)] for i in range(length)]


def _our_logprobs(policy, row: dict[str, Any], length: int) -> list[float]:
    """Log-probs of the fixed response with the adapters off, of the whole softmax as TRL's are."""
    import torch

    from mmft.batch import Responses

    ids = torch.tensor([_fixed_response(policy.tokenizer, length)])
    responses = Responses(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones(1, dtype=torch.bool))
    banned = policy.banned_ids.tolist()
    policy.banned.zero_()
    policy.ban([])
    prompts = policy.pictures.prompts([row], [str(row["id"])], policy.device)
    found = policy(prompts, responses, reference=True).logprobs[0].tolist()
    policy.ban(banned)
    return found


def work(order: dict[str, Any], turn: Turn) -> dict[str, Any]:
    """`measure`, of what an order to another process names."""
    import torch

    torch.set_num_threads(order["threads"])
    places = (Path(order["folder"]), Path(order["dataset"]))
    return measure(order["system"], SHAPES[order["shape"]], *places, order["setting"], turn)
