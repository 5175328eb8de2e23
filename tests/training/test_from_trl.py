"""Scripts written for TRL: every option is honoured, named as ignored, or refused; a GRPO script runs as it is."""

from __future__ import annotations

import dataclasses
import json
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_hub import fake_hub
from huggingface_hub import HfApi, constants
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback, TrainerState

from mmft.training.callbacks import with_state
from mmft.training.config import A2CConfig, PPOConfig
from mmft.training.from_trl import config_of, loading, require_known, settled
from mmft.training.scoring import as_rewards
from mmft.training.trainer import PPOTrainer
from mmft.training.trl_names import GRPO, NAMES, tables

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "examples" / "grpo_vlm.py"
FIELDS = {field.name for field in dataclasses.fields(PPOConfig)}


def quiet(cls=PPOConfig, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(**options)


def said(**options) -> str:
    """The one warning about a config's options, or nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PPOConfig(**options)
    assert len(caught) <= 1
    return str(caught[0].message) if caught else ""


def length(completions, **columns):
    return [float(len(text)) for text in completions]


# ---- the table


def test_every_option_of_grpo_config_is_accounted_for_with_its_default():
    from trl import GRPOConfig

    theirs = {
        f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(GRPOConfig)
    }
    assert set(theirs) == set(GRPO)
    assert {name: entry.default for name, entry in GRPO.items()} == theirs


def test_what_is_called_the_same_is_an_option_here_and_nothing_else_is():
    assert {name for name, entry in NAMES.items() if entry.how == "same"} == FIELDS & set(NAMES)


@pytest.mark.parametrize("name", [name for name, entry in GRPO.items() if entry.how in ("ignored", "refused")])
def test_no_option_is_dropped_in_silence(name):
    default = GRPO[name].default
    assert not said(**{name: default}), "its default asks for nothing"
    odd = {bool: not default, int: 7, float: 0.123, list: ["x"]}.get(type(default), "odd")
    if not GRPO[name].asks(odd):
        return
    if GRPO[name].how == "refused":
        with pytest.raises(ValueError, match=name):
            PPOConfig(**{name: odd})
    else:
        assert f"{name}={odd!r}" in said(**{name: odd})


def test_the_documentation_has_the_table_as_it_is():
    page = (ROOT / "docs" / "from_trl.md").read_text(encoding="utf-8")
    assert tables().strip() in page, "print it anew: python -m mmft.training.trl_names"


# ---- the translation


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        # 8 completions a device x 4 = 32 responses, in groups of 8
        (
            {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
            {"prompts_per_step": 4, "micro_prompts": 1, "num_mini_batches": 1},
        ),
        ({"per_device_train_batch_size": 16, "num_generations": 4}, {"prompts_per_step": 4, "micro_prompts": 4}),
        # one generation batch of 64 for 4 optimizer steps of 16; 40 optimizer steps are 10 of ours
        (
            {"per_device_train_batch_size": 16, "steps_per_generation": 4, "max_steps": 40},
            {"prompts_per_step": 8, "num_mini_batches": 4, "max_steps": 10},
        ),
        (
            {"num_iterations": 2, "max_steps": 30, "eval_steps": 5},
            {"num_ppo_epochs": 2, "max_steps": 15, "eval_steps": 3},
        ),
        ({"beta": 0.04}, {"kl_coef": 0.04}),
        ({"beta": 0.0}, {"kl_coef": 0.0}),
        ({"epsilon": 0.1}, {"cliprange": 0.1}),
        ({"epsilon_high": 0.28}, {"cliprange": (0.2, 0.28)}),
        ({"scale_rewards": False}, {"whiten_advantages": False}),
        ({"optim": "adamw_bnb_8bit"}, {"optimizer": "adamw_8bit"}),
        ({"save_strategy": "epoch", "num_train_epochs": 4}, {"save_steps": 0.25, "num_train_epochs": 4}),
        ({"save_strategy": "no", "save_steps": 100}, {"save_steps": 0}),
        ({"eval_strategy": "steps", "logging_steps": 7}, {"eval_steps": 7}),
        ({"evaluation_strategy": "no"}, {"eval_steps": 0}),
        ({"max_steps": -1}, {"num_train_epochs": 3.0}),
        ({"max_steps": 5, "num_train_epochs": 2}, {"max_steps": 5, "num_train_epochs": None}),
        ({"report_to": "none"}, {"report_to": ()}),
        ({"report_to": "wandb"}, {"report_to": ("wandb",)}),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"use_vllm": True}, {"engine": "vllm", "vllm": {"url": None, "memory": 0.3}}),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_server_port": 9000},
            {"vllm": {"url": "http://127.0.0.1:9000", "timeout": 240.0}},
        ),
        # an old PPO script: 64 episodes a batch
        (
            {"total_episodes": 640, "per_device_train_batch_size": 64, "num_generations": 1, "response_length": 53},
            {"prompts_per_step": 64, "max_steps": 10, "max_completion_length": 53},
        ),
    ],
)
def test_an_option_means_here_what_it_means_there(theirs, ours):
    config = quiet(**theirs)
    assert {name: getattr(config, name) for name in ours} == ours


def test_a_launch_of_several_processes_shares_the_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert quiet(per_device_train_batch_size=8).prompts_per_step == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rat": 1.0}, "no option 'learning_rat'; did you mean 'learning_rate'"),
        ({"per_device_train_batch_size": 3}, "3 responses of a step do not make whole groups of num_generations=8"),
        ({"beta": 0.1, "kl_coef": 0.2}, "beta=0.1 says kl_coef=0.1, and kl_coef=0.2 is given"),
        ({"loss_type": "sapo"}, "loss_type='sapo' cannot be had here"),
        ({"optim": "lion_8bit"}, "expected optimizer = adamw, adamw_8bit, sgd"),
        ({"save_strategy": "epoch", "max_steps": 9}, "needs num_train_epochs without max_steps"),
        ({"load_best_model_at_end": True}, "set `patience` and `eval_steps`"),
        ({"lr_scheduler_type": "polynomial"}, "expected one of constant, linear, cosine"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_to_say_instead(options, words):
    with pytest.raises(ValueError) as error:
        quiet(**options)
    assert words in str(error.value)


def test_the_warning_names_what_is_taken_lost_and_left_to_other_defaults():
    text = said(beta=0.04, top_p=0.9, learning_rate=1e-5)
    assert "beta=0.04 -> kl_coef=0.04" in text
    assert "top_p=0.9: ignored, responses are drawn from the whole distribution" in text
    assert "max_completion_length=24 (GRPOConfig: 512)" in text and "learning_rate" not in text
    assert said(learning_rate=1e-5, report_to="none") == "", "a config in our own names has nothing to be told"


def test_a_script_reads_its_options_back_and_cannot_set_one_in_vain():
    config = quiet(push_to_hub=True, logging_steps=5, beta=0.04)
    assert config.push_to_hub and config.logging_steps == 5 and config.hub_model_id is None
    config.model_init_kwargs = {"dtype": torch.bfloat16}
    assert loading(config) == {"dtype": "bfloat16"}
    assert loading(config, SimpleNamespace(load_in_8bit=True))["quantize"] == "int8"
    for name in ("top_k", "learning_rat"):
        with pytest.raises(AttributeError, match=name):
            setattr(config, name, 1)
    with pytest.raises(AttributeError, match=r"no 'epsilon'; here it is `cliprange`"):
        config.epsilon  # noqa: B018
    with pytest.raises(ValueError, match="revision"):
        loading(quiet(model_init_kwargs={"revision": "abc"}))


def test_passes_and_shares_become_steps_once_the_rows_are_known():
    config = settled(PPOConfig(num_train_epochs=2, prompts_per_step=4, warmup_steps=0.25, save_steps=0.5), rows=17)
    assert (config.max_steps, config.warmup_steps, config.save_steps) == (8, 2, 4)  # 17 rows make 4 whole batches
    plain = PPOConfig()
    assert settled(plain, rows=17) is plain
    with pytest.raises(ValueError, match="save_steps=2.5"):
        settled(PPOConfig(save_steps=2.5), 17)


def test_a_config_object_of_trl_says_everything():
    from trl import GRPOConfig

    theirs = GRPOConfig(output_dir="x", use_cpu=True, bf16=False, num_generations=4, top_k=5, save_strategy="no")
    with pytest.warns(UserWarning, match="top_k=5: ignored") as caught:
        config = config_of(theirs, PPOConfig)
    assert "other defaults" not in str(caught[0].message)
    assert (config.learning_rate, config.max_completion_length, config.kl_coef) == (1e-6, 512, 0.0)
    assert (config.prompts_per_step, config.num_generations, config.num_train_epochs) == (2, 4, 3.0)
    assert (config.seed, config.save_steps, config.report_to) == (42, 0, ())
    assert quiet(A2CConfig, beta=0.1).num_ppo_epochs == 1


def test_the_trainer_takes_the_object(tiny_model, tmp_path):
    from trl import GRPOConfig

    sizes = {"max_steps": 3, "num_generations": 2, "per_device_train_batch_size": 4}
    theirs = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **sizes)
    rows = [{"prompt": "say", "image": Image.new("RGB", (32, 32))}] * 4
    with pytest.warns(UserWarning, match="prompts_per_step=2"):
        trainer = PPOTrainer(str(tiny_model("llava")), lambda completions, **_: [0.0] * len(completions), theirs, rows)
    assert type(trainer.args) is PPOConfig and trainer.args.learning_rate == 1e-6
    assert trainer.processing_class is trainer.policy.processor
    with pytest.raises(ValueError, match="eval_dataset is dict"):
        PPOTrainer("scenes-vlm", print, PPOConfig(), rows, {"test": rows})
    with pytest.raises(ValueError, match="reward_funcs is missing"):
        PPOTrainer("scenes-vlm", train_dataset=rows)


def test_arguments_of_other_trainers_are_refused_by_name():
    require_known({"reward_processing_classes": None, "optimizers": (None, None), "tools": []}, "PPOTrainer")
    with pytest.raises(ValueError, match="value_model cannot be had here: the critic is a value head"):
        require_known({"value_model": object()}, "PPOTrainer")
    with pytest.raises(TypeError, match="no argument 'toolz'; did you mean 'tools'"):
        require_known({"toolz": None}, "PPOTrainer")


# ---- scripts


def moved(text: str) -> str:
    """The script after what docs/from_trl.md tells its owner to change."""
    text = text.replace("from trl import GRPOConfig, GRPOTrainer", "from mmft import PPOConfig, PPOTrainer")
    return text.replace("GRPOConfig", "PPOConfig").replace("GRPOTrainer", "PPOTrainer")


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """(names of the finished script, its output folder)"""
    folder = tmp_path_factory.mktemp("moved")
    script, output = folder / "ppo_vlm.py", folder / "out"
    script.write_text(moved(SCRIPT.read_text(encoding="utf-8")))
    before, sys.argv = sys.argv, [str(script), str(tiny_model("llava")), str(output)]
    try:
        with pytest.warns(UserWarning, match=r"prompts_per_step=2"):
            return SimpleNamespace(**runpy.run_path(str(script), run_name="__main__")), output
    finally:
        sys.argv = before


def test_a_grpo_script_runs_after_a_change_of_names(finished):
    names, output = finished
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    # 12 rows, 2 prompts a step: as many steps as TRL makes of it (see the test below)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"reward/colour_reward", "reward/brevity_reward", "eval/reward"} <= set(lines[2])
    # (N, 1 + 0.5): the weights of the two rewards
    first = lines[0]
    assert first["reward"] == pytest.approx(first["reward/colour_reward"] + 0.5 * first["reward/brevity_reward"])
    assert [path.name for path in sorted((output / "checkpoints").iterdir())] == ["step-000003", "step-000006"]
    assert names.trainer.policy.model.peft_config["default"].target_modules == {"q_proj", "v_proj"}


def test_the_page_of_ppo_names_every_metric_of_a_step(finished):
    page = (ROOT / "docs" / "algorithms" / "ppo.md").read_text(encoding="utf-8")
    lines = (finished[1] / "metrics.jsonl").read_text().splitlines()
    families = ("reward", "share", "eval", "time")
    logged = {name for line in lines for name in json.loads(line)} - {"step"}
    wanted = {f"{name.partition('/')[0]}/NAME" if name.startswith(tuple(f"{f}/" for f in families)) else name
              for name in logged}  # fmt: skip
    assert not [name for name in wanted if f"`{name}`" not in page]


def test_what_the_script_saved_is_plain_peft_with_its_processor(finished):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    names, output = finished
    AutoProcessor.from_pretrained(output)
    base = AutoModelForImageTextToText.from_pretrained(names.model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, output).state_dict()
    trained = {n: p for n, p in names.trainer.model.named_parameters() if p.requires_grad}
    assert trained and all(torch.equal(loaded[name], value) for name, value in trained.items())


@pytest.fixture
def hub(monkeypatch):
    token = "hf_" + "A1" * 17
    with fake_hub(token) as found:
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": found.url}
        for name, value in (values | {"HUGGINGFACE_CO_URL_TEMPLATE": template}).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
        yield found


def test_push_to_hub_publishes_the_run(finished, hub, tmp_path, capsys):
    trainer, output = finished[0].trainer, finished[1]
    # This run's base model is a folder of this machine, and two bounds of the clip are in no recipe: no card.
    trainer.push_to_hub(dataset_name="colours")
    assert "without a model card" in capsys.readouterr().err
    made = hub.repositories["me/out"]
    assert made.private
    assert {"adapter_model.safetensors", "value_head.safetensors", "tokenizer.json"} <= set(made.files)
    assert made.files["adapter_model.safetensors"] == (output / "adapter" / "adapter_model.safetensors").read_bytes()
    trainer.push_to_hub("A message", repository="me/other", private=False)
    assert not hub.repositories["me/other"].private


def test_push_to_hub_of_a_bundled_model_comes_with_its_card(hub, tmp_path):
    rows = [{"prompt": "say", "image": Image.new("RGB", (32, 32), (i, 0, 0))} for i in range(2)]
    sizes = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 3, "max_steps": 1}
    args = quiet(output_dir=str(tmp_path / "run"), report_to=(), hub_model_id="me/carded", **sizes)
    trainer = PPOTrainer("scenes-vlm", length, args, rows, rows, peft_config=LoraConfig(r=2))
    trainer.train()
    assert trainer.push_to_hub()
    assert {"README.md", "adapter_model.safetensors", "recipe.yaml"} <= set(hub.repositories["me/carded"].files)


def test_callbacks_hear_of_every_step_and_may_end_the_run(tiny_model, tmp_path):
    heard = []

    class Listener(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            heard.append(("begin", args.learning_rate, model is not None))

        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append(("log", state.global_step, "reward" in logs))

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

        def on_save(self, args, state, control, **kwargs):
            heard.append(("save", state.global_step))

        def on_train_end(self, args, state, control, **kwargs):
            heard.append(("end", state.global_step))

    steps = []

    def reward(completions, trainer_state, **columns):
        steps.append(trainer_state.global_step)
        return length(completions)

    rows = [{"prompt": "say", "image": Image.new("RGB", (32, 32), (i, 0, 0))} for i in range(4)]
    sizes = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 3, "max_steps": 5}
    args = PPOConfig(str(tmp_path), critic="none", report_to=(), **sizes)
    PPOTrainer(str(tiny_model("llava")), [reward], args, rows, callbacks=[Listener]).train()
    assert heard == [
        ("begin", args.learning_rate, True),
        ("log", 1, True),
        ("log", 2, True),
        ("save", 2),
        ("end", 2),
    ]
    assert steps == [0, 1]


def test_a_reward_keeps_name_credit_and_signature_when_it_is_told_the_state():
    class Judge:
        def __call__(self, completions, trainer_state, log_metric, **columns):
            log_metric("n", 1.0)
            return [float(trainer_state.global_step)]

        def increments(self, pieces, **columns):
            return pieces

    state = TrainerState()
    alone, (listed, plain) = with_state(Judge(), state), with_state([Judge(), length], state)
    signature = as_rewards([listed], None).signature
    state.global_step = 3
    with pytest.warns(UserWarning, match="log_metric and log_extra log nothing here"):
        assert alone(completions=["x"]) == listed(completions=["x"]) == [3.0]
    assert plain is length and listed.increments("p") == "p"
    # A resumed run compares the signature: a state in it, of as many steps as there are now, would be refused.
    rewards = as_rewards([listed], None)
    assert rewards.signature == signature and "TrainerState" not in signature and rewards.names == ["Judge"]


@pytest.mark.slow
def test_the_same_script_runs_with_trl_itself_in_as_many_steps(tiny_model, tmp_path):
    command = [sys.executable, str(SCRIPT), str(tiny_model("llava")), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["max_steps"] == state["global_step"] == 6
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
