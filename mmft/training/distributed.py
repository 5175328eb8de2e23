"""One process, several (DDP), or sharded ones (ZeRO-1/2/3, FSDP2): everything that differs between them.

The trainer runs the same stages everywhere. What it asks of this file: who prepares the model and the optimizer, when
the weights are whole, how a gradient becomes a step, and what there is to save.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mmft.training.config import PPOConfig
from mmft.training.sharding import engine_of, parts_of, shard
from mmft.training.sharding import whole as whole
from mmft.vlm.adapters import unfold_lora
from mmft.vlm.logprobs import score_in_head
from mmft.vlm.policy import Policy


def make_accelerator(policy: Policy, config: PPOConfig) -> Accelerator:
    """What the launcher asked for; on the CPU where there is no GPU, or where it says so.

    Raises:
        ValueError: an engine that is not one of ours, or prompts that cannot be shared evenly.
    """
    on_cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    # Of a tower some weights may take no part: its last layer, read at the one before; all of it, without pictures.
    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=not policy.tower_frozen)]
    if "LOCAL_RANK" in os.environ:
        # DeepSpeed would otherwise take a backend of its own, and come up as so many worlds of one process.
        backend = {"backend": "gloo"} if on_cpu else {}
        # Collectives give up after the watchdog, which knows whom they wait for.
        patience = timedelta(seconds=config.timeout + 60) if config.timeout else timedelta(days=7)
        handlers.append(InitProcessGroupKwargs(timeout=patience, **backend))
    if on_cpu and deepspeed:
        from deepspeed import ops

        # Its own all-reduce for CPUs is compiled at the first start: that takes a compiler and minutes, and a build
        # that is cut off leaves a lock at which every later run hangs.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Accelerate takes the device from its launcher; a launch on CPU has to say so itself. But to it a DeepSpeed that
    # is told so is no DeepSpeed.
    accelerator = Accelerator(cpu=on_cpu and not deepspeed, kwargs_handlers=handlers)
    shares = accelerator.num_processes * config.num_mini_batches
    if config.prompts_per_step % shares:
        raise ValueError(
            f"prompts_per_step={config.prompts_per_step} cannot be shared evenly by "
            f"{accelerator.num_processes} processes x {config.num_mini_batches} minibatches"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _settle_deepspeed(accelerator.deepspeed_plugin, config)
    elif engine_of(accelerator) == "fsdp2":
        _check_fsdp(accelerator, config)
    return accelerator


def _settle_deepspeed(plugin, config: PPOConfig) -> None:
    """What DeepSpeed wants to be told beside its stage, and a launch file cannot know."""
    if plugin.zero_stage not in (1, 2, 3):
        raise ValueError(
            f"zero_stage: {plugin.zero_stage} is not supported: 1, 2 or 3 (0 is accelerate_configs/ddp.yaml)"
        )
    # transformers would load every later model (a judge, a second trainer's) in pieces.
    unset_hf_deepspeed_config()
    plugin.deepspeed_config |= {
        # No loader is prepared, so it could not guess; the update counts its own tokens and microbatches.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _check_fsdp(accelerator: Accelerator, config: PPOConfig) -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP of the first version is not supported: set fsdp_version: 2 in the launch file")
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("fsdp_offload_params is not supported; accelerate_configs/zero3_offload.yaml offloads")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("mixed_precision: fp16 is not supported under FSDP2: take bf16")
    if config.optimizer == "adamw_8bit":
        raise ValueError("optimizer='adamw_8bit' cannot work on FSDP2's shards: take adamw, or DDP or ZeRO to run in")


def make_optimizer(policy: Policy, config: PPOConfig) -> torch.optim.Optimizer:
    """AdamW, 8-bit AdamW or SGD over the trainable weights; the value head with its own learning rate.

    Raises:
        ValueError: 8-bit AdamW without bitsandbytes.
    """
    groups = _parameter_groups(policy, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    if config.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError("optimizer='adamw_8bit' needs bitsandbytes: pip install 'mmft[quant]'") from error
        return AdamW8bit(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)


def _parameter_groups(policy: Policy, config: PPOConfig) -> list[dict[str, Any]]:
    """Adapters (or all weights), and the value head with its own learning rate."""
    head = list(policy.value_head.parameters()) if policy.value_head is not None else []
    known = {id(p) for p in head}
    rest = [p for p in policy.parameters() if p.requires_grad and id(p) not in known]
    value_rate = config.learning_rate if config.value_learning_rate is None else config.value_learning_rate
    groups = [{"params": rest, "lr": config.learning_rate, "base_lr": config.learning_rate}]
    return groups + ([{"params": head, "lr": value_rate, "base_lr": value_rate}] if head else [])


def prepare(accelerator: Accelerator, policy: Policy, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
    """The policy and its optimizer as this run's engine wants them."""
    engine = engine_of(accelerator)
    if engine in ("zero3", "fsdp2") and any(hasattr(reference, "peft_config") for reference in policy._reference):
        raise ValueError(
            f"the reference shares its frozen weights with the policy, and {engine} takes them apart: to go on from an "
            "adapter (model.adapter), launch by DDP or ZeRO 1 or 2, or set algorithm.kl_coef to 0"
        )
    for reference in policy._reference:  # no part of the module, so nobody else moves it
        reference.to(accelerator.device)
    if engine == "zero3":
        # It brings the weights of a module when that module is called, and on all processes in the same order: so
        # nobody may read a weight from outside, nor call a module more often where there are more tokens.
        unfold_lora(policy.model)
        score_in_head(policy.model)
    _watch_gradients(policy)
    if engine == "fsdp2":
        return shard(accelerator, policy, optimizer), optimizer
    return accelerator.prepare(policy, optimizer)


