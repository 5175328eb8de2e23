"""The typed recipe: one frozen object that says everything about a run.

Each section is a pydantic model. A key's description is the one place where its meaning is written: the reference page
(docs/recipe_keys.md) and the JSON Schema, which editors show, are made from it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmft.recipe.combinations import impossible
from mmft.recipe.messages import Expected
from mmft.recipe.rewards import Guards, Reward
from mmft.recipe.root import Impossible, Root
from mmft.recipe.strict_yaml import Section


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021), by PEFT."""

    r: int = Field(16, ge=1, description="rank of the adapters; more = more to learn with, more memory")
    alpha: int = Field(32, ge=1, description="adapters are scaled by alpha / r")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of adapter inputs dropped; 0 keeps the first ratio at exactly 1"
    )
    target: str = Field(
        "language", min_length=1, description="which layers: language, all, or a regular expression of module names"
    )
    dora: bool = Field(False, description="weight-decomposed adapters (Liu et al. 2024); slower")
    rslora: bool = Field(False, description="adapters are scaled by alpha / sqrt(r) (Kalajdzievski 2023)")


class PictureCache(Section):
    """Features of pictures kept across steps while the vision tower is frozen."""

    memory_mib: int = Field(1024, ge=0, description="MiB in memory; 0 = none")
    folder: str | None = Field(
        None, min_length=1, description="keep them on disk too, for later runs; null = in memory alone"
    )
    disk_mib: int = Field(10240, ge=1, description="MiB on disk at most; the oldest go first")


