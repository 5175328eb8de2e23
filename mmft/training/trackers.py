"""Where a run's numbers go beside its own files: TensorBoard, Weights & Biases, trackio, MLflow.

Accelerate has a class for each of them; here each learns to show distributions and held-out captions too, and to go
on where a resumed run left it. A package is imported when a run asks for it. Only the main process has trackers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from mmft.recipe.secrets import redacted

LEDGER = "ledger"
PROJECT = "mmft"
_THUMBNAIL = 256  # longest side, pixels
_NOT_STARTED = "output.trackers: {} did not start: {}; mend it or leave it out"
_IDS = "trackers.json"  # in the run folder: what each service calls this run, for a resume


class Sample(NamedTuple):
    """A held-out picture (PIL, RGB) and what is said of it."""

    id: str
    picture: Any
    before: str
    now: str


class TensorBoard(TensorBoardTracker):
    """Event files in ``tensorboard/``; hides what an earlier run, or this one before the resume, wrote past `done`."""

    def __init__(self, folder: Path, done: int, known: str | None):
        super().__init__("tensorboard", folder, purge_step=done + 1)
        self.fresh, self.id = not done, None
        self.shown: set[str] = set()

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        # Accelerate's would open a second run beside this one in TensorBoard's list, for the sake of its HParams page.
        if self.fresh:
            text = "\n".join(f"    {name}: {value}" for name, value in values.items())
            self.writer.add_text("options", text, 0)

    def log_distributions(self, values: Mapping[str, np.ndarray], step: int) -> None:
        for name, numbers in values.items():
            self.writer.add_histogram(f"distribution/{name}", numbers, step)

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        for i, sample in enumerate(samples):
            if sample.id not in self.shown:  # pictures stay the same; one is enough
                picture = np.asarray(sample.picture)
                self.writer.add_image(f"held_out/{i}", picture, step, dataformats="HWC")
                self.shown.add(sample.id)
            self.writer.add_text(f"held_out/{i}", f"before: {sample.before}\n\nnow: {sample.now}", step)


class _Tables:
    """What Weights & Biases and trackio have in common: histograms, and tables with pictures."""

    module: Any

    def log_distributions(self, values: Mapping[str, np.ndarray], step: int) -> None:
        self.run.log({f"distribution/{name}": self.module.Histogram(x) for name, x in values.items()}, step=step)

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        rows = [[s.id, self.module.Image(s.picture), s.before, s.now] for s in samples]
        table = self.module.Table(columns=["id", "picture", "before", "now"], data=rows)
        self.run.log({"held_out": table}, step=step)


class WandB(_Tables, WandBTracker):
    """A run of the project ``WANDB_PROJECT``; its files in ``wandb/`` of the run folder.

    Of a resumed run the service drops the steps that it has already; they are the same.
    """

    def __init__(self, folder: Path, done: int, known: str | None):
        import wandb

        self.module = wandb
        # wandb would read the screen before secrets are hidden in it.
        settings = wandb.Settings(console="off")
        options = {"dir": str(folder), "name": folder.name, "id": known, "resume": "allow", "settings": settings}
        super().__init__(os.environ.get("WANDB_PROJECT", PROJECT), **options)

    def start(self) -> None:
        with _arguments_without_secrets():  # the command line is part of what it sends
            super().start()
        self.id = self.run.id


class Trackio(_Tables, TrackioTracker):
    """A run of trackio's local dashboard, or of what its environment variables name."""

    def __init__(self, folder: Path, done: int, known: str | None):
        import trackio

        self.module = trackio
        how = {"name": known, "resume": "must"} if known else {}
        super().__init__(PROJECT, embed=False, **how)

    def start(self) -> None:
        super().start()
        self.id = self.run.name


