"""The typed recipe: one frozen object that says everything about a run.

Each section is a pydantic model; the comments beside the fields are what the reference page says of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, model_validator
from ruamel.yaml import YAML

from mmft.recipe.combinations import impossible
from mmft.recipe.rewards import Guards, Reward
from mmft.recipe.secrets import redacted
from mmft.recipe.strict_yaml import Section, dotted


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021), by PEFT."""

    r: int = Field(16, ge=1)  # rank
    alpha: int = Field(32, ge=1)  # the update is scaled by alpha / r
    dropout: float = Field(0.0, ge=0, lt=1)
    target: str = Field("language", min_length=1)  # which layers; see mmft/vlm/families.py
    dora: bool = False  # weight-decomposed adapters (Liu et al. 2024)
    rslora: bool = False  # scaled by alpha / sqrt(r) (Kalajdzievski 2023)


class PictureCache(Section):
    """Features of pictures kept across steps while the tower is frozen."""

    memory_mib: int = Field(1024, ge=0)  # 0 keeps none
    folder: str | None = Field(None, min_length=1)  # also on disk, for later runs; null = in memory alone
    disk_mib: int = Field(10240, ge=1)  # the oldest go first


class Model(Section):
    """The policy: which model, what of it learns, and whether a critic stands beside it."""

    name: str = Field("scenes-vlm", min_length=1)  # bundled name, hub id or folder
    quantize: Literal["nf4", "int8"] | None = None
    tune: Literal["lora", "full", "frozen", "hybrid"] = "lora"
    lora: Lora = Lora()
    trained_layers: int = Field(2, ge=1)  # with tune frozen: the decoder's last so many layers, and its last norm
    trust_remote_code: bool = False  # run Python code that comes with the model
    critic: Literal["head", "none"] = "head"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False  # the decoder's layers by torch.compile; the first steps then take minutes
    picture_cache: PictureCache = PictureCache()


class Video(Section):
    """How a clip reaches the model."""

    frames: int = Field(8, ge=1)  # taken evenly in time from each clip
    native: bool = False  # by the processor's own video input (needs torchvision); else as that many pictures
    max_side: int = Field(768, ge=16)  # pixels; longer frames are made smaller


class Audio(Section):
    """How a sound reaches the model."""

    sampling_rate: int = Field(16_000, ge=1)  # Hz, of the model's feature extractor
    max_seconds: float = Field(30.0, gt=0)  # longer sounds are refused


class Data(Section):
    """Where rows come from; split names belong to the data set."""

    name: str = Field("scenes", min_length=1)  # bundled name, a card (YAML) or a folder
    train: str = Field("train", min_length=1)
    eval: str = Field("test", min_length=1)
    train_rows: int | None = Field(None, ge=1)  # the first so many rows only
    prompt: str | None = Field(None, min_length=1)  # replaces the prompt of every row
    bad_rows: Literal["error", "skip"] = "error"  # files that cannot be used: stop, or leave their rows out
    video: Video = Video()
    audio: Audio = Audio()


