"""TRL's option names in our configs, and TRL's config objects in our trainers.

What happens to each name stands in `mmft.training.trl_names`; docs/from_trl.md is the page for users. Nothing that
was asked for is dropped in silence: it is translated, or a warning lists it, or it is refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

from mmft.training.trl_names import ARGUMENTS, GRPO, NAMES

_C = TypeVar("_C", bound=type)

_RENAMED = {
    "beta": "kl_coef",
    "init_kl_coef": "kl_coef",
    "num_iterations": "num_ppo_epochs",
    "ppo_epochs": "num_ppo_epochs",
    "response_length": "max_completion_length",
    "save_total_limit": "keep_last",
    "per_device_eval_batch_size": "eval_batch",
    "torch_compile": "compile",
    "activation_checkpointing": "gradient_checkpointing",
    "target": "kl_target",
    "horizon": "kl_horizon",
    "log_with": "report_to",
    "warmup_ratio": "warmup_steps",
}
_OPTIMIZERS = {
    "adamw": ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"),
    "adamw_8bit": ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"),
    "sgd": ("sgd",),
}
# Left to themselves, these decide how a run goes, and are not what they are in `GRPOConfig`, which is said here.
_DEFAULTS = {
    "max_steps": "3 passes",
    "learning_rate": 1e-6,
    "max_completion_length": 512,
    "prompts_per_step": 1,
    "kl_coef": 0.0,
    "num_ppo_epochs": 1,
}


def takes_trl_names(cls: _C) -> _C:
    """Lets a config be made by TRL's names, too, and be asked for those a script reads later.

    Raises (from the config's constructor):
        ValueError: a name that neither side knows, with the nearest; an option that cannot be honoured, with ours.
    """
    plain: Callable[..., None] = cls.__init__  # type: ignore[misc]

    @functools.wraps(plain)
    def init(self: Any, *given: Any, **options: Any) -> None:
        names = [field.name for field in dataclasses.fields(cls)]
        if len(given) > 1:
            raise ValueError(f"{cls.__name__} takes its options by name; only output_dir may stand without")
        options |= dict(zip(names, given, strict=False))
        object.__setattr__(self, "_trl", {name: v for name, v in options.items() if name not in names})
        ours, notes = translate(options, names, cls.__name__)
        plain(self, **ours)
        if notes and os.environ.get("RANK", "0") == "0":
            notes += _left_to_us(self, ours)
            warnings.warn(f"{cls.__name__} was given TRL's options:\n  " + "\n  ".join(notes), stacklevel=2)

    def read(self: Any, name: str) -> Any:
        asked = self.__dict__.get("_trl", {})
        entry = NAMES.get(name)
        if name in asked:
            return asked[name]
        if entry is not None and entry.how in ("kept", "ignored"):
            return entry.default
        where = f"; here it is {entry.text}" if entry is not None else ""
        raise AttributeError(f"{type(self).__name__} has no {name!r}{where}")

    def write(self: Any, name: str, value: Any) -> None:
        if name in {field.name for field in dataclasses.fields(self)}:
            object.__setattr__(self, name, value)
        elif name in NAMES and (NAMES[name].how == "kept" or name == "model_init_kwargs"):
            self._trl[name] = value
        else:
            why = f"set {name} when the config is made" if name in NAMES else _unknown(name, self)
            raise AttributeError(f"{type(self).__name__}: {why}")

    cls.__init__, cls.__getattr__, cls.__setattr__ = init, read, write  # type: ignore[misc,attr-defined]
    return cls


def translate(options: dict[str, Any], ours: list[str], what: str) -> tuple[dict[str, Any], list[str]]:
    """TRL's options -> ours, and what there is to say about it, a line each.

    Args:
        ours: the names that the config has itself.
        what: its name, for errors.

    Raises:
        ValueError: unknown, refused, or said twice.
    """
    given = {name: value.value if isinstance(value, Enum) else value for name, value in options.items()}
    for name in given:
        if name not in ours and name not in NAMES:
            raise ValueError(f"{what}: {_unknown(name, ours)}")
    found = {name: value for name, value in given.items() if name in ours}
    theirs = {name: value for name, value in given.items() if name not in ours}
    notes: list[str] = []

    def put(name: str, value: Any, source: str) -> None:
        if found.get(name, value) != value:
            raise ValueError(f"{what}: {source} says {name}={value!r}, and {name}={found[name]!r} is given, too")
        found[name] = value
        notes.append(f"{source} -> {name}={value!r}")

    for name, value in theirs.items():
        if name in _RENAMED and value is not None and (value or name != "warmup_ratio"):
            put(_RENAMED[name], value, f"{name}={value!r}")
    for convert in (_batch, _clip, _loss, _optimizer, _strategies, _vllm):
        convert(theirs, found, put, notes)
    _forms(found)
    _steps(theirs, found, put)
    lost: dict[str, list[str]] = {}
    for name, value in theirs.items():
        entry = NAMES[name]
        if entry.how == "refused" and entry.asks(value) and name != "loss_type":
            raise ValueError(f"{what}: {name}={value!r} cannot be had here: {entry.text}")
        if entry.how == "ignored" and entry.asks(value):
            lost.setdefault(entry.text, []).append(f"{name}={value!r}")
    notes += [f"{', '.join(names)}: ignored, {why}" for why, names in lost.items()]
    return found, notes


def _unknown(name: str, ours: Any) -> str:
    known = [*(ours if isinstance(ours, list) else vars(ours)), *NAMES]
    near = difflib.get_close_matches(name, known, n=1)
    return f"there is no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _batch(theirs: dict, found: dict, put: Callable, notes: list[str]) -> None:
    """Completions per device, and how often they are gathered -> prompts per step."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    said = {name: theirs[name] for name in (*names, "generation_batch_size") if theirs.get(name) is not None}
    if not said:
        return
    if wrong := [f"{name}={value!r}" for name, value in said.items() if not isinstance(value, int) or value < 1]:
        raise ValueError(f"{', '.join(wrong)}: expected a whole number >= 1")
    group = max(1, found.get("num_generations", GRPO["num_generations"].default))
    device, gathered = (theirs.get(name) or GRPO[name].default for name in names[:2])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    whole = said.get("generation_batch_size") or device * world * said.get(names[2], gathered)
    source = ", ".join(f"{name}={value}" for name, value in said.items())
    if whole % group:
        raise ValueError(
            f"{source}: {whole} responses of a step do not make whole groups of num_generations={group}; "
            "set prompts_per_step instead"
        )
    if whole % (device * world * gathered):
        raise ValueError(f"{source}: a generation batch of {whole} is no whole number of optimizer steps")
    put("prompts_per_step", whole // group, source)
    parts = whole // (device * world * gathered)
    if parts > 1:
        put("num_mini_batches", parts, source)
    put("micro_prompts", max(1, device // group), source)


def _clip(theirs: dict, found: dict, put: Callable, notes: list[str]) -> None:
    low, high = theirs.get("epsilon"), theirs.get("epsilon_high")
    if low is not None or high is not None:
        low = GRPO["epsilon"].default if low is None else low
        said = ", ".join(f"{name}={theirs[name]}" for name in ("epsilon", "epsilon_high") if theirs.get(name))
        put("cliprange", low if high is None else (low, high), said)


def _loss(theirs: dict, found: dict, put: Callable, notes: list[str]) -> None:
    scale, loss = theirs.get("scale_rewards"), theirs.get("loss_type")
    if scale in ("batch", "none", False):
        put("whiten_advantages", scale == "batch", f"scale_rewards={scale!r}")
    elif scale is not None:
        notes.append(f"scale_rewards={scale!r}: ignored, advantages are scaled over the step, not within each group")
    if loss in ("grpo", "bnpo", "dr_grpo"):
        notes.append(f"loss_type={loss!r}: ignored, the mean is over all tokens of the optimizer step")
    elif loss not in (None, "dapo"):
        raise ValueError(f"loss_type={loss!r} cannot be had here: {NAMES['loss_type'].text}")


def _optimizer(theirs: dict, found: dict, put: Callable, notes: list[str]) -> None:
    name = theirs.get("optim")
    if name is None:
        return
    for ours, known in _OPTIMIZERS.items():
        if name in known:
            return put("optimizer", ours, f"optim={name!r}")
    raise ValueError(f"optim={name!r} cannot be had here: expected optimizer = {', '.join(_OPTIMIZERS)}")


def _strategies(theirs: dict, found: dict, put: Callable, notes: list[str]) -> None:
    """When to save and to evaluate; an epoch is a share of the run."""
    theirs = {"evaluation_strategy": None, **theirs}
    theirs["eval_strategy"] = theirs.get("eval_strategy") or theirs["evaluation_strategy"]
    usual = {"save": GRPO["save_steps"].default, "eval": theirs.get("logging_steps", GRPO["logging_steps"].default)}
    for verb in ("save", "eval"):
        strategy, steps = theirs.get(f"{verb}_strategy"), f"{verb}_steps"
        said = f"{verb}_strategy={strategy!r}"
        if strategy == "no":
            found[steps] = 0
        elif strategy == "steps" and found.get(steps) is None:
            put(steps, usual[verb], said)
        elif strategy == "epoch":
            passes = found.get("num_train_epochs")
            if passes is None or found.get("max_steps", -1) > 0:
                raise ValueError(f"{said} needs num_train_epochs without max_steps here; or say {steps}")
            found.pop(steps, None)
            put(steps, 1 / passes if passes > 1 else 0, said)
        elif strategy not in (None, "steps"):
            raise ValueError(
                f"{said} cannot be had here: a run with patience, or a guard that rolls back, keeps the best"
            )


def _vllm(theirs: dict, found: dict, put: Callable, notes: list[str]) -> None:
    if not theirs.get("use_vllm"):
        return
    put("engine", "vllm", "use_vllm=True")
    mode = theirs.get("vllm_mode", GRPO["vllm_mode"].default)
    if mode not in ("colocate", "server"):
        raise ValueError(f"vllm_mode={mode!r} cannot be had here: expected colocate or server")
    if mode == "colocate":
        memory = theirs.get("vllm_gpu_memory_utilization", GRPO["vllm_gpu_memory_utilization"].default)
        return put("vllm", {"url": None, "memory": memory}, "vllm_mode='colocate'")
    host, port = (theirs.get(f"vllm_server_{x}", GRPO[f"vllm_server_{x}"].default) for x in ("host", "port"))
    url = theirs.get("vllm_server_base_url") or f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    put("vllm", {"url": url, "timeout": theirs.get("vllm_server_timeout", 240.0)}, "vllm_mode='server'")


def _forms(found: dict) -> None:
    """TRL's ways to write a value that we have as well."""
    trackers = found.get("report_to", ())
    if "report_to" in found and (not trackers or trackers in ("none", ["none"])):
        found["report_to"] = ()
    elif trackers:
        found["report_to"] = (trackers,) if isinstance(trackers, str) else tuple(trackers)
    if found.get("lr_scheduler_type") == "constant_with_warmup":
        found["lr_scheduler_type"] = "constant"
    for name in ("output_dir", "eval_steps", "save_steps"):
        if name in found and found[name] is None:
            del found[name]
    if "max_steps" in found and found["max_steps"] <= 0:
        del found["max_steps"]
        if found.get("num_train_epochs") is None:
            found["num_train_epochs"] = GRPO["num_train_epochs"].default
    elif "max_steps" in found:
        found["num_train_epochs"] = None  # as in TRL, steps count where both are given


def _steps(theirs: dict, found: dict, put: Callable) -> None:
    """TRL counts optimizer steps; a step here samples, and makes all optimizer steps of its samples."""
    if episodes := theirs.get("total_episodes"):
        responses = found.get("prompts_per_step", 32) * found.get("num_generations", 8)
        put("max_steps", math.ceil(episodes / responses), f"total_episodes={episodes}")
        return
    passes = found["num_ppo_epochs"] if theirs.get("num_iterations") else 1
    parts = found.get("num_mini_batches", 1) if {"steps_per_generation", "generation_batch_size"} & set(theirs) else 1
    unit = passes * parts
    if unit == 1:
        return
    for name in ("max_steps", "save_steps", "eval_steps", "warmup_steps"):
        steps = found.get(name)
        if steps and steps >= 1:
            del found[name]
            put(name, math.ceil(steps / unit), f"{name}={steps}, of which a step here makes {unit}")


def _left_to_us(config: Any, found: dict[str, Any]) -> list[str]:
    """What the script left to TRL's defaults, where ours are others."""
    left = [name for name in _DEFAULTS if name not in found and not (name == "max_steps" and config.num_train_epochs)]
    left = [f"{name}={getattr(config, name)} (GRPOConfig: {_DEFAULTS[name]})" for name in left]
    return [f"not said, and other defaults than TRL's: {', '.join(left)}"] if left else []


def settled(config: Any, rows: int) -> Any:
    """The config with passes over the rows, and shares of the run, as numbers of steps; itself where it has none."""
    changed: dict[str, Any] = {}
    steps = config.max_steps
    if config.num_train_epochs is not None:
        steps = max(1, math.ceil(config.num_train_epochs * max(1, rows // config.prompts_per_step)))
        changed |= {"max_steps": steps, "num_train_epochs": None}
    for name in ("save_steps", "eval_steps", "warmup_steps"):
        share = getattr(config, name)
        if share < 0 or (share > 1 and share != int(share)):
            raise ValueError(f"{name}={share}: expected a whole number of steps, or a share of them below 1")
        if share != int(share):
            changed[name] = math.ceil(share * steps)
        elif not isinstance(share, int):
            changed[name] = int(share)
    if not changed:
        return config
    found = dataclasses.replace(config, **changed)
    found.__dict__["_trl"] = config.__dict__.get("_trl", {})
    return found


def config_of(args: Any, ours: type) -> Any:
    """A `GRPOConfig` object of TRL -> one of our configs. It says everything, so TRL's defaults hold."""
    names = [field.name for field in dataclasses.fields(args)]
    fixed = {name: getattr(args, name) for name in ("output_dir", "use_cpu", "bf16", "fp16")}
    usual = type(args)(**fixed)
    options = {}
    for name in names:
        value, entry = getattr(args, name), NAMES.get(name)
        if entry is None or entry.how in ("same", "mapped", "kept") or value != getattr(usual, name):
            options[name] = value
    # Worked out of each other when the object was made.
    if options.get("steps_per_generation") is not None:
        options.pop("generation_batch_size", None)
    if options.get("num_train_epochs") is not None and options.get("max_steps", -1) > 0:
        options.pop("num_train_epochs")
    if options.get("scale_rewards") == "group":
        options.pop("scale_rewards")
    return ours(**options)


def require_known(arguments: dict[str, Any], what: str) -> None:
    """Refuses the arguments of TRL's trainers that mean nothing here, with what to do instead."""
    for name, value in arguments.items():
        if name not in ARGUMENTS:
            near = difflib.get_close_matches(name, ARGUMENTS, n=1)
            raise TypeError(f"{what} has no argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if value is not None and value not in ((None, None), []):
            raise ValueError(f"{what}: {name} cannot be had here: {ARGUMENTS[name]}")


def loading(config: Any, quantization: Any = None) -> dict[str, Any]:
    """Arguments of `mmft.vlm.load.load_model` from TRL's ``model_init_kwargs`` and quantisation.

    Raises:
        ValueError: something that cannot be said there.
    """
    given = dict(getattr(config, "_trl", {}).get("model_init_kwargs") or {})
    found: dict[str, Any] = {}
    dtype = given.pop("dtype", None) or given.pop("torch_dtype", None)
    if dtype is not None:
        found["dtype"] = str(dtype).removeprefix("torch.")
    trust = given.pop("trust_remote_code", None) or getattr(config, "_trl", {}).get("trust_remote_code")
    if trust:
        found["trust_remote_code"] = True
    quantization = given.pop("quantization_config", None) or quantization
    if quantization is not None:
        found["quantize"] = "int8" if getattr(quantization, "load_in_8bit", False) else "nf4"
    for name in ("device_map", "attn_implementation", "use_cache"):  # chosen here; the numbers do not change
        given.pop(name, None)
    if left := {name: value for name, value in given.items() if value not in (None, "main")}:
        raise ValueError(
            f"model_init_kwargs={left}: expected dtype, trust_remote_code or quantization_config; load the model "
            "yourself and give it in place of its name"
        )
    return found
