"""Products of fp32 matrices: MKL, which torch takes, against oneDNN, which `mmft/vlm/products.py` takes on AMD's CPUs.

    python benchmarks/products.py [--threads 2] [--json FILE]

GFLOP/s of x W^T (rows, in) -> (rows, out) by `torch.nn.functional.linear`, by oneDNN on the ordinary weight, and by
oneDNN on a packed one; and of the gradient dy W by `torch.mm` and by oneDNN. The sizes are those of layers of the
bundled model and of SmolVLM-256M, the rows those of decoding (16), of an update (245, 490) and of a vision tower
(2,048); one and the same weight again and again, so that the caches hold it. `decoding` reads the weights of 30 layers
in turn, 430 MB, as a step of decoding does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks._ceilings import seconds  # noqa: E402
from mmft.vlm import products  # noqa: E402

CPU = torch.device("cpu")
ROWS = (16, 245, 490, 2048)
LAYERS = ((128, 336), (336, 128), (576, 576), (576, 1536), (1536, 576), (768, 3072), (576, 49280))
DECODER = ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)) * 30
WAYS = ("MKL", "oneDNN", "packed", "dx MKL", "dx oneDNN")


def ways(rows: int, layers: tuple[tuple[int, int], ...]) -> dict[str, Callable[[], object]]:
    """Way -> all products of the layers, one after another."""
    inputs = {size: torch.randn(rows, size) for size in {size for layer in layers for size in layer}}
    weights = [torch.randn(outer, inner) for inner, outer in layers]
    kept = [products.packed(weight, rows) for weight in weights]
    onednn = products._product

    def each(function: Callable[..., object], of: list[torch.Tensor], side: int) -> Callable[[], object]:
        return lambda: [function(inputs[layer[side]], w) for layer, w in zip(layers, of, strict=True)]

    return {
        "MKL": each(linear, weights, 0),
        "oneDNN": each(partial(onednn, bias=None), weights, 0),
        "packed": each(partial(onednn, bias=None), kept, 0),
        "dx MKL": each(torch.mm, weights, 1),
        "dx oneDNN": each(lambda x, w: onednn(x, w.t(), None), weights, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        print("this torch was built without oneDNN: nothing to compare")
        return 0
    if not products._HERE:
        print("not an AMD CPU: mmft leaves products to torch here, whatever follows")
    products._HERE, products._LEAST = True, 0  # packs everywhere, and the small ones, too
    print(f"GFLOP/s, fp32, {options.threads} threads\n{'':<24}" + "".join(f"{way:>11}" for way in WAYS))
    found = []
    cases = [(f"{r:>4} x {i:>4} -> {o:>5}", r, ((i, o),)) for r in ROWS for i, o in LAYERS]
    with torch.no_grad():
        for name, rows, layers in [*cases, ("  16, decoding", 16, DECODER)]:
            flops = sum(2.0 * rows * inner * outer for inner, outer in layers)
            rates = {way: flops / seconds(run, CPU, 0.2) / 1e9 for way, run in ways(rows, layers).items()}
            print(f"{name:<24}" + "".join(f"{rates[way]:>11.0f}" for way in WAYS), flush=True)
            found.append({"case": " ".join(name.split())} | rates)
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "rates": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
