"""Seconds of one PPO step, phase by phase: matrix products at a machine's rates, bytes at its bandwidths, collectives
on its links, and the wait for the longest responses."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from benchmarks import _work
from benchmarks._cluster import NF4, Job, Machine, normal_maximum, trained, weight_bytes
from benchmarks._cluster_models import Model
from mmft.vlm.adapters import _KEPT_BYTES
from mmft.vlm.logprobs import KEPT_BYTES

SAMPLING = 12  # passes over a row of logits that sampling one token takes


# ---------------------------------------------------------------- communication


def gather_seconds(machine: Machine, ranks: int, size: float) -> float:
    """All-gather, or reduce-scatter, of ``size`` bytes in all by a ring: (n - 1) / n of them pass through each device.

    Between nodes the rings of a node's devices share its adapters: each device's own.
    """
    nodes, inside = math.ceil(ranks / machine.per_node), min(ranks, machine.per_node)
    bandwidth, latency = machine.inside.bandwidth, (ranks - 1) * machine.inside.latency
    if nodes > 1:
        bandwidth = min(bandwidth, inside * machine.across.bandwidth)
        latency = nodes * machine.across.latency + (ranks - nodes) * machine.inside.latency
    return latency + (ranks - 1) / ranks * size / bandwidth


def reduce_seconds(machine: Machine, ranks: int, size: float) -> float:
    """All-reduce: 2 (n - 1) / n of the bytes (Patarasuk & Yuan 2009), along trees whose depth is the latency."""
    nodes, inside = math.ceil(ranks / machine.per_node), min(ranks, machine.per_node)
    moved = 2 * (gather_seconds(machine, ranks, size) - gather_seconds(machine, ranks, 0.0))
    depth = math.ceil(math.log2(nodes)) * machine.across.latency + (inside - 1) * machine.inside.latency
    return 2 * depth + moved


def volumes(model: Model, job: Job) -> dict[str, float]:
    """Bytes of one optimizer step that go through collectives: "reduce" (all-reduced), "scatter" (reduce-scattered),
    "gather" (all-gathered)."""
    count, extra, gradient, _ = trained(model, job)
    size = extra or job.itemsize
    if job.trainers == 1:
        return {"reduce": 0.0, "scatter": 0.0, "gather": 0.0}
    if job.zero == 0:
        return {"reduce": count * gradient, "scatter": 0.0, "gather": 0.0}
    micros = job.share / job.micro
    if job.zero < 3:  # ZeRO-2 keeps no whole gradient, so that every microbatch scatters its own
        times = micros if job.zero == 2 else 1
        return {"reduce": 0.0, "scatter": times * count * gradient, "gather": count * size}
    weights = weight_bytes(model, job) + count * extra
    return {"reduce": 0.0, "scatter": micros * count * gradient, "gather": 2 * micros * weights}


# ---------------------------------------------------------------- time


def _moved(model: Model) -> tuple[float, float]:
    """Numbers that element-wise work of a layer reads and writes for one token, forward; and of a token's logits."""
    h, i, q, k = model.hidden, model.intermediate, model.queries, model.keys
    return 20 * h + 20 * q + 18 * k + 5 * i, 6 * model.vocabulary


def _products(machine: Machine, work: _work.Work, size: int) -> float:
    return sum(machine.product(*shape, size) * times for shape, times in work.products.items())


def _pairs(model: Model, job: Job, length: float, prompts: float) -> float:
    """Operations of a layer's attention over the pairs that the causal mask lets through."""
    p = job.prompt(model)
    answers = job.group * ((length - 1) * p + length * (length - 1) / 2)
    return prompts * (p * (p + 1) / 2 + answers) * 4 * model.queries


