"""The supervised warm start: TRL's `SFTTrainer` on (picture, reference) pairs, before reinforcement learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmft.training.fingerprint import differing, rows_digest, told
from mmft.training.interrupts import Interrupted, Interrupts
from mmft.training.together import Together
from mmft.training.transaction import Checkpoints, commit, verify
from mmft.vlm.load import load_model, lora_config
from mmft.vlm.media import media_of
from mmft.vlm.pictures import Pictures
from reward_models.preference.backbone import fingerprint as weights_digest


def warm_start(recipe, rows, folder: str | Path, resume: bool = False) -> Path:
    """Trains the recipe's model on every reference of ``rows`` and saves it, processor and all.

    While it runs, its checkpoints are beside the folder; a finished one is the folder alone.

    Args:
        recipe: a `mmft.recipe.Recipe` whose ``warm_start`` section is set.
        rows: rows with ``references``.
        folder: where the trained model goes.
        resume: take what is there: the finished model, or the newest whole checkpoint of an unfinished training.

    Returns:
        The folder; `load_model` takes it like any other model.

    Raises:
        ValueError: what is there is damaged, or of another recipe.
        Interrupted: after a SIGTERM or SIGINT, once the state is saved.
    """
    folder = Path(folder)
    if resume and folder.is_dir():
        verify(folder)
        return folder
    loading = {"dtype": recipe.model.dtype, "trust_remote_code": recipe.model.trust_remote_code}
    adapters = recipe.warm_start.tune == "lora"
    quantize = recipe.model.quantize if adapters else None  # all weights are trained in full precision
    model, processor = load_model(recipe.model.name, quantize, **loading)
    identity = _identity(recipe, rows, model)  # of the weights as they were loaded
    beside = folder.with_name(f"{folder.name}_checkpoints")
    trainer = _trainer_of(recipe, model, processor, _pairs_of(rows, Pictures(model, processor)), beside)
    main, together = trainer.accelerator.is_main_process, Together(trainer.accelerator)
    trainer.checkpoints = Checkpoints(beside, 2, main, together.agree)
    trainer.identity = identity
    _train(trainer, together, resume)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if adapters:
        if quantize is not None:
            trained = _on_whole_weights(trained, load_model(recipe.model.name, **loading)[0])
        trained = trained.merge_and_unload()

    def write(place: Path) -> None:
        if main:
            trained.save_pretrained(place)
            processor.save_pretrained(place)

    commit(folder, write, main, together.agree)
    trainer.checkpoints.clear()
    return folder


def _identity(recipe, rows, model) -> dict[str, Any]:
    """What a checkpoint must agree on with the training that goes on from it."""
    identity = {"seed": recipe.seed, "dataset": rows_digest(rows), "base_model": weights_digest(model)}
    return identity | recipe.warm_start.model_dump(exclude={"save_every"}) | {"lora": recipe.model.lora.model_dump()}


def _pairs_of(rows, pictures: Pictures):
    """A `datasets.Dataset` of every (picture, reference) pair: it holds two integers a pair, opened only when asked."""
    import datasets

    pairs = [(i, j) for i, texts in enumerate(rows.references()) for j in range(len(texts))]
    end = pictures.processor.tokenizer.eos_token

    def examples(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        chosen = [(rows[i], j) for i, j in zip(batch["row"], batch["reference"], strict=True)]
        return {
            "prompt": [pictures.render(row["prompt"], len(_images(row)), str(row["id"])) for row, _ in chosen],
            "completion": [pictures.as_text(row["references"][j]) + end for row, j in chosen],
            "images": [_images(row) for row, _ in chosen],
        }

    dataset = datasets.Dataset.from_dict({"row": [i for i, _ in pairs], "reference": [j for _, j in pairs]})
    return dataset.with_transform(examples)


def _trainer_of(recipe, model, processor, dataset, output: Path):
    """TRL's trainer as the recipe's ``warm_start`` section wants it."""
    from trl import SFTConfig

    from mmft.training.supervised import ResumableSFTTrainer

    options, peft_config = recipe.warm_start, None
    if options.tune == "lora":
        lora = recipe.model.lora
        peft_config = lora_config(model, lora.r, lora.alpha, lora.dropout, lora.target, lora.dora, lora.rslora)
    trainer = ResumableSFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
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
            save_strategy="steps" if options.save_every else "no",
            save_steps=options.save_every or 1,
            report_to=[],
        ),
        train_dataset=dataset,
        processing_class=processor,
        peft_config=peft_config,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and peft_config is not None and recipe.model.quantize is not None:
            parameter.data = parameter.data.float()  # TRL makes adapters of quantised weights half ones
    return trainer


def _train(trainer, together: Together, resume: bool) -> None:
    """Trains to the end, from the newest whole checkpoint where the training is to be resumed."""
    from mmft.training.supervised import LeaveWhenAsked

    checkpoint = trainer.checkpoints.latest(together.say) if resume else trainer.checkpoints.clear()
    if checkpoint is not None:
        saved, own = json.loads((checkpoint / "identity.json").read_text()), trainer.identity
        if wrong := differing(saved, own):
            raise ValueError(f"{checkpoint}: {told(wrong, saved, own)}; a run without --resume starts anew")
    with Interrupts(together.highest, together.say) as interrupts:
        leaving = LeaveWhenAsked(interrupts)
        trainer.add_callback(leaving)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if leaving.asked:
        together.say(f"the warm start ended after step {trainer.state.global_step}; go on by --resume")
        raise Interrupted(leaving.asked)


def _on_whole_weights(adapted: torch.nn.Module, base: torch.nn.Module) -> torch.nn.Module:
    """The same adapters on weights that are not quantised: merged into 4 bits they would be lost in the rounding."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    whole = get_peft_model(base, adapted.peft_config["default"])
    set_peft_model_state_dict(whole, get_peft_model_state_dict(adapted))
    return whole


def _images(row: dict[str, Any]) -> list[Any]:
    """The row's pictures, or frames of a clip; TRL's trainer takes neither native clips nor sounds."""
    media = media_of(row, str(row["id"]))
    if set(media) - {"image"}:
        raise ValueError(
            f"row {row['id']}: a warm start takes pictures, this row has {', '.join(sorted(media))}; "
            "set data.video.native to false, or leave warm_start out"
        )
    return media.get("image", [])
