"""Weights in shares: which engine runs, FSDP2's shares made, and the time in which every weight is whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn

from mmft.batch import TokenOutputs
from mmft.vlm.decoder import text_decoder
from mmft.vlm.policy import Policy


def engine_of(accelerator: Accelerator) -> str:
    """one, ddp, zero1, zero2, zero3 or fsdp2."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.deepspeed_plugin.zero_stage}"
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.num_processes > 1:
        return "fsdp2"  # on the CPU Accelerate does not know it
    return "one" if accelerator.num_processes == 1 else "ddp"


def shard(accelerator: Accelerator, policy: Policy, optimizer: torch.optim.Optimizer) -> Policy:
    """FSDP2, layer by layer; the rest of the model is a part of its own. Here, for Accelerate does it on GPUs alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.utils import _pytree

    if getattr(policy.model, "is_loaded_in_8bit", False):  # whose scales hang on the very parameter that is replaced
        raise ValueError("model.quantize: int8 weights cannot be FSDP2's shards: take nf4, or DDP or ZeRO to run in")
    if TokenOutputs not in _pytree.SUPPORTED_NODES:
        _pytree.register_dataclass(TokenOutputs)  # on whose tensors it hangs its backward pass
    names = {id(p): n for n, p in policy.named_parameters()}
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy.to(accelerator.device)
    for layer in text_decoder(policy.model, policy.family).layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    policy._get_fsdp_state()._lazy_init()  # before a layer is called by itself, which would make it the root
    shards = dict(policy.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [shards[names[id(p)]] for p in group["params"]]
    return policy


@contextmanager
def whole(accelerator: Accelerator, prepared: nn.Module) -> Iterator[None]:
    """Every weight is whole and readable on every process meanwhile; all of them have to come in and go out together.

    What is written to a weight may be lost afterwards (`load_trained_weights`). May be nested.
    """
    engine = engine_of(accelerator)
    if engine not in ("zero3", "fsdp2") or getattr(prepared, "is_whole", False):
        yield
        return
    prepared.is_whole = True
    try:
        with (_gathered if engine == "zero3" else _unsharded)(prepared):
            yield
    finally:
        prepared.is_whole = False


@contextmanager
def _gathered(engine) -> Iterator[None]:
    """ZeRO-3. Its hooks would give a module's weights away again after the first call, so they go meanwhile."""
    from deepspeed import zero

    offload = engine.optimizer.parameter_offload
    with zero.GatheredParameters(list(engine.module.parameters())):
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        for parameter in engine.module.parameters():
            parameter.ds_active_sub_modules.clear()
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)


@contextmanager
def _unsharded(policy) -> Iterator[None]:
    """FSDP2. A layer that is called by itself would give its weights away after the call."""
    parts = parts_of(policy)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not policy, recurse=False)


def parts_of(policy: nn.Module) -> list[Any]:
    """What FSDP2 brings and gives away as one: the layers, and the policy around them."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in policy.modules() if isinstance(module, FSDPModule)]
