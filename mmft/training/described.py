"""The recipe of a run that was put together in Python, so that it can be published, evaluated and read as any other.

What a recipe has words for is written as it is, with the options that a reward object was made with. Rows and rewards
that are objects of the program get a name that says so, by which nobody can load them again.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mmft.recipe import Recipe
from mmft.recipe.messages import without_null
from mmft.recipe.sections import Algorithm, Eval, Guards, Model, Rollout, Train
from mmft.recipe.strict_yaml import dotted
from mmft.training.config import A2CConfig, PPOConfig
from mmft.training.evaluate import text_row
from mmft.vlm.load import BUNDLED
from reward_models.named import BUILT_IN, built_in
from reward_models.options import options_of

if TYPE_CHECKING:
    from mmft.training.trainer import PPOTrainer

IN_PYTHON = "rows made in Python"
_LOOKED_AT = 8  # rows that are asked for their prompt


def describe(trainer: PPOTrainer, path: Path) -> None:
    """Writes ``recipe.yaml``; where the run has options that no recipe can hold, says so and writes nothing."""
    config = trainer.config
    options = asdict(config) | {"steps": config.max_steps, "lr_schedule": config.lr_scheduler_type}
    options |= {"save_every": config.save_steps, "every": config.eval_steps, "rows": config.eval_rows}
    options["rewards"] = config.eval_rewards
    said = {
        name: {
            key: options[key]
            for key, field in section.model_fields.items()
            if key in options and (options[key] is not None or without_null(field.annotation)[1])
        }
        for name, section in {"algorithm": Algorithm, "rollout": Rollout, "train": Train, "eval": Eval}.items()
    }
    said["algorithm"]["name"] = "a2c" if isinstance(config, A2CConfig) else "ppo"
    said |= {"seed": config.seed, "model": _model(trainer), "data": _data(trainer), "guards": _guards(config)}
    said["rewards"] = [_reward(part) for part in trainer.reward_funcs.parts]
    said["output"] = {"dir": str(trainer.run_dir), "trackers": list(config.report_to)}
    try:
        Recipe.model_validate(said).dump(path)
    except ValidationError as error:
        path.unlink(missing_ok=True)  # an earlier run's would be of another one
        wrong = error.errors()[0]
        what = f"{dotted(wrong['loc'])}: {wrong['msg']}".removeprefix(": ")
        print(f"no recipe.yaml is written, for a recipe cannot say this run ({what})", file=sys.stderr)


def _model(trainer: PPOTrainer) -> dict[str, Any]:
    model = trainer.policy.model
    adapters = getattr(model, "peft_config", None)
    base = model.get_base_model() if adapters else model
    place = getattr(base.config, "_name_or_path", "") or "a model made in Python"
    bundled = {str(folder): name for name, folder in BUNDLED.items()}
    config = trainer.config
    said: dict[str, Any] = {"name": bundled.get(place, place), "critic": config.critic, "compile": config.compile}
    said["picture_cache"] = {"memory_mib": config.cache_bytes >> 20, "folder": config.cache_folder}
    said["picture_cache"]["disk_mib"] = config.cache_disk_bytes >> 20
    said["quantize"] = next((kind for kind, bits in (("nf4", 4), ("int8", 8)) if _bits(base) == bits), None)
    dtype = str(base.dtype).removeprefix("torch.")
    said["dtype"] = dtype if dtype in Model.model_fields["dtype"].annotation.__args__ else "auto"
    if not adapters:
        return said | {"tune": "full" if all(p.requires_grad for p in base.parameters()) else "frozen"}
    lora = adapters[model.active_adapters[0]]
    target = lora.target_modules
    if not isinstance(target, str):
        target = rf".*\.({'|'.join(sorted(target))})"
    elif target == trainer.policy.family.lora_target:
        target = "language"
    shape = {"r": lora.r, "alpha": lora.lora_alpha, "dropout": lora.lora_dropout, "target": target}
    shape |= {"dora": lora.use_dora, "rslora": lora.use_rslora}
    return said | {"tune": "hybrid" if lora.modules_to_save else "lora", "lora": shape}


def _guards(config: PPOConfig) -> dict[str, Any]:
    """Each guard with the options that its section has; one that is left out is off."""
    sections = {name: without_null(field.annotation)[0] for name, field in Guards.model_fields.items()}
    return {
        name: {key: getattr(config.guards[name], key) for key in section.model_fields}
        if name in config.guards
        else None
        for name, section in sections.items()
    }


def _bits(model) -> int | None:
    return next((bits for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)), None)


def _data(trainer: PPOTrainer) -> dict[str, Any]:
    train, held_out = trainer.train_dataset, trainer.eval_dataset
    name, split = getattr(train, "origin", (IN_PYTHON, "train"))
    said: dict[str, Any] = {"name": name, "train": split, "eval": getattr(held_out, "origin", (name, "test"))[1]}
    said["train_rows"] = len(train)
    prompts = [text_row(train, i).get("prompt") for i in range(min(_LOOKED_AT, len(train)))]
    one = isinstance(prompts[0], str) and all(prompt == prompts[0] for prompt in prompts)
    return said | ({"prompt": prompts[0]} if one else {})


def _reward(part) -> dict[str, Any]:
    kind = part.function if isinstance(part.function, type) else type(part.function)
    alike = (name for name, place in BUILT_IN.items() if place.rpartition(":")[2] == kind.__qualname__)
    name = next((name for name in alike if built_in(name) is kind), None)
    if name is None:
        own = getattr(part.function, "__name__", kind.__name__)
        name = f"python:{own if own.isidentifier() else 'reward'}"
    said = {"name": name, "weight": part.weight, "credit": part.credit, "nonfinite": part.nonfinite, "as": part.name}
    said |= {"normalize": part.normalize, "clip": None if part.clip is None else list(part.clip)}
    return said | {"options": options_of(part.function)}