class MLflow(MLflowTracker):
    """A run of the experiment ``MLFLOW_EXPERIMENT_NAME`` where ``MLFLOW_TRACKING_URI`` says. It has no histograms."""

    def __init__(self, folder: Path, done: int, known: str | None):
        super().__init__(PROJECT, run_id=known, run_name=folder.name)
        self.pending: Any = None
        self.shown: set[str] = set()

    def start(self) -> None:
        super().start()
        self.id = self.active_run.info.run_id

    def log(self, values: Mapping[str, float], step: int | None = None, **options: Any) -> None:
        import mlflow

        # Its file store keeps a file per metric: "reward" and "reward/cider_d" would be a file and a folder.
        named = {name.replace("/", "."): value for name, value in values.items()}
        # In the background: a server far away must not hold up the steps.
        self.pending = mlflow.log_metrics(named, step=step, synchronous=False)

    def log_distributions(self, values: Mapping[str, np.ndarray], step: int) -> None:
        pass

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        import mlflow

        # It looks the run up, and its file store cannot read a number that is being written.
        mlflow.flush_async_logging()
        for sample in samples:
            if sample.id not in self.shown:
                mlflow.log_image(sample.picture, f"held_out/{len(self.shown):02d}.png")
                self.shown.add(sample.id)
        rows = [{"id": sample.id, "before": sample.before, "now": sample.now} for sample in samples]
        mlflow.log_dict({"step": step, "captions": rows}, f"held_out/step-{step:06d}.json")

    def finish(self) -> None:
        import mlflow

        try:
            mlflow.flush_async_logging()
            if self.pending is not None:
                self.pending.wait()  # raises what went wrong in the background
        finally:
            super().finish()


def samples_of(dataset: Any, before: Sequence[str], now: Sequence[str], most: int) -> list[Sample]:
    """The first held-out rows with a picture, made small; rows of clips and sounds have none to show here."""
    found = []
    for i in range(min(len(now), most)):
        row = dataset[i]
        picture = row.get("image") or next(iter(row.get("images") or []), None)
        if picture is not None:
            small = picture.convert("RGB")
            small.thumbnail((_THUMBNAIL, _THUMBNAIL))
            found.append(Sample(str(row.get("id", i)), small, before[i], now[i]))
    return found


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio, "mlflow": MLflow}


def check_trackers(names: Sequence[str]) -> None:
    """Before anything costs time: every tracker is one, installed, with its login or its store. Other ranks need none.

    Args:
        names: of `TRACKERS`, and "ledger", which is a file of the run's own.

    Raises:
        ValueError: naming the tracker and how to mend it.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    for name in names:
        if name == LEDGER:
            continue
        if name not in TRACKERS:
            raise ValueError(f"unknown tracker {name!r}: expected one of {', '.join(TRACKERS)}, {LEDGER}")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without origin: some folder of that name, as wandb leaves behind
            raise ValueError(f"output.trackers: {name} is not installed: pip install {name}, or leave it out")
    if "wandb" in names:
        import wandb

        # Without a login it would ask for one on the terminal, with nobody there.
        if wandb.setup().settings.mode in ("online", "shared") and not wandb.login(prompt=False):
            raise ValueError(
                "output.trackers: wandb has no login: run `wandb login`, or set WANDB_MODE=offline and "
                "send the run later by `wandb sync`"
            )
    if "mlflow" in names:
        import mlflow

        try:
            mlflow.search_experiments(max_results=1)  # is its store there?
        except Exception as problem:
            raise ValueError(_NOT_STARTED.format("mlflow", problem)) from problem


def open_trackers(names: Sequence[str], folder: Path, options: Mapping[str, Any], done: int) -> list[GeneralTracker]:
    """Starts trackers and tells them the run's options, without secrets.

    Args:
        folder: the run folder.
        done: steps before a resume; 0 = a new run.

    Raises:
        ValueError: a tracker did not start.
    """
    PartialState()  # Accelerate's trackers write to its log, which wants to know the process
    path = folder / _IDS
    known = json.loads(path.read_text(encoding="utf-8")) if done and path.is_file() else {}
    found = []
    for name in names:
        try:
            tracker = TRACKERS[name](folder, done, known.get(name))
            tracker.start()
            tracker.store_init_configuration(_flat(redacted(dict(options))))
        except Exception as problem:  # each service has errors of its own
            raise ValueError(_NOT_STARTED.format(name, problem)) from problem
        found.append(tracker)
    ids = {tracker.name: tracker.id for tracker in found if tracker.id is not None}
    path.unlink(missing_ok=True)
    if ids:
        path.write_text(json.dumps(ids), encoding="utf-8")
    return found


def _flat(options: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested options under dotted names; what is neither number, text nor truth value as text."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{name}.")
        else:
            found[above + str(name)] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


@contextmanager
def _arguments_without_secrets():
    kept = sys.argv
    sys.argv = redacted(kept)
    try:
        yield
    finally:
        sys.argv = kept
