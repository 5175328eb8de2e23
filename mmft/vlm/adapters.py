"""LoRA layers in as little work as they need: y = x (W + s B A)^T + c.

The same numbers as PEFT's x W^T + s (x A^T) B^T to rounding. Where a layer reads more tokens than
in * out / (in + out), W + s B A is made and one product taken, which for narrow models, where rank 16 is no longer
small beside the width, saves a quarter of the update. Where it reads fewer, the thin product is added in place, without
further passes over the output. Full precision alone: in half precision a small update would be lost in the rounding
of W.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from mmft.vlm.products import Linear, linear, packed

# Folded weights are kept for a whole rollout when all of them together are no larger than this.
_KEPT_BYTES = 512 << 20


class FoldedLora(LoraLinear):
    """PEFT's LoRA layer, computed by `_LoraProduct` where that can be; else as PEFT does. See `fold_lora`."""

    folded: Tensor | None = None  # W + s B A, while it is kept

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        base = self.base_layer
        if self.folded is not None and not self.disable_adapters and x.dtype == torch.float32:
            return linear(x, self.folded, base.bias)
        if args or kwargs or self.disable_adapters or not self._foldable(x):
            return super().forward(x, *args, **kwargs)
        a, b, scaling = self._parts()
        return _LoraProduct.apply(x, base.weight, base.bias, a, b, scaling)

    def fold(self) -> Tensor | None:
        """W + s B A, (out, in); None where it cannot be taken as one matrix."""
        if self.disable_adapters or not self._foldable(self.base_layer.weight):
            return None
        a, b, scaling = self._parts()
        return torch.addmm(self.base_layer.weight, b, a, alpha=scaling)

    def _parts(self) -> tuple[Tensor, Tensor, float]:
        name = self.active_adapters[0]
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]

    def _foldable(self, x: Tensor) -> bool:
        """One plain adapter without dropout on a frozen fp32 weight."""
        base, names = self.base_layer, self.active_adapters
        if len(names) != 1 or names[0] not in self.lora_A or names[0] in self.lora_variant or self.merged:
            return False
        a, b, dropout = self.lora_A[names[0]], self.lora_B[names[0]], self.lora_dropout[names[0]]
        return (
            type(base) in (nn.Linear, Linear)
            and all(layer.weight.dtype == x.dtype == torch.float32 for layer in (base, a, b))
            and not any(parameter.requires_grad for parameter in base.parameters())
            and a.bias is None
            and b.bias is None
            and (isinstance(dropout, nn.Identity) or not self.training)
            and not torch.is_autocast_enabled(x.device.type)
        )


class _LoraProduct(torch.autograd.Function):
    """y = x (W + s B A)^T + c, with gradients for x, A and B.

    By one product where that is less work than by two more thin ones. W + s B A is then made again in the backward
    pass instead of being kept for it: r / tokens of a product's work.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        flat, (out_features, in_features) = x.flatten(0, -2), weight.shape
        ctx.one = len(flat) * (in_features + out_features) > in_features * out_features
        ctx.scaling, thin = scaling, flat @ a.t()  # (M, r)
        ctx.save_for_backward(x, weight, a, b, thin)
        if ctx.one:
            return linear(x, torch.addmm(weight, b, a, alpha=scaling), bias)
        return linear(flat, weight, bias).addmm_(thin, b.t(), alpha=scaling).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight, a, b, thin = ctx.saved_tensors
        dy, flat, dx = gradient.flatten(0, -2), x.flatten(0, -2), None
        d_thin = dy @ b * ctx.scaling
        if ctx.needs_input_grad[0]:
            if ctx.one:
                dx = linear(dy, torch.addmm(weight, b, a, alpha=ctx.scaling).t())
            else:
                dx = linear(dy, weight.t()).addmm_(d_thin, a)
            dx = dx.view_as(x)
        da = d_thin.t() @ flat if ctx.needs_input_grad[3] else None
        db = dy.t() @ thin * ctx.scaling if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None


def fold_lora(model: nn.Module) -> None:
    """Lets every LoRA layer of the model compute itself in as little work as it needs."""
    for module in model.modules():
        if type(module) is LoraLinear and not module.fan_in_fan_out:
            module.__class__ = FoldedLora


def unfold_lora(model: nn.Module) -> None:
    """PEFT's own layers again, which leave every weight to the module that it belongs to."""
    for module in model.modules():
        if type(module) is FoldedLora:
            module.__class__ = LoraLinear


@contextmanager
def folded(model: nn.Module, rows: int) -> Iterator[None]:
    """Keeps folded weights while tokens of ``rows`` responses are decoded without gradient, where they are small
    enough."""
    layers = [module for module in model.modules() if isinstance(module, FoldedLora)]
    size = sum(layer.base_layer.weight.nbytes for layer in layers)
    compiled = any(module._compiled_call_impl is not None for module in model.modules())  # see `packed`
    try:
        if size <= _KEPT_BYTES:
            with torch.no_grad():
                for layer in layers:
                    weight = layer.fold()
                    layer.folded = weight if weight is None or compiled else packed(weight, rows)
        yield
    finally:
        for layer in layers:
            layer.folded = None
