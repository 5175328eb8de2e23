"""Training of a preference head: pairs by Bradley-Terry, ratings by squared error; then its temperature.

With a frozen backbone (`lora: 0`) the states of every text are computed once and the head alone is trained, in
seconds per epoch. With LoRA the backbone is read anew in every step; its pictures' features are still computed once,
as long as the adapter leaves the vision tower alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from reward_models.preference.backbone import Backbone, Row, States, fingerprint, length_mask, load_backbone
from reward_models.preference.calibration import fit_temperature, pair_metrics
from reward_models.preference.folder import check_folder, save_folder
from reward_models.preference.fusion import PreferenceHead
from reward_models.preference.pairs import Pair, Rating
from reward_models.preference.progress import Progress, Saver, identity_of
from reward_models.preference.scoring import Judge, Known, both, frozen_states
from reward_models.preference.sharing import quiet

# Linear layers of the decoder, in the names of transformers' Llama-like models; never the tower or the output head.
_DECODER = r".*(?:language_model|text_model).*(?:q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        backbone: folder or hub id of an image-text-to-text model.
        backbone_name: what the saved head calls it, where others know it by a name; None: as in `backbone`.
        fusion: "concat", "sum", "gated" or "cross_attention".
        heads: size of the ensemble. With more than one, head k sees pair i as often as Poisson(1) says (the online
            bootstrap of Oza and Russell 2001).
        width, dropout: of the head.
        lora: rank of the adapters, 0 for a frozen backbone; alpha is twice the rank.
        lora_target: "language" (the decoder's linear layers), "all", or a regular expression of module names.
        quantize, dtype, device: of the backbone, see `load_backbone`.
        gradient_checkpointing: less memory, a third more time.
        epochs, steps: one of them decides; `steps` where given.
        batch_size: pairs or ratings in a step.
        learning_rate, head_learning_rate: of adapters and head; linear warm-up over a share `warmup` of the steps,
            then linear to 0.
        label_smoothing: probability with which a pair is taken to be labelled the wrong way round.
        margin_scale: factor on the pairs' margins; 0 ignores them.
        log_every: steps per line of the log.
    """

    backbone: str
    backbone_name: str | None = None
    fusion: str = "cross_attention"
    heads: int = 1
    width: int = 128
    dropout: float = 0.1
    lora: int = 16
    lora_target: str = "language"
    quantize: str | None = None
    dtype: str = "auto"
    device: str | None = None
    gradient_checkpointing: bool = False
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 16
    learning_rate: float = 1e-3
    head_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    margin_scale: float = 1.0
    seed: int = 0
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing: expected at least 0 and less than 0.5, got {self.label_smoothing}")
        if self.lora < 0:
            raise ValueError(f"lora: expected a rank, or 0 for a frozen backbone, got {self.lora}")


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z) with z = chosen - rejected - margin, elementwise, in nats.

    Bradley and Terry 1952, as in Ouyang et al. 2022 (arXiv 2203.02155, equation 1); the margin as in Touvron et al.
    2023 (arXiv 2307.09288, equation 2); e, the chance of a wrong label, as in Mitchell 2023 (conservative DPO).
    """
    z = chosen - rejected - margin
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def train_preference(
    examples: Sequence[Pair] | Sequence[Rating],
    folder: str | Path,
    *,
    calibration: Sequence[Pair] = (),
    log: Callable[[str], None] | None = print,
    saver: Saver | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains on pairs or on ratings, fits the temperature on `calibration`, saves everything in `folder`.

    Args:
        examples: all `Pair` or all `Rating`.
        folder: new or empty, or with an earlier head, which is replaced.
        calibration: pairs that are not trained on and show none of the same pictures. They give the temperature and
            the zero of the reward. Without them both stay as they are: temperature 1, zero anywhere.
        log: gets a line now and then; None is silent.
        saver: keeps the state on the way, and has the one to go on from; a training that does ends in the same bits.
        **options: see `TrainOptions`; `backbone` is needed.

    Returns:
        What ``preference.json`` keeps under "metrics": loss, accuracy and seconds of the training; and, from the
        calibration pairs, which have been used for one number, accuracy, ECE and loss after calibration.

    Raises:
        ValueError: nothing to train on, pairs mixed with ratings, an unknown option, a folder with something else in
            it, a loss that is not finite, or a saved state of another training.
    """
    chosen = _options(options)
    check_folder(Path(folder))
    # Made once, where they are made on demand.
    made: list[Any] = list(examples)
    calibration = list(calibration)
    rated = _kind_of(made)
    say = log or (lambda line: None)
    with torch.random.fork_rng():
        torch.manual_seed(chosen.seed)
        model, processor = load_backbone(chosen.backbone, chosen.quantize, chosen.dtype, chosen.device)
        base = fingerprint(model)
        if chosen.lora:
            model = _adapted(model, chosen)
        backbone = Backbone(model, processor)
        size = backbone.hidden_size
        head = PreferenceHead(size, size, chosen.width, chosen.fusion, chosen.heads, chosen.dropout)
        head.to(backbone.device)
        shift, scale = _rating_unit(made) if rated else (0.0, 1.0)
        metrics = _fit(backbone, head, made, chosen, say, shift, scale, saver)
        head.eval()
        if rated:
            # The head learned (rating - mean) / std; its unit is turned back into ratings.
            shift, scale = -shift / scale, 1 / scale
        unit = {"temperature": 1.0, "shift": shift, "scale": scale}
        if calibration:
            judge = Judge(backbone, head, "default" if chosen.lora else None)
            fitted, measured = _calibrate(judge, calibration, chosen.batch_size, say)
            unit |= {"temperature": fitted["temperature"]} if rated else fitted
            metrics |= measured
    facts = _facts(chosen, made) | unit | {"metrics": metrics}
    facts["backbone"] |= {"fingerprint": base, "model_type": model.config.model_type}
    facts["head"] |= {"text_size": size, "picture_size": size}
    save_folder(Path(folder), facts, head, model if chosen.lora else None)
    return metrics


