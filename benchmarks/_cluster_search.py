"""The settings under which a model learns fastest on so many GPUs, and what a serving engine would change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks._cluster import Job, Machine, weight_bytes
from benchmarks._cluster_memory import peak
from benchmarks._cluster_models import Model
from benchmarks._cluster_time import seconds

MOST_PROMPTS = 1024  # of a step, over all GPUs
SIMPLER = 1.03  # a setting further down the list must be faster by so much


@dataclass(frozen=True)
class Plan:
    """A job that fits, its bytes at the highest phase, and its phases' seconds."""

    job: Job
    peak: float
    phases: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def rate(self) -> float:
        """Responses per second, by all GPUs together."""
        return self.job.prompts * self.job.group / self.seconds

    @property
    def setting(self) -> str:
        """In words: engine, quantisation, what is recomputed."""
        job = self.job
        sharing = "one" if job.trainers == 1 else f"ZeRO-{job.zero}" if job.zero else "DDP"
        words = [sharing, *(["nf4"] if job.quantize else []), *(["offload"] if job.offload else [])]
        return " ".join([*words, *(["ckpt"] if job.checkpointing else [])])


def _settings(job: Job) -> Iterator[Job]:
    """Ways to share and save memory, the simplest first. nf4 weights are not sharded; offload is for full training."""
    stages = (0,) if job.trainers == 1 else (0, 1, 2, 3)
    for checkpointing in (False, True):
        for zero in stages:
            yield replace(job, zero=zero, checkpointing=checkpointing)
        if job.tune == "lora" and not job.servers:
            yield replace(job, quantize=True, checkpointing=checkpointing)
    if job.tune == "full":
        yield replace(job, zero=3, offload=True, checkpointing=True)


def _powers(most: float) -> Iterator[int]:
    value = 1
    while value <= most:
        yield value
        value *= 2


def fastest(model: Model, job: Job, machine: Machine, most_prompts: int = MOST_PROMPTS) -> Plan | None:
    """The plan with the most responses per second that fits the machine, or None.

    Chosen are ZeRO's stage, quantisation, checkpointing, prompts per step (whole groups, the same number on every GPU)
    and prompts per microbatch: of those the most that fit, since neither time nor waiting falls with smaller ones.
    """
    best: Plan | None = None
    room = machine.memory * machine.usable
    for setting in _settings(job):
        for share in reversed(list(_powers(max(most_prompts // job.trainers, 1)))):
            fitting = None
            for micro in _powers(share):
                tried = replace(setting, prompts=share * job.trainers, micro=micro)
                if peak(model, tried) > room:
                    break
                fitting = tried
            if fitting is None:
                continue
            plan = Plan(fitting, peak(model, fitting), seconds(model, fitting, machine))
            if best is None or plan.rate > best.rate * SIMPLER:
                best = plan
            break  # fewer prompts a step share the same fixed costs among fewer responses
    return best


def _served_jobs(model: Model, job: Job, machine: Machine) -> Iterator[Job]:
    """Divisions of the GPUs between training and a serving engine whose replicas hold the weights."""
    for eighths in (1, 2, 3, 4, 5, 6):
        servers = job.gpus * eighths // 8
        if not 0 < servers < job.gpus:
            continue
        for tensor in (1, 2, 4, 8):
            if servers % tensor == 0 and _holds(model, job, machine, tensor):
                yield replace(job, servers=servers, tensor=tensor)


def _holds(model: Model, job: Job, machine: Machine, tensor: int) -> bool:
    """Whether the weights leave a fifth of so many GPUs' memory to keys and values, and key heads divide evenly."""
    room = machine.memory * machine.usable * tensor
    return model.kv_heads % tensor == 0 and weight_bytes(model, job) < 0.8 * room


def fastest_served(model: Model, job: Job, machine: Machine) -> Plan | None:
    """The fastest division of the GPUs with an engine on its own ones; training and serving wait for each other."""
    plans = [fastest(model, served, machine) for served in _served_jobs(model, job, machine)]
    return max((p for p in plans if p), key=lambda p: p.rate, default=None)


def fastest_in_turns(model: Model, job: Job, machine: Machine) -> Plan | None:
    """An engine that had all GPUs while it writes, and gave their memory back: the most an engine could give.

    Counted as twice the GPUs, one half of which serves.
    """
    sizes = [t for t in (1, 2, 4, 8) if job.gpus % t == 0 and _holds(model, job, machine, t)]
    fits = [replace(job, gpus=2 * job.gpus, servers=job.gpus, tensor=t) for t in sizes]
    plans = [fastest(model, served, machine) for served in fits]
    return max((p for p in plans if p), key=lambda p: p.rate, default=None)
