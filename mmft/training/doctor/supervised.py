"""A recipe that is trained on captions alone (recipes/caption_sft.py): what it will do, what it takes, and a try."""

from __future__ import annotations

import math
import time
import warnings

import torch

from mmft.data.rows import listed
from mmft.training.doctor.page import Section
from mmft.training.doctor.parts import Parts
from mmft.training.doctor.trial import EVALUATED, count, duration, tell_selftest, without_model
from mmft.training.evaluate import evaluate
from mmft.training.memory import GIB, moments, ram
from mmft.training.memory_trace import ghost_policy
from mmft.training.run import caption_metrics
from mmft.vlm.load import build_policy, load_model
from mmft.vlm.selftest import selftest
from reward_models import DocumentFrequencies


def least_memory(section: Section, recipe) -> bool:
    """What the training holds whatever its batch is; whether at least that fits.

    Weights, gradients and AdamW's two moments are counted on a ghost of the model. A batch comes on top; the plan of
    `mmft doctor memory` is of reinforcement learning alone.
    """
    gpu = torch.cuda.mem_get_info(0) if torch.cuda.is_available() else None
    policy = ghost_policy(_as_policy(recipe), "cuda" if gpu else "cpu")
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    held = sum(p.nbytes for p in policy.model.parameters())
    least = held + sum(p.nbytes for p in trained) + moments("adamw", trained) + (0 if gpu else without_model() or 0)
    available, where = (gpu[1], "GPU") if gpu else (ram(), "machine")
    section.numbers |= {"least": least, "available": available}
    text = (
        f"{least / GIB:.2f} GiB at least, for weights, gradients and AdamW's moments; this {where} has "
        f"{available / GIB:.1f}"
    )
    if least > available:
        section.wrong(text, "warm_start.tune=lora" if recipe.warm_start.tune == "full" else "a smaller model")
        return False
    section.fine(text)
    section.note(
        f"what a batch of {recipe.warm_start.batch_size} pairs takes comes on top, and is not planned; where it does "
        "not fit: a smaller warm_start.batch_size"
    )
    return True


def _as_policy(recipe):
    """A recipe by which `ghost_policy` makes what is trained here."""
    tune = recipe.warm_start.tune
    quantize = recipe.model.quantize if tune == "lora" else None
    model = recipe.model.model_copy(update={"tune": tune, "critic": "none", "quantize": quantize})
    algorithm = recipe.algorithm.model_copy(update={"kl_coef": 0.0})  # no reference model
    return recipe.model_copy(update={"model": model, "algorithm": algorithm})


def try_captions(section: Section, recipe, parts: Parts) -> None:
    """Loads the model as the run would, has it tested, and times some captions; says how many steps it will train."""
    loaded = load_model(recipe.model.name, dtype=recipe.model.dtype, trust_remote_code=recipe.model.trust_remote_code)
    policy = build_policy(*loaded, critic="none", needs_reference=False)
    kind, notes = policy.model.config.model_type, policy.family.notes
    whole = sum(p.numel() for p in policy.model.parameters())
    section.numbers |= {"parameters": whole, "family": kind}
    section.fine(f"a {kind} model{'' if notes else ', of a family that is tested'}: {count(whole)} parameters")
    if notes:
        section.warn(listed("not everything about this model is known; it takes a slower path", list(notes)))
    first = [parts.train[i] for i in range(min(2, len(parts.train)))]
    ids = [str(row.get("id", i)) for i, row in enumerate(first)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        selftest(policy, policy.pictures.prompts(first, ids, policy.device, pixels=True), 1.0)
    tell_selftest(section, caught)
    metrics = caption_metrics(DocumentFrequencies.from_references(parts.references), parts.held_out)
    began, rows = time.perf_counter(), min(recipe.eval.rows, len(parts.held_out))
    tried = min(EVALUATED, rows)
    evaluation = evaluate(policy, parts.held_out, metrics, tried, recipe.rollout.max_completion_length)
    evaluating = (time.perf_counter() - began) * rows / tried
    start, pairs = recipe.warm_start, sum(len(texts) for texts in parts.references)
    steps = start.max_steps or math.ceil(math.ceil(pairs / start.batch_size) * start.epochs)
    section.numbers |= {"steps": steps, "evaluation_seconds": evaluating}
    section.fine(
        f"{steps:,} steps of {start.batch_size} of the {pairs:,} (picture, caption) pairs, in one process; an "
        f"evaluation, before and after, takes about {duration(evaluating)} here"
    )
    section.note("how long the steps take is not foreseen: the training's own progress shows it after a few")
    written = " ".join(evaluation.texts[0].split())[:200] or "(nothing)"
    section.note(f"it now says: {written!r}; a person said: {parts.held_out[0]['references'][0]!r}")
