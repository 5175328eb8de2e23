"""One RL step, the only file that knows all stages: 1 to 7 of a batch, from rows to new weights, top to bottom."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from mmft.batch import Rollout
from mmft.training import distributed
from mmft.training import rollout as stages
from mmft.training.critic import fit_critic
from mmft.training.finite import require_finite_rollout
from mmft.training.measures import distributions, ledger, measure
from mmft.training.monitor import LEDGER
from mmft.training.schedule import places
from mmft.training.scoring import rewards_at
from mmft.training.update import update
from mmft.training.vllm_engine import VLLM
from mmft.vlm.generate import generate

if TYPE_CHECKING:
    from mmft.training.trainer import PPOTrainer


def take_step(trainer: PPOTrainer, step: int) -> dict[str, float]:
    """Stages 1 to 7; returns the step's metrics (docs/metrics.md)."""
    config, began = trainer.config, time.perf_counter()
    trainer.phase_seconds.clear()  # an evaluation before it is no part of this step
    learning_rate = trainer.set_learning_rate(step)

    # What reads the weights from 3 to 6 finds them whole; the update brings a layer's when it is at it.
    with distributed.whole(trainer.accelerator, trainer.prepared):
        rollout, kl, head = _experience(trainer, step)
    distributed.load_trained_weights(trainer.accelerator, trainer.prepared, head)
    # 7. Epochs x minibatches x microbatches.
    with trainer.timed("update"):
        trainer.prepared.train()
        ratios: list[torch.Tensor] | None = [] if trainer.draws(step) else None
        losses = update(
            trainer.prepared,
            trainer.optimizer,
            rollout,
            config,
            trainer.accelerator,
            step,
            trainer.guards.spikes,
            ratios,
        )
    trainer.drawn = {} if ratios is None else distributions(rollout, ratios)

    counted = [part.name for part in trainer.reward_funcs.parts if part.weight != 0.0]
    metrics = measure(rollout, kl, counted, config.critic != "none", trainer.accelerator, trainer.reduce) | losses
    if isinstance(trainer.engine, VLLM):
        metrics |= {f"vllm/logprob_gap_{name}": gap for name, gap in trainer.engine.gap.items()}
    if trainer.guards.wants_blank(step):
        metrics["blank_picture"] = _blank_picture(trainer, rollout, step)
    trainer.kl.update(metrics["kl"], config.prompts_per_step * config.num_generations)
    seconds = time.perf_counter() - began
    metrics |= {f"time/{name}": value for name, value in trainer.phase_seconds.items()}
    metrics |= {
        "seconds": seconds,
        "tokens_per_second": metrics.pop("tokens") / seconds,
        "samples_per_second": config.prompts_per_step * config.num_generations / seconds,
        "kl_coef": trainer.kl.value,
        "learning_rate": learning_rate,
    }
    return metrics


def _experience(trainer: PPOTrainer, step: int) -> tuple[Rollout, torch.Tensor, dict[str, torch.Tensor]]:
    """Stages 1 to 6: the rollout, the KL of each token (N, T), and the value head where this step fitted it."""
    config = trainer.config
    # 1, 2. Rows and their pictures. 3. Responses, with log-probs and values as they fall out of sampling.
    with trainer.timed("rollout"):
        prompts = trainer.prompts(step)
        with trainer.accelerator.autocast():
            rollout = stages.sample(trainer.policy, prompts, config, config.seed * 1_000_003 + step, trainer.engine)
    # 4. The reference's view of them: the same weights with the adapters off, or a second model.
    with trainer.timed("reference"):
        if config.kl_coef > 0:
            with trainer.accelerator.autocast():
                rollout.ref_logprobs = trainer.policy(
                    prompts, rollout.responses, config.temperature, reference=True
                ).logprobs
    # 5. Scores, with their parts.
    with trainer.timed("reward"):
        by_token = any(part.credit != "last" for part in trainer.reward_funcs.parts)
        pieces = stages.pieces_of(trainer.policy, rollout.responses) if by_token else None
        with rewards_at(step):
            stages.score(rollout, trainer.reward_funcs, config, step, pieces)
    if LEDGER in config.report_to:
        trainer.written = ledger(rollout, config.num_generations, trainer.accelerator)
    head: dict[str, torch.Tensor] = {}
    require_finite_rollout(rollout, trainer.accelerator, step)
    # 6. Token rewards, advantages, returns; statistics over all processes.
    kl = stages.earn(rollout, config, trainer.kl.value, trainer.reduce)
    if step == 1 and config.critic == "head" and config.critic_start == "fit":
        fit_critic(trainer.policy, rollout, config, [place % 2 for place in places(prompts)], trainer.reduce)
        head = {f"value_head.{name}": p.detach().clone() for name, p in trainer.policy.value_head.named_parameters()}
    stages.credit(rollout, config, trainer.reduce)
    return rollout, kl, head


def _blank_picture(trainer: PPOTrainer, rollout: Rollout, step: int) -> float:
    """Share of prompts that earn as much under a grey picture as their responses did on average."""
    config, prompts = trainer.config, rollout.prompts
    blank = stages.blank_prompts(trainer.policy, prompts)
    with distributed.whole(trainer.accelerator, trainer.prepared), trainer.accelerator.autocast():
        responses, _ = generate(
            trainer.policy, blank, 1, config.max_completion_length, config.temperature, config.seed * 1_000_003 + step
        )
    texts = stages.decode(trainer.policy, responses)
    found = trainer.reward_funcs(**stages.reward_arguments(prompts, texts, responses))
    seen = rollout.plain.view(len(prompts), -1).mean(-1)
    as_good = (stages.penalised(found.plain, responses.ended, config) >= seen).float()
    return float(trainer.accelerator.gather(as_good).mean())
