"""What TRL's scripts do when training is over: save the model where they say, and push it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mmft.hub.folder import make_folder
from mmft.hub.remote import upload
from mmft.training import distributed
from mmft.training.checkpoint import save_adapter

if TYPE_CHECKING:
    from mmft.training.trainer import PPOTrainer


def save_model(trainer: PPOTrainer, folder: str | Path) -> None:
    """Adapter (or whole model), value head and processor right in the folder. Every process has to call it."""
    weights = distributed.trained_weights(trainer.accelerator, trainer.prepared)
    with distributed.whole(trainer.accelerator, trainer.prepared):
        if trainer.accelerator.is_main_process:
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                save_adapter(trainer.policy, Path(aside), weights)
                files = [path for path in Path(aside).rglob("*") if path.is_file()]
                for path in files:
                    shutil.move(path, folder / path.name)
            trainer.policy.processor.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()


def push_to_hub(trainer: PPOTrainer, repository: str | None, message: str, private: bool | None) -> str | None:
    """Publishes the run with its model card; where no card can be made of it, what `save_model` saves.

    Args:
        repository: user/name, or a name of one's own; None = ``hub_model_id``, else the name of the output folder.
        private: of a repository that has to be made; None = ``hub_private_repo``, else yes.

    Returns:
        The address of the commit; None on processes that are not the main one.
    """
    from huggingface_hub import HfApi

    config = trainer.config
    name = repository or config.hub_model_id or trainer.run_dir.resolve().name
    private = config.hub_private_repo if private is None else private
    with tempfile.TemporaryDirectory(prefix="mmft-push-") as aside:
        plain, folder = Path(aside) / "model", Path(aside) / "published"
        save_model(trainer, plain)
        if not trainer.accelerator.is_main_process:
            return None
        name = name if "/" in name else f"{HfApi().whoami()['name']}/{name}"
        try:
            files = make_folder(trainer.run_dir, folder, name)
        except ValueError as reason:
            print(f"published without a model card: {reason}", file=sys.stderr)
            folder, files = plain, sorted(path.relative_to(plain) for path in plain.iterdir())
        return upload(folder, files, name, True if private is None else private, message)
