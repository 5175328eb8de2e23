"""What becomes of each option of TRL's `GRPOConfig` (1.16), and of its `PPOConfig` (before 1.0), in mmft.

Data only; `mmft.training.from_trl` acts on it, and ``python -m mmft.training.trl_names`` prints it as the tables of
docs/from_trl.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One name.

    Attributes:
        how: "same" (an option here, too), "mapped" (to others), "kept" (for the script to read), "ignored" (with a
            warning) or "refused" (with an error).
        default: TRL's own; a value that asks for nothing passes without a word. So does None.
        text: to what, or why.
        also: further values that ask for nothing.
    """

    how: str
    default: Any
    text: str
    also: tuple[Any, ...] = ()

    def asks(self, value: Any) -> bool:
        """Whether the value asks for anything that mmft does not do anyway."""
        return value is not None and all(value != known for known in (self.default, *self.also))


def _entries(how: str, text: str, also: tuple[Any, ...] = (), **defaults: Any) -> dict[str, Entry]:
    return {name: Entry(how, default, text, also) for name, default in defaults.items()}


GRPO: dict[str, Entry] = {
    # ---- the same
    **_entries("same", "", learning_rate=1e-6, weight_decay=0.0, max_grad_norm=1.0, temperature=1.0),
    **_entries("same", "", num_generations=8, max_completion_length=512, entropy_coef=0.0, reward_weights=None),
    **_entries("same", "", output_dir=None, seed=42, gradient_checkpointing=True),
    **_entries("same", "-1 = by `num_train_epochs`", max_steps=-1),
    **_entries("same", "passes over the rows; those of a last, smaller batch are not dropped", num_train_epochs=3.0),
    **_entries("same", "linear, cosine, constant; constant_with_warmup is constant", lr_scheduler_type="linear"),
    **_entries("same", "below 1: a share of all steps", warmup_steps=0, save_steps=500, eval_steps=None),
    **_entries("same", '"none", one name or several', report_to="none"),
    # ---- under another name
    **_entries(
        "mapped",
        "`prompts_per_step`: all of a generation batch ÷ `num_generations`; `micro_prompts`: those of one device",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        steps_per_generation=None,
        generation_batch_size=None,
    ),
    **_entries("mapped", "`kl_coef`; the KL is part of the reward here, and of the loss there", beta=0.0),
    **_entries("mapped", "`num_ppo_epochs`", num_iterations=1),
    **_entries("mapped", "`cliprange`", epsilon=0.2),
    **_entries("mapped", "`cliprange=(epsilon, epsilon_high)`", epsilon_high=None),
    **_entries(
        "mapped",
        '`whiten_advantages`: "batch" = True, "none" = False; "group" is taken as "batch"',
        scale_rewards="group",
    ),
    **_entries("mapped", "`optimizer`: adamw, adamw_8bit or sgd", optim="adamw_torch_fused"),
    **_entries("mapped", '`save_steps`: "no" = 0, "epoch" = one pass over the rows', save_strategy="steps"),
    **_entries("mapped", '`eval_steps`: "no" = 0, "epoch" = one pass over the rows', eval_strategy="no"),
    **_entries("mapped", "`keep_last`", save_total_limit=None),
    **_entries("mapped", "`eval_batch`", per_device_eval_batch_size=8),
    **_entries("mapped", "`compile`", torch_compile=False),
    **_entries("mapped", "`gradient_checkpointing`", activation_checkpointing=None),
    **_entries("mapped", '`engine="vllm"`', use_vllm=False),
    **_entries("mapped", '`vllm`: "colocate" is url=None, in this process', vllm_mode="colocate"),
    **_entries(
        "mapped",
        "`vllm`: url",
        vllm_server_base_url=None,
        vllm_server_host="0.0.0.0",
        vllm_server_port=8000,
    ),
    **_entries("mapped", "`vllm`: timeout", vllm_server_timeout=240.0),
    **_entries("mapped", "`vllm`: memory", vllm_gpu_memory_utilization=0.3),
    **_entries(
        "mapped",
        "read when the model is loaded by name: dtype, trust_remote_code, quantization_config; others are refused",
        model_init_kwargs=None,
        trust_remote_code=False,
    ),
    # ---- for the script itself
    **_entries("kept", "nothing is pushed during training: `trainer.push_to_hub()` does it", push_to_hub=False),
    **_entries("kept", "read by `trainer.push_to_hub()`", hub_model_id=None, hub_private_repo=None),
    **_entries("kept", "for `trainer.train(resume_from_checkpoint=…)`", resume_from_checkpoint=None),
    **_entries("kept", "nothing here asks for them", do_train=False, do_eval=False, do_predict=False, local_rank=-1),
    # ---- said elsewhere
    **_entries(
        "ignored",
        "the launcher says it: `accelerate launch --config_file accelerate_configs/…`",
        fsdp=None,
        fsdp_config=None,
        deepspeed=None,
        parallelism_config=None,
        accelerator_config=None,
        use_cpu=False,
        ddp_backend=None,
        ddp_find_unused_parameters=None,
        ddp_bucket_cap_mb=None,
        ddp_broadcast_buffers=None,
        ddp_static_graph=None,
    ),
    **_entries(
        "ignored",
        "the launcher says it: `accelerate launch --mixed_precision bf16`",
        (False,),
        bf16=None,
        fp16=False,
        bf16_full_eval=False,
        fp16_full_eval=False,
    ),
    **_entries("ignored", "set `torch.backends.cuda.matmul.allow_tf32` yourself", tf32=None),
    **_entries("ignored", "`timeout` ends all processes when one phase of a step hangs", ddp_timeout=1800),
    **_entries("ignored", "log in with `hf auth login`", hub_token=None),
    **_entries(
        "ignored",
        "a run is pushed when it is finished",
        hub_strategy="every_save",
        hub_always_push=False,
        hub_revision=None,
        log_completions_hub_repo=None,
    ),
    **_entries(
        "ignored",
        "every step is a line of metrics.jsonl, and the report shows captions",
        logging_strategy="steps",
        logging_steps=10,
        logging_first_step=False,
        log_on_each_node=True,
        include_num_input_tokens_seen="no",
        log_completions=False,
        log_multimodal=True,
        num_completions_to_print=None,
        log_unique_prompts=False,
        log_level="passive",
        log_level_replica="warning",
        disable_tqdm=None,
        skip_memory_metrics=True,
    ),
    **_entries("ignored", "a number that is not finite ends the run", logging_nan_inf_filter=True, debug=""),
    **_entries(
        "ignored",
        "trackers take it from their own environment variables",
        run_name=None,
        project="huggingface",
        trackio_space_id=None,
        trackio_bucket_id=None,
        trackio_static_space_id=None,
    ),
    # ---- done anyway, or without need
    **_entries("ignored", "dropout of the model is always off here", (True,), disable_dropout=False),
    **_entries("ignored", "the untrained model is always evaluated", (True,), eval_on_start=False),
    **_entries("ignored", "a loss is divided by the tokens of all devices", average_tokens_across_devices=True),
    **_entries("ignored", "a run with one seed is the same run again", (True,), full_determinism=False),
    **_entries("ignored", "`seed` draws the order of the rows, too", data_seed=None),
    **_entries("ignored", "rows are shuffled", shuffle_dataset=True, train_sampling_strategy="random"),
    **_entries("ignored", "reward functions get every column", remove_unused_columns=False),
    **_entries(
        "ignored",
        "rows are opened when a step needs them; there is no data loader",
        dataloader_drop_last=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=True,
        dataloader_persistent_workers=False,
        dataloader_prefetch_factor=None,
        dataloader_multiprocessing_context=None,
        dataloader_in_order=True,
        length_column_name="length",
        pad_to_multiple_of="auto",
    ),
    **_entries(
        "ignored",
        "evaluation is greedy, one response a row, by `compute_metrics` or the rewards",
        num_generations_eval=None,
        prediction_loss_only=False,
        eval_delay=0,
        eval_do_concat_batches=True,
        eval_use_gather_object=False,
        eval_accumulation_steps=None,
        include_for_metrics=[],
        batch_eval_metrics=False,
        label_names=None,
    ),
    **_entries(
        "ignored",
        "a checkpoint is always whole, and a resumed run ends as the unbroken one",
        save_only_model=False,
        save_on_each_node=False,
        enable_jit_checkpoint=False,
        ignore_data_skip=False,
        restore_callback_states_from_checkpoint=False,
    ),
    **_entries("ignored", "the main metric of the evaluation is", metric_for_best_model=None, greater_is_better=None),
    **_entries(
        "ignored",
        "how it is computed is chosen here; the numbers do not change",
        activation_checkpointing_kwargs=None,
        gradient_checkpointing_kwargs=None,
        torch_compile_backend=None,
        torch_compile_mode=None,
        use_liger_kernel=False,
        liger_kernel_config=None,
        use_cache=False,
        torch_empty_cache_steps=None,
        cast_lm_head_to_fp32=False,
        ds3_gather_for_generation=True,
        cache_implementation=None,
        use_transformers_continuous_batching=False,
        transformers_continuous_batching_config=None,
        use_transformers_paged=False,
    ),
    **_entries(
        "ignored",
        "responses are drawn from the whole distribution, so that the first ratio is 1; lower `temperature` instead",
        top_p=1.0,
        top_k=0,
        min_p=None,
        repetition_penalty=1.0,
    ),
    **_entries(
        "ignored",
        "vLLM's log-probs are only compared with the policy's own, which the ratio is made of",
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="sequence_mask",
        vllm_importance_sampling_clip_max=3.0,
        vllm_importance_sampling_clip_min=None,
        vllm_importance_sampling_cap=None,
    ),
    **_entries(
        "ignored",
        "adapters reach vLLM as files; it is set up by its own options (docs/generation.md)",
        vllm_model_impl="vllm",
        vllm_enable_sleep_mode=False,
        vllm_group_port=51216,
        vllm_max_model_length=None,
        vllm_tensor_parallel_size=1,
    ),
    **_entries("ignored", "the KL is part of the reward, whose gradient has no such bias", use_bias_correction_kl=True),
    **_entries(
        "ignored",
        "belongs to an option that is refused, or does nothing without it",
        sapo_temperature_neg=1.05,
        sapo_temperature_pos=1.0,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        ref_model_mixup_alpha=0.6,
        ref_model_sync_steps=512,
        entropy_coef_min=0.0,
        entropy_coef_max=1.0,
        entropy_coef_delta=0.005,
        entropy_target=0.2,
        max_tool_calling_iterations=None,
        optim_target_modules=None,
        lr_scheduler_kwargs=None,
    ),
    # ---- another algorithm, or not here
    **_entries(
        "refused",
        "the objective here is PPO's (or A2C's), a mean over all tokens of the optimizer step, as in \"dapo\": leave "
        'it out; "grpo", "bnpo" and "dr_grpo" differ in that mean alone, and are ignored with a warning',
        loss_type="dapo",
    ),
    **_entries("refused", "`cliprange` is the only clip of the ratio", delta=None),
    **_entries("refused", "the ratio is taken token by token", importance_sampling_level="token"),
    **_entries(
        "refused",
        "give each reward its own `normalize` in a `reward_models.WeightedRewards`",
        multi_objective_aggregation="sum_then_normalize",
    ),
    **_entries("refused", "`missing_eos_penalty` lowers their score instead", mask_truncated_completions=False),
    **_entries(
        "refused", "the reference stays where training began; `kl_target` adapts `kl_coef`", sync_ref_model=False
    ),
    **_entries("refused", "every token is learned from", top_entropy_quantile=1.0, off_policy_mask_threshold=None),
    **_entries("refused", "`entropy_coef` stays as it is; a guard watches the entropy", use_adaptive_entropy=False),
    **_entries("refused", "set `patience` and `eval_steps`, or a guard that rolls back", load_best_model_at_end=False),
    **_entries("refused", "set `micro_prompts`", auto_find_batch_size=False),
    **_entries("refused", "only `temperature` shapes the sampling", generation_kwargs=None),
    **_entries(
        "refused", "write the words into the prompt, or set the processor's template", chat_template_kwargs=None
    ),
    **_entries("refused", "a reward can check the form: docs/rewards/format.md", vllm_structured_outputs_regex=None),
    **_entries("refused", "no auxiliary loss is added", router_aux_loss_coef=None, label_smoothing_factor=0.0),
    **_entries("refused", "noise would change what is learned from", neftune_noise_alpha=None),
    **_entries("refused", "AdamW is torch's, with its defaults", optim_args=None),
    **_entries("refused", "AdamW is torch's, with its defaults", adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8),
}

