"""Scoring with a model that belongs to somebody else: switch its adapters, look, and put everything back.

A policy that is trained with adapters holds the frozen base weights that the preference head was trained on. One
more adapter on the same weights makes the judge; nothing is loaded twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reward_models.preference.backbone import fingerprint


def attach(model: nn.Module, adapter: Path | None, name: str, expected: str) -> None:
    """Loads the adapter (if there is one) into a `PeftModel` under `name`, frozen, leaving its state as it was.

    Raises:
        ValueError: no `PeftModel`, base weights that are trained or are not those of fingerprint `expected`, or a
            name that is taken.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError(
            f"a preference head can share the weights of a PeftModel (a policy with adapters), got "
            f"{type(model).__name__}; load the reward with a backbone of its own instead"
        )
    found = fingerprint(model)
    if found != expected:
        raise ValueError(
            f"the model's base weights ({found}) are not those that the preference head was trained on ({expected}): "
            "same checkpoint, same dtype and same quantisation are needed to share them"
        )
    trained = [n for n, p in model.get_base_model().named_parameters() if p.requires_grad and not _is_adapter(n)]
    if trained:
        raise ValueError(
            f"the model's base weights are being trained ({trained[0]} and {len(trained) - 1} more); the preference "
            "head needs them as they were: load the reward with a backbone of its own"
        )
    if adapter is None:
        return
    if name in model.peft_config:
        raise ValueError(f"the model has an adapter {name!r} already; give share() another adapter_name")
    known = set(map(id, _switches(model)))
    with quiet(), _restored(model):
        device = str(next(model.parameters()).device)
        model.load_adapter(str(adapter), name, is_trainable=False, torch_device=device)
    for layer in _switches(model):
        if id(layer) not in known:  # wrapped just now, around a layer that the policy's adapter leaves alone
            layer.training = layer.get_base_layer().training


def detach(model: nn.Module, name: str) -> None:
    """Takes the adapter out of a `PeftModel` again, and the wrappers that `attach` put around layers for it alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    peft: Any = model
    if name not in getattr(peft, "peft_config", {}):
        return
    with quiet(), _restored(model):
        peft.delete_adapter(name)
    for parent in list(model.modules()):
        for key, layer in list(parent.named_children()):
            if isinstance(layer, BaseTunerLayer) and not layer._all_available_adapter_names():
                setattr(parent, key, layer.get_base_layer())


@contextmanager
def quiet() -> Iterator[None]:
    """Without two warnings of PEFT: of a name in transformers that is about to change, and of several adapters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*multiple adapters")
        yield


@contextmanager
def borrowed(model: nn.Module, name: str | None) -> Iterator[None]:
    """The model with adapter `name` alone (None: without adapters), in evaluation mode and without gradients.

    Afterwards, exceptions included: active adapters, adapters on or off, trainable parameters and the mode of every
    module are what they were.
    """
    with _restored(model), torch.no_grad(), torch.autocast(next(model.parameters()).device.type, enabled=False):
        model.eval()
        if hasattr(model, "peft_config"):
            adapted: Any = model
            if name is not None:
                adapted.set_adapter(name, inference_mode=True)
            for layer in _switches(model):
                if layer.disable_adapters != (name is None):
                    layer.enable_adapters(name is not None)
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    peft: Any = model if hasattr(model, "peft_config") else None
    modes = [(module, module.training) for module in model.modules()]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    layers = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in _switches(model)]
    if peft is not None:
        active, tuner_active = peft.active_adapter, peft.base_model.active_adapter
    try:
        yield
    finally:
        for layer, names, disabled in layers:
            if list(layer.active_adapters) != names:
                layer.set_adapter(names)
            if layer.disable_adapters != disabled:
                layer.enable_adapters(not disabled)
        if peft is not None:
            peft.active_adapter, peft.base_model.active_adapter = active, tuner_active
        # Last: switching adapters on makes their weights trainable, whatever they were before.
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


def _switches(model: nn.Module) -> list[Any]:
    """The modules in which adapters live."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _is_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name
