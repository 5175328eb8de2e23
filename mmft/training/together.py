"""What processes decide together: whether one of them failed, which signal one of them got."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator


@dataclass(frozen=True)
class Together:
    """Small agreements; every process has to ask, and gets the same answer."""

    accelerator: Accelerator

    def highest(self, number: int) -> int:
        """The highest number that any process gives."""
        if self.accelerator.num_processes == 1:
            return int(number)
        mine = torch.tensor([int(number)], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    def agree(self, said: bool) -> bool:
        """Whether any process says so."""
        return bool(self.highest(said))

    def say(self, line: str) -> None:
        """A line on the screen, once; this one may be asked by the main process alone."""
        if self.accelerator.is_main_process:
            print(line, flush=True)