@cache
def _pass(model: Model, job: Job, machine: Machine, prompts: float, length: float, backward: bool, adapted: bool):
    """Device seconds of decoder and head over ``prompts`` groups with responses of ``length``: forward, backward."""
    work, size = _work.Work(), job.itemsize
    tokens = prompts * (job.prompt(model) + job.group * (length - 1))
    predicting = prompts * (1 + job.group * (length - 1))
    written = prompts * job.group * length
    linears = model.linears(job.lora if job.tune == "lora" else 0)
    see = (tokens if job.folds else 1) if adapted and job.tune == "lora" else 0
    _work._forward(work, linears, tokens, predicting, 1, adapters_see=see)
    work.products[(predicting, model.hidden, model.vocabulary)] += 1
    attention = model.layers * _pairs(model, job, length, prompts)
    per_token, per_logit = _moved(model)
    moved = model.layers * tokens * per_token * size + written * per_logit * 4
    unpack = model.matrices * (NF4 + 2) / machine.bandwidth if job.quantize else 0.0
    rate = machine.rate(1 << 20)
    forward = _products(machine, work, size) + attention / rate + moved / machine.stream + unpack
    if not backward:
        return forward, 0.0
    work = _work.Work()
    if job.tune == "lora":
        _work._backward(work, linears, tokens, predicting, 1, see)
    else:
        for x in linears:
            rows = predicting if x.last else tokens
            work.products[(rows, x.outer, x.inner)] += 1
            work.products[(x.inner, rows, x.outer)] += 1
        work.products[(model.hidden, predicting, model.vocabulary)] += 1
    again = written * model.vocabulary * 4 > KEPT_BYTES  # probabilities made a second time
    work.products[(predicting, model.vocabulary, model.hidden)] += 2 if again else 1
    return forward, _products(machine, work, size) + 2 * attention / rate + 2 * moved / machine.stream + unpack


@cache
def vision_seconds(model: Model, machine: Machine, pictures: float, size: int) -> float:
    """Device seconds of tower and connector, forward."""
    tower, patches = model.tower, pictures * model.patches
    products = sum(machine.product(patches, *s, size) for s in tower.linears) * tower.layers
    products += machine.product(patches, tower.patch, tower.hidden, size)
    merged = pictures * model.picture_tokens
    products += sum(machine.product(merged, *s, size) for s in tower.connector(model.hidden))
    seen = tower.full * model.patches + (tower.layers - tower.full) * min(tower.window or model.patches, model.patches)
    moved = tower.layers * patches * (20 * tower.hidden + 6 * tower.intermediate) * size
    return products + 4 * tower.hidden * patches * seen / machine.rate(1 << 20) + moved / machine.stream