def _calibrate(
    judge: Judge, pairs: Sequence[Pair], batch_size: int, say: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Temperature, shift and scale that fit pairs nobody trained on; and how good the head is before and after."""
    rewards = judge.rewards([row for pair in pairs for row in both(pair)], batch_size).mean(0)
    differences = rewards[0::2] - rewards[1::2]
    temperature = fit_temperature(differences)
    measured = pair_metrics(differences, temperature, [pair.kind for pair in pairs])
    say(
        f"calibration: {len(pairs)} pairs, accuracy {measured['accuracy']:.4f}, "
        f"temperature {temperature:.3f}, ECE {measured['ece']:.4f}"
    )
    # The median, for a few ruined texts get rewards far below all others.
    unit = {"temperature": temperature, "shift": float(np.median(rewards[0::2])), "scale": temperature}
    return unit, {"before_calibration": pair_metrics(differences, 1.0), "calibration": measured}


def _facts(options: TrainOptions, examples: Sequence[Any]) -> dict[str, Any]:
    """What is known of a head before it is trained, as ``preference.json`` keeps it."""
    pictured = sum(bool(example.images) for example in examples)
    training = {k: v for k, v in asdict(options).items() if k not in ("backbone", "backbone_name")}
    return {
        "backbone": {"name": str(options.backbone_name or options.backbone)}
        | {"quantize": options.quantize, "dtype": options.dtype},
        "head": {"width": options.width, "fusion": options.fusion, "heads": options.heads, "dropout": options.dropout},
        "adapter": bool(options.lora),
        "learned_from": "ratings" if isinstance(examples[0], Rating) else "pairs",
        "pictures": "all" if pictured == len(examples) else "some" if pictured else "none",  # how many had any
        "training": training | {"examples": len(examples)},
    }


def _options(options: dict[str, Any]) -> TrainOptions:
    known = set(TrainOptions.__dataclass_fields__)
    if unknown := sorted(set(options) - known):
        import difflib

        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ValueError(f"unknown option {unknown[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if not options.get("backbone"):
        raise ValueError("backbone: the folder or hub id of a vision-language model is needed")
    return TrainOptions(**options)


def _kind_of(examples: Sequence[Any]) -> bool:
    """Whether the examples are ratings."""
    kinds = {type(example) for example in examples}
    if not kinds:
        raise ValueError("no examples to train on")
    if kinds not in ({Pair}, {Rating}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"expected all Pair or all Rating to train on, got {names}")
    return kinds == {Rating}


def _rating_unit(examples: Sequence[Any]) -> tuple[float, float]:
    ratings = np.array([example.rating for example in examples], dtype=np.float64)
    if not np.isfinite(ratings).all():
        i = int(np.flatnonzero(~np.isfinite(ratings))[0])
        raise ValueError(f"rating {i} (id {examples[i].id!r}) is {ratings[i]}, expected a finite number")
    if ratings.std() == 0:
        raise ValueError(f"all {len(ratings)} ratings are {ratings[0]:g}; there is nothing to learn")
    return float(ratings.mean()), float(ratings.std())


def _adapted(model: Any, options: TrainOptions) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    target = {"language": _DECODER, "all": "all-linear"}.get(options.lora_target, options.lora_target)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    try:
        with quiet():
            return get_peft_model(model, LoraConfig(r=options.lora, lora_alpha=2 * options.lora, target_modules=target))
    except ValueError as error:
        raise ValueError(f"lora_target: no layer of the backbone is meant by {target!r} ({error})") from error


class _Batches:
    """Examples -> states of their texts: for pairs all chosen texts, then all rejected ones."""

    def __init__(self, backbone: Backbone, examples: Sequence[Any], frozen: bool, batch_size: int):
        self.backbone = backbone
        self.rows: list[tuple[Row, ...]]
        if isinstance(examples[0], Pair):
            self.rows = [both(pair) for pair in examples]
        else:
            self.rows = [(Row(r.prompt, r.images, r.completion),) for r in examples]
        self.known: list[Known] | None = None
        if frozen:
            self.known = frozen_states(backbone, [row for rows in self.rows for row in rows], 2 * batch_size)

    def __call__(self, numbers: list[int]) -> States:
        sides = len(self.rows[0])
        rows = [self.rows[i][side] for side in range(sides) for i in numbers]
        if self.known is None:
            return self.backbone.read(rows)
        texts = [self.known[i * sides + side] for side in range(sides) for i in numbers]
        device = self.backbone.device
        text = pad_sequence([t.text for t in texts], batch_first=True).to(device)
        logprobs = pad_sequence([t.logprobs for t in texts], batch_first=True).to(device)
        mask = length_mask([t.logprobs for t in texts]).to(device)
        with torch.no_grad():
            return States(text, logprobs, mask, *self.backbone.look(rows))


def _fit(
    backbone: Backbone,
    head: PreferenceHead,
    examples: Sequence[Any],
    options: TrainOptions,
    say: Callable[[str], None],
    shift: float,
    scale: float,
    saver: Saver | None,
) -> dict[str, Any]:
    started = time.monotonic()
    rated = isinstance(examples[0], Rating)
    n = len(examples)
    steps = options.steps or math.ceil(options.epochs * n / options.batch_size)
    generator = torch.Generator().manual_seed(options.seed)
    order = _order(n, steps * options.batch_size, generator)
    shares = torch.poisson(torch.ones(n, options.heads), generator=generator) if options.heads > 1 else None
    batches = _Batches(backbone, examples, not options.lora, options.batch_size)
    optimizer, schedule = _optimizer(backbone.model, head, options, steps)
    backbone.model.train(options.gradient_checkpointing)
    head.train()
    progress = Progress(backbone.model, head, optimizer, schedule, identity_of(examples, asdict(options)))
    done = progress.resume(saver)
    losses, rights = progress.losses, progress.rights
    for step in range(done + 1, steps + 1):
        numbers = order[(step - 1) * options.batch_size : step * options.batch_size]
        rewards = head(*batches(numbers))
        if rated:
            aims = torch.tensor([(examples[i].rating - shift) / scale for i in numbers], dtype=torch.float32)
            each = (rewards - aims.to(rewards.device)).square()
            right = float("nan")
        else:
            better, worse = rewards.chunk(2, dim=1)
            margin = torch.tensor([(examples[i].margin or 0.0) * options.margin_scale for i in numbers])
            each = bradley_terry_loss(better, worse, margin.to(rewards.device), options.label_smoothing)
            right = float((better.mean(0) > worse.mean(0)).float().mean())
        weight = torch.ones_like(each) if shares is None else shares[numbers].T.to(each.device)
        loss = (each * weight).sum() / weight.sum().clamp_min(1.0)
        if not torch.isfinite(loss):
            ids = ", ".join(repr(examples[i].id) for i in numbers[:4])
            raise ValueError(f"step {step}: the loss is {float(loss)} on examples {ids} ...; nothing was saved")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], options.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        rights.append(right)
        if step % options.log_every == 0 or step == steps:
            recent = slice(-options.log_every, None)
            tail = "" if rated else f"  accuracy {np.mean(rights[recent]):.3f}"
            seconds = time.monotonic() - started
            say(f"step {step}/{steps}  loss {np.mean(losses[recent]):.4f}{tail}  {seconds:.0f} s")
        if saver is not None and saver.due(step):
            saver.save(step, *progress.state())
    last = slice(-max(1, steps // 10), None)
    return {
        "steps": steps,
        "train_loss": float(np.mean(losses[last])),
        "train_accuracy": None if rated else float(np.mean(rights[last])),
        "seconds": round(time.monotonic() - started, 1),
    }


def _order(n: int, wanted: int, generator: torch.Generator) -> list[int]:
    """Numbers of examples, shuffled anew for each pass."""
    order: list[int] = []
    while len(order) < wanted:
        order += torch.randperm(n, generator=generator).tolist()
    return order[:wanted]


def _optimizer(model: nn.Module, head: nn.Module, options: TrainOptions, steps: int):
    groups = [{"params": list(head.parameters()), "lr": options.head_learning_rate}]
    if adapter := [p for p in model.parameters() if p.requires_grad]:
        groups.append({"params": adapter, "lr": options.learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    warm = max(1, round(options.warmup * steps))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / warm, (steps - done) / max(1, steps - warm + 1))
    )