class Algorithm(Section):
    """Option names follow TRL's PPOConfig."""

    name: Literal["ppo", "a2c"] = "ppo"
    num_ppo_epochs: int = Field(2, ge=1)
    num_mini_batches: int = Field(1, ge=1)
    kl_coef: float = Field(0.02, ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: float | None = Field(None, gt=0)  # nats per response; null = kl_coef stays fixed
    kl_horizon: int = Field(10_000, ge=1)  # responses over which the adaptive coefficient reacts
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    cliprange: float = Field(0.2, gt=0)
    vf_coef: float = Field(0.1, ge=0)
    cliprange_value: float | None = Field(0.2, gt=0)  # null = values are not clipped
    critic_start: Literal["fit", "zero"] = "fit"  # the value head: fitted to the first step's returns, or zero
    entropy_coef: float = Field(0.0, ge=0)
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = Field(None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _one_epoch_of_a2c(cls, data: Any) -> Any:
        # A2C takes one step on fresh samples, so the PPO default of two epochs would never be what is meant.
        if isinstance(data, dict) and data.get("name") == "a2c":
            return {"num_ppo_epochs": 1, **data}
        return data


class Vllm(Section):
    """vLLM: a server started as docs/generation.md says, or in this process."""

    url: str | None = Field(
        "http://127.0.0.1:8000", pattern=r"^https?://", description="an http(s) address or null"
    )  # null = in this process
    memory: float = Field(0.3, gt=0, lt=1)  # with url null: share of the GPU that it takes
    timeout: float = Field(240.0, gt=0)  # seconds
    tolerance: float = Field(0.1, gt=0)  # nats a token between its log-probs and the policy's own, mean of a prompt


class Rollout(Section):
    """How much is sampled per step: prompts_per_step x num_generations responses, over all processes."""

    prompts_per_step: int = Field(32, ge=1)
    num_generations: int = Field(8, ge=1)
    max_completion_length: int = Field(24, ge=1)  # tokens, end token included
    temperature: float = Field(1.0, gt=0)
    engine: Literal["native", "hf", "vllm"] = "native"  # the shared prefix, model.generate, or vLLM
    vllm: Vllm = Vllm()


class Train(Section):
    """The optimiser and its schedule."""

    steps: int = Field(60, ge=1)
    learning_rate: float = Field(5.0e-4, gt=0)
    value_learning_rate: float | None = Field(None, gt=0)  # null = learning_rate
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    optimizer: Literal["adamw", "adamw_8bit", "sgd"] = "adamw"
    save_every: int = Field(20, ge=0)  # steps; 0 = only at the end
    keep_last: int = Field(2, ge=1)  # checkpoints; the one of the best evaluation is kept beside them
    skip_spikes: float | None = Field(None, gt=1)  # a loss this many times its usual size is not learned from
    timeout: float | None = Field(1800.0, gt=0)  # seconds one phase of a step may take; null = for ever
    micro_prompts: int | None = Field(None, ge=1)  # prompts per forward pass; null = the whole minibatch
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more work


class WarmStart(Section):
    """Supervised training on the references before reinforcement learning begins."""

    epochs: float = Field(1.0, gt=0)
    learning_rate: float = Field(1.0e-3, gt=0)
    batch_size: int = Field(32, ge=1)  # (picture, caption) pairs per step
    tune: Literal["full", "lora"] = "full"
    max_steps: int | None = Field(None, ge=1)  # stop early; null = all epochs
    save_every: int = Field(200, ge=0)  # steps between checkpoints of the warm start; 0 = none


class Eval(Section):
    """Held-out evaluation, on the split ``data.eval``."""

    every: int = Field(20, ge=0)  # steps; 0 = only before and after
    patience: int | None = Field(None, ge=1)  # evaluations without a new best before the run ends with the best state
    rows: int = Field(512, ge=1)


class Output(Section):
    """Where results go."""

    dir: str = Field("runs/caption_ppo", min_length=1)
    push_to_hub: str | None = Field(
        None, pattern=r"^[\w.-]+/[\w.-]+$", description="user/name of a repository on the Hub, or null"
    )
    private: bool = True  # the repository that is pushed to, if it is made
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow", "ledger"]] = [
        "tensorboard"
    ]  # beside metrics.jsonl


class Recipe(Section):
    """Everything about a run. Immutable; ``dump`` writes it with every default filled in."""

    seed: int = Field(0, ge=0, lt=2**32)
    model: Model = Model()
    data: Data = Data()
    rewards: list[Reward] = Field([Reward(name="cider_d"), Reward(name="bleu", weight=0.0)], min_length=1)
    algorithm: Algorithm = Algorithm()
    rollout: Rollout = Rollout()
    train: Train = Train()
    warm_start: WarmStart | None = None
    eval: Eval = Eval()
    guards: Guards = Guards()
    output: Output = Output()

    @model_validator(mode="after")
    def _possible(self, info: ValidationInfo) -> Recipe:
        if not info.context:  # load_recipe reports combinations itself, with their lines
            problems = [f"{dotted(key)}: {text}" for key, _, text in impossible(self)]
            if problems:
                raise ValueError("; ".join(problems))
        return self

    def dump(self, path: str | Path) -> None:
        """Write the resolved recipe as YAML, without secrets; ``load_recipe`` of that file gives an equal recipe."""
        yaml = YAML()
        yaml.default_flow_style = False
        with Path(path).open("w", encoding="utf-8") as stream:
            yaml.dump(redacted(self.model_dump()), stream)
