"""A trained preference head on disk.

preference.json      what it is: backbone and its fingerprint, head, temperature, metrics, versions, SHA-256 of files
head.safetensors     the fusion heads
adapter/             plain PEFT, where the backbone was adapted
README.md            the card, for people; not hashed, so that it may be edited
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from reward_models.preference.fusion import PreferenceHead

FORMAT = 2  # 1: a fingerprint that saw sixteen tensors
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def check_folder(folder: Path) -> None:
    """Whether a head may be saved here: in a folder that is new or empty, or in the place of an earlier head.

    Raises:
        ValueError: the folder holds something else, such as a training run, whose files would be lost.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder for the preference head")
    held = sorted(path.name for path in folder.glob("[!.]*"))
    if not held:
        return
    if not (folder / "preference.json").is_file():
        raise ValueError(
            f"{folder} holds other files ({', '.join(held[:4])}{' ...' if len(held) > 4 else ''}) and no "
            "preference.json; expected a new or empty folder for the preference head, or one with an earlier head"
        )
    own = _read(folder / "preference.json").get("files", {})
    for path in _kept(folder):
        name = path.relative_to(folder).as_posix()
        if own.get(name) != _sha256(path):
            raise ValueError(
                f"{path} is not a file of the preference head in {folder} and would be lost; expected a new or empty "
                "folder, or one with an earlier head as it was saved"
            )


def save_folder(folder: Path, facts: dict[str, Any], head: PreferenceHead, adapted: nn.Module | None) -> None:
    """Writes the folder; files of an earlier head in it are replaced, no other file is deleted.

    Args:
        facts: everything `preference.json` says beyond format, versions and hashes.
        adapted: the `PeftModel` whose adapter belongs to the head.

    Raises:
        ValueError: see `check_folder`.
    """
    from safetensors.torch import save_file

    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in _kept(folder):
        path.unlink()
    save_file({k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}, folder / "head.safetensors")
    if adapted is not None:
        model: Any = adapted
        for config in model.peft_config.values():
            config.base_model_name_or_path = facts["backbone"]["name"]  # PEFT's own would be where it lay here
        # "auto" would ask the Hub for the base model, to compare vocabularies; the embeddings are never trained.
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's empty template; the card stands above
    else:
        with suppress(OSError):  # there is none, or something else lives in it
            (folder / "adapter").rmdir()
    facts = {"format": FORMAT, **facts, "versions": _versions(), "files": _hashes(folder)}
    facts["identity"] = _identity(facts)
    (folder / "preference.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(facts), encoding="utf-8")


def backbone_name(folder: str | Path) -> str:
    """The backbone's name as the head in `folder` was trained with: a hub id, a folder, or a name of its trainer's own.

    Who knows such names looks this one up and gives the reward where it is, as option `backbone`.

    Raises:
        ValueError: no preference head of this format is there.
    """
    return _described(Path(folder))["backbone"]["name"]


def load_facts(folder: Path) -> dict[str, Any]:
    """`preference.json`, after every file was compared with its hash.

    Raises:
        ValueError: no such folder, a file missing or altered, or a format of another version.
    """
    facts, path = _described(folder), folder / "preference.json"
    if facts.get("identity") != _identity(facts):
        raise ValueError(f"{path} was altered: its identity is not the hash of what it says; take the saved one again")
    for name, digest in facts["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing from the preference head")
        if _sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} was altered: its SHA-256 is not the one in {path.name}")
    return facts


def _described(folder: Path) -> dict[str, Any]:
    """`preference.json`, of this format."""
    path = folder / "preference.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no preference head: {path.name} is missing; expected what train_preference saves"
        )
    facts = _read(path)
    if (found := facts.get("format")) != FORMAT:
        old = isinstance(found, int) and found < FORMAT
        mend = "it is of an earlier version: train the head again" if old else "take the folder from its source again"
        raise ValueError(f"{path}: format {found!r}, expected {FORMAT}; {mend}")
    return facts


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); take the folder from its source again") from error
    return facts if isinstance(facts, dict) else {}


def load_head(folder: Path, facts: dict[str, Any]) -> PreferenceHead:
    from safetensors.torch import load_file

    from reward_models.preference.fusion import PreferenceHead

    head = PreferenceHead(**facts["head"])
    head.load_state_dict(load_file(folder / "head.safetensors"))
    return head.requires_grad_(False).eval()


def _kept(folder: Path) -> list[Path]:
    """The files that hold a head's weights, as far as they are there."""
    paths = [folder / "head.safetensors", *sorted((folder / "adapter").rglob("*"))]
    return [path for path in paths if path.is_file()]


def _hashes(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): _sha256(p) for p in _kept(folder)}


def _identity(facts: dict[str, Any]) -> str:
    said = {k: v for k, v in facts.items() if k != "identity"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _card(facts: dict[str, Any]) -> str:
    head, training, metrics = facts["head"], facts["training"], facts["metrics"]
    name = facts["backbone"]["name"]
    name = Path(name).resolve().name if Path(name).is_dir() else name  # where it lies says nothing to others
    lines = [
        "# Preference head",
        "",
        f"A reward learned from {training['examples']} {facts['learned_from']}: reads the picture, the prompt and a "
        "text, and gives one number, higher for the text that people would prefer.",
        "",
        "```python",
        "from reward_models.preference import PreferenceReward",
        "",
        'reward = PreferenceReward.load("this/folder")',
        "reward(prompts=prompts, completions=texts, image=pictures)",
        "```",
        "",
        f"- backbone: `{name}` ({facts['backbone']['model_type']}, weights "
        f"{facts['backbone']['fingerprint']}), {'LoRA' if facts['adapter'] else 'frozen'}",
        f"- head: {head['fusion']}, {head['heads']} x width {head['width']}",
        f"- trained: {metrics['steps']} steps of {training['batch_size']}, {metrics['seconds']} s, "
        f"seed {training['seed']}",
    ]
    if "calibration" in metrics:
        held = metrics["calibration"]
        lines += [
            f"- accuracy on {held['pairs']} held-out pairs: {held['accuracy']:.4f} "
            f"(95 % interval {held['accuracy_low']:.4f} to {held['accuracy_high']:.4f})",
            f"- calibration on the same pairs: temperature {facts['temperature']:.3f}, ECE {held['ece']:.4f} "
            f"(before: {metrics['before_calibration']['ece']:.4f})",
        ]
    else:
        lines.append("- not calibrated: differences of rewards are no log-odds")
    lines += [
        "",
        "It has learned what told its pairs apart and nothing else. Outside of their pictures, prompts and kinds of "
        "fault its rewards mean little, and a policy will find out where. Watch a metric that it is not trained on.",
        "",
    ]
    return "\n".join(lines)
