"""What a machine can do at most, measured: matrix products per second, and bytes of memory per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch

from mmft.vlm.products import linear

SQUARES = (1024, 2048, 4096)
READ_MIB = (1, 4, 16, 64, 256, 1024)


def seconds(function: Callable[[], object], device: torch.device, least: float = 0.15) -> float:
    """The shortest of several calls: at least two, and for at least ``least`` seconds, after one to warm up."""
    best, began, calls = float("inf"), time.perf_counter(), -1
    while calls < 2 or time.perf_counter() - began < least:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls += 1
        if calls:
            best = min(best, time.perf_counter() - start)
    return best


def product_rate(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, least: float = 0.15) -> float:
    """FLOP/s of (rows, inner) @ (inner, outer) at the fastest of: the right side as it is or transposed by `torch.mm`,
    or by the engine's own way to a product."""
    rows, inner, outer = size
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    right = (
        torch.randn(inner, outer, device=device, dtype=dtype),
        torch.randn(outer, inner, device=device).to(dtype).t(),
    )
    out = torch.empty(rows, outer, device=device, dtype=dtype)
    ways = [*(partial(torch.mm, a, b, out=out) for b in right), *(partial(linear, a, b.t()) for b in right)]
    return 2.0 * rows * inner * outer / min(seconds(way, device, least) for way in ways)


def square_rates(dtype: torch.dtype, device: torch.device) -> dict[int, float]:
    """Side of a square product -> FLOP/s."""
    return {n: product_rate((n, n, n), dtype, device, 0.5) for n in SQUARES}


def rate_at(products: dict[tuple[int, int, int], int], dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of many products of these sizes, each at its own best: what a phase could reach with products alone."""
    flops = {size: 2.0 * size[0] * size[1] * size[2] * times for size, times in products.items()}
    spent = sum(f / product_rate(size, dtype, device, 0.03) for size, f in flops.items())
    return sum(flops.values()) / spent


def bandwidths(device: torch.device, sizes: Iterable[int] = READ_MIB) -> dict[str, dict[int, float]]:
    """ "read" and "copy" (read and written bytes together): MiB of the array -> bytes/s."""
    found: dict[str, dict[int, float]] = {"read": {}, "copy": {}}
    for mib in sizes:
        array = torch.ones(mib << 18, device=device)  # fp32
        matrix, half = array.view(-1, 1024), array.view(2, -1)
        reads = partial(torch.mv, matrix, torch.ones(1024, device=device)), array.sum
        found["read"][mib] = array.nbytes / min(seconds(read, device) for read in reads)
        found["copy"][mib] = array.nbytes / seconds(partial(half[0].copy_, half[1]), device)
    return found


def bandwidth_for(working_set: float, found: dict[str, dict[int, float]]) -> float:
    """Bytes/s for a pass over so many bytes: at the smallest measured size that holds them, else at the largest."""
    best = {int(mib): max(found[kind][mib] for kind in found) for mib in found["read"]}
    return next((rate for mib, rate in sorted(best.items()) if mib << 20 >= working_set), best[max(best)])


def synchronised(device: torch.device) -> Callable[[], float]:
    """A clock that waits for the device."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock
