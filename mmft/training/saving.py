"""What TRL's scripts do when training is over: save the model where they say, and push it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

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
    """Uploads what `save_model` saves; the address of the commit, on the main process.

    Args:
        repository: user/name, or a name of one's own; None = ``hub_model_id``, else the name of the output folder.
        private: of a repository that has to be made; None = ``hub_private_repo``, else yes.
    """
    from huggingface_hub import HfApi

    config = trainer.config
    name = repository or config.hub_model_id or trainer.run_dir.resolve().name
    private = config.hub_private_repo if private is None else private
    with tempfile.TemporaryDirectory(prefix="mmft-push-") as folder:
        save_model(trainer, folder)
        if not trainer.accelerator.is_main_process:
            return None
        api = HfApi()
        found = api.create_repo(name, private=True if private is None else private, exist_ok=True)
        return str(api.upload_folder(repo_id=found.repo_id, folder_path=folder, commit_message=message))
