"""The trainers: an explicit loop on Accelerate, in the order of the stages of one batch.

TRL's face (constructor, dataset formats, reward functions, option names), and
TRL's `PPOTrainer` as it was before its removal for the order of things; the step itself is in the open: step.py.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmft.algorithms.kl import AdaptiveKL, FixedKL
from mmft.batch import PromptBatch
from mmft.data.rows import opened_here
from mmft.recipe.secrets import redact
from mmft.training import distributed, saving
from mmft.training.best import act, best_checkpoint, held_out_alarms, keeps_best, metric_of
from mmft.training.callbacks import Callbacks, with_state
from mmft.training.checkpoint import (
    find_checkpoint,
    host_state,
    load_checkpoint,
    restore_host_state,
    save_adapter,
    save_checkpoint,
)
from mmft.training.config import A2CConfig, PPOConfig
from mmft.training.described import describe
from mmft.training.diagnoses import Diagnoses
from mmft.training.engines import engine_of
from mmft.training.evaluate import Evaluation, Metrics, evaluate
from mmft.training.fingerprint import fingerprint
from mmft.training.from_trl import config_of, require_known, settled
from mmft.training.given import policy_of, require_columns, require_possible, require_rows
from mmft.training.guards import Guards
from mmft.training.interrupts import Abandoned, Interrupted, Interrupts
from mmft.training.monitor import Monitor
from mmft.training.schedule import learning_rate_factor, rows_of_step
from mmft.training.scoring import HeldOutParts, as_rewards, score_texts, share_backbone
from mmft.training.step import take_step
from mmft.training.summary import LiveReport, environment_of, write_summary
from mmft.training.together import Together
from mmft.training.trackers import check_trackers
from mmft.training.transaction import Checkpoints, failpoint
from mmft.training.watchdog import Watchdog, record_cause
from mmft.vlm.policy import Policy
from mmft.vlm.selftest import selftest


class PPOTrainer:
    """Fine-tunes a vision-language model with proximal policy optimisation.

    Args:
        model: name (bundled, folder, hub id), a loaded model, a `PeftModel`, or a `Policy`.
        reward_funcs: one reward function, several, or a `reward_models.WeightedRewards`. Each takes ``prompts``,
            ``completions`` and the dataset's columns as keyword arguments and returns a score per completion.
        args: the options.
        train_dataset: rows with ``prompt`` and ``image`` (or ``images``): a `datasets.Dataset`, a list of dicts, or
            `mmft.data.Rows`.
        eval_dataset: held-out rows of the same kind.
        processing_class: the processor; by default the one saved with the model.
        peft_config: a PEFT configuration, or "lora" for rank 16 on the layers that suit the model's family; None
            trains every weight, against a frozen copy as reference.
        compute_metrics: texts and rows -> metric -> number per sample, for evaluation. By default the reward
            functions' own parts are the metrics.
        callbacks: `transformers.TrainerCallback`s, see `mmft.training.callbacks`.
        quantization_config: of a model that is given by name.
        theirs: TRL's other arguments; refused, with what to do instead, unless they ask for nothing.

    TRL's `GRPOConfig` is taken as ``args``, too, and its option names by `PPOConfig`: docs/from_trl.md.
    """

    config_class = PPOConfig
    has_recipe = False  # it was made by one, which lies in the run folder

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: PPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        compute_metrics: Metrics | None = None,
        callbacks=None,
        quantization_config=None,
        **theirs: Any,
    ):
        require_known(theirs, type(self).__name__)
        args = args or self.config_class()
        if hasattr(args, "per_device_train_batch_size") and not isinstance(args, PPOConfig):
            args = config_of(args, self.config_class)
        if type(args) is not self.config_class:
            raise ValueError(f"{type(self).__name__} takes {self.config_class.__name__}, not {type(args).__name__}")
        require_rows(train_dataset, eval_dataset)
        if reward_funcs is None:
            raise ValueError("reward_funcs is missing: a function f(completions, **columns) -> a number per completion")
        self.config = settled(args, len(train_dataset))
        check_trackers(self.config.report_to)
        self.train_dataset, self.eval_dataset = opened_here(train_dataset), opened_here(eval_dataset)
        require_columns(train_dataset, "train_dataset")
        self.callbacks = Callbacks(callbacks, self.config)
        reward_funcs = with_state(reward_funcs, self.callbacks.state)
        self.reward_funcs = as_rewards(reward_funcs, self.config.reward_weights, self.train_dataset)
        self.guards = Guards(self.config.guards, self.config.skip_spikes, Diagnoses(self.config))
        require_possible(self.config, self.reward_funcs, self.guards, eval_dataset, compute_metrics)
        self.compute_metrics = compute_metrics or self._reward_metrics
        model = policy_of(model, processing_class, peft_config, self.config, quantization_config)
        share_backbone(self.reward_funcs, model)
        self.accelerator = distributed.make_accelerator(model, self.config)
        optimizer = distributed.make_optimizer(model, self.config)
        self.prepared, self.optimizer = distributed.prepare(self.accelerator, model, optimizer)
        self.policy: Policy = self.accelerator.unwrap_model(self.prepared)
        kl = self.config
        self.kl = AdaptiveKL(kl.kl_coef, kl.kl_target, kl.kl_horizon) if kl.kl_target else FixedKL(kl.kl_coef)
        if self.accelerator.num_processes > 1:
            self.reward_funcs.reduce = self._reduce_numbers
        accelerator = self.accelerator
        self.callbacks.state.is_world_process_zero = accelerator.is_main_process
        self.watchdog = Watchdog(self.config.timeout, accelerator.process_index, accelerator.num_processes)
        self.run_dir = Path(self.config.output_dir)
        word_by_word = {f"reward/{p.name}": getattr(p.function, "increments", None) for p in self.reward_funcs.parts}
        self.report = LiveReport(self.run_dir, self.eval_dataset, {k: v for k, v in word_by_word.items() if v})
        # Where they are the metrics, the reward and its parts need not be asked for twice.
        self._parts = HeldOutParts(self.reward_funcs) if compute_metrics and self.config.eval_rewards else None
        self.engine = engine_of(self.config)
        self.phase_seconds: dict[str, float] = {}
        self.rolled_back_to: int | None = None
        self._together = Together(self.accelerator)
        self.checkpoints = self.checkpoints_of(self.run_dir)
        self.saved_step: int | None = None  # of the checkpoint that holds the state as it is
        self.before: Evaluation | None = None  # of the policy before training
        with distributed.whole(self.accelerator, self.prepared):
            self.fingerprint = fingerprint(self)  # of the weights as they were loaded
        self.allow_change: Sequence[str] = ()
        self.seconds_before, self._began = 0.0, time.time()  # of the run before a resume; start of this process's part
        self._interrupts = Interrupts(self._together.highest, self._together.say)
        self._usual_seconds: dict[str, float] = {}  # phase -> what it took in the step before
        self._abandonable: tuple[str, ...] = ()  # phases before which the step may be given up
        self.written: list[tuple[str, str]] = []  # see `ledger`
        self.drawn: dict[str, np.ndarray] = {}  # see `distributions`
        self.draws: Callable[[int], bool] = lambda step: False  # whether this step's are wanted; the monitor knows
        self._begun: int | None = None

    # ---------------------------------------------------------------- the loop

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> dict[str, Any]:
        """Runs the whole training; returns the run's summary (also in ``summary.json``).

        Args:
            resume_from_checkpoint: a checkpoint folder, True for the run folder's last one, or None.

        Raises:
            Interrupted: after a SIGTERM or SIGINT, once the state is saved; uncaught, it ends the process with 143
                or 130.
        """
        done = self.begin(resume_from_checkpoint)
        main = self.accelerator.is_main_process
        aside = self.checkpoints.set_aside(after=done)
        monitor = Monitor(
            self.run_dir,
            self.config.max_steps,
            main,
            self.config.report_to,
            resume_step=done or None,
            options=asdict(self.config)
            | {"model": self.policy.model.config._name_or_path, "rewards": self.signatures()},
        )
        self.draws = monitor.wants_distributions
        if aside:
            monitor.say(f"checkpoints of an earlier run were moved to {aside}")
        if main:
            (self.run_dir / "summary.json").unlink(missing_ok=True)  # an earlier run's; this one is not finished
        self.callbacks.begin(done, **self._seen)
        with self._interrupts, self.watchdog.phase("between steps"):
            if not done and self.guards.best_step is None:
                held_out_alarms(self, 0, self.before)
                monitor.evaluated(0, self.eval_dataset, self.before, self.before)
                self._report(0, None, monitor)
                if keeps_best(self):
                    save_checkpoint(self, 0)
            last = self._steps(done, monitor)
            after = self.evaluate()
            if last == self.config.max_steps and self.rolled_back_to is None:
                self._leave_if_asked(last, monitor)
        if self.rolled_back_to is None and (alarms := held_out_alarms(self, last, after)):
            monitor.alarms(alarms)
            if act(self, alarms, monitor) and self.rolled_back_to is not None:
                after = self.evaluate()
        self.callbacks.end(**self._seen)
        weights = distributed.trained_weights(self.accelerator, self.prepared)
        summary: dict[str, Any] = {}
        with distributed.whole(self.accelerator, self.prepared):
            if main:
                save_adapter(self.policy, self.run_dir, weights)
                self.policy.processor.save_pretrained(self.run_dir / "processor")
        if main:
            shown = last if self.rolled_back_to is None else self.rolled_back_to
            summary = write_summary(
                self.run_dir,
                self.before,
                after,
                self.seconds(),
                self.signatures(),
                self.guards.alarms,
                self.rolled_back_to,
                environment_of(self.policy.device, self.accelerator.num_processes),
            )
            monitor.evaluated(last, self.eval_dataset, self.before, after)
            sides = (summary[side] for side in ("before", "after", "difference"))
            monitor.table(*sides, summary["signatures"], summary.get("rows"))
            if problem := self.report.finish(shown, self.before, after):
                monitor.say(problem)
            monitor.farewell(len(self.guards.alarms))
        monitor.close()
        self.accelerator.wait_for_everyone()
        return summary

    def begin(self, resume: str | Path | bool | None = None, allow_change: Sequence[str] = ()) -> int:
        """What comes before the first step: self-test, evaluation of the untrained policy, checkpoint.

        Args:
            resume: as in `train`.
            allow_change: fields of the `fingerprint` in which the checkpoint may differ from this run.

        Returns:
            The number of steps already done. Asked again, the same answer.
        """
        if self._begun is None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            checkpoint = find_checkpoint(self, resume) if resume else None
            self.allow_change = allow_change
            with self.watchdog.phase("self-test"):
                self._self_test()
            for part in self.reward_funcs.parts:
                if hasattr(part.function, "prepare"):
                    part.function.prepare()  # a judge that cannot be loaded is found now, not at its first score
            if checkpoint is None:
                self.before, self._begun = self.evaluate(), 0  # adapters still add nothing
            else:
                self._begun = load_checkpoint(self, checkpoint)
            if not self.has_recipe and self.accelerator.is_main_process:
                describe(self, self.run_dir / "recipe.yaml")  # not before: a resume that is refused leaves all as it is
            known = self.before is not None or self.eval_dataset is None  # else nothing is evaluated of new rows yet
            if self.config.patience is not None and known and metric_of(self.before) is None:
                raise ValueError("patience (eval.patience) needs held-out rows and a metric of which more is better")
            if keeps_best(self) and best_checkpoint(self) is None:
                self.guards.forget_best()  # kept by no earlier run; the next evaluation is the first to return to
        return self._begun

    def _steps(self, done: int, monitor: Monitor) -> int:
        """The steps after ``done``, each with what follows from it; the number of the last."""
        config = self.config
        for step in range(done + 1, config.max_steps + 1):
            kept = host_state(self)
            # The fit of the critic comes before the first update, and changes weights.
            self._abandonable = ("reference", "reward", "update") if step > 1 else ("reference", "reward")
            self.callbacks.step_begin(**self._seen)
            try:
                metrics = self.step(step)
                self._usual_seconds = dict(self.phase_seconds)
            except Abandoned:
                restore_host_state(self, kept)
                self._leave_if_asked(step - 1, monitor)
            alarms, held_out = self.guards.look(step, metrics), None
            if config.eval_steps and step % config.eval_steps == 0 and step < config.max_steps:
                held_out = self.evaluate()
                metrics |= {f"eval/{k}": v for k, v in (held_out.means() if held_out else {}).items()}
                alarms += held_out_alarms(self, step, held_out)
            monitor.log(step, metrics, self.written, self.drawn)
            monitor.alarms(alarms)
            if held_out is not None:
                monitor.evaluated(step, self.eval_dataset, self.before, held_out)
            enough = self.callbacks.step(step, metrics, **self._seen)
            if act(self, alarms, monitor):
                return step
            new_best = self.guards.best_step == step and (config.save_steps or keeps_best(self))
            due = step == config.max_steps or (config.save_steps and step % config.save_steps == 0)
            if self.callbacks.wants_save() or new_best or due or enough:
                monitor.sync()  # the lines of a saved step must outlive whatever the checkpoint outlives
                save_checkpoint(self, step)
                self.callbacks.saved(**self._seen)
            if held_out is not None or self.saved_step == step:
                self._report(step, held_out, monitor)
            self._leave_if_asked(step, monitor)
            if enough:
                monitor.say(f"a callback ended the training after step {step}")
                return step
        return max(done, config.max_steps)

    def _leave_if_asked(self, step: int, monitor: Monitor) -> None:
        """Saves and leaves, where a signal has asked for it on any process. The state is that after ``step``."""
        if number := self._interrupts.asked():
            monitor.sync()
            folder = save_checkpoint(self, step)
            self._report(step, None, monitor, needed=True)
            said = f"ended by {signal.Signals(number).name} after step {step}: saved {folder}; go on by --resume"
            monitor.say(said)
            record_cause(said)  # a launcher calls this a failure, too, and ends its report with it
            monitor.close()
            raise Interrupted(number)

    def _report(self, step: int, held_out: Evaluation | None, monitor: Monitor, needed: bool = False) -> None:
        """Shows what is new in ``report.html``; a run outlives a report that cannot be written."""
        if self.accelerator.is_main_process and (problem := self.report.show(step, self.before, held_out, needed)):
            monitor.say(problem)

    def _boundary(self, phase: str) -> None:
        """Between the phases of a step: gives it up where a signal is there and the rest would take too long.

        Only where no weight has changed yet: an update, once begun, is finished.
        """
        failpoint(f"before_{phase}")
        if phase in self._abandonable:
            order = ("reference", "reward", "update")
            rest = sum(self._usual_seconds.get(name, float("inf")) for name in order[order.index(phase) :])
            if self._interrupts.too_long(rest):
                raise Abandoned

    # ---------------------------------------------------------------- what TRL's scripts ask for

    @property
    def args(self) -> PPOConfig:
        """The config, by TRL's name."""
        return self.config

    @property
    def model(self):
        """The model with its adapters."""
        return self.policy.model

    @property
    def processing_class(self):
        """The processor."""
        return self.policy.processor

    @property
    def _seen(self) -> dict[str, Any]:
        return {"model": self.model, "processing_class": self.processing_class, "optimizer": self.optimizer}

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Adapter (or whole model), value head and processor, right in the folder; see `mmft.training.saving`."""
        saving.save_model(self, output_dir or self.run_dir)

    def push_to_hub(
        self, commit_message: str = "End of training", repository: str | None = None, private: bool | None = None, **_
    ) -> str | None:
        """Publishes the run with its model card, or what `save_model` saves; see `mmft.training.saving`."""
        return saving.push_to_hub(self, repository, commit_message, private)

    def checkpoints_of(self, run_dir: Path) -> Checkpoints:
        """The checkpoints of a run folder."""
        main, agree = self.accelerator.is_main_process, self._together.agree
        return Checkpoints(run_dir / "checkpoints", self.config.keep_last, main, agree)

    def seconds(self) -> float:
        """Wall-clock time of the run, that before a resume included."""
        return self.seconds_before + time.time() - self._began

    def step(self, step: int) -> dict[str, float]:
        """One RL step: stages 1 to 7. Returns its metrics."""
        with self.watchdog.phase("step", step):
            return take_step(self, step)

    # ---------------------------------------------------------------- rows

    def prompts(self, step: int) -> PromptBatch:
        """This process's prompts of a step. A function of (seed, step) alone, so a resumed run needs no cursor."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = rows_of_step(step, len(self.train_dataset), self.config, rank, world)
        rows = [self.train_dataset[i] for _, i in mine]
        ids = [f"{row.get('id', i)}@{place}" for row, (place, i) in zip(rows, mine, strict=True)]
        return self.policy.pictures.prompts(rows, ids, self.policy.device)

    def _self_test(self) -> None:
        """The engine's contract on the first rows; all processes take the same path after it."""
        policy, first = self.policy, self.prompts(1)
        first = first.select(list(range(min(2, len(first)))))
        first = policy.pictures.prompts(first.rows, first.row_ids, policy.device, pixels=True)
        with distributed.whole(self.accelerator, self.prepared), self.accelerator.autocast():
            selftest(policy, first, self.config.temperature)
        plain = torch.tensor(float(not policy.shared_prefix), device=policy.device)
        if self.accelerator.reduce(plain, "sum").item():
            policy.take_plain_path()

    # ---------------------------------------------------------------- evaluation

    def evaluate(self) -> Evaluation | None:
        """Greedy responses to the held-out rows and their metrics; None without an evaluation set."""
        if self.eval_dataset is None:
            return None
        config = self.config
        with self.timed("evaluate"), distributed.whole(self.accelerator, self.prepared):
            return evaluate(
                self.policy,
                self.eval_dataset,
                self.compute_metrics,
                config.eval_rows,
                config.max_completion_length,
                config.eval_batch,
                self.accelerator,
                self._parts,
            )

    def _reward_metrics(
        self, texts: list[str], rows: Sequence[dict[str, Any]], ended: list[bool]
    ) -> dict[str, np.ndarray]:
        # The rows come without their pictures, and a reward may look at them.
        rows = [self.eval_dataset[i] | {"completion_ids": row["completion_ids"]} for i, row in enumerate(rows)]
        scores = score_texts(self.reward_funcs, texts, rows, ended)
        return {"reward": np.asarray(scores.total)} | {f"reward/{k}": np.asarray(v) for k, v in scores.parts.items()}

    def signatures(self) -> dict[str, str]:
        """Reward -> how exactly it is computed, where it says so; a key among its options is not told."""
        return {part.name: redact(part.signature) for part in self.reward_funcs.parts}

    # ---------------------------------------------------------------- numbers

    def _reduce_numbers(self, numbers: np.ndarray) -> np.ndarray:
        summed = self.accelerator.reduce(torch.as_tensor(numbers, device=self.accelerator.device), "sum")
        return summed.cpu().numpy()

    def reduce(self, statistics: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(statistics, "sum") if self.accelerator.num_processes > 1 else statistics

    def set_learning_rate(self, step: int) -> float:
        """Sets this step's rates; each group keeps its own base rate. Returns the policy's."""
        factor = learning_rate_factor(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return self.config.learning_rate * factor

    @contextmanager
    def timed(self, phase: str):
        """A phase under the watchdog; its seconds are among the metrics of the step around it."""
        self._boundary(phase)
        start = time.perf_counter()
        with self.watchdog.phase(phase):
            yield
            if self.policy.device.type == "cuda":
                torch.cuda.synchronize(self.policy.device)
        self.phase_seconds[phase] = time.perf_counter() - start


class A2CTrainer(PPOTrainer):
    """Advantage actor-critic: the same loop with one pass and the plain policy gradient. See `PPOTrainer`."""

    config_class = A2CConfig
