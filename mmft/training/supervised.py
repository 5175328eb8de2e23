"""TRL's `SFTTrainer` with checkpoints that are transactions: nothing of them is pickled, and a resumed one is exact.

transformers' own checkpoints are `torch.save` files in a folder that is filled in place. What is overridden here are
the places where it writes and reads them; when it does so, and how it finds its place in the data again, stays its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTTrainer

from mmft.training import distributed
from mmft.training.interrupts import Interrupts
from mmft.training.random_state import random_state, set_random_state
from mmft.training.transaction import Checkpoints, read_tensors, write_tensors, write_text


class ResumableSFTTrainer(SFTTrainer):
    """See the module. ``checkpoints`` and ``identity`` are set by whoever makes it.

    Attributes:
        checkpoints: where they go.
        identity: plain data saved with each, for the caller to compare.
    """

    checkpoints: Checkpoints
    identity: dict[str, Any]

    def _save_checkpoint(self, model, trial) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return  # their optimizers are in parts that transformers keeps to itself; such a warm start begins anew
        self.checkpoints.save(self.state.global_step, self._write)

    def _write(self, folder: Path) -> None:
        if self.is_world_process_zero():
            weights = {n: p.detach().cpu().contiguous() for n, p in self._trained().items()}
            write_tensors(folder / "weights.safetensors", weights)
            tensors, plain = distributed.optimizer_state(self.accelerator, self.optimizer)
            write_tensors(folder / "optimizer.safetensors", tensors, plain)
            write_text(folder / "scheduler.json", json.dumps(self.lr_scheduler.state_dict()))
            write_text(folder / "identity.json", json.dumps(self.identity))
            self.state.save_to_json(str(folder / "trainer_state.json"))
        write_tensors(folder / f"rank-{self.args.process_index:05d}.safetensors", *random_state())

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / "weights.safetensors")
        for name, parameter in self._trained().items():
            parameter.copy_(saved[name])

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None:
            return
        state = read_tensors(Path(checkpoint) / "optimizer.safetensors")
        distributed.load_optimizer_state(self.accelerator, self.optimizer, *state)
        self.lr_scheduler.load_state_dict(json.loads((Path(checkpoint) / "scheduler.json").read_text()))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is not None:
            set_random_state(*read_tensors(Path(checkpoint) / f"rank-{self.args.process_index:05d}.safetensors"))

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        model = self.accelerator.unwrap_model(self.model)
        return {n: p for n, p in model.named_parameters() if p.requires_grad}


class LeaveWhenAsked(TrainerCallback):
    """A signal ends the training after the step at hand, with a checkpoint."""

    def __init__(self, interrupts: Interrupts):
        self.interrupts, self.asked = interrupts, 0

    def on_step_end(self, args, state, control, **_):
        self.asked = self.interrupts.asked()
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control