class Decoder:
    """Seconds of one token of ``active`` responses, by the engine that writes them.

    Args:
        tensor: GPUs that share every matrix; above 1 (or ``engine``) it is a serving engine, whose tokens the CPU
            issues as one graph, and which reads a prompt's keys for each of its responses.
    """

    def __init__(self, model: Model, job: Job, machine: Machine, tensor: int = 1, engine: bool = False):
        self.model, self.job, self.machine, self.tensor, self.engine = model, job, machine, tensor, engine
        self._rows = 2.0 ** np.arange(0, 21)
        self._seconds = np.array([self._products(rows) for rows in self._rows])

    def _products(self, rows: float) -> float:
        model, machine, size = self.model, self.machine, self.job.itemsize
        layer = sum(machine.product(rows, i, o / self.tensor, size) for i, o in model.shapes)
        if self.job.tune == "lora" and not self.job.folds:
            layer += (
                sum(
                    machine.product(rows, i, self.job.lora, 4) + machine.product(rows, self.job.lora, o, 4)
                    for i, o in model.shapes
                )
                / self.tensor
            )
        head = machine.product(rows, model.hidden, model.vocabulary / self.tensor, size)
        per_token, _ = _moved(model)
        moved = rows * (model.layers * per_token * size + SAMPLING * model.vocabulary * 4) / self.tensor
        seconds = model.layers * layer + head + moved / machine.stream
        if self.job.quantize:
            seconds += model.matrices * (NF4 + 2) / machine.bandwidth
        if self.tensor > 1:
            seconds += 2 * model.layers * reduce_seconds(machine, self.tensor, rows * model.hidden * size)
        return seconds

    def token(self, t: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Seconds of token t, with so many responses under way."""
        model, p = self.model, self.job.prompt(self.model)
        prompts = active if self.engine else np.minimum(active, np.maximum(active / self.job.group, 1))
        seen = prompts * p + active * t
        read = seen * model.cached * self.job.itemsize / self.tensor / self.machine.bandwidth
        work = 4 * model.layers * model.queries * active * (p + t) / self.tensor / self.machine.rate(1 << 20)
        device = np.interp(active, self._rows, self._seconds) + np.maximum(read, work)
        if self.engine:
            return np.maximum(device, self.machine.engine_host)
        issuing = (model.layers + 1) * self.machine.host
        return np.maximum(device, issuing) if self.machine.asynchronous else device + issuing

    def seconds(self, rows: float, ranks: int = 1) -> tuple[float, float]:
        """Expected time to write ``rows`` responses: on one of ``ranks`` devices, and on the slowest of them.

        The slowest still writes while any response of all devices is unfinished, and its responses have more tokens:
        the mean, and the expected maximum of a normal sum's deviation. An upper bound, since the two need not fall
        on the same device.
        """
        lengths = self.job.lengths
        t, s = np.arange(lengths.most), lengths.survival()
        mean, deviation = lengths.moments
        alone = lengths.alive(rows)
        use = alone > 0
        active = rows * s[use] / alone[use]
        one = float((alone[use] * self.token(t[use], active)).sum())
        if ranks == 1:
            return one, one
        anyone = lengths.alive(rows * ranks)
        use = anyone > 0
        slowest = float((anyone[use] * self.token(t[use], np.maximum(rows * s[use], 1.0))).sum())
        marginal = float((self.token(t, np.full(len(t), rows)) - self.token(t, np.full(len(t), rows * 0.9))).mean())
        slowest += normal_maximum(ranks) * deviation * math.sqrt(rows) * marginal / (0.1 * rows)
        return one, max(one, slowest)


@cache
def _decoder(model: Model, job: Job, machine: Machine, tensor: int, engine: bool) -> Decoder:
    return Decoder(model, job, machine, tensor, engine)


@cache
def _written(model: Model, job: Job, machine: Machine, rows: float, ranks: int, tensor: int, engine: bool):
    return _decoder(model, job, machine, tensor, engine).seconds(rows, ranks)


def seconds(model: Model, job: Job, machine: Machine) -> dict[str, float]:
    """Phase -> seconds of one PPO step, as the slowest trainer spends it; "waiting" is for the longest responses."""
    n, share, size = job.trainers, job.share, job.itemsize
    mean, deviation = job.lengths.moments
    pictures = share * job.pictures
    alike = _alike(job)
    found: dict[str, float] = {"prepare": pictures * machine.picture}
    found["vision"] = machine.together(vision_seconds(model, machine, pictures, size), model.tower.layers)
    gathered = weight_bytes(model, job) if job.zero == 3 else 0.0
    found["gather"] = gather_seconds(machine, n, gathered) + _fetched(job, machine, gathered)
    forward, _ = _pass(model, alike, machine, share, mean, False, True)
    if job.servers:
        found |= _served(model, job, machine)
        found["logprobs"] = machine.together(forward, model.layers)  # the policy's own of what the engine wrote
    else:
        prompt, _ = _pass(model, alike, machine, share, 1.0, False, True)
        found["prefill"] = machine.together(prompt, model.layers)
        one, slowest = _written(model, alike, machine, share * job.group, n, 1, False)
        # Adapters are folded into copies of their weights once a rollout, where those are few.
        folds = job.folds and job.tune == "lora" and model.matrices * size <= _KEPT_BYTES
        folding = 2 * model.matrices * size / machine.stream if folds else 0.0
        found |= {"decode": one + folding, "waiting": slowest - one}
    if job.kl:
        plain, _ = _pass(model, alike, machine, share, mean, False, False)
        extra = found["vision"] if job.tune == "full" else 0.0  # the copy has a tower of its own
        found["reference"] = machine.together(plain, model.layers) + extra
    found["reward"] = share * job.group * job.reward
    return found | _update(model, job, machine, mean, deviation)


def _alike(job: Job) -> Job:
    """What a pass on one device depends on: jobs that differ in the rest share cached results."""
    return Job(
        tune=job.tune,
        quantize=job.quantize,
        group=job.group,
        text=job.text,
        pictures=job.pictures,
        lengths=job.lengths,
        lora=job.lora,
        itemsize=job.itemsize,
        folds=job.folds,
    )


def _served(model: Model, job: Job, machine: Machine) -> dict[str, float]:
    """Phases of a separate engine: ``servers / tensor`` replicas share the responses; none more at a time than fit."""
    replicas = job.servers // job.tensor
    rows, p, size = job.prompts * job.group / replicas, job.prompt(model), job.itemsize
    mean, _ = job.lengths.moments
    room = machine.memory * machine.usable * job.tensor - weight_bytes(model, job)
    fits = max(room / ((p / job.group + mean) * model.cached * size), 1.0)
    alike = _alike(job)
    pictures = vision_seconds(model, machine, job.prompts * job.pictures / replicas, size)
    prompt, _ = _pass(model, alike, machine, job.prompts / replicas, 1.0, False, True)
    if rows <= fits:
        one, slowest = _written(model, alike, machine, rows, replicas, job.tensor, True)
    else:  # filled up as responses end: full throughput, then the tail of the last ones
        decoder = _decoder(model, alike, machine, job.tensor, True)
        steady = (rows - fits) * mean / fits * float(decoder.token(np.array([mean / 2]), np.array([fits]))[0])
        one, slowest = (steady + x for x in decoder.seconds(fits, replicas))
    return {"prefill": (pictures + prompt) / job.tensor, "decode": one, "waiting": slowest - one}


def _update(model: Model, job: Job, machine: Machine, mean: float, deviation: float) -> dict[str, float]:
    """Forward, backward, communication and optimizer of all passes over the experience."""
    n, micros = job.trainers, job.share / job.micro
    # Who waits for whom: all ranks at every layer under ZeRO-3, at every microbatch under ZeRO-2, else once a step.
    together = job.group * (job.micro if job.zero >= 2 else job.share)
    longer = 1 + normal_maximum(n) * deviation / math.sqrt(together) / mean
    length = mean * min(longer, job.lengths.most / mean)
    forward, backward = (x * micros for x in _pass(model, _alike(job), machine, job.micro, length, True, True))
    if job.tune == "full":
        tower = vision_seconds(model, machine, job.micro * job.pictures, job.itemsize) * micros
        forward, backward = forward + tower, backward + 2 * tower
    if job.checkpointing:
        backward += forward
    calls, third = (model.layers + 1) * micros, machine.host_update / 3  # a third forward, the rest backward
    ahead = machine.together(forward, calls, third)
    back = machine.together(backward, calls, (3 if job.checkpointing else 2) * third)
    moved = volumes(model, job)
    layers = model.layers * micros if job.zero == 3 else 1  # ZeRO-3 gathers layer by layer
    scatter = _many(machine, n, moved["scatter"], micros * (model.layers if job.zero == 3 else 1))
    gather = _many(machine, n, moved["gather"], 2 * layers)
    reduce = reduce_seconds(machine, n, moved["reduce"])
    if job.zero == 3:
        exposed = _exposed(machine, gather / 2, ahead) + _exposed(machine, gather / 2 + scatter, back)
        exposed += _fetched(job, machine, moved["gather"])
    else:
        last = back / micros
        exposed = _exposed(machine, reduce, last) + _exposed(machine, scatter, back if job.zero == 2 else last) + gather
    checks = (micros + 3) * reduce_seconds(machine, n, 4)  # of finiteness, by every microbatch
    count, extra, gradient, state = trained(model, job)
    own = count / (n if job.zero else 1)
    touched = own * (2 * state + gradient + 2 * (extra or job.itemsize))  # state and weights read and written
    if job.offload:
        carried = own * (gradient + (extra or job.itemsize)) / machine.offload_link
        optimizer = touched / (machine.offload_memory) + carried
    else:
        optimizer = touched / machine.stream
    steps = job.epochs
    return {
        "forward": steps * ahead,
        "backward": steps * back,
        "communication": steps * (exposed + (checks if n > 1 else 0.0)),
        "optimizer": steps * optimizer,
    }


def _many(machine: Machine, ranks: int, size: float, messages: float) -> float:
    """Seconds of so many bytes in so many equal collectives."""
    return messages * gather_seconds(machine, ranks, size / messages) if size else 0.0


def _fetched(job: Job, machine: Machine, gathered: float) -> float:
    """Seconds in which a GPU gets its own share of what is gathered from the CPU's memory, where that keeps it."""
    return gathered / job.trainers / machine.offload_link if job.offload else 0.0


def _exposed(machine: Machine, communication: float, computing: float) -> float:
    return communication - machine.overlap * min(communication, computing)
