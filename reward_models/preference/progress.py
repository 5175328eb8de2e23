"""What of a training of a preference head is kept, so that a killed one goes on to the same end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Saver(Protocol):
    """Keeps the state of a training that is to survive being killed; whose files those are is not known here."""

    def due(self, step: int) -> bool:
        """Whether the state after this step is to be kept."""

    def save(self, step: int, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Keeps it, in place of the one before. May end the process, if that is why it was due."""

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The state to go on from; None for a new training."""


@dataclass
class Progress:
    """Everything that changes in a training, as tensors and plain data, and back."""

    model: nn.Module
    head: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    identity: str
    losses: list[float] = field(default_factory=list)
    rights: list[float] = field(default_factory=list)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"weight/{name}": p.detach().cpu().clone() for name, p in self._weights().items()}
        tensors["random"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value.cpu().clone() for name, value in slots.items()}
        rates = {"last_epoch": self.schedule.last_epoch, "rates": self.schedule.get_last_lr()}
        return tensors, rates | {"losses": self.losses, "rights": self.rights, "identity": self.identity}

    @torch.no_grad()
    def resume(self, saver: Saver | None) -> int:
        """Takes the saver's state, if it has one; the steps done."""
        found = saver.latest() if saver is not None else None
        if found is None:
            return 0
        step, tensors, plain = found
        if plain["identity"] != self.identity:
            raise ValueError("the training to resume was of other pairs or options; start it anew, without --resume")
        for name, parameter in self._weights().items():
            parameter.copy_(tensors[f"weight/{name}"])
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                slots.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})
        self.schedule.last_epoch = plain["last_epoch"]
        for group, rate in zip(self.optimizer.param_groups, plain["rates"]):
            group["lr"] = rate
        self.losses, self.rights = plain["losses"], plain["rights"]
        torch.set_rng_state(tensors["random"])
        if "random/cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random/cuda"])
        return step

    def _weights(self) -> dict[str, nn.Parameter]:
        adapters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return {f"head/{n}": p for n, p in self.head.named_parameters()} | adapters


def identity_of(examples: Sequence[Any], options: dict[str, Any]) -> str:
    """Of a training: its options, and the words of its examples."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for example in examples:
        words = {k: v for k, v in vars(example).items() if k != "images"}
        digest.update(json.dumps(words, sort_keys=True, default=str).encode())
    return digest.hexdigest()
