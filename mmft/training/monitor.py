"""What a run tells while it runs: ``metrics.jsonl``, trackers, a progress bar, alarms, the before/after table.

Everything happens on the main process; on the others a monitor does nothing at all.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmft.evaluation.captioning import metric_info
from mmft.evaluation.findings import headline, main_metric
from mmft.training.guards import Alarm
from mmft.training.trackers import LEDGER, check_trackers, open_trackers, samples_of

if TYPE_CHECKING:
    from mmft.training.evaluate import Evaluation

_HISTOGRAMS, _PICTURES = 50, 8  # of a run; of an evaluation
# What the progress bar shows: key of the metrics -> label and number format. Widths keep plain lines in columns.
SHOWN = {
    "reward": ("reward", "z7.3f"),
    "kl": ("KL", "z7.3f"),
    "entropy": ("entropy", "z5.2f"),
    "explained_variance": ("expl. var.", "z5.2f"),
    "response_length": ("length", "5.1f"),
    "tokens_per_second": ("tokens/s", "6.0f"),
}


class Monitor:
    """Writes a run's numbers down and shows them.

    Args:
        run_dir: the run folder; made where missing.
        total_steps: steps of the whole run, those before a resume included.
        is_main: False = do nothing.
        trackers: beside ``metrics.jsonl``: names from `mmft.training.trackers.TRACKERS`, and "ledger" for
            ``ledger.jsonl``, a line per response with its step, row and a hash of its tokens.
        progress: show a bar on a terminal, and a plain line every 5 % of the steps elsewhere.
        resume_step: continue after this step: lines past it leave ``metrics.jsonl``. None = a new run, which starts
            the file anew.
        options: what the run was asked to do, for trackers.

    Raises:
        ValueError: a tracker that is unknown or not installed, or does not start.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        total_steps: int,
        is_main: bool = True,
        trackers: Sequence[str] = ("tensorboard",),
        progress: bool = True,
        resume_step: int | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        self.is_main, self.total_steps = is_main, total_steps
        self._file, self._ledger, self._bar, self._trackers = None, None, None, []
        if not is_main:
            return
        self.run_dir = run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.console = Console()
        if not self.console.is_terminal:
            self.console = Console(width=120)  # 80 columns, the default in a log file, would cut the table
        self.progress = progress
        done = resume_step or 0
        path = run_dir / "metrics.jsonl"
        _keep_lines_until(path, done)
        _keep_lines_until(run_dir / "alarms.jsonl", done)
        self._file = path.open("a", encoding="utf-8")
        if LEDGER in trackers:
            _keep_lines_until(run_dir / "ledger.jsonl", done)
            self._ledger = (run_dir / "ledger.jsonl").open("a", encoding="utf-8")
        check_trackers(trackers)
        if services := [name for name in trackers if name != LEDGER]:
            self._trackers = open_trackers(services, run_dir, options or {}, done)
        self._began, self._done_at_start = time.monotonic(), done
        if progress:
            start = f"going on after step {done} of {total_steps}" if done else f"{total_steps} steps"
            curves = f", tensorboard --logdir {shlex.quote(str(run_dir))}" if "tensorboard" in trackers else ""
            self._line(f"{start}; look on: {run_dir / 'report.html'}{curves}")
        if progress and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self.console,
                speed_estimate_period=600,  # steps take seconds to minutes; the default looks back 30 s
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=done, numbers="")
            self._bar.start()
        # A run that dies would leave the terminal without a cursor.
        atexit.register(self.close)

    def wants_distributions(self, step: int) -> bool:
        """Whether a tracker would show histograms of this step: about fifty of a run, and the last."""
        due = step % max(1, self.total_steps // _HISTOGRAMS) == 0
        return bool(self._trackers) and (due or step == self.total_steps)

    def log(
        self,
        step: int,
        metrics: Mapping[str, float],
        written: Sequence[tuple[str, str]] = (),
        distributions: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Writes one step down everywhere. Not-a-number and infinity become null in the file.

        Args:
            written: row id and hash of each response, for the ledger.
            distributions: name -> numbers of which trackers show a histogram.
        """
        if not self.is_main:
            return
        numbers = {name: _number(value) for name, value in metrics.items()}
        line = json.dumps({"step": int(step)} | {k: v for k, v in numbers.items() if k != "step"}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        if self._ledger is not None:
            self._ledger.writelines(json.dumps({"step": step, "row": row, "sha": sha}) + "\n" for row, sha in written)
            self._ledger.flush()
        self._track("log", _finite(numbers), step)
        if distributions:
            self._track("log_distributions", distributions, step)
        self._show(step, numbers)

    def sync(self) -> None:
        """Forces the lines written so far to the disk, ahead of a checkpoint that takes them for granted."""
        for file in (self._file, self._ledger):
            if file is not None:
                os.fsync(file.fileno())

    def alarms(self, alarms: Sequence[Alarm]) -> None:
        """Shows what the guards have to say, above the progress bar, and keeps it in ``alarms.jsonl``."""
        if not self.is_main or not alarms:
            return
        with (self.run_dir / "alarms.jsonl").open("a", encoding="utf-8") as file:
            for alarm in alarms:
                file.write(json.dumps(alarm.as_dict()) + "\n")
                self.say(f"step {alarm.step}, {alarm.guard}: {alarm.text}")

    def say(self, text: str) -> None:
        """One line that should not be missed."""
        if self.is_main:
            self._line(text, "yellow")

    def evaluated(self, step: int, dataset: Any, before: Evaluation | None, now: Evaluation | None) -> None:
        """Shows an evaluation: its main metric on the screen; pictures, captions and all metrics in the trackers.

        Args:
            dataset: the held-out rows.
            before: of the policy before training.
        """
        if not self.is_main or now is None:
            return
        means, old = now.means(), before.means() if before is not None else {}
        if self._trackers:
            self._track("log", _finite({f"eval/{name}": value for name, value in means.items()}), step)
            if samples := samples_of(dataset, (before or now).texts, now.texts, _PICTURES):
                self._track("log_samples", samples, step)
        name = main_metric(list(means))
        if name is not None and 0 < step < self.total_steps:
            info = metric_info(name)
            was = f" ({info.text(old[name])} before training)" if name in old else ""
            self._line(f"{self._place(step)}  held-out {info.label} {info.text(means[name])}{was}")

    def table(
        self,
        before: Mapping[str, Mapping[str, float]],
        after: Mapping[str, Mapping[str, float]],
        difference: Mapping[str, Mapping[str, float]] | None = None,
        signatures: Mapping[str, str] | None = None,
        rows: int | None = None,
    ) -> None:
        """Prints the held-out table, each side metric -> {"mean", "low", "high"}, and how its numbers are computed.

        Args:
            rows: how many pictures it is over; of very few it says nothing.
        """
        if not self.is_main:
            return
        self._stop_bar()
        table = Table(title="Held-out, greedy decoding, 95 % intervals", title_justify="left")
        table.add_column("")
        for heading in ("before", "after", "difference", "relative"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name in [*before, *(name for name in after if name not in before)]:
            info = metric_info(name)
            change = (difference or {}).get(name, {})
            verdict = _verdict(change, info.better)
            difference_text = info.text(change.get("mean"), signed=True) + _range(info, change, signed=True)
            cells = [info.text(side.get(name, {}).get("mean")) for side in (before, after)]
            relative = change.get("relative")
            share = "–" if relative is None or not math.isfinite(relative) else f"{100 * relative:+z.1f} %"
            table.add_row(escape(info.label), *cells, difference_text, share.replace("-", "−"), style=verdict)
        self.console.print(table)
        if before and after:
            self._line(headline({"before": before, "after": after, "difference": difference, "rows": rows}).text)
        for name, text in (signatures or {}).items():
            self._line(f"{name}: {text}", "dim")

    def farewell(self, alarms: int) -> None:
        """Closes, and says what to look at next."""
        self.close()  # trackers have last words of their own
        if not self.is_main:
            return
        run = shlex.quote(str(self.run_dir))
        rows = [
            ("read", str(self.run_dir / "report.html")),
            ("try", f"mmft caption PICTURE --model {run}"),
            ("measure", f"mmft evaluate {run}"),
            ("compare", f"mmft compare {run} OTHER_RUN"),
            ("share", f"mmft push {run} USER/NAME"),
        ]
        if alarms:
            what = "1 warning" if alarms == 1 else f"{alarms} warnings"
            rows.insert(0, ("mind", f"{what}, in {self.run_dir / 'alarms.jsonl'} and in the report"))
        self._line("\nWhat next")
        for name, text in rows:
            self._line(f"  {name:<8} {text}")

    def close(self) -> None:
        """Ends the progress bar and closes files and trackers. May be called twice."""
        self._stop_bar()
        for file in (self._file, self._ledger):
            if file is not None:
                file.close()
        self._file, self._ledger = None, None
        self._track("finish")
        self._trackers = []
        atexit.unregister(self.close)

    def _track(self, what: str, *arguments: Any) -> None:
        """Asks every tracker for something. One that fails is left out from then on: the run matters more."""
        for tracker in list(self._trackers):
            try:
                getattr(tracker, what)(*arguments)
            except Exception as problem:  # each service has errors of its own
                self._trackers.remove(tracker)
                self.say(f"{tracker.name} is left out from here on: {problem}; metrics.jsonl has all numbers")

    def _line(self, text: str, style: str = "") -> None:
        """One line as it is, however long: a log file is searched by lines."""
        self.console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def _place(self, step: int) -> str:
        return f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"

    def _show(self, step: int, numbers: Mapping[str, float | None]) -> None:
        parts = [
            f"{label} {numbers[name]:{how}}" for name, (label, how) in SHOWN.items() if numbers.get(name) is not None
        ]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers="  ".join(parts))
        elif self.progress and (step % max(1, self.total_steps // 20) == 0 or step == self.total_steps):
            steps = max(1, step - self._done_at_start)
            left = (time.monotonic() - self._began) / steps * (self.total_steps - step)
            self._line(f"{self._place(step)}  {'  '.join(parts)}  {_duration(left)} left")

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _keep_lines_until(path: Path, step: int) -> None:
    """Drops lines past `step`, and the half line that a killed run may leave; replaces the file in one go."""
    kept = []
    if step and path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
    beside = path.with_name(f".{path.name}.part")
    beside.write_text("".join(kept), encoding="utf-8")
    os.replace(beside, path)


def _finite(numbers: Mapping[str, float | None]) -> dict[str, float]:
    """What a tracker gets: no step among the values, and nothing that is no number."""
    return {k: v for k, v in numbers.items() if v is not None and math.isfinite(v) and k != "step"}


def _number(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _range(info, interval: Mapping[str, float], signed: bool) -> str:
    if interval.get("low") is None or interval.get("high") is None:
        return ""
    return f" [{info.text(interval['low'], signed)}, {info.text(interval['high'], signed)}]"


def _verdict(difference: Mapping[str, float], better: int) -> str | None:
    """Green or red only where the interval leaves out zero and the metric has a good direction."""
    low, high = difference.get("low"), difference.get("high")
    if not better or low is None or high is None or not (low > 0 or high < 0):
        return None
    return "green" if (low > 0) == (better > 0) else "red"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
