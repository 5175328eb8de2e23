"""The whole state of a run as a checkpoint, and back.

adapter/                     plain PEFT, for everybody
value_head.safetensors       the critic
weights.safetensors          trained weights that are in neither, by their names in the policy
optimizer.safetensors        its state; of a sharded optimizer each process keeps its part in its own file
rank-00000.safetensors       random number generators of one process (and its part of a sharded optimizer)
state.json                   step, KL coefficient, reward moments, guards, fingerprint, seconds
before.json                  the evaluation before training
manifest.json                SHA-256 of each

The position in the data is no part of it: rows and draws are a function of seed and step. Tensors are safetensors,
the rest JSON; nothing is pickled. How a folder gets to the disk whole is `transaction.py`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor

from mmft.evaluation.captioning import CaptionScores
from mmft.training import distributed
from mmft.training.evaluate import Evaluation
from mmft.training.fingerprint import require_same
from mmft.training.random_state import random_state, set_random_state
from mmft.training.transaction import Damaged, attempt, failpoint, read_tensors, verify, write_tensors, write_text
from mmft.vlm.policy import Policy

if TYPE_CHECKING:
    from mmft.training.trainer import PPOTrainer

# Attributes of the trainer with a state_dict of plain data.
STATEFUL = ("kl", "reward_funcs", "guards")
_HEAD = "value_head."


def save_adapter(policy: Policy, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """``adapter/`` (plain PEFT; the whole model when there is no adapter) and ``value_head.safetensors``.

    Args:
        weights: the trained weights by name in the policy, where the policy itself may hold only parts of them.
    """
    target = folder / ("adapter" if hasattr(policy.model, "peft_config") else "model")
    # Only what is trained: a learned reward may have lent the model an adapter of its own.
    chosen = {"selected_adapters": policy.model.active_adapters} if target.name == "adapter" else {}
    if weights is not None and chosen:
        chosen["state_dict"] = {name.removeprefix("model."): value for name, value in weights.items()}
    size = sum(p.nbytes for p in policy.model.parameters() if p.requires_grad or not chosen)
    file = target / ("adapter_model.safetensors" if chosen else "model.safetensors")
    attempt(file, size, lambda: policy.model.save_pretrained(target, **chosen))
    (target / "README.md").unlink(missing_ok=True)  # PEFT's empty template; the model card is the run's own
    if policy.value_head is not None:
        state = {_HEAD + name: value for name, value in policy.value_head.state_dict().items()}
        state |= {name: value for name, value in (weights or {}).items() if name.startswith(_HEAD)}
        head = {name.removeprefix(_HEAD): v.detach().contiguous().cpu() for name, v in state.items()}
        write_tensors(folder / "value_head.safetensors", head)


def save_checkpoint(trainer: PPOTrainer, step: int) -> Path:
    """Writes ``checkpoints/step-XXXXXX`` whole or not at all. Every process has to call it.

    Raises:
        NotSaved: naming file and bytes, where the disk is full; the checkpoint before is untouched.
    """
    if trainer.saved_step == step:
        return trainer.checkpoints.path(step)
    with trainer.watchdog.phase("save", step):
        return _save(trainer, step)


def _save(trainer: PPOTrainer, step: int) -> Path:
    accelerator = trainer.accelerator
    weights = distributed.trained_weights(accelerator, trainer.prepared)
    tensors, plain = distributed.optimizer_state(accelerator, trainer.optimizer)
    sharded = distributed.optimizer_is_sharded(accelerator, trainer.optimizer)

    def write(folder: Path) -> None:
        if accelerator.is_main_process:
            _write_weights(trainer.policy, weights, folder)
            failpoint("first_file")
            if not sharded:
                write_tensors(folder / "optimizer.safetensors", tensors, plain)
            failpoint("half_way")
            write_text(folder / "state.json", json.dumps(_state(trainer, step, sharded)))
            write_text(folder / "before.json", json.dumps(_evaluation_state(trainer.before)))
        generators, words = random_state()
        own = {f"optimizer/{name}": value for name, value in tensors.items()} if sharded else {}
        words |= {"optimizer": plain} if sharded else {}
        failpoint("before_shard")
        write_tensors(folder / _rank_file(accelerator.process_index), generators | own, words)

    best = trainer.guards.best_step
    folder = trainer.checkpoints.save(step, write, keep=() if best is None else (best,))
    trainer.saved_step = step
    return folder


def find_checkpoint(trainer: PPOTrainer, where: str | Path | bool) -> Path:
    """The checkpoint to resume from, verified by the main process; the others take its word.

    Args:
        where: True for the newest whole one of the run folder; another run folder for the newest of that; or a
            checkpoint, which is taken or refused.

    Raises:
        ValueError: there is none, or none is whole.
    """
    return Path(_by_main(trainer, lambda: str(_find(trainer, trainer.run_dir if where is True else Path(where)))))


def _by_main(trainer: PPOTrainer, look: Callable[[], Any]) -> Any:
    """What the main process finds, for all: the others need not read every file as well. Its error is everybody's."""
    said: list[Any] = [None, None]
    if trainer.accelerator.is_main_process:
        try:
            said[0] = look()
        except ValueError as error:
            said[1] = error
    broadcast_object_list(said)
    if said[1] is not None:
        raise said[1]
    return said[0]