def layout(accelerator: Accelerator) -> dict[str, Any]:
    """``world_size``, and ``engine``: one, ddp, zero1, zero2, zero3 or fsdp2."""
    return {"world_size": accelerator.num_processes, "engine": engine_of(accelerator)}


# ---------------------------------------------------------------- a step


def _watch_gradients(policy: Policy) -> None:
    """Keeps the largest element of this process's own gradients, before they are summed with those of others."""
    policy.largest_gradient = torch.zeros(())

    def look(gradient: Tensor) -> None:
        largest = torch.linalg.vector_norm(gradient, float("inf")).float()  # NaN where anything is
        policy.largest_gradient = torch.maximum(policy.largest_gradient.to(largest), largest)

    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.register_hook(look)


def take_largest_gradient(accelerator: Accelerator, prepared: nn.Module) -> Tensor:
    """The largest element of this process's gradients since last asked; 0 under FSDP2, where nobody sees them."""
    policy = accelerator.unwrap_model(prepared)
    largest, policy.largest_gradient = policy.largest_gradient, torch.zeros(())
    return largest


@contextmanager
def accumulating(accelerator: Accelerator, prepared: nn.Module, last: bool) -> Iterator[None]:
    """Around forward and backward of a microbatch: processes exchange gradients at a minibatch's ``last`` alone."""
    engine = engine_of(accelerator)
    if engine.startswith("zero"):
        prepared.set_gradient_accumulation_boundary(last)
        yield
    elif engine == "fsdp2":
        prepared.set_requires_gradient_sync(last)
        yield
    else:
        with nullcontext() if last else accelerator.no_sync(prepared):
            yield


def backward(accelerator: Accelerator, prepared: nn.Module, loss: Tensor) -> None:
    """Adds the gradient of a microbatch; no more. (Accelerate's own takes DeepSpeed's step along.)"""
    if engine_of(accelerator).startswith("zero"):
        prepared.backward(loss)
    else:
        accelerator.backward(loss)


def gradient_norm(accelerator: Accelerator, prepared: nn.Module, longest: float) -> Tensor:
    """Length of the whole gradient, the same on every process; the coming step is shortened to ``longest``."""
    if engine_of(accelerator).startswith("zero"):
        norm = torch.as_tensor(_zero_norm(prepared.optimizer), dtype=torch.float32)
        return torch.where(norm >= 0, norm, torch.nan)  # DeepSpeed says -1 where it is not finite
    trained = [p for p in prepared.parameters() if p.requires_grad]
    if engine_of(accelerator) == "fsdp2":
        return nn.utils.clip_grad_norm_(trained, longest).full_tensor().float()
    return torch.as_tensor(accelerator.clip_grad_norm_(trained, longest), dtype=torch.float32)


def _zero_norm(zero) -> Tensor | float:
    if hasattr(zero, "scaled_global_norm"):
        return zero.scaled_global_norm()
    from deepspeed.runtime.utils import combine_grad_norm_groups

    return combine_grad_norm_groups(zero._get_norm_groups())


def apply_gradient(accelerator: Accelerator, prepared: nn.Module, optimizer) -> None:
    """The optimizer's step, and no gradient after it."""
    if engine_of(accelerator).startswith("zero"):
        prepared.step()
    else:
        optimizer.step()
        drop_gradient(accelerator, prepared, optimizer)


def drop_gradient(accelerator: Accelerator, prepared: nn.Module, optimizer) -> None:
    """Forgets the gradient of a minibatch without a step."""
    engine = engine_of(accelerator)
    if not engine.startswith("zero"):
        optimizer.zero_grad(set_to_none=True)
        return
    zero = prepared.optimizer  # as it does itself where a loss scale was too high
    if engine == "zero3":
        zero._overflow_clean_up(zero.loss_scale)
    else:
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        zero.micro_step_id = -1
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
        else:
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None


# ---------------------------------------------------------------- what there is to save


def trained_weights(accelerator: Accelerator, prepared: nn.Module) -> dict[str, Tensor]:
    """Full copies on the CPU of every trainable weight, by name in the policy; every process has to ask.

    In the precision that the optimizer works in: of weights that ZeRO keeps twice, the fp32 ones.
    """
    full = _full_copy(engine_of(accelerator))
    return {name: full(p).cpu().clone().contiguous() for name, p in _trained(accelerator, prepared).items()}


