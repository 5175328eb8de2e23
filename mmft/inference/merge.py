"""An adapter folded into its base model: a plain folder that loads without mmft and without PEFT."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import mmft
from mmft.batch import PromptBatch, Responses
from mmft.data.rows import open_picture
from mmft.inference.captioner import MAX_NEW_TOKENS, load_policy, trained_prompt
from mmft.inference.source import Source, find_source
from mmft.vlm.generate import decode, generate
from mmft.vlm.load import DTYPES, cannot_load, resolve
from mmft.vlm.policy import Policy

# Largest difference of one token's log-prob, in nats. Half precision rounds the merged weights.
TOLERANCE = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.25}
MAX_LOST = 0.1  # of what training changed: rounding may take so much, on average over tokens
_PICTURES = 8


@dataclass(frozen=True)
class Merged:
    """A merged model that was loaded again and compared with the adapter on its base.

    Attributes:
        folder: where it is.
        dtype: of its weights.
        difference: largest difference of one token's log-prob, in nats, over the captions that were compared.
        changed: how far the adapter had moved the base model on the same tokens, likewise; 0 for a whole model.
        same, captions: how many greedy captions are equal, and of how many.
        notes: what else there is to know, a sentence each.
    """

    folder: Path
    dtype: str
    difference: float
    changed: float
    same: int
    captions: int
    notes: tuple[str, ...] = ()


@torch.no_grad()
def merge(
    source: str | Path,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Merged:
    """Saves base model + adapter (or the trained weights, where all were) as one model, with its processor.

    It is written beside ``folder``, loaded again, compared in fp32 on real pictures, and only then put in its place.

    Args:
        source: see `Captioner`.
        folder: one that does not exist yet, or is empty.
        base: the model that the adapter stands on, where the source cannot know.
        dtype: of the saved weights: "float32", "bfloat16", "float16", or "auto": the base model's own.

    Raises:
        ValueError: something is not there or does not fit; or the saved model does not write what the adapter does,
            and nothing is left behind.
    """
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is there already; name a new folder")
    if dtype not in ("auto", *TOLERANCE):
        raise ValueError(f"dtype={dtype!r}: expected auto, {', '.join(TOLERANCE)}")
    found = find_source(source, base)
    dtype = _own_dtype(found, trust_remote_code) if dtype == "auto" else dtype
    policy = load_policy(found, "float32", None, trust_remote_code)
    prompts = _prompts(policy, found)
    length = found.recipe.rollout.max_completion_length if found.recipe is not None else MAX_NEW_TOKENS
    responses, _ = generate(policy, prompts, 1, length, 0.0)
    expected, texts = policy(prompts, responses).logprobs, decode(policy, responses)
    before = policy(prompts, responses, reference=True).logprobs if found.adapter is not None else expected
    target.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _save(policy, found, working, dtype)
        del policy
        again = load_policy(find_source(working), "float32", None, trust_remote_code)
        now = again(prompts := _prompts(again, found), responses).logprobs
        new_texts = decode(again, generate(again, prompts, 1, length, 0.0)[0])
        _compare(expected, before, now, responses, dtype)
        (working / "README.md").write_text(_readme(found, dtype), encoding="utf-8")
        working.chmod(0o755)  # mkdtemp's are private
        working.replace(target)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    quantised = found.recipe.model.quantize if found.recipe is not None else None
    note = (
        f"trained on a base model in {quantised}, and merged into its whole weights, which write a little differently"
    )
    return Merged(
        target,
        dtype,
        float((now - expected).abs().max()),
        float((before - expected).abs().max()),
        sum(a == b for a, b in zip(texts, new_texts, strict=True)),
        len(texts),
        (note,) if quantised and found.adapter is not None else (),
    )


def _save(policy: Policy, found: Source, folder: Path, dtype: str) -> None:
    model = policy.model
    if found.adapter is not None:
        from mmft.vlm.adapters import unfold_lora

        unfold_lora(model)
        model = model.merge_and_unload(safe_merge=True)
    model.to(DTYPES[dtype]).save_pretrained(folder)
    policy.processor.save_pretrained(folder)
    if found.root is not None and (found.root / "recipe.yaml").is_file():  # the prompt it was trained with
        shutil.copyfile(found.root / "recipe.yaml", folder / "recipe.yaml")


def _compare(expected: Tensor, before: Tensor, now: Tensor, responses: Responses, dtype: str) -> None:
    """Raises ValueError where the saved model is another one than the adapter on its base."""
    worst = float((now - expected).abs().max())
    if not worst <= TOLERANCE[dtype]:
        raise ValueError(
            f"the merged model is not the adapter on its base: log-probs differ by up to {worst:.2g} nats, allowed are "
            f"{TOLERANCE[dtype]:g} in {dtype}; nothing was saved"
            + ("" if dtype == "float32" else "; try dtype float32 (--dtype)")
        )
    moved, off = (float((x - expected).abs().sum() / responses.mask.sum()) for x in (before, now))
    if dtype != "float32" and off > MAX_LOST * moved > 0:
        raise ValueError(
            f"rounded to {dtype}, the merged weights would lose {off / moved:.0%} of what training changed (allowed "
            f"{MAX_LOST:.0%}); nothing was saved; save them in float32 (--dtype float32)"
        )


def _prompts(policy: Policy, found: Source) -> PromptBatch:
    """The run's own pictures, or drawn ones, under the prompt that it was trained with."""
    prompt, device = trained_prompt(found.recipe), policy.device
    kept = sorted((found.root / "pictures").glob("*.jpg"))[:_PICTURES] if found.root is not None else []
    if "image" not in policy.pictures.token_ids:
        rows = [{"prompt": prompt}]  # of a model of sounds: in words alone
    elif kept:
        rows = [{"prompt": prompt, "image": open_picture(path)} for path in kept]
    else:
        from mmft.data.scenes import scene_rows

        rows = [{"prompt": prompt, "image": row["image"]} for row in scene_rows("test", _PICTURES)]
    return policy.pictures.prompts(rows, [str(i) for i in range(len(rows))], device, pixels=True)


def _own_dtype(found: Source, trust_remote_code: bool) -> str:
    """The dtype that the base model's weights are kept in."""
    from transformers import AutoConfig

    folder = resolve(found.model)
    try:
        said = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).dtype
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load(found.model, folder, error).removeprefix("model.name: ")) from error
    return next((name for name, kind in DTYPES.items() if kind == said), "float32")


def _readme(found: Source, dtype: str) -> str:
    def called(name: str) -> str:  # a place on this machine means nothing to others
        return Path(name).resolve().name if Path(name).exists() else name

    trained = called(found.name)
    what = (
        f"{called(found.model)} with the adapter of {trained} folded in" if found.adapter else f"weights of {trained}"
    )
    return (
        f"# {trained}, merged\n\n{what[0].upper()}{what[1:]} by mmft {mmft.__version__}; {dtype}.\n\n"
        "```python\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        'model = AutoModelForImageTextToText.from_pretrained("this folder")\n'
        'processor = AutoProcessor.from_pretrained("this folder")\n```\n'
    )
