"""Fine-tunes a vision-language model with TRL's GRPO: `python grpo_vlm.py MODEL OUTPUT_DIR`."""

import sys

from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import GRPOConfig, GRPOTrainer

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "white": (240, 240, 240)}


def make_conversation(name, colour):
    return {
        "prompt": [
            {"role": "system", "content": "You describe pictures in a few words."},
            {"role": "user", "content": "Which colour is this?"},
        ],
        "image": Image.new("RGB", (32, 32), colour),
        "solution": name,
    }


def colour_reward(completions, solution, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [float(name in content) for content, name in zip(contents, solution)]


def brevity_reward(completions, trainer_state=None, **kwargs):
    return [-0.01 * len(completion[0]["content"]) for completion in completions]


if __name__ == "__main__":
    model, output_dir = sys.argv[1:]
    rows = [make_conversation(name, colour) for name, colour in COLOURS.items()] * 4
    dataset = Dataset.from_list(rows).train_test_split(test_size=4, seed=42)

    training_args = GRPOConfig(
        output_dir=output_dir,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=8,
        num_train_epochs=1,
        beta=0.04,
        temperature=0.9,
        epsilon=0.2,
        epsilon_high=0.28,
        scale_rewards="batch",
        loss_type="dapo",
        reward_weights=[1.0, 0.5],
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=3,
        per_device_eval_batch_size=4,
        remove_unused_columns=False,
        gradient_checkpointing=True,
        bf16=False,
        use_vllm=False,
        optim="adamw_torch",
        max_grad_norm=1.0,
        report_to="none",
        seed=1,
        push_to_hub=False,
    )
    trainer = GRPOTrainer(
        model=model,
        args=training_args,
        reward_funcs=[colour_reward, brevity_reward],
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()

    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name="colours")