def _full_copy(engine: str):
    if engine.startswith("zero"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param
    return lambda p: p.detach().full_tensor() if engine == "fsdp2" else p.detach()


@torch.no_grad()
def load_trained_weights(accelerator: Accelerator, prepared: nn.Module, weights: dict[str, Tensor]) -> None:
    """Puts back what `trained_weights` gave, or some of it; every process has to ask, with the same weights.

    Not within `whole`.

    Raises:
        ValueError: a weight is of no trainable parameter, or of another shape.
    """
    parameters = _trained(accelerator, prepared)
    for name, value in weights.items():
        if name not in parameters:
            raise ValueError(f"weight {name!r} belongs to no trainable parameter of this model")
        parameter = parameters[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if shape != value.shape:
            raise ValueError(f"weight {name!r} has shape {tuple(value.shape)}, the model's has {tuple(shape)}")
        _put(accelerator, parameter, value.to(accelerator.device))


def _put(accelerator: Accelerator, parameter: nn.Parameter, value: Tensor) -> None:
    engine = engine_of(accelerator)
    if engine == "fsdp2":
        from torch.distributed.tensor import distribute_tensor

        parameter.copy_(distribute_tensor(value.to(parameter.dtype), parameter.device_mesh, parameter.placements))
    elif engine.startswith("zero"):
        from deepspeed import zero
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        with zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        if engine == "zero3":
            # Its own function for a full value does not know that a share may be filled up with zeros at its end.
            shares = nn.functional.pad(value.float().flatten(), (0, -value.numel() % accelerator.num_processes))
            share = shares.chunk(accelerator.num_processes)[accelerator.process_index]
            safe_set_local_fp32_param(parameter, share)
        else:
            safe_set_full_fp32_param(parameter, value.float())
    else:
        parameter.copy_(value)


def _trained(accelerator: Accelerator, prepared: nn.Module) -> dict[str, nn.Parameter]:
    if engine_of(accelerator) == "fsdp2":
        for part in parts_of(prepared):
            part.reshard()  # a forward pass without its backward leaves the outermost part whole
    return {n: p for n, p in accelerator.unwrap_model(prepared).named_parameters() if p.requires_grad}


def optimizer_is_sharded(accelerator: Accelerator, optimizer) -> bool:
    """Whether each process holds another part of the optimizer's state; else the first one's is everybody's."""
    return engine_of(accelerator) not in ("one", "ddp")


def optimizer_state(accelerator: Accelerator, optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This process's state of the optimizer: tensors by "index/name", and what is not a tensor."""
    tensors, plain = {}, {}
    state = _innermost(optimizer).state
    for index, slot in enumerate(_slots(optimizer)):
        for name, value in state.get(slot, {}).items():
            if isinstance(value, Tensor):
                value = value.to_local() if hasattr(value, "to_local") else value
                tensors[f"{index}/{name}"] = value.detach().cpu().clone().contiguous()
            else:
                plain[f"{index}/{name}"] = value
    return tensors, plain


def load_optimizer_state(
    accelerator: Accelerator, optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]
) -> None:
    """Puts back what `optimizer_state` gave to a process of the same rank in the same layout.

    Raises:
        ValueError: the state is of more parameters than this optimizer has.
    """
    slots, state = _slots(optimizer), _innermost(optimizer).state
    state.clear()
    for key, value in (tensors | plain).items():
        index, name = key.split("/", 1)
        if int(index) >= len(slots):
            raise ValueError(f"optimizer state {key!r}: this optimizer has {len(slots)} parts, numbered from 0")
        slot = slots[int(index)]
        if isinstance(value, Tensor):
            value = value.clone() if name == "step" else _like(slot, value)
        state[slot][name] = value


def _like(slot: Tensor, value: Tensor) -> Tensor:
    """This process's part of a state, as the optimizer keeps it beside ``slot``."""
    value = value.to(slot.device, copy=True)
    if hasattr(slot, "device_mesh") and value.shape == slot.to_local().shape:
        from torch.distributed.tensor import DTensor

        mesh = slot.device_mesh, slot.placements
        return DTensor.from_local(value, *mesh, run_check=False, shape=slot.shape, stride=slot.stride())
    return value


def _innermost(optimizer) -> torch.optim.Optimizer:
    """The optimizer below what Accelerate and DeepSpeed wrap around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _slots(optimizer) -> list[Tensor]:
    """What the optimizer's state is keyed by, in order: parameters, or ZeRO's flat parts of them."""
    while hasattr(optimizer, "optimizer"):
        for flat in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            if hasattr(optimizer, flat):
                return list(getattr(optimizer, flat))
        optimizer = optimizer.optimizer
    return [p for group in optimizer.param_groups for p in group["params"]]


def close() -> None:
    """Ends this process well, where it is one of several and all work is done; else does nothing.

    After the last of what is to happen at exit, but without the interpreter's own farewell: now and then a thread of
    gloo outlives it, and a process that has done all its work aborts ("terminate called without an active exception").
    """
    if not torch.distributed.is_initialized():
        return
    torch.distributed.barrier()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
