"""Products of fp32 matrices on AMD's CPUs, by oneDNN's kernels in place of MKL's.

torch brings both libraries and takes MKL for fp32, which reaches half to nine tenths of oneDNN's rate on these CPUs
(docs/engine.md has the table). torch's public way to oneDNN wants every array converted there and back; the operator
called here is the one that torch's own compiler puts in place of a linear layer, and takes ordinary tensors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

# Elements of the weight. Below it the calling of the operator costs more than its kernel gains.
_LEAST = 100_000
_CPU_INFO = Path("/proc/cpuinfo")


def _is_here() -> bool:
    """Whether this is the kind of CPU, and the kind of torch, where oneDNN was measured to be faster."""
    amd = _CPU_INFO.is_file() and "AuthenticAMD" in _CPU_INFO.read_text()
    return amd and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_HERE = _is_here()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + c: (..., K), (N, K), (N,) -> (..., N), as `torch.nn.functional.linear`, with its gradients.

    The weight may be a transposed view, or what `packed` returned; then nothing may need a gradient.
    """
    if weight.is_mkldnn:
        return _product(x, weight, bias)
    if not _faster(x, weight):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def packed(weight: Tensor, rows: int) -> Tensor:
    """A copy of the weight (N, K) in the layout that oneDNN reads fastest where x has few ``rows``, for `linear`
    alone; the weight itself where oneDNN is not used. Not for code that `torch.compile` traces, which takes it for an
    ordinary tensor."""
    if not _HERE or weight.numel() < _LEAST or weight.device.type != "cpu":
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def quicken(model: nn.Module) -> None:
    """Makes every plain linear layer of the model a `Linear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def _faster(x: Tensor, weight: Tensor) -> bool:
    return (
        _HERE
        and weight.numel() >= _LEAST
        and x.dim() > 1
        and x.numel() > 0
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and not hasattr(weight, "ds_id")  # ZeRO-3 takes such weights away between passes, and has its own product
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # For strided rows oneDNN has a reference kernel alone, hundreds of times slower.
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Of a frozen weight the input is not needed again, and is the larger one.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        dy = gradient.flatten(0, -2)
        dx = linear(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        dw = dy.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        db = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dw, db
