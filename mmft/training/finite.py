"""Numbers that are not finite end a run before they reach a weight, on all processes together.

The processes agree by one sum of flags. Only when somebody raised one do they tell each other whose rows it were, so
that every screen names the process and the rows.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mmft.batch import Rollout

_NAMED = 8  # rows per process


def require_finite(accelerator: Accelerator, where: str, bad: str, rows: list[str]) -> None:
    """Every process has to ask, with what it has found itself.

    Args:
        where: "step 3, pass 1, minibatch 2".
        bad: what is not finite, as "the loss"; empty where all is.
        rows: ids of the rows that it was made from.

    Raises:
        FloatingPointError: something is not finite on some process; names that, the process and the rows.
    """
    flag = torch.tensor([1.0 if bad else 0.0], device=accelerator.device)
    if accelerator.reduce(flag, "sum").item() == 0:
        return
    found = gather_object([(accelerator.process_index, bad, rows)])
    said = [f"{bad} is not finite on rank {rank} (rows {_some(rows)})" for rank, bad, rows in found if bad]
    raise FloatingPointError(
        f"{where}: {'; '.join(said)}. No process has applied this update. Lower train.learning_rate, or look at the "
        "rewards of these rows"
    )


def require_finite_rollout(rollout: Rollout, accelerator: Accelerator, step: int) -> None:
    """What sampling, reference and rewards said of the real tokens; statistics would spread it over all processes."""
    mask, prompts = rollout.responses.mask, rollout.prompts
    seen = {
        "a log-probability": rollout.old.logprobs,
        "a value": rollout.old.values,
        "a log-probability of the reference": rollout.ref_logprobs,
        "a score": rollout.scores[:, None],
    }
    bad = {name: (~x.isfinite() & mask).any(-1) for name, x in seen.items() if x is not None}
    names = [name for name, flags in bad.items() if flags.any()]
    flags = torch.stack(list(bad.values())).any(0).view(len(prompts), -1).any(-1)  # (B,)
    rows = [prompts.row_ids[i] for i in flags.nonzero().flatten().tolist()]
    require_finite(accelerator, f"step {step}, rollout", " and ".join(names), rows)


def _some(rows: list[str]) -> str:
    return ", ".join(rows[:_NAMED]) + (f", … {len(rows)} in all" if len(rows) > _NAMED else "")