def _find(trainer: PPOTrainer, place: Path) -> Path:
    if not (place / "checkpoints").is_dir() and place != trainer.run_dir:
        verify(place)
        return place
    found = trainer.checkpoints_of(place).latest()
    if found is None:
        raise ValueError(f"nothing to resume: {place / 'checkpoints'} holds no checkpoint")
    return found


def load_checkpoint(trainer: PPOTrainer, folder: Path) -> int:
    """Puts the trainer where a checkpoint left it; returns the number of steps done. Every process has to call it.

    Raises:
        ValueError: a file is missing or altered, or it is of another run (see `fingerprint`).
    """
    files = set(_by_main(trainer, lambda: verify(folder)))
    for name in ("state.json", "before.json"):
        if name not in files:
            raise Damaged(f"{folder} is no checkpoint of a run: {name} is missing")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    made = state["fingerprint"]
    require_same(made, trainer.fingerprint, str(folder), trainer.allow_change)
    accelerator = trainer.accelerator
    sharded = distributed.optimizer_is_sharded(accelerator, trainer.optimizer)
    if sharded != state["sharded"] or (sharded and made["world_size"] != accelerator.num_processes):
        raise ValueError(
            f"{folder}: the state of its optimizer is that of {made['world_size']} processes with {made['engine']}, "
            "and fits no others, whatever --allow-change says"
        )
    distributed.load_trained_weights(accelerator, trainer.prepared, _read_weights(trainer.policy, folder, files))
    rank = _rank_file(accelerator.process_index)
    generators, words = read_tensors(folder / rank) if rank in files else ({}, {})  # a process that was not there then
    if sharded:
        own = {n.removeprefix("optimizer/"): v for n, v in generators.items() if n.startswith("optimizer/")}
        distributed.load_optimizer_state(accelerator, trainer.optimizer, own, words["optimizer"])
    else:
        distributed.load_optimizer_state(
            accelerator, trainer.optimizer, *read_tensors(folder / "optimizer.safetensors")
        )
    for name in STATEFUL:
        getattr(trainer, name).load_state_dict(state["parts"][name])
    trainer.seconds_before = state["seconds"]
    trainer.before = _evaluation(json.loads((folder / "before.json").read_text(encoding="utf-8")))
    if made["held_out"] != trainer.fingerprint["held_out"]:
        trainer.before = None  # of other rows: nothing can be compared with it
        trainer.guards.forget_best()
    if generators:
        set_random_state(generators, words)
    return int(state["step"])


def host_state(trainer: PPOTrainer) -> dict[str, Any]:
    """What a step changes before it changes any weight; `restore_host_state` takes it back."""
    return {"rewards": trainer.reward_funcs.state_dict(), "random": random_state()}


