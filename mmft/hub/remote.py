"""To the Hub in one commit, and back with every byte compared."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mmft.hub.card import loading_code
from mmft.hub.folder import ALLOWED, base_of, make_folder, sizes
from mmft.recipe import load_recipe
from mmft.vlm.model_files import check_model

WAITS = (2.0, 8.0)  # seconds between whole attempts; the Hub's client repeats most single requests by itself
_MESSAGE = "Publish a run of mmft"
_T = TypeVar("_T")


class PublishError(RuntimeError):
    """The Hub could not be reached or refused; nothing was lost."""


def push(
    run_folder: str | Path,
    repository: str,
    private: bool = True,
    dry_run: str | Path | None = None,
    **options: Any,
) -> str:
    """Publishes a finished run in one commit; a second push of the same run makes none.

    Args:
        repository: user/name; made where it is missing.
        private: of a repository that has to be made.
        dry_run: write the files to this folder instead, and ask nobody.
        options: base, licence, pictures of `mmft.hub.make_folder`.

    Returns:
        Where it is: the address of the commit, or the folder.

    Raises:
        ValueError: the run is not finished, or should not be published as it is.
        PublishError: the Hub could not be reached or refused, after a bounded number of attempts.
    """
    _expect_repository(repository)
    if dry_run is not None:
        files = make_folder(run_folder, dry_run, repository, **options)
        print("\n".join(sizes(Path(dry_run), files)))
        return str(dry_run)
    with tempfile.TemporaryDirectory(prefix="mmft-push-") as folder:
        files = make_folder(run_folder, folder, repository, **options)
        print("\n".join(sizes(Path(folder), files)), flush=True)
        return upload(Path(folder), files, repository, private)


def _expect_repository(name: str) -> None:
    """ValueError for what can be no repository's name."""
    from huggingface_hub.utils import validate_repo_id

    if "/" not in name:
        raise ValueError(f"{name!r} is no repository on the Hub; expected user/name")
    validate_repo_id(name)


def upload(folder: Path, files: list[Path], repository: str, private: bool, message: str = _MESSAGE) -> str:
    """One commit with the folder's files, as `push` makes it; the address of the commit. Errors as there."""
    return _persistent(lambda: _commit(folder, files, repository, private, message), repository)


def pull(repository: str, folder: str | Path, revision: str | None = None) -> str:
    """Fetches a published run into a folder and compares every file with what the Hub says it is.

    Only files of the names that `push` publishes are fetched: no code, no pickle.

    Returns:
        The lines of Python that load it.

    Raises:
        ValueError: the folder is not empty, the repository is not one of ours, or a file is not what it should be.
        PublishError: the Hub could not be reached or refused.
    """
    from huggingface_hub import HfApi

    _expect_repository(repository)
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder")
    api = HfApi()

    def fetch() -> list[Any]:
        commit = api.repo_info(repository, revision=revision).sha
        tree = api.list_repo_tree(repository, revision=commit, recursive=True)
        found = [entry for entry in tree if hasattr(entry, "blob_id") and ALLOWED.fullmatch(entry.path)]
        names = {entry.path for entry in found}
        if "recipe.yaml" not in names or not names & {"adapter_config.json", "config.json"}:
            raise ValueError(f"{repository} was not published by mmft: it needs recipe.yaml and an adapter or a model")
        for entry in found:
            api.hf_hub_download(repository, entry.path, revision=commit, local_dir=folder)
        return found

    for entry in _persistent(fetch, repository):
        _compare(folder / entry.path, entry)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes
    if (folder / "base_model").is_dir():
        check_model(str(folder / "base_model"))
    if (folder / "adapter_config.json").is_file():
        from mmft.vlm.adapter_files import check_adapter  # imports torch

        check_adapter(folder)
        base = base_of(load_recipe(folder / "recipe.yaml").model_dump())
        return loading_code(base.name, base.kind, str(folder))
    check_model(str(folder))
    return loading_code("", "model", str(folder))


def _commit(folder: Path, files: list[Path], repository: str, private: bool, message: str) -> str:
    """One commit with the files, and without those of an earlier push that are no longer made."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    if get_token() is None:
        raise ValueError("no login for the Hub: `hf auth login`, or a token with write access in HF_TOKEN")
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    if private and not api.repo_info(repository).private:
        raise ValueError(f"{repository} is public: say --public (in a recipe: output.private false) to publish there")
    names = [name.as_posix() for name in files]
    stale = [name for name in api.list_repo_files(repository) if ALLOWED.fullmatch(name) and name not in names]
    operations = [CommitOperationAdd(name, folder / name) for name in names]
    operations += [CommitOperationDelete(name) for name in stale]
    return api.create_commit(repository, operations, commit_message=message).commit_url


def _persistent(action: Callable[[], _T], repository: str) -> _T:
    """The action's result, tried again where the reason may pass.

    A commit whose answer was lost is not made twice: the next attempt finds all files in place and makes none.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except Exception as error:
            if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
                raise
            answer = _answer(error)
            if wait is None or not _may_pass(answer):
                raise PublishError(_reason(answer, repository)) from error
            print(f"the Hub: {_first_line(answer)}; trying again in {wait:g} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _may_pass(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    return not isinstance(error, OfflineModeIsEnabled) and (status is None or status in (408, 429) or status >= 500)


def _answer(error: BaseException) -> BaseException:
    """The error that holds the Hub's answer, among an error and its causes; without one, the error itself."""
    found: BaseException | None = error
    while found is not None and _status(found) is None:
        found = found.__cause__
    return found or error


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _reason(error: BaseException, repository: str) -> str:
    hints = {
        401: "log in with `hf auth login`, or set HF_TOKEN to a token that is valid",
        403: f"the token may not write to {repository}; make one that may",
        404: f"{repository} is not there, or not yours to see",
    }
    hint = f" ({hints[_status(error)]})" if _status(error) in hints else ""
    return f"the Hub, {repository}: {_first_line(error)}{hint}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _compare(path: Path, entry: Any) -> None:
    """A file against the Hub's own hash of it: SHA-256 of a large one, git's of a small one."""
    if path.stat().st_size != entry.size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, the Hub's has {entry.size}; pull again")
    if entry.lfs is not None:
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256
    else:
        data = path.read_bytes()
        same = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == entry.blob_id
    if not same:
        raise ValueError(f"{path} is not what the Hub has (other bytes); delete the folder and pull again")
