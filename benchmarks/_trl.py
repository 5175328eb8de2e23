"""TRL's side of the benchmarks: its GRPO and RLOO trainers on our rows and rewards, timed phase by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks._turns import Turn


@dataclass(frozen=True)
class Setting:
    """How TRL splits its work; changes its time and memory, never what it computes.

    Attributes:
        batch: samples per forward and backward pass (``per_device_train_batch_size``).
        generation: samples generated together (``generation_batch_size``); None = all of an iteration.
        cache: ``cache_implementation`` of generation; None = transformers' default, which grows.
        compile: ``torch_compile``, of everything but generation; takes a minute and a C++ compiler at the first step.
    """

    batch: int
    generation: int | None = None
    cache: str | None = None
    compile: bool = False

    @classmethod
    def parse(cls, text: str) -> Setting:
        """``batch=16,generation=64,cache=static,compile=yes``; all but the batch may be left out. Else ValueError."""
        given = dict(part.partition("=")[::2] for part in text.split(","))
        try:
            batch, generation = int(given.pop("batch")), given.pop("generation", None)
            cache, compiled = given.pop("cache", None), given.pop("compile", None)
            if given or compiled not in (None, "yes"):
                raise ValueError
            return cls(batch, int(generation) if generation else None, cache, compiled == "yes")
        except (KeyError, ValueError):
            expected = "batch=N[,generation=N][,cache=static][,compile=yes]"
            raise ValueError(f"TRL setting {text!r}: expected {expected}") from None

    def __str__(self) -> str:
        parts = {"batch": self.batch, "generation": self.generation, "cache": self.cache}
        parts["compile"] = "yes" if self.compile else None
        return ",".join(f"{name}={value}" for name, value in parts.items() if value is not None)


def build(
    kind: str,
    setting: Setting,
    model,
    processor,
    adapters,
    score,
    dataset,
    *,
    scratch: str,
    steps: int,
    prompts: int,
    group: int,
    length: int,
    banned: list[int],
    **options,
):
    """A `GRPOTrainer` ("grpo") or `RLOOTrainer` ("rloo") whose every optimizer step answers ``prompts`` new rows.

    Args:
        banned: tokens that are never sampled.
        options: further fields of its configuration.
    """
    import trl

    samples = prompts * group
    together = setting.generation or samples
    if samples % together or together % setting.batch or together % group:
        raise ValueError(f"TRL setting {setting}: {samples} samples in groups of {group} do not split so")
    config = getattr(trl, f"{kind.upper()}Config")(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=setting.batch,
        gradient_accumulation_steps=samples // setting.batch,
        steps_per_generation=together // setting.batch,
        num_generations=group,
        max_completion_length=length,
        cache_implementation=setting.cache,
        torch_compile=setting.compile,
        generation_kwargs={"suppress_tokens": banned},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **{"num_iterations": 1, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0} | options,
    )
    made = getattr(trl, f"{kind.upper()}Trainer")(
        model=model,
        reward_funcs=score,
        args=config,
        train_dataset=dataset,
        processing_class=processor,
        peft_config=adapters,
    )
    if getattr(made.model, "is_activation_checkpointing", False):
        raise RuntimeError("TRL's model recomputes activations; the comparison wants it at its fastest")
    return made


def run(trainer, turn: Turn) -> dict[str, float]:
    """Trains, an optimizer step at a time; returns TRL's own log, means over all steps.

    ``turn`` gets {} before the first step, and after each its "seconds" in all and by "phases".
    The phases have mmft's names: "rollout" (pictures, prompts and generation), "reference" (log-probs without
    gradient: the reference's; RLOO's old ones too), "reward", and "update" (forward, backward and optimizer).
    """
    phases = _phases(trainer)
    trainer.add_callback(_clock(turn, phases))
    trainer.train()
    return trainer.state.log_history[-1]


def _phases(trainer) -> dict[str, float]:
    """Seconds by method of the trainer, counted up from now on."""
    seconds: dict[str, float] = defaultdict(float)

    def watch(method: str, phase: str, when=lambda: True) -> None:
        plain = getattr(trainer, method)

        def timed(*args, **kwargs):
            began, counts = time.perf_counter(), when()
            try:
                return plain(*args, **kwargs)
            finally:
                if counts:
                    seconds[phase] += time.perf_counter() - began

        setattr(trainer, method, timed)

    # With a gradient it is a part of the update.
    watch("_get_per_token_logps_and_entropies", "reference", lambda: not torch.is_grad_enabled())
    watch("_calculate_rewards", "reward")
    watch("_prepare_inputs", "experience")
    return seconds


def _clock(turn: Turn, phases: dict[str, float]):
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def _wait(self, control, measured: dict[str, Any]) -> None:
            if not turn(measured):
                control.should_training_stop = True
            phases.clear()
            self.began = time.perf_counter()

        def on_train_begin(self, args, state, control, **kwargs) -> None:
            self._wait(control, {})

        def on_step_end(self, args, state, control, **kwargs) -> None:
            seconds = time.perf_counter() - self.began
            experience, reference, reward = (phases[name] for name in ("experience", "reference", "reward"))
            found = {"rollout": experience - reference - reward, "reference": reference, "reward": reward}
            self._wait(control, {"seconds": seconds, "phases": found | {"update": seconds - experience}})

    return Clock()


def reference_logprobs(trainer, processor, row: dict[str, Any], response: list[int]) -> list[float]:
    """Log-probs of the tokens of one response to one row with the adapters off, by TRL's own method."""
    from trl.data_utils import apply_chat_template, prepare_multimodal_messages

    messages = prepare_multimodal_messages(row["prompt"], images=[row["image"]])
    text = apply_chat_template({"prompt": messages}, processor)["prompt"]
    inputs = dict(processor(images=[[row["image"]]], text=[text], return_tensors="pt"))
    answer = torch.tensor([response])
    ids = torch.cat([inputs.pop("input_ids"), answer], dim=1)
    mask = torch.cat([inputs.pop("attention_mask"), torch.ones_like(answer)], dim=1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(answer)], dim=1)
    with torch.no_grad(), trainer.model.disable_adapter():
        found, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, len(response), num_images=[1], **inputs
        )
    return found[0].tolist()