class Model(Section):
    """The policy: which model, what of it learns, and whether a critic stands beside it."""

    name: str = Field(
        "scenes-vlm", min_length=1, description="bundled model, or a hub id or folder of an image-text-to-text model"
    )
    adapter: str | None = Field(
        None,
        min_length=1,
        description="go on from this LoRA adapter: a run folder, an adapter's folder or user/name on the Hub. `name` "
        "is its base model, `lora` must be as it was trained; null = a new one",
    )
    quantize: Literal["nf4", "int8"] | None = Field(
        None, description="frozen weights in 4 or 8 bits (needs a GPU and the extra `quant`); null = as they are"
    )
    tune: Literal["lora", "full", "frozen", "hybrid"] = Field(
        "lora",
        description="what learns: adapters; every weight; the last layers; or adapters and the connector in full",
    )
    lora: Lora = Field(Lora(), description="the adapters; read with tune lora and hybrid")
    trained_layers: int = Field(
        2, ge=1, description="with tune frozen: the decoder's last so many layers, and its last norm"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model; read it first")
    critic: Literal["head", "none"] = Field(
        "head", description="a value head on the last hidden states; none: leave-one-out baseline"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the weights; auto: float32 on a CPU, the checkpoint's own on a GPU"
    )
    compile: bool = Field(False, description="the decoder's layers by torch.compile; the first steps then take minutes")
    picture_cache: PictureCache = Field(PictureCache(), description="features of pictures kept across steps")


class Video(Section):
    """How a clip reaches the model."""

    frames: int = Field(8, ge=1, description="taken evenly in time from each clip")
    native: bool = Field(
        False, description="by the processor's own video input (needs torchvision); false: as so many pictures"
    )
    max_side: int = Field(768, ge=16, description="pixels; longer frames are made smaller")


class Audio(Section):
    """How a sound reaches the model."""

    sampling_rate: int = Field(16_000, ge=1, description="Hz, of the model's feature extractor")
    max_seconds: float = Field(30.0, gt=0, description="longer sounds are refused")


class Data(Section):
    """Where rows come from; split names belong to the data set."""

    name: str = Field("scenes", min_length=1, description="bundled name, a card (YAML) or a folder; see data/README.md")
    train: str = Field("train", min_length=1, description="split that is trained on")
    eval: str = Field("test", min_length=1, description="held-out split")
    train_rows: int | None = Field(None, ge=1, description="the first so many training rows only; null = all")
    prompt: str | None = Field(
        None, min_length=1, description="ask this about every picture; null = the data set's own prompt"
    )
    bad_rows: Literal["error", "skip"] = Field(
        "error", description="files that cannot be used: stop, or leave their rows out and count them"
    )
    video: Video = Field(Video(), description="for data sets of clips")
    audio: Audio = Field(Audio(), description="for data sets of sounds")


class Algorithm(Section):
    """How the policy learns from what it wrote. Names of keys follow TRL's PPOConfig."""

    name: Literal["ppo", "a2c"] = Field("ppo", description="clipped ratios and several passes, or one plain pass")
    num_ppo_epochs: int = Field(
        2,
        ge=1,
        description="passes over each step's samples; more = faster learning, more drift per step. "
        "With a2c 1, also by default",
    )
    num_mini_batches: int = Field(1, ge=1, description="optimizer steps per pass; must divide rollout.prompts_per_step")
    kl_coef: float = Field(
        0.02, ge=0, description="reward lost per nat of divergence from the reference model; 0 = no tether"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k1", description="estimator of the KL in the reward (Schulman 2020)"
    )
    kl_target: float | None = Field(
        None, gt=0, description="nats per response to steer kl_coef to; null = kl_coef stays fixed"
    )
    kl_horizon: int = Field(
        10_000, ge=1, description="responses over which kl_coef is steered; read only with kl_target"
    )
    gamma: float = Field(1.0, gt=0, le=1, description="discount per token; 1 = the score counts alike for every token")
    lam: float = Field(
        0.95, ge=0, le=1, description="GAE's lambda: 1 = no bias, more noise; 0 = trust the critic's next value"
    )
    cliprange: float = Field(
        0.2, gt=0, description="policy ratios beyond 1 +- this earn nothing more; read by ppo only"
    )
    vf_coef: float = Field(0.1, ge=0, description="weight of the critic's loss")
    cliprange_value: float | None = Field(
        0.2,
        gt=0,
        description="the critic's steps are clipped to +- this, in units of reward; null = not clipped, "
        "the default with a2c",
    )
    critic_start: Literal["fit", "zero"] = Field(
        "fit", description="the value head: fitted to the first step's returns by least squares, or zero"
    )
    entropy_coef: float = Field(
        0.0, ge=0, description="bonus per nat of entropy; raise it where samples become all alike"
    )
    whiten_rewards: bool = Field(False, description="scale token rewards to unit variance first")
    whiten_advantages: bool = Field(True, description="scale advantages to mean 0, variance 1 over the step")
    missing_eos_penalty: float | None = Field(
        None, ge=0, description="taken from the score of a response without an end; null = nothing"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_a2c(cls, data: Any) -> Any:
        # A2C takes one step on fresh samples, so the PPO default of two epochs would never be what is meant, and there
        # is no earlier pass that a clip could keep the critic near.
        if isinstance(data, dict) and data.get("name") == "a2c":
            return {"num_ppo_epochs": 1, "cliprange_value": None, **data}
        return data


class Vllm(Section):
    """vLLM: a server started as docs/generation.md says, or in this process."""

    url: Annotated[str | None, Expected("an http(s) address or null")] = Field(
        "http://127.0.0.1:8000", pattern=r"^https?://", description="of the server; null = in this process"
    )
    memory: float = Field(0.3, gt=0, lt=1, description="with url null: share of the GPU that it takes")
    timeout: float = Field(240.0, gt=0, description="seconds")
    tolerance: float = Field(
        0.1, gt=0, description="nats a token between its log-probs and the policy's own, mean of a prompt"
    )


class Rollout(Section):
    """How much is sampled per step: prompts_per_step x num_generations responses, over all processes."""

    prompts_per_step: int = Field(32, ge=1, description="pictures per step, over all processes")
    num_generations: int = Field(8, ge=1, description="responses per picture; 2 or more without a critic")
    max_completion_length: int = Field(24, ge=1, description="tokens, end token included")
    temperature: float = Field(1.0, gt=0, description="of sampling; below 1 = more cautious samples")
    engine: Literal["native", "hf", "vllm"] = Field(
        "native", description="who writes: the shared prefix, model.generate, or vLLM (docs/generation.md)"
    )
    vllm: Vllm = Field(Vllm(), description="read only with engine vllm")


class Train(Section):
    """The optimiser and its schedule."""

    steps: int = Field(60, ge=1, description="rollouts with their updates")
    learning_rate: float = Field(5.0e-4, gt=0, description="of the adapters, or of whatever learns")
    value_learning_rate: float | None = Field(
        None, gt=0, description="of the value head, which starts at zero and has far to go; null = learning_rate"
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="of both rates; the last two fall to 0"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the rates rise from 0")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients longer than this are shortened")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    optimizer: Literal["adamw", "adamw_8bit", "sgd"] = Field(
        "adamw", description="adamw_8bit needs a quarter of AdamW's memory (extra `quant`)"
    )
    save_every: int = Field(20, ge=0, description="steps between checkpoints; 0 = only at the end")
    keep_last: int = Field(
        2, ge=1, description="checkpoints that stay; the one of the best evaluation is kept beside them"
    )
    skip_spikes: float | None = Field(
        None, gt=1, description="a gradient this many times its usual length is not learned from; null = it is"
    )
    timeout: float | None = Field(
        1800.0, gt=0, description="seconds one phase of a step may take before the run is ended; null = for ever"
    )
    micro_prompts: int | None = Field(
        None,
        ge=1,
        description="prompts per forward pass in the update: smaller = less memory, same result; "
        "null = the whole minibatch",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations: less memory, about a third more work"
    )


class WarmStart(Section):
    """Supervised training on the references before reinforcement learning begins, by TRL's SFTTrainer."""

    epochs: float = Field(1.0, gt=0, description="passes over every (picture, caption) pair")
    learning_rate: float = Field(1.0e-3, gt=0, description="AdamW's")
    batch_size: int = Field(32, ge=1, description="(picture, caption) pairs per step")
    tune: Literal["full", "lora"] = Field("full", description="every weight, or adapters only (merged at the end)")
    max_steps: int | None = Field(None, ge=1, description="stop early; null = all epochs")
    save_every: int = Field(200, ge=0, description="steps between checkpoints of the warm start; 0 = none")


class Eval(Section):
    """Held-out evaluation, on the split ``data.eval``."""

    every: int = Field(20, ge=0, description="steps between held-out evaluations; 0 = only before and after")
    patience: int | None = Field(
        None,
        ge=1,
        description="evaluations without a new best before the run ends with the best state; null = never",
    )
    rows: int = Field(512, ge=1, description="the first so many rows of data.eval")
    rewards: bool = Field(
        True,
        description="the rewards score held-out captions, too, for the report; false saves time with a judge or http",
    )


class Output(Section):
    """Where results go."""

    dir: str = Field(
        "runs/caption_ppo", min_length=1, description="run folder: metrics, samples, report, checkpoints, adapter"
    )
    push_to_hub: Annotated[str | None, Expected("user/name of a repository on the Hub, or null")] = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="user/name: publish adapter, model card and all at the end; null = not (`mmft push` does it later)",
    )
    private: bool = Field(True, description="the repository, if it has to be made")
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow", "ledger"]] = Field(
        ["tensorboard"], description="live logs; [] = metrics.jsonl only. ledger = ledger.jsonl, a line per response"
    )


class Recipe(Root):
    """Everything about a run that trains a policy by reinforcement learning."""

    launched_by = "accelerate launch recipes/caption_ppo.py"

    model: Model = Field(Model(), description="the policy")
    data: Data = Field(Data(), description="where rows come from")
    rewards: list[Reward] = Field(
        [Reward(name="cider_d"), Reward(name="bleu", weight=0.0)],
        min_length=1,
        description="the reward is the sum of weight x score",
    )
    algorithm: Algorithm = Field(Algorithm(), description="how the policy learns")
    rollout: Rollout = Field(Rollout(), description="what is sampled in a step")
    train: Train = Field(Train(), description="the optimiser")
    warm_start: WarmStart | None = Field(None, description="supervised training first; null = none")
    eval: Eval = Field(Eval(), description="held-out evaluation")
    guards: Guards = Field(Guards(), description="live monitors against a reward that is cheated (docs/guards.md)")
    output: Output = Field(Output(), description="where results go")

    def impossible(self) -> list[Impossible]:
        return impossible(self)
