"""The numbers of a step, over the responses of all processes, and the ledger of what was written in it."""

from __future__ import annotations

import hashlib
import json
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mmft.algorithms.masked import explained_variance
from mmft.batch import Rollout
from mmft.evaluation.health import text_health


def measure(
    rollout: Rollout, kl: Tensor, counted: list[str], critic: bool, accelerator: Accelerator, reduce
) -> dict[str, float]:
    """Means over the responses of all processes; every process has to ask.

    Args:
        kl: of each token (N, T), in nats.
        counted: the parts of the reward whose weight is not 0.
        critic: whether there are values to be measured, too.
        reduce: sums statistics over processes.
    """
    length = rollout.responses.mask.sum(-1).float()
    device = rollout.scores.device
    per_response = {
        "reward": rollout.plain if rollout.keep is None else rollout.plain.where(rollout.keep, torch.nan),
        "kl": kl.sum(-1),
        "entropy": rollout.old.entropy.sum(-1) / length.clamp_min(1),
        "response_length": length,
        "ended_fraction": rollout.responses.ended.float(),
    }
    per_response |= {f"reward/{name}": part for name, part in rollout.parts.items()}
    health = text_health(rollout.texts)
    per_response |= {name: torch.as_tensor(v, dtype=torch.float32) for name, v in health.items()}
    gathered = {name: accelerator.gather(v.to(device).contiguous()) for name, v in per_response.items()}
    metrics = {k: float(v[~v.isnan()].mean()) if (~v.isnan()).any() else float("nan") for k, v in gathered.items()}
    kept = gathered["reward"][~gathered["reward"].isnan()]
    equal = not len(kept) or bool(kept.min() == kept.max())  # the deviation of ten times 0.7 is not 0 in float32
    metrics["kept"] = float(len(kept))
    metrics["reward_std"] = 0.0 if equal else float(kept.std(unbiased=False))
    metrics |= _shares(rollout, counted, accelerator)
    metrics["tokens"] = float(gathered["response_length"].sum())
    if critic:
        metrics["explained_variance"] = float(
            explained_variance(rollout.old.values, rollout.returns, rollout.update_mask, reduce=reduce)
        )
    return metrics


def warn_of_equal_rewards(kept: int) -> None:
    """Says that a step had nothing to compare, of so many rewards that were not dropped."""
    what = f"all {kept} rewards of a step are equal" if kept else "all responses were dropped"
    warnings.warn(f"{what}: it taught nothing (said once)", stacklevel=3)


def ledger(rollout: Rollout, group: int, accelerator: Accelerator) -> list[tuple[str, str]]:
    """What was written in a step, in the order of the run: row id and a hash of each response's tokens."""
    responses = rollout.responses
    tokens = [ids[mask].tolist() for ids, mask in zip(responses.ids.cpu(), responses.mask.cpu(), strict=True)]
    hashes = [hashlib.blake2b(json.dumps(row).encode(), digest_size=8).hexdigest() for row in tokens]
    mine = [(rollout.prompts.row_ids[i // group], found) for i, found in enumerate(hashes)]
    everyone = gather_object(mine) if accelerator.num_processes > 1 else mine
    return sorted(everyone, key=lambda entry: int(entry[0].rpartition("@")[2]))


def _shares(rollout: Rollout, counted: list[str], accelerator: Accelerator) -> dict[str, float]:
    """Each part's share in the spread of the total: its standard deviation over the sum of all parts'."""
    device = rollout.scores.device
    spread = {
        name: float(accelerator.gather(rollout.weighted[name].to(device)).std(unbiased=False)) for name in counted
    }
    whole = sum(spread.values())
    return {f"share/{name}": value / whole for name, value in spread.items()} if whole else {}
