"""Folders that are there whole or not at all, and the numbered checkpoints of one training made of them.

A folder is written as ``.writing-NAME`` beside its place, every file of it hashed (SHA-256) into ``manifest.json``,
forced to the disk, and renamed; what it replaces or makes superfluous is deleted last, after a rename to
``.deleting-NAME``. So whatever stands under a name without a dot was once complete, whenever the process was killed;
`verify` tells whether it still is. Nothing here knows of trainers: plain paths, tensors and dicts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"
_WRITING, _DELETING = ".writing-", ".deleting-"
_passes: Counter[str] = Counter()


class Damaged(ValueError):
    """A folder that is not, or no longer, what was committed; the message names folder, file and reason."""


class NotSaved(RuntimeError):
    """A folder could not be written (a full disk, say); what stood in its place still does."""


def failpoint(name: str) -> None:
    """Kills this process where ``MMFT_FAILPOINT=NAME[@RANK][:N]`` says so, at the N-th pass.

    Random kills seldom land inside a write that lasts milliseconds; tests of what survives one need them there.
    """
    wanted = os.environ.get("MMFT_FAILPOINT")
    if not wanted:
        return
    where, _, count = wanted.partition(":")
    where, _, rank = where.partition("@")
    if where != name or (rank and rank != os.environ.get("RANK", "0")):
        return
    _passes[name] += 1
    if _passes[name] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------- one folder


def commit(final: Path, write: Callable[[Path], None], main: bool = True, agree: Callable[[bool], bool] = bool) -> None:
    """Puts a folder in its place, whole.

    Args:
        write: fills the folder that it is given; every process writes the files that are its own.
        main: the one process that hashes and renames.
        agree: True if it is given True on any process; all of them meet there.

    Raises:
        NotSaved: naming file and reason; on the other processes, that it was another one. Nothing is left behind.
    """
    working = final.with_name(_WRITING + final.name)

    def stage(work: Callable[[], None]) -> None:
        error = None
        try:
            work()
        except Exception as caught:  # whatever it is, the other processes must not wait for this one
            error = caught
        if agree(error is not None):
            if main:
                shutil.rmtree(working, ignore_errors=True)
            reason = error or "another process could not write its part"
            raise NotSaved(f"{final} was not saved: {reason}") from error

    def prepare() -> None:
        if main:
            final.parent.mkdir(parents=True, exist_ok=True)
            for rest in (*final.parent.glob(f"{_WRITING}*"), *final.parent.glob(f"{_DELETING}*")):
                shutil.rmtree(rest)  # of a process that was killed
            working.mkdir()

    def seal() -> None:
        if not main:
            return
        failpoint("before_manifest")
        files = sorted(p for p in working.rglob("*") if p.is_file())
        said = {"sha256": {p.relative_to(working).as_posix(): sha256(p) for p in files}}
        said["digest"] = _digest(said)
        write_text(working / MANIFEST, json.dumps(said, indent=1))
        for path in (*files, working / MANIFEST, *(p for p in working.rglob("*") if p.is_dir()), working):
            _sync(path)
        failpoint("before_rename")
        if final.exists():
            final.rename(final.with_name(_DELETING + final.name))
        working.rename(final)
        _sync(final.parent)
        failpoint("after_rename")

    for work in (prepare, lambda: write(working), seal):
        stage(work)
    if main:
        _delete(final.with_name(_DELETING + final.name))


def verify(folder: Path) -> list[str]:
    """The names of the files of a folder, all of them there and unaltered.

    Raises:
        Damaged: naming the first file that is not, and what is wrong with it.
    """
    manifest = folder / MANIFEST
    try:
        said = json.loads(manifest.read_bytes())
        files, digest = said["sha256"], said["digest"]
        sound = digest == _digest({"sha256": files})
    except FileNotFoundError as error:
        raise Damaged(f"{folder} is no whole checkpoint: {MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{manifest} was altered: it cannot be read ({error})") from error
    if not sound:
        raise Damaged(f"{manifest} was altered: its digest is not that of what it says")
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise Damaged(f"{folder / name} is missing from the checkpoint")
        if sha256(folder / name) != expected:
            raise Damaged(f"{folder / name} was altered: its SHA-256 is not the manifest's; take another checkpoint")
    return list(files)


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8. Raises NotSaved naming the file and its bytes."""
    attempt(path, len(text), lambda: path.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], plain: Mapping[str, Any] | None = None) -> None:
    """A safetensors file, with plain (JSON) data in its header. Raises NotSaved naming the file and its bytes."""
    size = sum(t.nbytes for t in tensors.values())
    attempt(path, size, lambda: save_file(dict(tensors), path, {"plain": json.dumps(plain or {})}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote."""
    with safe_open(path, framework="pt") as file:
        plain = json.loads((file.metadata() or {}).get("plain", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, plain


def attempt(path: Path, size: int, write: Callable[[], Any]) -> None:
    """Calls `write`. Raises NotSaved naming the file, its bytes and the disk's, where it cannot."""
    try:
        write()
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        reason = getattr(error, "strerror", None) or error
        raise NotSaved(f"{path}: {size:,} bytes could not be written ({reason}; {free:,} bytes are free)") from error


def _digest(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Forces a file, or a folder's list of names, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _delete(folder: Path) -> None:
    """Takes the folder's name away first: what is half deleted must not look whole."""
    if not folder.exists():
        return
    if not folder.name.startswith(_DELETING):
        folder = folder.rename(folder.with_name(_DELETING + folder.name))
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        if number == 1:
            failpoint("deleting")
        path.unlink()
    shutil.rmtree(folder)


# ---------------------------------------------------------------- the checkpoints of one training


@dataclass
class Checkpoints:
    """Folders ``step-000020`` of one training.

    Attributes:
        folder: where they are.
        keep_last: so many stay; older ones are deleted when a new one is whole.
        main, agree: see `commit`.
    """

    folder: Path
    keep_last: int = 2
    main: bool = True
    agree: Callable[[bool], bool] = bool

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def save(self, step: int, write: Callable[[Path], None], keep: Collection[int] = ()) -> Path:
        """Commits the checkpoint of a step, then deletes old ones, but for the steps of ``keep``."""
        commit(self.path(step), write, self.main, self.agree)
        if self.main:
            kept = {self.path(s).name for s in keep}
            for old in self._all()[self.keep_last :]:
                if old.name not in kept:
                    _delete(old)
        self.agree(False)
        return self.path(step)

    def latest(self, say: Callable[[str], None] = print) -> Path | None:
        """The newest checkpoint that is whole; None where there never was one.

        Args:
            say: told of each newer one that is not.

        Raises:
            Damaged: there are some, and none is whole.
        """
        if not self.folder.is_dir():
            return None
        unfinished = self.folder.glob(f"{_WRITING}step-*")
        candidates = sorted((*self._all(), *unfinished), key=step_of, reverse=True)
        problems = []
        for path in candidates:
            try:
                if path.name.startswith(_WRITING):
                    raise Damaged(f"{path} was never finished: the process died while it was written")
                verify(path)
                return path
            except (Damaged, OSError) as problem:
                problems.append(str(problem))
                say(f"checkpoint skipped: {problem}")
        if self._all():
            raise Damaged(f"nothing to resume: none of the checkpoints in {self.folder} is whole; {problems[0]}")
        return None

    def set_aside(self, after: int) -> Path | None:
        """Moves the checkpoints of later steps out of the way of a training that goes on from ``after``.

        They belong to another future: one of them would otherwise be the "latest" of this one. Those of a single
        earlier training are kept, so that whoever forgot to resume has lost nothing.

        Returns:
            Where they are now; None if there were none.
        """
        later = [path for path in self._all() if step_of(path) > after]
        aside = self.folder.with_name(f"{self.folder.name}-before")
        if self.main and later:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            for path in later:
                path.rename(aside / path.name)
        self.agree(False)
        return aside if later else None

    def save_state(self, step: int, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """A checkpoint that is one file: for trainings whose whole state is tensors and plain data."""
        self.save(step, lambda folder: write_tensors(folder / "state.safetensors", tensors, plain))

    def latest_state(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Step, tensors and plain data of the newest whole one of `save_state`; None where there is none."""
        found = self.latest()
        return None if found is None else (step_of(found), *read_tensors(found / "state.safetensors"))

    def clear(self) -> None:
        """Deletes them all: the training they were for is done."""
        if self.main:
            _delete(self.folder)
        self.agree(False)

    def _all(self) -> list[Path]:
        """Newest first."""
        return sorted((p for p in self.folder.glob("step-*") if step_of(p) >= 0), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder; -1 of any other."""
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1
