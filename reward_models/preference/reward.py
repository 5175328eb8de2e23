"""The learned head as a reward: `PreferenceReward.load(folder)` is a function in TRL's form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from reward_models.metrics.text import completion_text
from reward_models.preference.backbone import Backbone, Row, fingerprint, load_backbone
from reward_models.preference.calibration import pair_metrics
from reward_models.preference.folder import load_facts, load_head
from reward_models.preference.pairs import Pair
from reward_models.preference.scoring import Judge, as_unit, check_heads
from reward_models.preference.sharing import attach, detach, quiet
from reward_models.returned import Scored


class PreferenceReward:
    """A learned reward: mean - kappa * std over heads and draws, of (r - shift) / scale.

    For a head learned from pairs, `scale` is the temperature and `shift` the median over the preferred texts of the
    calibration pairs: a difference of two rewards is the log-odds of being preferred, and 0 is a good text. For one
    learned from ratings the value is a rating.

    The backbone is loaded by `prepare`, or when the first row is scored, so that `share` costs no second copy.
    """

    __name__ = "preference"

    def __init__(
        self,
        path: str | Path,
        *,
        kappa: float = 0.0,
        mc_samples: int = 0,
        batch_size: int = 32,
        backbone: str | Path | None = None,
        device: str | None = None,
        cache_bytes: int = 256 << 20,
    ):
        if not isinstance(path, str | Path):
            raise ValueError(f"path: expected a folder, got {path!r}")
        if not isinstance(backbone, str | Path | None):
            raise ValueError(f"backbone: expected a folder or hub id, got {backbone!r}")
        if isinstance(kappa, bool) or not isinstance(kappa, int | float) or not math.isfinite(kappa):
            raise ValueError(f"kappa: expected a finite number, got {kappa!r}")
        for name, number, least in (("mc_samples", mc_samples, 0), ("batch_size", batch_size, 1)):
            _check_whole(name, number, least)
        _check_whole("cache_bytes", cache_bytes, 0)
        _check_device(device)
        self.folder = self.path = Path(path)
        self.facts = load_facts(self.folder)
        self.head = load_head(self.folder, self.facts)
        self.kappa, self.mc_samples, self.batch_size = float(kappa), mc_samples, batch_size
        self.cache_bytes = cache_bytes
        check_heads(self.kappa, len(self.head), self.mc_samples, self.facts["head"]["dropout"])
        self._name, self._device = str(backbone or self.facts["backbone"]["name"]), device
        self.backbone = backbone  # as given
        self._judge: Judge | None = None
        self._lent: tuple[nn.Module, str] | None = None  # whose weights are shared, and the head's adapter in them

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> PreferenceReward:
        """The reward saved in a folder by `train_preference`.

        Args:
            path: the folder.
            **options: `kappa`, how many standard deviations below the mean (needs several heads or draws);
                `mc_samples`, draws of dropout per head (0: none); `batch_size`; `backbone`, folder or hub id of the
                base model, where the head's own name for it does not lead there; `device`; `cache_bytes`, how much
                of the pictures' features is kept for the next call.

        Raises:
            ValueError: not such a folder, a file of it was altered, or an option that is wrong or does not fit the
                head.
        """
        return cls(path, **options)

    @property
    def signature(self) -> str:
        head, backbone = self.facts["head"], self.facts["backbone"]
        return (
            f"preference|id:{self.facts['identity'][:16]}|backbone:{backbone['model_type']}-{backbone['fingerprint']}"
            f"|fusion:{head['fusion']}|heads:{head['heads']}|mc:{self.mc_samples}|kappa:{self.kappa:g}"
            f"|scale:{self.facts['scale']:.6g}|shift:{self.facts['shift']:.6g}|version:2"
        )

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[Any] = (),
        image: Sequence[Any] | None = None,
        images: Sequence[Any] | None = None,
        **columns: Any,
    ) -> Scored:
        """Scores N completions; logs their `std` over heads and draws, where there is more than one.

        Every completion is read as a finished one; whether it was cut off is for another reward to punish. The
        pictures of a row are those of `images`, or, where it has none there, that of `image`. Without any the row
        gets None from a head that never saw such a row in training.

        Raises:
            ValueError: no prompts, or no column of pictures for a head that was trained with pictures alone.
        """
        rows = self._rows(prompts, completions, image, images)
        judged = [i for i, row in enumerate(rows) if row.images or self.facts["pictures"] != "all"]
        mean, std = self.mean_and_std([rows[i] for i in judged]) if judged else (np.zeros(0), np.zeros(0))
        values: list[float | None] = [None] * len(rows)
        spread = values.copy()
        for i, value, s in zip(judged, mean - self.kappa * std, std, strict=True):
            values[i], spread[i] = float(value), float(s)
        return Scored(values, {"std": spread} if len(self.head) * max(self.mc_samples, 1) > 1 else {})

    def mean_and_std(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """(N,) mean and standard deviation of the reward over heads and draws, in the unit of the reward."""
        samples = self.judge.rewards(rows, self.batch_size, self.mc_samples)
        return as_unit(samples, self.facts["shift"], self.facts["scale"])

    def evaluate(self, pairs: Sequence[Pair], blank: bool = False) -> dict[str, Any]:
        """Accuracy with interval, ECE, loss and accuracy by kind on pairs; `blank`: with every picture made grey."""
        differences = self.judge.differences(pairs, self.batch_size, self.mc_samples, blank)
        return pair_metrics(differences, self.facts["temperature"], [pair.kind for pair in pairs])

    @property
    def judge(self) -> Judge:
        if self._judge is None:
            about = self.facts["backbone"]
            try:
                model, processor = load_backbone(self._name, about["quantize"], about["dtype"], self._device)
            except ValueError as error:
                raise ValueError(
                    f"{error}; give the folder or hub id of the model that the head in {self.folder} was trained on "
                    "as option backbone"
                ) from error
            found = fingerprint(model)
            if found != about["fingerprint"]:
                raise ValueError(
                    f"backbone: the weights of {self._name!r} ({found}) are not those that the preference head in "
                    f"{self.folder} was trained on ({about['fingerprint']}); expected the checkpoint "
                    f"{about['name']!r} as it was, in the same dtype and quantisation"
                )
            if self.facts["adapter"]:
                from peft import PeftModel

                with quiet():
                    model = PeftModel.from_pretrained(model, str(self.folder / "adapter")).eval()
            adapter = "default" if self.facts["adapter"] else None
            self._judge = Judge(Backbone(model, processor, self.cache_bytes), self.head, adapter)
        return self._judge

    def prepare(self) -> None:
        """Loads and checks the backbone now, unless that was done or it is shared.

        Raises:
            ValueError: it cannot be loaded, or is another one than the head was trained on.
        """
        _ = self.judge

    def share(self, model: nn.Module, processor: Any, adapter_name: str | None = None) -> PreferenceReward:
        """Scores with a policy's `PeftModel` from now on: its base weights, and the head's own adapter beside its own.

        While rows are scored the policy's adapters are off; afterwards active adapters, trainable parameters and the
        mode of every module are what they were, exceptions included. Draws no random numbers.

        Whatever the reward read before is let go first (`release`), also if the new model is refused: then the next
        call loads a backbone of its own. So a reward may be shared again and again, with other models or the same.

        Args:
            model: the policy's model; its adapters may be trained, its base weights may not.
            processor: its processor.
            adapter_name: of the head's adapter in it; None takes "preference", or "preference_2" and so on.

        Raises:
            ValueError: the model is no `PeftModel`, its base weights are others or are being trained, or it has an
                adapter of this name.
        """
        self.release()
        adapter = self.folder / "adapter" if self.facts["adapter"] else None
        if adapter_name is None:
            names = itertools.chain(["preference"], (f"preference_{k}" for k in itertools.count(2)))
            adapter_name = next(name for name in names if name not in getattr(model, "peft_config", {}))
        attach(model, adapter, adapter_name, self.facts["backbone"]["fingerprint"])
        self._lent = (model, adapter_name) if adapter else None
        name = adapter_name if adapter else None
        self._judge = Judge(Backbone(model, processor, self.cache_bytes), self.head, name)
        return self

    def release(self) -> None:
        """Lets the backbone and the pictures' features go; a model that was shared loses the head's adapter."""
        lent, self._lent, self._judge = self._lent, None, None
        if lent is not None:
            detach(*lent)

    def _rows(self, prompts: Any, completions: Sequence[Any], image: Any, images: Any) -> list[Row]:
        n = len(completions)
        if prompts is None:
            raise ValueError("preference: no prompts; the head judges a text as the answer to a prompt")
        if image is None and images is None and self.facts["pictures"] == "all":
            raise ValueError(
                "preference: no column 'image' or 'images', and the head was trained with pictures; pass the "
                "pictures' column, or train a head on pairs without pictures"
            )
        image, images = [None] * n if image is None else image, [None] * n if images is None else images
        for name, column in (("prompts", prompts), ("image", image), ("images", images)):
            if len(column) != n:
                raise ValueError(f"preference: {name}: {len(column)} values for {n} completions")
        return [
            Row(prompt, _pictures(several) or _pictures(one), completion_text(completion))
            for prompt, one, several, completion in zip(prompts, image, images, completions, strict=True)
        ]


def _pictures(value: Any) -> tuple[Any, ...]:
    """The pictures of a row: several, one, or none."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def _check_device(device: Any) -> None:
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: a torch without CUDA
        said = str(error).splitlines()[0]
        raise ValueError(
            f"device: expected one of this machine, such as 'cpu' or 'cuda:0', got {device!r} ({said})"
        ) from error
