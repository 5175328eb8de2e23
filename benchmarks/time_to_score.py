"""Wall-clock time to a held-out CIDEr-D on the built-in world: mmft's recipe against TRL's GRPO tuned for it.

    python benchmarks/time_to_score.py [--seeds 0,1,2] [--steps 20] [--trl-steps 40] [--rates 5e-4,1e-3,2e-3,4e-3]
                                       [--trl batch=16] [--level 3.9] [--rows 256] [--json FILE] [--plot FILE]

mmft: `recipes/caption_ppo.yaml` with its critic, and with the leave-one-out baseline. TRL: the same bundled model,
pictures in the same order, rewards (CIDEr-D with the same document frequencies), LoRA, prompts and responses per
step, length, temperature and KL coefficient. All rates are constant: one that falls would favour whoever is early.

Held-out greedy captions of the same validation scenes are scored by the same code before the first step and after
every one; the clock stands still meanwhile (and while models load). The level is 95 % of what the recipe with critic
gains in ``--steps`` (mean of its last three evaluations; by seed), or ``--level``; seconds are read off the straight
line between two evaluations. The others stop there. TRL is tuned on the first seed: every rate with one pass over the
samples, then the fastest rate with two (mmft's own number); the fastest of all runs on the other seeds. A trial ends
early only once it has had the steps in which another one was there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks._trl import Setting  # noqa: E402
from benchmarks._turns import Process, Turn, serve  # noqa: E402

SHARES = (0.9, 0.95)  # of mmft's gain; the last is the one that the target is about
TARGET = 1 / 5  # of TRL's seconds


# --- one run, in a process of its own ----------------------------------------------------------------


def recipe_of(order: dict[str, Any], scratch: str):
    """The recipe of a run; ``order`` holds the command line's options, and seed and system."""
    from mmft.recipe import load_recipe

    options = [f"seed={order['seed']}", f"train.steps={order['steps']}", "train.lr_schedule=constant"]
    options += ["data.eval=validation", f"eval.rows={order['rows']}", "output.trackers=[]", f"output.dir={scratch}"]
    options += ["model.critic=none"] if order["system"] == "loo" else []
    return load_recipe(ROOT / "recipes" / "caption_ppo.yaml", options + order["options"])


def ours(order: dict[str, Any], scratch: str, turn: Turn) -> dict[str, Any]:
    """A run of the recipe; ``turn`` gets {"seconds", "cider_d"} before the first step and after each."""
    from mmft.training.run import assemble

    trainer = assemble(recipe_of(order, scratch))
    seconds, step = 0.0, 0

    def evaluated() -> dict[str, float]:
        return {"seconds": seconds, "cider_d": trainer.evaluate().means()["cider_d"]}

    while turn(evaluated()) and step < order["steps"]:
        step += 1
        began = time.perf_counter()
        trainer.step(step)
        seconds += time.perf_counter() - began
    return {}


def theirs(order: dict[str, Any], scratch: str, turn: Turn) -> dict[str, Any]:
    """A run of TRL's `GRPOTrainer`; ``turn`` as of `ours`."""
    from accelerate.utils import set_seed
    from datasets import Dataset

    from benchmarks import _trl
    from mmft.training.run import rewards_of, rows_of
    from mmft.vlm.families import never_sampled
    from mmft.vlm.load import load_model, lora_config
    from reward_models import DocumentFrequencies

    recipe = recipe_of(order, scratch)
    set_seed(recipe.seed)
    train = rows_of(recipe, recipe.data.train, recipe.data.train_rows)
    frequencies = DocumentFrequencies.from_references(train.references())
    rewards = rewards_of(recipe, frequencies)
    model, processor = load_model(recipe.model.name, dtype="float32")
    lora, ends = recipe.model.lora, {processor.tokenizer.eos_token_id}

    def score(completions, completion_ids, references, **columns) -> list[float]:
        ended = [ids[-1] in ends for ids in completion_ids]
        return rewards(completions=completions, references=references, ended=ended).total.tolist()

    trainer = _trl.build(
        "grpo",
        Setting.parse(order["trl"]),
        model,
        processor,
        lora_config(model, lora.r, lora.alpha, lora.dropout, lora.target),
        score,
        Dataset.from_list(rows_in_order(train, recipe)),
        scratch=scratch,
        steps=order["steps"] * order["passes"],
        prompts=recipe.rollout.prompts_per_step,
        group=recipe.rollout.num_generations,
        length=recipe.rollout.max_completion_length,
        banned=never_sampled(model, processor.tokenizer),
        seed=recipe.seed,
        temperature=recipe.rollout.temperature,
        beta=recipe.algorithm.kl_coef,
        learning_rate=order["rate"],
        num_iterations=order["passes"],
    )
    held_out = _held_out(recipe, frequencies, trainer.model)
    seconds, updates = 0.0, 0

    def after(measured: dict[str, Any]) -> bool:
        nonlocal seconds, updates
        if measured:
            seconds, updates = seconds + measured["seconds"], updates + 1
        if updates % order["passes"]:
            return True
        return turn({"seconds": seconds, "cider_d": held_out()})

    _trl.run(trainer, after)
    return {}


