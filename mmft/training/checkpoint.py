"""Adapter, value head and trainer state on disk.

A checkpoint is written beside its place, described by a manifest of SHA-256 sums, and renamed into place, so that a
folder named ``step-...`` is a whole one. Tensors are safetensors; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from mmft.vlm.policy import Policy

if TYPE_CHECKING:
    from mmft.training.trainer import PPOTrainer


def save_adapter(policy: Policy, folder: Path) -> None:
    """``adapter/`` (plain PEFT; the whole model when there is no adapter) and ``value_head.safetensors``."""
    target = folder / ("adapter" if hasattr(policy.model, "peft_config") else "model")
    # Only what is trained: a learned reward may have lent the model an adapter of its own.
    chosen = {"selected_adapters": policy.model.active_adapters} if target.name == "adapter" else {}
    policy.model.save_pretrained(target, **chosen)
    (target / "README.md").unlink(missing_ok=True)  # PEFT's empty template; the model card is the run's own
    if policy.value_head is not None:
        head = {k: v.detach().contiguous().cpu() for k, v in policy.value_head.state_dict().items()}
        save_file(head, folder / "value_head.safetensors")


def save_checkpoint(trainer: PPOTrainer, step: int) -> Path:
    """Writes ``checkpoints/step-XXXXXX`` whole or not at all. Every process may call it; the main one writes."""
    final = trainer.run_dir / "checkpoints" / f"step-{step:06d}"
    if trainer.accelerator.is_main_process:
        working = final.with_name(f".writing-{final.name}")
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        save_adapter(trainer.policy, working)
        if not hasattr(trainer.policy.model, "peft_config"):
            # As the model holds them: a saved model has the Hub's names for its weights, which are others.
            save_file(_trained(trainer.policy), working / "weights.safetensors")
        tensors, plain = _flatten(trainer.optimizer.state_dict()["state"])
        save_file(tensors, working / "optimizer.safetensors")
        state = _identity(trainer) | {"step": step, "kl": trainer.kl.state_dict(), "optimizer": plain}
        state |= {"rewards": trainer.reward_funcs.state_dict(), "guards": trainer.guards.state_dict()}
        (working / "state.json").write_text(json.dumps(state))
        files = {str(p.relative_to(working)): _sha256(p) for p in sorted(working.rglob("*")) if p.is_file()}
        (working / "manifest.json").write_text(json.dumps({"step": step, "sha256": files}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(working, final)
    trainer.accelerator.wait_for_everyone()
    return final


def load_checkpoint(trainer: PPOTrainer, where: str | Path | bool) -> int:
    """Puts the trainer where a checkpoint left it; returns the number of steps done.

    Raises:
        ValueError: there is no checkpoint, a file of it is missing or altered, or it is of another seed.
    """
    folder = trainer.run_dir if where is True else Path(where)
    if not (folder / "manifest.json").is_file():
        folder = _latest(folder)
    _verify(folder)
    state = json.loads((folder / "state.json").read_text())
    _require_same(trainer, state, folder)
    model = trainer.policy.model
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(folder / "adapter" / "adapter_model.safetensors"))
    else:
        _put_back(trainer.policy, load_file(folder / "weights.safetensors"), folder)
    if trainer.policy.value_head is not None:
        trainer.policy.value_head.load_state_dict(load_file(folder / "value_head.safetensors"))
    optimizer = trainer.optimizer.state_dict()
    optimizer["state"] = _unflatten(load_file(folder / "optimizer.safetensors"), state["optimizer"])
    trainer.optimizer.load_state_dict(optimizer)
    trainer.kl.load_state_dict(state["kl"])
    trainer.reward_funcs.load_state_dict(state["rewards"])
    trainer.guards.load_state_dict(state["guards"])
    return int(state["step"])


def _identity(trainer: PPOTrainer) -> dict[str, Any]:
    """What a checkpoint and the run that resumes it must have in common."""
    adapters = getattr(trainer.policy.model, "peft_config", {})
    trained = [adapters[name] for name in trainer.policy.model.active_adapters] if adapters else []
    shapes = {n: list(p.shape) for n, p in trainer.policy.named_parameters() if p.requires_grad}
    return {
        "seed": trainer.config.seed,
        "critic": trainer.config.critic,
        "prompts_per_step": trainer.config.prompts_per_step,
        "lora_rank": [config.r for config in trained],
        "trained_weights": hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16],
    }


def _require_same(trainer: PPOTrainer, state: dict[str, Any], folder: Path) -> None:
    for name, value in _identity(trainer).items():
        if state.get(name) != value:
            raise ValueError(f"{folder}: made with {name} {state.get(name)}, this run has {name} {value}")


def _trained(policy: Policy) -> dict[str, torch.Tensor]:
    return {n: p.detach().contiguous().cpu() for n, p in policy.model.named_parameters() if p.requires_grad}


def _put_back(policy: Policy, saved: dict[str, torch.Tensor], folder: Path) -> None:
    parameters = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    if odd := sorted(saved.keys() ^ parameters.keys()):
        raise ValueError(f"{folder / 'weights.safetensors'} is of another model: {len(odd)} names differ, as {odd[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def _latest(run_dir: Path) -> Path:
    found = sorted((run_dir / "checkpoints").glob("step-*"))
    if not found:
        raise ValueError(f"nothing to resume: {run_dir / 'checkpoints'} holds no checkpoint")
    return found[-1]


def _verify(folder: Path) -> None:
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{folder} is no whole checkpoint: manifest.json is missing")
    for name, digest in json.loads(manifest.read_text())["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing from the checkpoint")
        if _sha256(path) != digest:
            raise ValueError(f"{path} was altered: its SHA-256 is not the manifest's; take another checkpoint")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flatten(state: dict[int, dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Optimizer state -> tensors by "parameter/name", and what is not a tensor."""
    tensors, plain = {}, {}
    for index, values in state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}/{name}"] = value.detach().contiguous().cpu()
            else:
                plain[f"{index}/{name}"] = value
    return tensors, plain


def _unflatten(tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | plain).items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    return state
