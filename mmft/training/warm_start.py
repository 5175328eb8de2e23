"""The supervised warm start: TRL's `SFTTrainer` on (picture, reference) pairs, before reinforcement learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmft.vlm.load import load_model, lora_config
from mmft.vlm.media import media_of
from mmft.vlm.pictures import Pictures


def warm_start(recipe, rows, folder: str | Path) -> Path:
    """Trains the recipe's model on every reference of ``rows`` and saves it, processor and all.

    Args:
        recipe: a `mmft.recipe.Recipe` whose ``warm_start`` section is set.
        rows: rows with ``references``.
        folder: where the trained model goes.

    Returns:
        The folder; `load_model` takes it like any other model.
    """
    import datasets
    from trl import SFTConfig, SFTTrainer

    options = recipe.warm_start
    model, processor = load_model(recipe.model.name, dtype=recipe.model.dtype)
    pictures = Pictures(model, processor)
    end = processor.tokenizer.eos_token
    pairs = [(i, j) for i, texts in enumerate(rows.references()) for j in range(len(texts))]

    def examples(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Opened only now: the data set itself holds two integers a pair."""
        chosen = [(rows[i], j) for i, j in zip(batch["row"], batch["reference"], strict=True)]
        return {
            "prompt": [pictures.render(row["prompt"], len(_images(row)), str(row["id"])) for row, _ in chosen],
            "completion": [pictures.as_text(row["references"][j]) + end for row, j in chosen],
            "images": [_images(row) for row, _ in chosen],
        }

    dataset = datasets.Dataset.from_dict({"row": [i for i, _ in pairs], "reference": [j for _, j in pairs]})
    peft_config = None
    if options.tune == "lora":
        lora = recipe.model.lora
        peft_config = lora_config(model, lora.r, lora.alpha, lora.dropout, lora.target)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            seed=recipe.seed,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=options.batch_size,
            num_train_epochs=options.epochs,
            max_steps=options.max_steps or -1,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            max_length=None,  # never cut: a picture's tokens are part of the sequence
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=dataset.with_transform(examples),
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if peft_config is not None:
        trained = trained.merge_and_unload()
    if trainer.accelerator.is_main_process:
        trained.save_pretrained(folder)
        processor.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
    return Path(folder)


def _images(row: dict[str, Any]) -> list[Any]:
    """The row's pictures, or frames of a clip; TRL's trainer takes neither native clips nor sounds."""
    media = media_of(row, str(row["id"]))
    if set(media) - {"image"}:
        raise ValueError(
            f"row {row['id']}: a warm start takes pictures, this row has {', '.join(sorted(media))}; "
            "set data.video.native to false, or leave warm_start out"
        )
    return media.get("image", [])
