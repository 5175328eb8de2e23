"""The model tried out: captions in its tokens, memory, the self-test on real rows, and one step with its time."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import AutoProcessor

from mmft.data.rows import listed
from mmft.training.doctor.machine import launched_threads
from mmft.training.doctor.page import Section
from mmft.training.doctor.parts import Parts
from mmft.training.memory import GIB, plan_memory, resident
from mmft.training.run import rows_of, trainer_of
from mmft.vlm.load import cannot_load, resolve
from reward_models import build_rewards

DRAWN = 512  # of the built-in world's rows, where the recipe's own cannot be read
MOST_MEASURED = 2_000  # captions whose tokens are counted
CUT = 0.05  # share of captions that may be longer than a response can be
ENDED = 0.5  # share of responses below which most were cut off
PATIENCE = 60.0  # seconds that the step tried out may take, as far as the self-test tells
EVALUATED = 32  # held-out rows captioned to see how long that takes


def complete(section: Section, recipe, parts: Parts):
    """Puts drawn pictures in the place of rows that could not be had, so that the rest can be tried all the same.

    Returns:
        the recipe that describes what is in ``parts`` now, without rows that cannot be used.
    """
    if parts.train is None or parts.held_out is None:
        section.note("from here on with drawn pictures in place of the rows that cannot be read")
        recipe = recipe.model_copy(update={"data": type(recipe.data)(train_rows=DRAWN)})
        parts.train, parts.held_out = (rows_of(recipe, split, DRAWN) for split in (recipe.data.train, recipe.data.eval))
        parts.references = parts.train.references()
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"bad_rows": "skip"})})


def caption_lengths(section: Section, recipe, references: list[list[str]]) -> None:
    """Compares the captions' lengths in the model's tokens with the longest response.

    Raises:
        ValueError: the model's processor cannot be loaded.
    """
    name, trust = recipe.model.name, recipe.model.trust_remote_code
    try:
        processor = AutoProcessor.from_pretrained(resolve(name), trust_remote_code=trust)
    except Exception as error:  # processors fail in many ways
        raise ValueError(cannot_load(name, resolve(name), error)) from error
    if not references:
        return
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = [text for several in references for text in several][:MOST_MEASURED]
    # One more for the end token, which a response has to write as well.
    lengths = sorted(len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    limit, wanted = recipe.rollout.max_completion_length, lengths[int(0.99 * (len(lengths) - 1))]
    longer = sum(length > limit for length in lengths) / len(lengths)
    section.numbers["caption_tokens"] = {"median": lengths[len(lengths) // 2], "99%": wanted, "longest": lengths[-1]}
    said = f"captions have {lengths[len(lengths) // 2]} tokens (median; the longest {lengths[-1]})"
    if longer > CUT:
        section.warn(
            f"{said}; {longer:.0%} are longer than the {limit} that a response may have",
            f"rollout.max_completion_length={wanted}",
        )
    elif limit > 4 * lengths[-1]:
        section.note(f"{said}; responses may have {limit}: a smaller rollout.max_completion_length saves memory")
    else:
        section.fine(f"{said}; a response may have {limit}")


def memory(section: Section, recipe) -> bool:
    """The plan of `mmft doctor memory` against this machine; whether the run fits."""
    base = without_model()
    gpu = torch.cuda.mem_get_info(0) if torch.cuda.is_available() else None
    plan = plan_memory(recipe, device_gib=gpu[1] / GIB if gpu else None, base=base)
    section.numbers |= {"peak": plan.peak.total, "available": plan.available, "phase": plan.peak.name}
    where = "GPU" if gpu else "machine"
    text = f"{plan.peak.total / GIB:.2f} GiB at most, in {plan.peak.name}; this {where} has {plan.available / GIB:.1f}"
    if not plan.fits:
        section.wrong(text, "\n".join(f"{change} saves about {saved / GIB:.2f} GiB" for change, saved in plan.advice))
    elif gpu and plan.peak.total > gpu[0]:
        section.warn(f"{text}, of which {gpu[0] / GIB:.1f} are free", "end what else runs there: nvidia-smi shows it")
    else:
        section.fine(text)
    return plan.fits


def without_model() -> int | None:
    """Bytes of this process, which holds the libraries and rows of a run and no model yet; None = nobody tells."""
    try:
        return resident()
    except (ValueError, OSError):
        return None


def try_model(section: Section, recipe, parts: Parts) -> None:
    """Loads the model as a run would, has it tested, and times a step and some captions."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Nothing is left behind: an engine may write adapters into the run folder.
        output = recipe.output.model_copy(update={"dir": scratch, "trackers": [], "push_to_hub": None})
        tried = recipe.model_copy(update={"output": output, "warm_start": None})
        if parts.rewards is None:
            section.note("with cider_d in place of the rewards")
            parts.rewards = build_rewards([{"name": "cider_d"}], parts.frequencies)
        set_seed(recipe.seed)
        rest = {"frequencies": parts.frequencies, "rewards": parts.rewards}
        trainer = trainer_of(tried, recipe.model.name, train=parts.train, held_out=parts.held_out, **rest)
        _what_learns(section, trainer.policy)
        with _threads(launched_threads() if trainer.policy.device.type == "cpu" else None):
            began = time.perf_counter()
            trainer._self_test()
            tested = time.perf_counter() - began
            tell_selftest(section, caught)
            _time(section, recipe, trainer, tested)