def rows_in_order(train, recipe) -> list[dict[str, Any]]:
    """The rows of all steps, in the order in which mmft's trainer takes them, as TRL wants them."""
    import numpy as np

    count = recipe.train.steps * recipe.rollout.prompts_per_step
    if count > len(train):
        raise ValueError(f"{count} rows for {recipe.train.steps} steps, but the training split has {len(train)}")
    order = np.random.default_rng([recipe.seed, 0]).permutation(len(train))[:count]
    rows = [train[int(i)] for i in order]
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "image": row["image"],
            "references": row["references"],
        }
        for row in rows
    ]


def _held_out(recipe, frequencies, model) -> Callable[[], float]:
    """Held-out CIDEr-D of TRL's model as it is by then: its adapters in a policy of mmft's, so that the same code
    evaluates both, and nothing of mmft's touches the model that TRL trains."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from mmft.training.evaluate import evaluate
    from mmft.training.run import caption_metrics, rows_of
    from mmft.vlm.load import build_policy, load_model

    copy, processor = load_model(recipe.model.name, dtype="float32")
    policy = build_policy(copy, processor, model.peft_config["default"], critic="none", needs_reference=False)
    rows = rows_of(recipe, recipe.data.eval)
    metrics = caption_metrics(frequencies, rows)

    def score() -> float:
        missing = set_peft_model_state_dict(policy.model, get_peft_model_state_dict(model)).unexpected_keys
        assert not missing, missing
        found = evaluate(policy, rows, metrics, recipe.eval.rows, recipe.rollout.max_completion_length)
        return found.means()["cider_d"]

    return score


def _worker(order: dict[str, Any], turn: Turn) -> dict[str, Any]:
    import torch

    torch.set_num_threads(order["threads"])
    with tempfile.TemporaryDirectory() as scratch:
        return (theirs if order["system"] == "grpo" else ours)(order, scratch, turn)


# --- the comparison ----------------------------------------------------------------------------------

Run = dict[str, Any]  # name, system, seed, its options, and by evaluation "seconds" and "cider_d"


def curve(name: str, order: dict[str, Any], level: float = math.inf) -> Run:
    """One run, up to ``order["steps"]`` or until the level is reached."""
    found: Run = {"name": name, **order, "seconds": [], "cider_d": []}
    with Process(__file__, order, order["threads"]) as process:
        said = process.read()
        while said:
            found["seconds"].append(said["seconds"])
            found["cider_d"].append(said["cider_d"])
            said = process.go(said["cider_d"] < level)
    print(
        f"  seed {order['seed']}  {name:28} {len(found['seconds']) - 1:3} steps, {found['seconds'][-1]:7.1f} s: "
        f"CIDEr-D {found['cider_d'][0]:.3f} -> {found['cider_d'][-1]:.3f}",
        flush=True,
    )
    return found


def reached(level: float, run: Run, axis: str = "seconds") -> float:
    """Seconds (or "steps") at which the curve first comes to the level, on straight lines; infinity if never."""
    scores, at = run["cider_d"], run["seconds"] if axis == "seconds" else range(len(run["seconds"]))
    for i, score in enumerate(scores):
        if score >= level:
            if i == 0:
                return 0.0
            return at[i - 1] + (at[i] - at[i - 1]) * (level - scores[i - 1]) / (score - scores[i - 1])
    return math.inf


def compare(options: dict[str, Any]) -> dict[str, Any]:
    """All runs of all seeds, and the levels by seed."""
    runs: list[Run] = []
    levels: dict[int, list[float]] = {}
    best: dict[str, Any] | None = None
    for seed in options["seeds"]:
        common = {key: options[key] for key in ("threads", "rows", "options", "steps")} | {"seed": seed}
        runs.append(curve("mmft PPO", common | {"system": "ppo"}))
        start, end = runs[-1]["cider_d"][0], sum(runs[-1]["cider_d"][-3:]) / 3
        levels[seed] = [start + share * (end - start) for share in SHARES]
        if options["level"] is not None:
            levels[seed] = [*levels[seed][:-1], options["level"]]
        top = max(levels[seed])
        runs.append(curve("mmft leave-one-out", common | {"system": "loo"}, top))
        common |= {"system": "grpo", "trl": options["trl"], "steps": options["trl_steps"]}
        if best is None:
            trials = _tuned(common, options["rates"], levels[seed][-1], top)
            runs += trials
            fastest = min(trials, key=lambda run: (reached(levels[seed][-1], run), -run["cider_d"][-1]))
            best = {"rate": fastest["rate"], "passes": fastest["passes"]}
        else:
            runs.append(curve(_name(best), common | best, top))
    return {"levels": levels, "best": best, "runs": runs}


def _name(chosen: dict[str, Any]) -> str:
    return f"TRL GRPO {chosen['rate']:g}" + (f", {chosen['passes']} passes" if chosen["passes"] > 1 else "")


def _tuned(common: dict[str, Any], rates: list[float], level: float, top: float) -> list[Run]:
    """Every rate with one pass, then the fastest of them with two."""
    trials: list[Run] = []

    def trial(rate: float, passes: int) -> None:
        steps = min(
            (math.ceil(reached(level, run, "steps")) for run in trials if reached(level, run) < math.inf), default=0
        )
        chosen = {"rate": rate, "passes": passes, "steps": steps + 1 if steps else common["steps"]}
        trials.append(curve(_name(chosen), common | chosen, top))

    for rate in rates:
        trial(rate, 1)
    trial(min(trials, key=lambda run: (reached(level, run), -run["cider_d"][-1]))["rate"], 2)
    return trials


# --- what is printed ---------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """Seconds and steps to the levels, by run; and the ratios to tuned TRL."""
    levels, lines = result["levels"], ["| | seed | level | seconds | steps | level | seconds | steps | CIDEr-D last |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for run in result["runs"]:
        cells = []
        for level in levels[run["seed"]]:
            cells += [f"{level:.3f}", f"{reached(level, run):.1f}", f"{reached(level, run, 'steps'):.1f}"]
        lines.append(f"| {run['name']} | {run['seed']} | {' | '.join(cells)} | {run['cider_d'][-1]:.3f} |")
    name = _name(result["best"])
    for system in ("mmft PPO", "mmft leave-one-out"):
        shares = ratios(result, system)
        each = ", ".join(f"{share:.3f}" for share in shares)
        verdict = "met" if median(shares) <= TARGET else "NOT met"
        lines.append(
            f"{system}: {median(shares):.3f} of the seconds of {name} to the last level (by seed {each})   "
            f"target <= {TARGET:g}: {verdict}"
        )
    return "\n".join(lines)


def ratios(result: dict[str, Any], system: str) -> list[float]:
    """By seed: seconds of ``system`` to the last level over those of tuned TRL. Where TRL never came there, over all
    of its seconds: the ratio is then no more than that."""

    def run(seed: int, name: str) -> Run:
        return next(run for run in result["runs"] if run["seed"] == seed and run["name"] == name)

    found = []
    for seed, levels in result["levels"].items():
        trl = run(seed, _name(result["best"]))
        found.append(reached(levels[-1], run(seed, system)) / min(reached(levels[-1], trl), trl["seconds"][-1]))
    return found


def plot(result: dict[str, Any], file: Path) -> None:
    """Held-out CIDEr-D against seconds, on the first seed; the thin lines are TRL's other trials."""
    from benchmarks._plots import COLOURS, figure

    seed = next(iter(result["levels"]))
    colours = {"mmft PPO": COLOURS[0], "mmft leave-one-out": COLOURS[1], _name(result["best"]): COLOURS[2]}
    with figure(file, size=(7.0, 3.8)) as (axes,):
        for run in (run for run in result["runs"] if run["seed"] == seed):
            chosen = run["name"] in colours
            look = {"marker": "o", "markersize": 3} if chosen else {"alpha": 0.35, "linewidth": 1}
            colour = colours.get(run["name"], COLOURS[5])
            axes.plot(run["seconds"], run["cider_d"], color=colour, label=run["name"] if chosen else None, **look)
        level = result["levels"][seed][-1]
        axes.axhline(level, color="black", linewidth=0.8, linestyle=":")
        axes.annotate(f"{level:.2f}", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axes.set(xlabel="seconds of training", ylabel="held-out CIDEr-D (greedy)")
        axes.legend(loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=20, help="of the recipe with critic; they set the level")
    parser.add_argument("--trl-steps", type=int, default=40, help="at most, of TRL")
    parser.add_argument("--rates", default="5e-4,1e-3,2e-3,4e-3", help="learning rates to tune TRL over")
    parser.add_argument("--trl", default="batch=16", help="TRL's setting; the fastest is found by vs_trl.py")
    parser.add_argument("--level", type=float, help="CIDEr-D to reach, instead of 95 %% of mmft's gain")
    parser.add_argument("--rows", type=int, default=256, help="held-out rows")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="recipe options of all runs, for example rollout.prompts_per_step=8")
    args = parser.parse_args()
    if args.worker:
        order = json.loads(args.worker)
        serve(lambda turn: _worker(order, turn))
        return
    from benchmarks.vs_trl import environment

    Setting.parse(args.trl)
    options = {k: v for k, v in vars(args).items() if k not in ("json", "plot", "worker")}
    options["seeds"] = [int(seed) for seed in args.seeds.split(",")]
    options["rates"] = [float(rate) for rate in args.rates.split(",")]
    began, about = time.time(), environment(args.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    result = compare(options)
    print(f"\n{table(result)}\n({time.time() - began:.0f} s in all)")
    if args.json:
        args.json.write_text(json.dumps({"environment": about, "options": options, **result}, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
