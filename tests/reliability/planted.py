"""Numbers that are not finite, put where a run would meet them; one on rank 1 of two when it is run by itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from mmft.training import distributed
from mmft.training import rollout as stages
from mmft.training import update as updates
from mmft.vlm import policy as policies

PLACES = ("loss", "gradient", "log-ratio", "value", "sampled log-prob", "sampled value", "reference")
VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


class _Poison(torch.autograd.Function):
    """x, with another gradient."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.value, None


@contextmanager
def planted(trainer, place: str, value: float) -> Iterator[None]:
    """``value`` in place of the right number, at one of `PLACES`, in the trainer's next step."""

    def after(module, name: str, change: Callable) -> mock._patch:
        original = getattr(module, name)
        return mock.patch.object(module, name, lambda *args, **options: change(original(*args, **options)))

    def loss(found):
        return found[0] + value, found[1]

    def gradient(found):
        return _Poison.apply(found[0], value), found[1]

    def log_ratio(found):
        if not torch.is_grad_enabled():
            return found
        logprobs = found[0].clone()
        logprobs[0] = logprobs[0] + value  # of one token
        return logprobs, found[1]

    def sampled(name: str):
        def change(rollout):
            getattr(rollout.old, name)[-1, 0] = value
            return rollout

        return change

    def own(x):  # of the update alone: without gradients the critic is being read, not trained
        return x + value if torch.is_grad_enabled() else x

    if place == "value":
        hook = trainer.policy.value_head.register_forward_hook(lambda module, inputs, x: own(x))
        try:
            yield
        finally:
            hook.remove()
        return
    if place == "reference":
        # Asked of the policy between sampling and the update, without gradients.
        patch = mock.patch.object(
            type(trainer.policy), "forward", _poisoned_reference(type(trainer.policy).forward, value)
        )
    else:
        patch = {
            "loss": lambda: after(updates, "microbatch_loss", loss),
            "gradient": lambda: after(updates, "microbatch_loss", gradient),
            "log-ratio": lambda: after(policies, "token_logprobs", log_ratio),
            "sampled log-prob": lambda: after(stages, "sample", sampled("logprobs")),
            "sampled value": lambda: after(stages, "sample", sampled("values")),
        }[place]()
    with patch:
        yield


def _poisoned_reference(forward, value: float):
    def poisoned(self, *args, reference=False, **options):
        found = forward(self, *args, reference=reference, **options)
        if reference:
            found.logprobs = found.logprobs.clone()
            found.logprobs[-1, 0] = value
        return found

    return poisoned


def state(trainer) -> dict[str, torch.Tensor]:
    """Every trained weight and every number of the optimizer, under any engine."""
    weights = distributed.trained_weights(trainer.accelerator, trainer.prepared)
    return weights | distributed.optimizer_state(trainer.accelerator, trainer.optimizer)[0]


def main(folder: Path, model: Path, names: list[str]) -> None:
    """One step for each place and value, planted on rank 1 alone; each process writes down what it then saw."""
    from test_trainer import trainer_of

    found = {}
    for place in PLACES:
        for name in names:
            value = VALUES[name]
            trainer = trainer_of(lambda family: model, folder / "run", critic_start="zero")
            rank, said = trainer.accelerator.process_index, None
            trainer.step(1)
            before = state(trainer)
            try:
                with planted(trainer, place, value if rank == 1 else 0.0 if place != "gradient" else 1.0):
                    trainer.step(2)
            except FloatingPointError as error:
                said = str(error)
            after = state(trainer)
            same = after.keys() == before.keys() and all(torch.equal(x, before[key]) for key, x in after.items())
            found[f"{place} {name}"] = {"said": said, "unchanged": same, "rows": trainer.prompts(2).row_ids}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
