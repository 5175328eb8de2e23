"""The numbers of a step, over the responses of all processes, and the ledger of what was written in it."""

from __future__ import annotations

import hashlib
import json

import numpy as np
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
    """Means over the responses (or prompts) of all processes; every process has to ask.

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
    per_response |= {name: torch.as_tensor(v, dtype=torch.float32) for name, v in (health | _groups(rollout)).items()}
    gathered = {name: accelerator.gather(v.to(device).contiguous()) for name, v in per_response.items()}
    metrics = {k: float(v[~v.isnan()].mean()) if (~v.isnan()).any() else float("nan") for k, v in gathered.items()}
    kept = gathered["reward"][~gathered["reward"].isnan()]
    equal = not len(kept) or bool(kept.min() == kept.max())  # the deviation of ten times 0.7 is not 0 in float32
    metrics["reward_std"] = 0.0 if equal else float(kept.std(unbiased=False))
    metrics |= _shares(rollout, counted, accelerator)
    metrics["tokens"] = float(gathered["response_length"].sum())
    if critic:
        metrics["explained_variance"] = float(
            explained_variance(rollout.old.values, rollout.returns, rollout.update_mask, reduce=reduce)
        )
    return metrics


def _groups(rollout: Rollout) -> dict[str, list[float]]:
    """Per prompt: whether its responses all earned the same (those that count), and the share of different texts."""
    group = len(rollout.texts) // len(rollout.prompts)
    if group < 2:
        return {}
    equal, unique = [], []
    plain = rollout.plain.cpu()
    keep = torch.ones_like(plain, dtype=torch.bool) if rollout.keep is None else rollout.keep.cpu()
    for first in range(0, len(rollout.texts), group):
        own = slice(first, first + group)
        earned = plain[own][keep[own]]
        equal.append(float(len(earned) < 2 or bool(earned.min() == earned.max())))
        unique.append(len(set(rollout.texts[own])) / group)
    return {"equal_groups": equal, "unique_responses": unique}


def distributions(rollout: Rollout, ratios: list[Tensor]) -> dict[str, np.ndarray]:
    """What a step's histograms are made of: numbers of this process's tokens (T) and responses (N), flat.

    Args:
        ratios: new over old probability of each token in the last pass, per microbatch.
    """
    mask = rollout.update_mask
    found = {"advantage": rollout.advantages[mask], "return": rollout.returns[mask], "reward": rollout.plain}
    found["response_length"] = rollout.responses.mask.sum(-1)
    if rollout.old.values is not None:
        found["value"] = rollout.old.values[mask]
    if ratios:
        found["ratio"] = torch.cat(ratios)
    return {name: values.detach().float().cpu().numpy() for name, values in found.items() if values.numel()}


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
