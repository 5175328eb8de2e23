"""mmft: actor-critic reinforcement learning for vision-language models.

from mmft import PPOConfig, PPOTrainer
"""

import logging
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "PPOConfig": "mmft.training.config",
    "A2CConfig": "mmft.training.config",
    "PPOTrainer": "mmft.training.trainer",
    "A2CTrainer": "mmft.training.trainer",
    "load_rows": "mmft.data",
    "Captioner": "mmft.inference.captioner",
    "evaluate": "mmft.inference.evaluate",
    "merge": "mmft.inference.merge",
    "push": "mmft.hub",
    "pull": "mmft.hub",
}

# On a CPU bitsandbytes, which PEFT imports in every run, would advise to install something that fetches code.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = [*_PLACES, "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import mmft` costs nothing and a wrong recipe is refused before torch is loaded.
    if name in _PLACES:
        import importlib

        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'mmft' has no attribute {name!r}")
