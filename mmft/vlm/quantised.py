"""Frozen weights in 4 or 8 bits, by bitsandbytes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from mmft.vlm.families import CONNECTORS

LARGE_BLOCK = 256 << 10  # bytes; on a CPU larger ones are mapped by themselves
_MMAP_THRESHOLD = -3  # glibc's number of that option
# Not quantised: the head, whose logits are the policy, and the connector, which is small and may be trained.
IN_FULL = [rf".*\b{name.replace('.', '[.]')}" for name in ("lm_head", *CONNECTORS)]


def quantisation(kind: str, dtype: Any):
    """transformers' configuration of "nf4" (4 bits, their scales in 8) or "int8"; computed in ``dtype``."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=IN_FULL)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
        llm_int8_skip_modules=IN_FULL,  # read for 4 bits as well, in spite of its name
    )


@contextmanager
def read_tensor_by_tensor() -> Iterator[None]:
    """Lets transformers read each tensor of a file when its turn comes, into memory that goes when it is quantised.

    It maps files otherwise. The pages of a mapped file count as the process's own as soon as they are read, so that
    all of the full weights would lie in memory beside the quantised ones, and stay there with the first tensor that is
    kept as it is.
    """
    from transformers import modeling_utils

    opened = modeling_utils.safe_open

    def read(*args, **kwargs):
        return opened(*args, **(kwargs | {"backend": "pread"}))

    with mock.patch.object(modeling_utils, "safe_open", read):
        yield
    _give_freed_memory_back()


def _give_freed_memory_back() -> None:
    """Has glibc return every large block when it is freed, from now on. Else holes between activations stay with the
    process, and they come to more than the quantised weights; it costs page faults (see docs/memory.md)."""
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.malloc_trim(0)


def compute_as_in_training(model: nn.Module) -> None:
    """Keeps bitsandbytes from computing otherwise where no gradient is asked for.

    4 bits: on CPUs with AVX-512 bf16 it repacks the weights at the first pass without gradient and never unpacks them,
    and the product with those has no gradient: after one rollout nothing would flow back through the base layers.
    8 bits: on a CPU a layer in evaluation mode also rounds its inputs, so that responses would be sampled from another
    distribution than is trained. And PEFT's DoRA, which measures a layer's whole weight in every pass, puts it back
    without its scales, which bitsandbytes then forgets.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if type(module).__name__ == "Linear8bitLt" and module.weight.device.type == "cpu":
            module.train(True).train = partial(_stay, module)
            module.init_8bit_state = partial(_keep_scales, module)


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _keep_scales(module: nn.Module) -> None:
    scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    type(module).init_8bit_state(module)
    module.state.SCB = scales
