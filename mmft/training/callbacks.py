"""`TrainerCallback`s of transformers in our loop, and the trainer's state where reward functions ask for it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerControl, TrainerState

from reward_models.own import signature_of


class Callbacks:
    """Tells callbacks what happens, in the order of TRL: begin, (step, log, evaluate, save)*, end.

    One call of ``on_step_begin`` and ``on_step_end`` stands for one RL step. Of what a callback may ask for,
    ``should_training_stop`` and ``should_save`` are done; logs and evaluations come when they come.

    Args:
        given: callbacks, or classes of them.
        args: the trainer's config, which they get as ``args``.
    """

    def __init__(self, given: Sequence[Any] | None, args: Any, is_main: bool = True):
        self.given = [found() if isinstance(found, type) else found for found in given or ()]
        self.args, self.control = args, TrainerControl()
        self.state = TrainerState(max_steps=args.max_steps, is_world_process_zero=is_main)

    def begin(self, done: int, **seen: Any) -> None:
        self.state.global_step = done
        self._tell("train_begin", **seen)

    def step(self, step: int, metrics: Mapping[str, float], **seen: Any) -> bool:
        """After a step; whether one of them asks to end the training."""
        self.state.global_step = step
        self._tell("step_end", **seen)
        logs = {name.replace("eval/", "eval_"): value for name, value in metrics.items()}
        self.state.log_history.append(logs | {"step": step})
        self._tell("log", logs=logs, **seen)
        if held_out := {name: value for name, value in logs.items() if name.startswith("eval_")}:
            self._tell("evaluate", metrics=held_out, **seen)
        return self.control.should_training_stop

    def wants_save(self) -> bool:
        """Whether one of them asked to save; asked again, no."""
        asked, self.control.should_save = self.control.should_save, False
        return asked

    def saved(self, **seen: Any) -> None:
        self._tell("save", **seen)

    def step_begin(self, **seen: Any) -> None:
        self._tell("step_begin", **seen)

    def end(self, **seen: Any) -> None:
        self._tell("train_end", **seen)

    def _tell(self, event: str, **seen: Any) -> None:
        for callback in self.given:
            answer = getattr(callback, f"on_{event}")(self.args, self.state, self.control, **seen)
            self.control = answer or self.control


def with_state(reward_funcs: Any, state: TrainerState) -> Any:
    """The reward functions, those that name ``trainer_state`` among their arguments given it; others as they are.

    So are ``log_metric`` and ``log_extra``, which do nothing here but say once what does.
    """
    theirs = {"trainer_state": state, "log_metric": _not_logged, "log_extra": _not_logged}

    def told(function: Any) -> Any:
        try:
            names = inspect.signature(function).parameters
        except (TypeError, ValueError):
            return function
        given = {name: value for name, value in theirs.items() if name in names}
        return _Told(function, given) if given else function

    if isinstance(reward_funcs, list | tuple):
        return [told(function) for function in reward_funcs]
    return told(reward_funcs)


class _Told:
    """A reward function that is given some arguments in every call; in all else, its name and signature, itself."""

    def __init__(self, function: Any, given: dict[str, Any]):
        self._function, self._given = function, given
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        # Without what is given: a state changes from step to step, and a resumed run compares the signature.
        self.signature = getattr(function, "signature", None) or signature_of(function)

    def __call__(self, **columns: Any) -> Any:
        return self._function(**columns, **self._given)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._function, name)


@functools.cache  # a warning a run is enough
def _say_not_logged() -> None:
    warnings.warn(
        "log_metric and log_extra log nothing here: return `reward_models.rewards.Scored(scores, logged={name: […]})`",
        stacklevel=3,
    )


def _not_logged(*_: Any, **__: Any) -> None:
    _say_not_logged()
