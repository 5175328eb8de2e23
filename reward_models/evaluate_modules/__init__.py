"""The caption metrics as local modules of Hugging Face's `evaluate`, without network:

    import evaluate
    from reward_models.evaluate_modules import path

    metric = evaluate.load(path("cider_d"))
    metric.add_batch(predictions=["a dog runs"], references=[["a dog is running", "a brown dog runs"]])
    metric.compute()

`evaluate` copies a module's file into its cache and runs the copy, so those files hold next to nothing; what they do
is in caption_metric.py, which is imported from here.
"""

from __future__ import annotations

from pathlib import Path

MODULES = ("cider_d", "bleu", "rouge_l", "cider", "meteor", "spice")


def path(name: str) -> str:
    """The folder that `evaluate.load` takes for the metric of that name; ValueError listing the names otherwise."""
    if name not in MODULES:
        raise ValueError(f"no evaluate module {name!r}; there are: {', '.join(MODULES)}")
    return str(Path(__file__).parent / name)
