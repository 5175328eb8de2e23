"""The loop as a whole, on a tiny model: what must not change the result, what a run leaves behind, what stops it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mmft.batch import Responses
from mmft.training.config import A2CConfig, PPOConfig
from mmft.training.trainer import A2CTrainer, PPOTrainer
from mmft.vlm import policy as policy_module
from mmft.vlm.generate import generate
from mmft.vlm.load import build_policy, load_model, lora_config


def rows(n: int = 6):
    stream = np.random.default_rng(0)
    pictures = [Image.fromarray(stream.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(n)]
    return [
        {"id": f"r{i}", "prompt": "say " + "it " * i, "image": p, "wanted": "aeiou"[i % 5]}
        for i, p in enumerate(pictures)
    ]


def count_wanted(completions, wanted, **_):
    return [float(text.count(letter)) - 0.1 * len(text) for text, letter in zip(completions, wanted, strict=True)]


def trainer_of(
    tiny_model, folder, reward=count_wanted, dataset=None, cls=PPOTrainer, config_class=PPOConfig, **options
):
    torch.manual_seed(0)
    name = options.pop("model", None) or str(tiny_model("llava"))
    model, processor = load_model(name, options.pop("quantize", None), options.pop("dtype", "auto"))
    adapters = None if options.pop("full", False) else lora_config(model, r=4)
    shared_prefix = options.pop("shared_prefix", None)
    policy = build_policy(model, processor, adapters, options.get("critic", "head"), shared_prefix=shared_prefix)
    options = {
        "output_dir": str(folder),
        "max_steps": 4,
        "prompts_per_step": 4,
        "num_generations": 3,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "report_to": (),
    } | options
    return cls(policy, reward, config_class(**options), dataset or rows(), rows(3))


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.policy.named_parameters() if p.requires_grad}


def test_microbatches_change_nothing(tiny_model, tmp_path):
    whole = trainer_of(tiny_model, tmp_path / "a", num_mini_batches=2)
    split = trainer_of(tiny_model, tmp_path / "b", num_mini_batches=2, micro_prompts=1)
    for step in (1, 2):
        one, other = whole.step(step), split.step(step)
        assert one["reward"] == other["reward"]
        assert one["policy_loss"] == pytest.approx(other["policy_loss"], abs=1e-6)
    for name, value in weights(whole).items():
        # AdamW divides by the gradient's size, so rounding of tiny gradients shows at the scale of the step.
        torch.testing.assert_close(value, weights(split)[name], atol=2e-5, rtol=0)


def test_first_ratio_is_one_and_every_number_is_there(tiny_model, tmp_path):
    trainer = trainer_of(tiny_model, tmp_path, temperature=0.8)
    for step in (1, 2):
        metrics = trainer.step(step)
        assert metrics["first_ratio_error"] <= 1e-4
    wanted = "reward reward_std reward/count_wanted kl entropy explained_variance policy_loss value_loss ratio_max "
    wanted += "clip_fraction grad_norm response_length tokens_per_second samples_per_second time/rollout "
    wanted += "time/reference time/reward time/update kl_coef learning_rate ended_fraction seconds"
    assert set(wanted.split()) <= set(metrics)
    assert all(np.isfinite(v) for v in metrics.values())


def test_kl_is_zero_before_the_first_update_and_not_after(tiny_model, tmp_path):
    trainer = trainer_of(tiny_model, tmp_path, learning_rate=1e-2)
    assert abs(trainer.step(1)["kl"]) <= 1e-4
    assert abs(trainer.step(2)["kl"]) > 1e-3


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(tiny_model, tmp_path):
    runs = [trainer_of(tiny_model, tmp_path / str(i), seed=seed) for i, seed in enumerate((7, 7, 8))]
    losses = [[run.step(s)["policy_loss"] for s in (1, 2)] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_resumed_run_equals_the_unbroken_one(tiny_model, tmp_path):
    unbroken = trainer_of(tiny_model, tmp_path / "a", save_steps=2, kl_target=0.05, kl_coef=0.1)
    unbroken.train()
    broken = trainer_of(tiny_model, tmp_path / "b", save_steps=2, kl_target=0.05, kl_coef=0.1)
    broken.config.max_steps = 4
    for step in (1, 2):
        broken.step(step)
    from mmft.training.checkpoint import save_checkpoint

    save_checkpoint(broken, 2)
    resumed = trainer_of(tiny_model, tmp_path / "b", save_steps=2, kl_target=0.05, kl_coef=0.1)
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(unbroken).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert resumed.kl.value == unbroken.kl.value


def test_an_altered_checkpoint_is_refused_by_name(tiny_model, tmp_path):
    trainer_of(tiny_model, tmp_path, max_steps=1, save_steps=1).train()
    head = tmp_path / "checkpoints" / "step-000001" / "value_head.safetensors"
    data = bytearray(head.read_bytes())
    data[-1] ^= 1
    head.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="value_head.safetensors was altered"):
        trainer_of(tiny_model, tmp_path).train(resume_from_checkpoint=True)


def test_run_folder_holds_what_others_rely_on(tiny_model, tmp_path):
    from peft import PeftModel

    trainer = trainer_of(tiny_model, tmp_path, save_steps=2, eval_steps=2)
    summary = trainer.train()
    for name in ("metrics.jsonl", "samples.jsonl", "summary.json", "report.html", "value_head.safetensors"):
        assert (tmp_path / name).is_file(), name
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and "eval/reward" in lines[1]
    assert summary["before"].keys() == summary["after"].keys() == summary["difference"].keys()
    manifest = json.loads((tmp_path / "checkpoints" / "step-000004" / "manifest.json").read_text())
    assert {"state.json", "value_head.safetensors", "adapter/adapter_model.safetensors"} <= set(manifest["sha256"])
    # The final adapter, by plain PEFT on the plain model, is the policy.
    base, processor = load_model(trainer.policy.model.get_base_model().config._name_or_path)
    again = build_policy(PeftModel.from_pretrained(base, tmp_path / "adapter"), processor)
    again.value_head.load_state_dict(load_file(tmp_path / "value_head.safetensors"))
    prompts = trainer.prompts(1)
    from mmft.vlm.generate import generate

    one, other = (generate(p, prompts, 2, 6, seed=1) for p in (trainer.policy.eval(), again))
    assert torch.equal(one[0].ids, other[0].ids)
    torch.testing.assert_close(one[1].values, other[1].values)


def test_a_gradient_that_is_not_finite_stops_before_the_step(tiny_model, tmp_path, monkeypatch):
    trainer = trainer_of(tiny_model, tmp_path, critic_start="zero")  # a fitted critic moves before the update
    before = weights(trainer)
    forward = policy_module.token_logprobs

    def poisoned(*args, **options):
        logprobs, entropy = forward(*args, **options)
        return (logprobs * float("nan") if torch.is_grad_enabled() else logprobs), entropy

    monkeypatch.setattr(policy_module, "token_logprobs", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 1, pass 1, minibatch 1: the loss is not finite .*rows r\d"):
        trainer.step(1)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_rewards_get_trl_arguments_in_trl_forms(tiny_model, tmp_path):
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0] * len(completions)

    chat = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows()]
    trainer_of(tiny_model, tmp_path, reward=spy, dataset=chat).step(1)
    assert len(seen["completions"]) == len(seen["wanted"]) == len(seen["image"]) == len(seen["completion_ids"]) == 12
    assert seen["completions"][0][0]["role"] == "assistant" and seen["prompts"][0][0]["role"] == "user"
    assert seen["wanted"][:3] == [seen["wanted"][0]] * 3  # a group's responses stand together


def test_equal_rewards_give_no_policy_gradient_without_critic_and_kl(tiny_model, tmp_path):
    trainer = trainer_of(
        tiny_model, tmp_path, reward=lambda completions, **_: [1.0] * len(completions), critic="none", kl_coef=0.0
    )
    before = weights(trainer)
    metrics = trainer.step(1)
    assert metrics["policy_loss"] == 0.0
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_a2c_takes_one_pass(tiny_model, tmp_path):
    trainer = trainer_of(tiny_model, tmp_path, cls=A2CTrainer, config_class=A2CConfig)
    assert np.isfinite(trainer.step(1)["policy_loss"])
    with pytest.raises(ValueError, match="A2CTrainer takes A2CConfig"):
        trainer_of(tiny_model, tmp_path, cls=A2CTrainer)
    with pytest.raises(ValueError, match="num_ppo_epochs must be 1"):
        A2CConfig(num_ppo_epochs=2)


def test_a_dataset_without_prompt_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="train_dataset has no column 'prompt'; its columns are: image"):
        trainer_of(tiny_model, tmp_path, dataset=[{"image": None}])


def test_a_model_that_is_nowhere_is_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match="model.name: cannot load 'no/such-model'.*HF_HUB_OFFLINE"):
        load_model("no/such-model")
    with pytest.raises(ValueError, match="has no config.json"):
        load_model(str(tmp_path))


def test_the_plain_path_trains_too(tiny_model, tmp_path):
    trainer = trainer_of(tiny_model, tmp_path, shared_prefix=False)
    before = weights(trainer)
    metrics = trainer.step(1)
    assert metrics["first_ratio_error"] <= 1e-4 and metrics["grad_norm"] > 0
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_every_weight_can_be_trained_against_a_copy_and_resumed(tiny_model, tmp_path):
    trainer = trainer_of(tiny_model, tmp_path / "a", full=True, save_steps=2, learning_rate=1e-3)
    trainer.train()
    assert "model.vision_tower" in " ".join(n.removeprefix("model.") for n in weights(trainer))
    broken = trainer_of(tiny_model, tmp_path / "b", full=True, max_steps=4, save_steps=2)
    for step in (1, 2):
        metrics = broken.step(step)
    assert abs(metrics["kl"]) > 1e-5  # the copy stayed where it was
    from mmft.training.checkpoint import save_checkpoint

    save_checkpoint(broken, 2)
    resumed = trainer_of(tiny_model, tmp_path / "b", full=True, save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(trainer).items())


def wider(tiny: Path, folder: Path) -> Path:
    """A tiny model with a decoder wide enough for blocks of 64 four-bit weights."""
    config = AutoConfig.from_pretrained(tiny)
    config.text_config.update({"hidden_size": 128, "intermediate_size": 256, "head_dim": 32})
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "nf4"}, {"quantize": "int8"}], ids=str)
def test_half_and_quantised_weights_train(tiny_model, tmp_path, options):
    trainer = trainer_of(lambda family: wider(tiny_model(family), tmp_path / "model"), tmp_path, max_steps=2, **options)
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_a_rollout_leaves_the_gradients_of_4_bit_weights_alone(tiny_model, tmp_path):
    """Repacked for a faster product, 4-bit weights would pass no gradient on."""
    trainer = trainer_of(
        lambda family: wider(tiny_model(family), tmp_path / "model"), tmp_path, quantize="nf4", critic_start="zero"
    )
    policy, prompts = trainer.policy, trainer.prompts(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    allowed = (~policy.banned).nonzero().flatten()[:6]
    n = len(prompts) * 2
    written = Responses(allowed.repeat(n, 1), torch.ones(n, 6, dtype=torch.bool), torch.ones(n, dtype=torch.bool))

    def gradients():
        policy.zero_grad()
        policy(prompts, written).logprobs.sum().backward()
        return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    fresh = gradients()
    generate(policy, prompts, 2, 4, seed=0)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, fresh[name], atol=1e-6, rtol=1e-4, msg=name)


def test_the_reference_copy_has_its_own_eyes(tiny_model, tmp_path):
    """With every weight trained, the reference reads with its own frozen tower, decoder and head, on both paths."""
    for shared_prefix in (None, False):
        trainer = trainer_of(tiny_model, tmp_path, full=True, shared_prefix=shared_prefix)
        policy, prompts = trainer.policy, trainer.prompts(1)
        from mmft.vlm.generate import generate

        responses, _ = generate(policy, prompts, 2, 5, seed=0)
        before = policy(prompts, responses, reference=True).logprobs
        with torch.no_grad():
            for parameter in policy.model.parameters():  # tower, decoder and head alike
                parameter.add_(0.1 * torch.randn_like(parameter))
            after = policy(prompts, responses, reference=True).logprobs
            moved = policy(prompts, responses).logprobs
        assert torch.equal(before, after)
        assert (moved - before).abs().max() > 1e-2


def test_mixed_precision_trains_with_the_value_head_in_full(tiny_model, tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        trainer = trainer_of(tiny_model, tmp_path, max_steps=2)
        assert trainer.accelerator.mixed_precision == "bf16"
        trainer.train()
        with trainer.accelerator.autocast():
            prompts = trainer.prompts(1)
            from mmft.vlm.generate import generate

            _, sampled = generate(trainer.policy, prompts, 2, 4, seed=0)
        assert sampled.values.dtype == torch.float32
    finally:
        AcceleratorState._reset_state(True)


def test_dropout_and_a_plain_first_picture_pass_the_self_test(tiny_model, tmp_path):
    plain = [{**row, "image": Image.new("RGB", (32, 32))} for row in rows()]
    trainer = trainer_of(tiny_model, tmp_path, dataset=plain)
    for module in trainer.policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    from mmft.vlm.selftest import selftest

    trainer.policy.train()
    result = selftest(trainer.policy, trainer.prompts(1).select([0]))
    assert result["logprob_error"] <= 1e-4 and result["blank_change"] > 0
    assert trainer.policy.training


def test_minibatches_are_as_many_as_asked(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="prompts_per_step=4 is not divisible by num_mini_batches=3"):
        trainer_of(tiny_model, tmp_path, num_mini_batches=3)
    trainer = trainer_of(tiny_model, tmp_path, num_mini_batches=4, num_ppo_epochs=1)
    steps = []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.step(1)
    assert len(steps) == 4


def test_resume_names_what_differs(tiny_model, tmp_path):
    trainer_of(tiny_model, tmp_path, max_steps=1, save_steps=1).train()
    with pytest.raises(ValueError, match="made with seed 0, this run has seed 5"):
        trainer_of(tiny_model, tmp_path, seed=5).begin(True)
    with pytest.raises(ValueError, match="made with critic head, this run has critic none"):
        trainer_of(tiny_model, tmp_path, critic="none").begin(True)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        trainer_of(tiny_model, tmp_path / "new").begin(True)


def test_rows_that_cannot_be_read_are_named(tiny_model, tmp_path):
    trainer = trainer_of(tiny_model, tmp_path)

    def prompts(**row):
        return trainer.policy.pictures.prompts([row], ["r9"], torch.device("cpu"))

    with pytest.raises(ValueError, match="row r9: a picture is str, expected PIL"):
        prompts(prompt="a", image="picture.jpg")
    with pytest.raises(ValueError, match="row r9: a prompt is text, or a list of messages"):
        prompts(prompt=[{"role": "user", "content": None}])
    with pytest.raises(ValueError, match="row r9: a part of the prompt has type 'image_url'"):
        prompts(prompt=[{"role": "user", "content": [{"type": "image_url"}]}])
    with pytest.raises(ValueError, match="row r9: its prompt has .* more than the model's"):
        from mmft.vlm.generate import generate

        generate(trainer.policy, prompts(prompt="long " * 2000, image=rows(1)[0]["image"]), 1, 4, temperature=0.0)


def test_settings_out_of_their_choices_are_refused():
    with pytest.raises(ValueError, match="lr_scheduler_type='lineer': expected one of constant, linear, cosine"):
        PPOConfig(lr_scheduler_type="lineer")
    with pytest.raises(ValueError, match="critic='heads'"):
        PPOConfig(critic="heads")