def restore_host_state(trainer: PPOTrainer, state: dict[str, Any]) -> None:
    trainer.reward_funcs.load_state_dict(state["rewards"])
    set_random_state(*state["random"])


def _state(trainer: PPOTrainer, step: int, sharded: bool) -> dict[str, Any]:
    return {
        "step": step,
        "fingerprint": trainer.fingerprint,
        "parts": {name: getattr(trainer, name).state_dict() for name in STATEFUL},
        "sharded": sharded,
        "seconds": trainer.seconds(),
    }


# ---------------------------------------------------------------- weights


def _adapter_names(policy: Policy) -> dict[str, str]:
    """Name in the adapter's file -> name in the policy, as PEFT itself translates them."""
    if not hasattr(policy.model, "peft_config"):
        return {}
    from peft import get_peft_model_state_dict

    names = [n for n, p in policy.named_parameters() if p.requires_grad and not n.startswith(_HEAD)]
    numbered = {name.removeprefix("model."): torch.tensor(i) for i, name in enumerate(names)}
    kept = get_peft_model_state_dict(
        policy.model, numbered, policy.model.active_adapters[0], save_embedding_layers=False
    )
    return {saved: names[int(number)] for saved, number in kept.items()}


def _write_weights(policy: Policy, weights: dict[str, Tensor], folder: Path) -> None:
    inside = set(_adapter_names(policy).values())
    if inside:
        save_adapter(policy, folder, weights)
    elif policy.value_head is not None:
        head = {n.removeprefix(_HEAD): v for n, v in weights.items() if n.startswith(_HEAD)}
        write_tensors(folder / "value_head.safetensors", head)
    rest = {n: v for n, v in weights.items() if n not in inside and not n.startswith(_HEAD)}
    if rest:
        write_tensors(folder / "weights.safetensors", rest)


def _read_weights(policy: Policy, folder: Path, files: set[str]) -> dict[str, Tensor]:
    """Every trained weight by its name in the policy. Raises ValueError when some are missing or too many."""
    found: dict[str, Tensor] = {}
    if "adapter/adapter_model.safetensors" in files:
        names = _adapter_names(policy)
        saved = load_file(folder / "adapter" / "adapter_model.safetensors")
        found |= {names.get(name, name): value for name, value in saved.items()}
    if "value_head.safetensors" in files:
        found |= {_HEAD + n: v for n, v in load_file(folder / "value_head.safetensors").items()}
    if "weights.safetensors" in files:
        found |= load_file(folder / "weights.safetensors")
    wanted = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    if odd := sorted(found.keys() ^ wanted):
        raise ValueError(f"{folder} is of another model: {len(odd)} names of trained weights differ, as {odd[0]}")
    return found


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


# ---------------------------------------------------------------- the evaluation before training


def _evaluation_state(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    metrics = evaluation.metrics
    state = {"texts": evaluation.texts, "metrics": {name: _numbers(values) for name, values in metrics.items()}}
    state["parts"] = {name: _numbers(values) for name, values in evaluation.parts.items()}
    if isinstance(metrics, CaptionScores):
        captions = {"signatures": metrics.signatures, "word_pairs": metrics.word_pairs}
        state["captions"] = captions | {"bleu_counts": metrics.bleu_counts.tolist()}
    return state


def _evaluation(state: dict[str, Any] | None) -> Evaluation | None:
    if state is None:
        return None
    metrics = {name: np.array(values, dtype=np.float64) for name, values in state["metrics"].items()}
    if captions := state.get("captions"):
        metrics = CaptionScores(metrics)
        metrics.signatures, metrics.bleu_counts = captions["signatures"], np.array(captions["bleu_counts"])
        metrics.word_pairs = [[tuple(pair) for pair in pairs] for pairs in captions["word_pairs"]]
    parts = {name: np.array(values, dtype=np.float64) for name, values in state.get("parts", {}).items()}
    return Evaluation(state["texts"], metrics, parts)


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