# Names of `PPOConfig`, and of `GRPOConfig` and `TrainingArguments` as they were, that are no longer in `GRPOConfig`.
OLD: dict[str, Entry] = {
    **_entries("same", "", num_ppo_epochs=4, kl_coef=0.05, kl_estimator="k1", cliprange=0.2, cliprange_value=0.2),
    **_entries("same", "", vf_coef=0.1, gamma=1.0, lam=0.95, whiten_rewards=False, missing_eos_penalty=None),
    **_entries("same", "", num_mini_batches=1),
    **_entries("mapped", "`max_completion_length`", response_length=53),
    **_entries("mapped", "`max_steps`: ÷ responses of a step", total_episodes=None),
    **_entries("mapped", "`num_ppo_epochs`", ppo_epochs=4),
    **_entries("mapped", "`kl_coef`", init_kl_coef=0.2),
    **_entries("mapped", "`kl_target`", target=6),
    **_entries("mapped", "`kl_horizon`", horizon=10000),
    **_entries("mapped", "`report_to`", log_with=None),
    **_entries("mapped", "`warmup_steps`", warmup_ratio=0.0),
    **_entries("mapped", "`eval_strategy`", evaluation_strategy="no"),
    **_entries(
        "kept",
        "nothing here asks for them",
        exp_name=None,
        sft_model_path=None,
        reward_model_path=None,
        model_name=None,
    ),
    **_entries("ignored", "a response always ends at the model's own end tokens", ("eos",), stop_token=None),
    **_entries("ignored", "prompts are never cut, so that no picture loses a part", max_prompt_length=512),
    **_entries(
        "ignored",
        "a whole step is sampled at once; `micro_prompts` sets the memory of the update",
        local_rollout_forward_batch_size=64,
    ),
    **_entries("ignored", "the report shows captions of held-out rows", num_sample_generations=10),
    **_entries("ignored", "rows are tokenized when a step needs them", dataset_num_proc=None),
    **_entries(
        "ignored", "said by the run folder", logging_dir=None, overwrite_output_dir=False, save_safetensors=True
    ),
    **_entries("refused", "a response ends at the model's own end tokens", stop_token_id=None),
    **_entries("refused", "the adapters are `peft_config`'s", model_adapter_name=None, ref_adapter_name=None),
    **_entries("refused", "the loop over batches is the trainer's: say prompts_per_step", batch_size=256),
    **_entries("refused", "say num_mini_batches and micro_prompts", mini_batch_size=1, forward_batch_size=None),
    **_entries("refused", "say max_steps", steps=20000),
    **_entries("refused", "True is kl_target, False is none", adap_kl_ctrl=None),
    **_entries("refused", "say kl_estimator", kl_penalty="kl"),
    **_entries("refused", "guards watch the KL and may end the run", early_stopping=False, target_kl=1),
    **_entries("refused", "say skip_spikes", ratio_threshold=10.0),
    **_entries(
        "refused",
        "give the reward `normalize` and `clip` in a `reward_models.WeightedRewards`",
        use_score_scaling=False,
        use_score_norm=False,
        score_clip=None,
    ),
}

