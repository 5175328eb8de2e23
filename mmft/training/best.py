"""The best evaluation of a run: which it was, how long ago, and the way back to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmft.evaluation.captioning import metric_info
from mmft.evaluation.findings import main_metric
from mmft.training.checkpoint import load_checkpoint
from mmft.training.evaluate import Evaluation
from mmft.training.guards import Alarm
from mmft.training.monitor import Monitor
from mmft.training.transaction import Damaged

if TYPE_CHECKING:
    from mmft.training.trainer import PPOTrainer


def keeps_best(trainer: PPOTrainer) -> bool:
    """Whether the run may end with the state of the best evaluation."""
    return trainer.guards.may_roll_back or trainer.config.patience is not None


def metric_of(evaluation: Evaluation | None) -> str | None:
    """The metric that a best evaluation is best in; None where nobody knows whether more of it is better."""
    name = main_metric(list(evaluation.means())) if evaluation else None
    return name if name is not None and metric_info(name).better > 0 else None


def held_out_alarms(trainer: PPOTrainer, step: int, evaluation: Evaluation | None) -> list[Alarm]:
    """Shows an evaluation to the guards; the alarms, running out of patience among them."""
    name = metric_of(evaluation)
    if name is None:
        return []
    alarms = trainer.guards.held_out(step, evaluation.means()[name], name)
    patience, best = trainer.config.patience, trainer.guards.best_step
    every = trainer.config.eval_steps
    if patience is not None and best is not None and step % every == 0 and step < trainer.config.max_steps:
        waited = (step - best) // every
        if waited >= patience:
            text = f"{waited} evaluations without a better {name} than at step {best}"
            alarms.append(Alarm("patience", step, waited, patience, "rollback", text))
            trainer.guards.alarms.append(alarms[-1])
    return alarms


def best_checkpoint(trainer: PPOTrainer) -> Path | None:
    """The checkpoint of the best evaluation, where there is one."""
    if trainer.guards.best_step is None:
        return None
    folder = trainer.checkpoints.path(trainer.guards.best_step)
    return folder if folder.is_dir() else None


def act(trainer: PPOTrainer, alarms: list[Alarm], monitor: Monitor) -> bool:
    """What the alarms ask for; True = the training ends here."""
    asked = {alarm.action for alarm in alarms}
    best = best_checkpoint(trainer) if "rollback" in asked else None
    if best is not None:
        said, seconds = trainer.guards.alarms, trainer.seconds_before  # they belong to the run, not to the state
        try:
            trainer.rolled_back_to = load_checkpoint(trainer, best)
            monitor.say(f"training ends with the weights of step {trainer.rolled_back_to}, the best evaluated")
        except Damaged as problem:
            monitor.say(f"training stops; the best evaluated state cannot be put back: {problem}")
        trainer.guards.alarms, trainer.seconds_before = said, seconds
    elif asked & {"stop", "rollback"}:
        monitor.say("training stops" + ("; no evaluated state to roll back to" if "rollback" in asked else ""))
    return bool(asked & {"stop", "rollback"})