def tell_selftest(section: Section, caught: list[warnings.WarningMessage]) -> None:
    """What a self-test that was passed has warned of."""
    slower = [str(w.message) for w in caught if str(w.message).startswith("self-test: ")]
    if slower:
        section.warn(slower[0].removeprefix("self-test: "))
    else:
        section.fine("self-test: sampling and training agree, and the model sees its pictures")


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """As many threads as a run would have: what is timed is to hold for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _what_learns(section: Section, policy) -> None:
    parameters = list(policy.model.parameters())
    whole, learn = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    section.numbers |= {"parameters": whole, "trained": learn, "family": policy.model.config.model_type}
    notes = policy.family.notes
    kind = f"a {policy.model.config.model_type} model" + ("" if notes else ", of a family that is tested")
    section.fine(
        f"{kind}: {count(whole)} parameters, {count(learn)} of them learn ({learn / whole:.1%}), on {policy.device}"
    )
    if notes:
        section.warn(listed("not everything about this model is known; it takes a slower path", list(notes)))


def _time(section: Section, recipe, trainer, tested: float) -> None:
    """How long the run will take, by some captions and a step, in a run's order; what they show of the model."""
    config, held_out = trainer.config, trainer.eval_dataset
    config.eval_rows = min(EVALUATED, config.eval_rows)
    began = time.perf_counter()
    evaluation = trainer.evaluate()  # before a step changes what it says
    rows = min(recipe.eval.rows, len(held_out))
    evaluating = (time.perf_counter() - began) * rows / len(evaluation.texts)
    every = config.num_mini_batches  # pictures of a step come in multiples of it
    possible = int(PATIENCE / max(tested * _passes(trainer), 1e-9) * config.prompts_per_step) // every * every
    config.prompts_per_step = min(max(possible, every), config.prompts_per_step)
    share = config.prompts_per_step / recipe.rollout.prompts_per_step
    metrics = trainer.step(1)
    seconds = metrics["seconds"]
    if seconds <= PATIENCE / 6:  # the first one also fits the critic and fills caches
        seconds = min(seconds, trainer.step(2)["seconds"])
    seconds /= share
    steps = recipe.train.steps
    times = 2 + ((steps - 1) // recipe.eval.every if recipe.eval.every else 0)
    whole = steps * seconds + times * evaluating
    section.numbers |= {"step_seconds": seconds, "evaluation_seconds": evaluating, "run_seconds": whole}
    part = "" if share == 1.0 else f", from {config.prompts_per_step} of its {recipe.rollout.prompts_per_step} pictures"
    section.fine(
        f"the run takes about {duration(whole)} on this machine, in one process: {steps:,} steps of "
        f"{duration(seconds)} (measured on one{part}), {times} evaluations of {duration(evaluating)}"
        + ("; the supervised training before it comes on top" if recipe.warm_start else "")
    )
    section.numbers["first_step"] = {name: value for name, value in metrics.items() if isinstance(value, float)}
    _first_words(section, recipe, trainer, evaluation, metrics)


def _passes(trainer) -> float:
    """How much more a step is than the self-test, by the tokens that pass through the model.

    The self-test: three passes over 2 prompts with 2 responses of 8 tokens. A step: one pass for the reference, and
    for each epoch one forward and one, twice as dear, backward.
    """
    config, prompt = trainer.config, trainer.prompts(1).prompt_ids.shape[1]
    tokens = config.prompts_per_step * (prompt + config.num_generations * config.max_completion_length)
    return (1 + 3 * config.num_ppo_epochs) * tokens / (3 * 2 * (prompt + 2 * 8))


def _first_words(section: Section, recipe, trainer, evaluation, metrics: dict[str, Any]) -> None:
    row = trainer.eval_dataset[0]
    written = " ".join(evaluation.texts[0].split())[:200] or "(nothing)"
    section.note(f"it now says: {written!r}; a person said: {row['references'][0]!r}")
    if metrics["reward_std"] == 0.0:
        section.wrong(
            "all responses of a step earn the same: there is nothing to learn from",
            "a warmer rollout.temperature, another reward, or a warm start (recipes/caption_photos.yaml)",
        )
    if metrics["ended_fraction"] < ENDED and recipe.warm_start is None:
        section.warn(
            f"{1 - metrics['ended_fraction']:.0%} of its responses are cut off after "
            f"{recipe.rollout.max_completion_length} tokens",
            "a larger rollout.max_completion_length, a data.prompt that asks for one sentence, or a warm start",
        )


def count(number: int) -> str:
    for size, name in ((10**9, " billion"), (10**6, " million")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return f"{number:,}"


def duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"