NAMES: dict[str, Entry] = GRPO | OLD

# Arguments of TRL's trainers that `PPOTrainer` has no use for: what to do instead.
ARGUMENTS = {
    "reward_processing_classes": "a reward is a function here: tokenize in it",
    "optimizers": "set optimizer, learning_rate and lr_scheduler_type in the config",
    "tools": "a response is one turn",
    "rollout_func": "set engine in the config",
    "environment_factory": "a response is one turn; give reward_funcs",
    "ref_model": "the reference is the model with its adapters off, or a frozen copy of it",
    "value_model": "the critic is a value head on the model: critic='head' in the config",
    "reward_model": "give reward_funcs: a function that calls your model",
    "data_collator": "rows are put together here",
}


def tables() -> str:
    """Both dictionaries as Markdown, one row for all names that share their text."""
    lines = []
    for title, names in (("Options of GRPOConfig", GRPO), ("Options of older versions, PPOConfig among them", OLD)):
        lines += [f"### {title}", "", "| option | here | how |", "|---|---|---|"]
        rows: dict[tuple[str, str], list[str]] = {}
        for name, entry in names.items():
            rows.setdefault((entry.how, entry.text), []).append(f"`{name}`")
        lines += [f"| {', '.join(found)} | {how} | {text} |" for (how, text), found in rows.items()]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables(), end="")
