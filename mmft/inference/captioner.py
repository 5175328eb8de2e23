"""Captions by a trained model: ``Captioner("runs/caption_ppo").caption(["a.jpg", "b.jpg"])``.

The same engine as in training: a picture and its prompt are read once, whatever the number of captions, and greedy
captions are, token for token, those that the run's evaluation wrote.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmft.batch import PromptBatch, Responses
from mmft.data.audio import Sounds
from mmft.data.rows import PICTURES
from mmft.data.sources import PROMPTS, card_of
from mmft.data.video import Clips
from mmft.inference.source import Source, find_source
from mmft.recipe import Recipe
from mmft.vlm.families import FAMILIES
from mmft.vlm.generate import decode, generate, require_room
from mmft.vlm.load import build_policy, load_model
from mmft.vlm.policy import Policy

# method -> how many responses it looks at when nobody says, None = always one
METHODS: dict[str, int | None] = {"greedy": None, "beam": 4, "sample": 1, "best-of": 8}
MAX_NEW_TOKENS = 64  # where no recipe says what the model was trained for
_CACHE_BYTES = 256 << 20

Picture = str | Path | Image.Image
Prompt = str | list[dict[str, Any]]


@dataclass
class Written:
    """Responses in the order of their rows, those to one row next to each other.

    Attributes:
        texts: without special tokens and outer spaces.
        completion_ids: the tokens, the one that ends it included.
        ended: whether it stopped by itself and was not cut off.
    """

    texts: list[str] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)


class Captioner:
    """A trained model with everything that writing captions takes.

    Args:
        source: a run folder, an adapter, a checkpoint of a run, a published run (folder or ``user/name``), or a model:
            bundled name, folder, name on the Hub.
        base: the model that the adapter stands on, where the source cannot know.
        dtype: "float32", "bfloat16", "float16", or "auto": as the run was trained, else as `load_model` chooses.
        quantize: "nf4", "int8", None for whole weights, or "auto": as the run was trained.
        trust_remote_code: run Python code that comes with the model. Never taken from a recipe.

    Attributes:
        policy, processor: the model and its processor.
        source: see `find_source`.
        recipe: of the run, or None.
        prompt: the prompt that it was trained with; without a recipe the one for pictures.
        max_new_tokens: length of a caption at most, likewise.

    Raises:
        ValueError: the source is not there, not whole, or does not fit its base model.
    """

    def __init__(
        self,
        source: str | Path = "scenes-vlm",
        *,
        base: str | Path | None = None,
        dtype: str = "auto",
        quantize: str | None = "auto",
        trust_remote_code: bool = False,
    ):
        self.source = find_source(source, base)
        recipe = self.recipe = self.source.recipe
        if dtype == "auto" and recipe is not None:
            dtype = recipe.model.dtype
        if quantize == "auto":
            quantize = recipe.model.quantize if recipe is not None and self.source.adapter is not None else None
        self.policy: Policy = load_policy(self.source, dtype, quantize, trust_remote_code)
        self.processor = self.policy.processor
        self.prompt = trained_prompt(recipe)
        self.max_new_tokens = recipe.rollout.max_completion_length if recipe is not None else MAX_NEW_TOKENS
        self._tested = self.policy.model.config.model_type in FAMILIES or not self.policy.shared_prefix

    def caption(self, pictures: Picture | Sequence[Picture], prompt: Prompt | None = None, **options: Any) -> list[str]:
        """Captions of pictures: a list of paths or PIL images, or one of them. Paths of clips and sounds work where
        the model takes those.

        Args:
            prompt: instead of `prompt`.
            options: those of `write`.

        Returns:
            A caption for each picture; ``num`` for each, next to each other, with ``method="sample"``.

        Raises:
            ValueError: a picture cannot be read, with its name and why.
        """
        several = [pictures] if isinstance(pictures, str | Path | Image.Image) else list(pictures)
        return self.write(self.rows(several), prompt, **options).texts

    def evaluate(self, data: Any = None, **options: Any) -> Any:
        """Scores of its captions of held-out pictures, the run's own where ``data`` is None: see `mmft.evaluate`."""
        from mmft.inference.evaluate import evaluate

        return evaluate(self, data, **options)

    def rows(self, pictures: Sequence[Picture]) -> Sequence[dict[str, Any]]:
        """Rows of pictures, clips and sounds, each file opened when its row is asked for."""
        data = self.recipe.data if self.recipe is not None else None
        clips = Clips(**data.video.model_dump()) if data is not None else Clips()
        sounds = Sounds(**data.audio.model_dump()) if data is not None else Sounds()
        return _Files(pictures, self.prompt if data is not None else None, clips, sounds)

    @torch.no_grad()
    def write(
        self,
        rows: Sequence[Mapping[str, Any]],
        prompt: Prompt | None = None,
        method: str = "greedy",
        num: int | None = None,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        reward: Any = None,
        seed: int = 0,
        batch: int = 64,
        advance: Callable[[int], Any] = lambda n: None,
    ) -> Written:
        """Responses to rows of a data set.

        Args:
            rows: with ``image`` (or ``images``, ``video``, ``audio``), and ``prompt`` where it differs from `prompt`.
            prompt: instead of every row's own.
            method: "greedy" (the likeliest token each time), "beam" (the best of ``num`` that are followed at once),
                "sample" (``num`` draws, all returned), "best-of" (the best of ``num`` draws).
            num: 4 beams, 1 sample, best of 8 when it is None.
            temperature: of draws.
            max_new_tokens: length of a response; None = `max_new_tokens`.
            reward: what makes the best of several draws: a reward as `PPOTrainer` takes it, which sees the whole row;
                None: the mean log-prob of its tokens.
            seed: of draws, together with each row's id.
            batch: responses written together.
            advance: told how many more rows are done.

        Raises:
            ValueError: an option is wrong, or a row (named) cannot be used.
        """
        group = _group(method, num, temperature, reward)
        length = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if length < 1:
            raise ValueError(f"max_new_tokens={length}: expected at least 1")
        best = self._best_by(reward) if method == "best-of" else None
        written, step = Written(), max(1, batch // group)
        for start in range(0, len(rows), step):
            places = range(start, min(start + step, len(rows)))
            opened = [_prompted(dict(rows[i]), prompt, self.prompt) for i in places]
            ids = [str(row.get("id", i)) for row, i in zip(opened, places, strict=True)]
            self._test(opened, ids)
            prompts = self.policy.pictures.prompts(opened, ids, self.policy.device, pixels=method == "beam")
            if method == "beam":
                from mmft.vlm.plain import beam_search

                require_room(self.policy, prompts, length)
                responses, _ = beam_search(self.policy, prompts, group, length)
            else:
                drawn = {} if method == "greedy" else {"temperature": temperature, "seed": seed}
                options = {"num_generations": group, "max_new_tokens": length, "temperature": 0.0} | drawn
                responses, found = generate(self.policy, prompts, **options)
                if best is not None:
                    mean = found.logprobs.sum(-1) / responses.mask.sum(-1)
                    responses = best(prompts, responses, mean)
            written.texts += decode(self.policy, responses)
            written.completion_ids += [i[m].tolist() for i, m in zip(responses.ids, responses.mask, strict=True)]
            written.ended += responses.ended.tolist()
            advance(len(opened))
        return written

    def _best_by(self, reward: Any) -> Callable[[PromptBatch, Responses, Tensor], Responses]:
        """What chooses one response of each group: by the reward, or by the given mean log-probs (N,)."""
        if reward is None:
            return lambda prompts, responses, mean: _best(responses, mean, len(prompts))
        from mmft.training.rollout import reward_arguments
        from mmft.training.scoring import as_rewards

        try:
            rewards = as_rewards(reward, None)
        except ValueError as error:
            raise ValueError(f"best-of by {reward!r}: {error}") from error

        def choose(prompts: PromptBatch, responses: Responses, mean: Tensor) -> Responses:
            arguments = reward_arguments(prompts, decode(self.policy, responses), responses)
            found = rewards(**arguments, group_size=len(responses.ids) // len(prompts))
            return _best(responses, torch.as_tensor(found.plain), len(prompts))

        return choose

    def _test(self, rows: list[dict[str, Any]], ids: list[str]) -> None:
        """A model of no listed family is held against its own forward pass once; it may leave the shared prefix."""
        if not self._tested:
            from mmft.vlm.selftest import selftest

            selftest(self.policy, self.policy.pictures.prompts(rows[:2], ids[:2], self.policy.device, pixels=True))
            self._tested = True


def load_policy(source: Source, dtype: str, quantize: str | None, trust_remote_code: bool) -> Policy:
    """Base model, adapter on it, processor: ready to write, on the GPU where there is one."""
    try:
        model, processor = load_model(
            source.model, quantize, dtype, trust_remote_code=trust_remote_code, processor=source.processor
        )
    except ValueError as error:
        said = str(error).removeprefix("model.name: ")
        hint = "" if source.adapter is None else f"; it is the base of {source.adapter}: name a copy as base (--base)"
        raise ValueError(said + hint) from error
    if source.adapter is not None:
        from mmft.vlm.adapter_files import load_adapter

        name = model.config._name_or_path
        if source.base_given:
            model.config._name_or_path = ""  # a copy may have another name; its layers are compared all the same
        model = load_adapter(model, source.adapter)
        model.config._name_or_path = name
    policy = build_policy(model, processor, critic="none", needs_reference=False, cache_bytes=_CACHE_BYTES).eval()
    return policy.to("cuda") if torch.cuda.is_available() else policy


def trained_prompt(recipe: Recipe | None) -> str:
    if recipe is None:
        return PROMPTS["image"]
    card = card_of(recipe.data.name)
    return recipe.data.prompt or (card and card.prompt) or PROMPTS[card.media if card else "image"]


def _group(method: str, num: int | None, temperature: float, reward: Any) -> int:
    """How many responses a method writes for each row; ValueError for options that do not go together."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    usual = METHODS[method]
    if usual is None and num not in (None, 1):
        raise ValueError(f"num={num}: a {method} caption is one; several come from beam, sample and best-of")
    if num is not None and num < 1:
        raise ValueError(f"num={num}: expected at least 1")
    if method in ("sample", "best-of") and not temperature > 0:
        raise ValueError(f"temperature={temperature}: draws need one above 0; the likeliest words are method 'greedy'")
    if reward is not None and method != "best-of":
        raise ValueError(f"a reward chooses the best of several draws: expected method 'best-of', not {method!r}")
    return num or usual or 1


def _prompted(row: dict[str, Any], prompt: Prompt | None, usual: str) -> dict[str, Any]:
    row["prompt"] = prompt if prompt is not None else row.get("prompt", usual)
    return row


def _best(responses: Responses, scores: Tensor, prompts: int) -> Responses:
    """The response of highest score in each group; one without a score loses."""
    scores = scores.to(responses.ids.device).nan_to_num(-torch.inf).view(prompts, -1)
    rows = scores.argmax(-1) + torch.arange(prompts, device=scores.device) * scores.shape[1]
    return Responses(responses.ids[rows], responses.mask[rows], responses.ended[rows])


class _Files(Sequence[dict[str, Any]]):
    """Files and pictures as rows."""

    def __init__(self, files: Sequence[Picture], prompt: str | None, clips: Clips, sounds: Sounds):
        self.files, self.prompt = files, prompt
        self.readers = {"image": PICTURES, "video": clips.reader, "audio": sounds.reader}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file = self.files[index]
        if isinstance(file, str) and "://" in file:
            raise ValueError(f"{file}: addresses are not fetched; download the picture and give its path")
        if isinstance(file, Image.Image):
            kind, name, where = "image", str(index), f"picture {index}"
        else:
            file = Path(file).expanduser()
            kind = (mimetypes.guess_type(file.name)[0] or "").partition("/")[0]
            kind = kind if kind in self.readers else "image"
            name, where = file.name, str(file)  # the file's name, not its place, seeds its draws
        reader = self.readers[kind]
        return {"id": name, "prompt": self.prompt or PROMPTS[kind], reader.column: reader.open(file, where)}
