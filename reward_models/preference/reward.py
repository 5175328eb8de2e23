"""The learned head as a reward: `PreferenceReward.load(folder)` is a function in TRL's form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from reward_models.metrics.text import completion_text
from reward_models.preference.backbone import Backbone, Row, fingerprint, load_backbone
from reward_models.preference.calibration import pair_metrics
from reward_models.preference.folder import load_facts, load_head
from reward_models.preference.pairs import Pair
from reward_models.preference.scoring import Judge, as_unit, check_heads
from reward_models.preference.sharing import attach, quiet
from reward_models.returned import Scored


class PreferenceReward:
    """A learned reward: mean - kappa * std over heads and draws, of (r - shift) / scale.

    For a head learned from pairs, `scale` is the temperature and `shift` the median over the preferred texts of the
    calibration pairs: a difference of two rewards is the log-odds of being preferred, and 0 is a good text. For one
    learned from ratings the value is a rating.

    The backbone is loaded when the first row is scored, so that `share` costs no second copy.
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
    ):
        self.folder = Path(path)
        self.facts = load_facts(self.folder)
        self.head = load_head(self.folder, self.facts)
        self.kappa, self.mc_samples, self.batch_size = float(kappa), int(mc_samples), int(batch_size)
        check_heads(self.kappa, len(self.head), self.mc_samples, self.facts["head"]["dropout"])
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self._name, self._device = str(backbone or self.facts["backbone"]["name"]), device
        self._judge: Judge | None = None

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> PreferenceReward:
        """The reward saved in a folder by `train_preference`.

        Args:
            path: the folder.
            **options: `kappa`, how many standard deviations below the mean (needs several heads or draws);
                `mc_samples`, draws of dropout per head (0: none); `batch_size`; `backbone`, where the base model is
                if no longer where it was trained from; `device`.

        Raises:
            ValueError: not such a folder, a file of it was altered, or options that do not fit the head.
        """
        return cls(path, **options)

    @property
    def signature(self) -> str:
        head, backbone = self.facts["head"], self.facts["backbone"]
        return (
            f"preference|id:{self.facts['identity'][:16]}|backbone:{backbone['model_type']}-{backbone['fingerprint']}"
            f"|fusion:{head['fusion']}|heads:{head['heads']}|mc:{self.mc_samples}|kappa:{self.kappa:g}"
            f"|scale:{self.facts['scale']:.6g}|shift:{self.facts['shift']:.6g}|version:1"
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

        Every completion is read as a finished one; whether it was cut off is for another reward to punish.

        Raises:
            ValueError: no prompts, or no column of pictures for a head that was trained with pictures.
        """
        rows = self._rows(prompts, completions, images if images is not None else image)
        mean, std = self.mean_and_std(rows)
        values = [float(v) for v in mean - self.kappa * std]
        logged = {"std": [float(s) for s in std]} if len(self.head) * max(self.mc_samples, 1) > 1 else {}
        return Scored(values, logged)

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
                    f"{error}; option backbone says where the base model of {self.folder} is now"
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
            self._judge = Judge(Backbone(model, processor), self.head, "default" if self.facts["adapter"] else None)
        return self._judge

    def share(self, model: nn.Module, processor: Any, adapter_name: str | None = None) -> PreferenceReward:
        """Scores with a policy's `PeftModel` from now on: its base weights, and the head's own adapter beside its own.

        While rows are scored the policy's adapters are off; afterwards active adapters, trainable parameters and the
        mode of every module are what they were, exceptions included. Draws no random numbers.

        Args:
            model: the policy's model; its adapters may be trained, its base weights may not.
            processor: its processor.
            adapter_name: of the head's adapter in it; None takes "preference", or "preference_2" and so on.

        Raises:
            ValueError: the model is no `PeftModel`, its base weights are others or are being trained, or it has an
                adapter of this name.
        """
        adapter = self.folder / "adapter" if self.facts["adapter"] else None
        if adapter_name is None:
            taken = len([name for name in getattr(model, "peft_config", {}) if name.startswith("preference")])
            adapter_name = f"preference_{taken + 1}" if taken else "preference"
        attach(model, adapter, adapter_name, self.facts["backbone"]["fingerprint"])
        self._judge = Judge(Backbone(model, processor), self.head, adapter_name if adapter else None)
        return self

    def _rows(self, prompts: Any, completions: Sequence[Any], pictures: Any) -> list[Row]:
        n = len(completions)
        if prompts is None:
            raise ValueError("preference: no prompts; the head judges a text as the answer to a prompt")
        if pictures is None:
            if self.facts["pictures"]:
                raise ValueError(
                    "preference: no column 'image' or 'images', and the head was trained with pictures; pass the "
                    "pictures' column, or train a head on pairs without pictures"
                )
            pictures = [None] * n
        for name, column in (("prompts", prompts), ("images", pictures)):
            if len(column) != n:
                raise ValueError(f"preference: {len(column)} {name} for {n} completions")
        rows = []
        for prompt, seen, completion in zip(prompts, pictures, completions, strict=True):
            seen = () if seen is None else tuple(seen) if isinstance(seen, list | tuple) else (seen,)
            rows.append(Row(prompt, seen, completion_text(completion)))
        return rows
