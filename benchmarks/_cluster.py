"""What a plan of a PPO step is made from: machines, response lengths, jobs.

`_cluster_memory.py` and `_cluster_time.py` turn them into bytes and seconds. Everything is arithmetic: nothing is run.
Where each formula comes from stands in docs/scaling.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks._cluster_models import Model

GB, GIB = 10**9, 1 << 30
NF4 = 1 / 2 + 1 / 64 + 1 / 4096  # bytes a weight: 4 bits, a scale per 64, a scale of scales per 256 of those


# ---------------------------------------------------------------- machines


@dataclass(frozen=True)
class Link:
    """``bandwidth``: bytes/s one way and device; ``latency``: seconds per message."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """One device of a cluster, as measured (`_calibrate.py`) or assumed.

    Attributes:
        memory: bytes; ``usable`` of them are planned with.
        rates: (smallest dimension of a product, FLOP/s), rising; between them on a line over logarithms.
        bandwidth: bytes/s of weights and caches that are read.
        stream: bytes/s of element-wise work, reads and writes together.
        host, host_update: seconds that the CPU takes to issue one decoder layer, and one forward and backward of it;
            ``engine_host``: a serving engine's whole token.
        asynchronous: the device works while the CPU issues; else their times add up.
        overlap: share of a gradient's communication that hides behind computing where both could run.
        picture: seconds in which the CPU makes tensors of one picture.
    """

    name: str
    memory: float
    rates: tuple[tuple[int, float], ...]
    bandwidth: float
    stream: float
    host: float
    host_update: float
    asynchronous: bool
    per_node: int
    inside: Link
    across: Link
    overlap: float = 0.0
    picture: float = 0.01
    usable: float = 0.9
    engine_host: float = 0.002
    offload_link: float = 50 * GB
    offload_memory: float = 25 * GB

    def rate(self, smallest: float) -> float:
        """FLOP/s of products whose smallest dimension is this."""
        return _between(self.rates, smallest)

    def product(self, rows: float, inner: float, outer: float, size: int) -> float:
        """Seconds of (rows, inner) @ (inner, outer): what its operations take, or its bytes where that is more."""
        moved = (rows * inner + inner * outer + rows * outer) * size
        return max(2.0 * rows * inner * outer / self.rate(min(rows, inner, outer)), moved / self.bandwidth)

    def together(self, device: float, calls: float, host: float | None = None) -> float:
        """Seconds of a pass whose device work takes ``device`` seconds and that issues so many layers."""
        issuing = calls * (self.host if host is None else host)
        return max(device, issuing) if self.asynchronous else device + issuing


# ---------------------------------------------------------------- how long responses are


@dataclass(frozen=True)
class Lengths:
    """Response lengths: log-normal with this mean and coefficient of variation, whole tokens from 1, cut at ``most``.

    Special case: ``spread`` 0, all responses have the length ``mean``.
    """

    mean: float
    most: int
    spread: float = 0.5

    def survival(self) -> np.ndarray:
        """(most,) P(L > t) for t = 0 .. most - 1."""
        return _survival(self.mean, self.most, self.spread)

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Lengths of that distribution: the smallest t with a uniform number at or above P(L > t)."""
        rising = 1.0 - np.append(self.survival(), 0.0)  # P(L <= t)
        return np.searchsorted(rising, rng.random(shape), side="right").clip(1, self.most)

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation after the cut: E L = sum S(t), E L^2 = sum (2 t + 1) S(t)."""
        s = self.survival()
        mean = float(s.sum())
        return mean, math.sqrt(max(float(((2 * np.arange(self.most) + 1) * s).sum()) - mean**2, 0.0))

    def longest(self, of: float) -> float:
        """Expected longest of so many: sum over t of 1 - (1 - S(t))^of."""
        return float(self.alive(of).sum())

    def alive(self, of: float) -> np.ndarray:
        """(most,) probability that at least one of so many responses is longer than t."""
        return 1.0 - (1.0 - self.survival()) ** of


@cache
def _survival(mean: float, most: int, spread: float) -> np.ndarray:
    t = np.arange(most)
    if not spread:
        return (t < mean).astype(float)
    sigma = math.sqrt(math.log1p(spread**2))
    centre = math.log(mean) - sigma**2 / 2
    beyond = [0.5 * math.erfc((math.log(x) - centre) / sigma / math.sqrt(2)) for x in range(1, most)]
    return np.array([1.0, *beyond])


@cache
def _between(rates: tuple[tuple[int, float], ...], smallest: float) -> float:
    sides, values = zip(*rates, strict=True)
    return float(np.interp(math.log(max(smallest, 1)), np.log(sides), values))


@cache
def normal_maximum(count: int) -> float:
    """Expected largest of ``count`` standard normal numbers, by integrating its distribution function."""
    if count <= 1:
        return 0.0
    x = np.linspace(-9, 9, 20001)
    below = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x]) ** count
    step = x[1] - x[0]
    return float(((x >= 0) - below).sum() * step)


# ---------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """Settings of a run, in the recipe's words.

    Attributes:
        zero: DeepSpeed's stage; 0 with several GPUs is DDP.
        offload: ZeRO-3 with weights, optimizer state and the optimizer's step on the CPU.
        prompts, group: rollout.prompts_per_step over all GPUs, and G.
        micro: train.micro_prompts.
        text: tokens of a prompt beside its picture.
        servers: GPUs of ``gpus`` that a vLLM engine has to itself, in groups of ``tensor``; 0 = the native engine.
        reward: seconds to score a response.
        itemsize: bytes of a weight or activation; ``folds``: LoRA layers are folded where that is cheaper (fp32 alone).
    """

    gpus: int = 1
    zero: int = 0
    tune: str = "lora"
    quantize: bool = False
    offload: bool = False
    checkpointing: bool = False
    prompts: float = 1024
    group: int = 8
    micro: float = 1
    epochs: int = 2
    text: int = 40
    pictures: int = 1
    lengths: Lengths = Lengths(40, 128)
    lora: int = 16
    kl: bool = True
    servers: int = 0
    tensor: int = 1
    reward: float = 1e-4
    itemsize: int = 2
    folds: bool = False

    @property
    def trainers(self) -> int:
        return self.gpus - self.servers

    @property
    def share(self) -> float:
        """Prompts of one trainer."""
        return self.prompts / self.trainers

    def prompt(self, model: Model) -> int:
        """Tokens of one prompt."""
        return self.text + self.pictures * model.picture_tokens


def weight_bytes(model: Model, job: Job) -> float:
    """Of the whole model, without adapters. nf4 packs decoder and tower; embeddings, head and connector stay whole."""
    packed = model.matrices + model.tower.matrices if job.quantize else 0
    return packed * NF4 + (model.parameters - packed) * job.itemsize


def trained(model: Model, job: Job) -> tuple[float, int, int, int]:
    """Trained parameters, and bytes of each: its weight beside the model's, its gradient, its optimizer state.

    LoRA: fp32 adapters with fp32 gradients and Adam's two moments. Full: bf16 gradients of bf16 weights, and an fp32
    copy with two moments (Rajbhandari et al. 2020, section 3.1: K = 12); fp32 weights need no copy.
    """
    if job.tune == "lora":
        return model.adapters(job.lora), 4, 4, 8
    return model.parameters, 0, job.itemsize, 12 if job.itemsize == 2 else 8
