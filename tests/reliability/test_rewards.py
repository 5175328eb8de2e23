"""Rewards that return anything, fail in any way, or are given odd text, counted (rows 14, 15 and 17).

What each policy makes of each value is worked out by hand in `tests/reward_models/test_reward_policies.py`, every way
to fail in `tests/reward_models/test_isolation.py`; here stands that both also hold in a child process, and in a run.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from mmft.evaluation.captioning import score_captions
from mmft.evaluation.health import text_health
from mmft.recipe import load_recipe
from mmft.training.run import run
from reward_models import DocumentFrequencies, RewardPart, WeightedRewards, build_rewards
from reward_models.isolation import Isolated

ROOT = Path(__file__).parents[2]
POLICIES = ("raise", "drop", "zero")
KINDS = ("nan", "inf", "-inf", "none", "text", "length", "shape")
MINE = """
import os, subprocess, sys, time
import numpy as np

def odd(completions, kind, **columns):
    values = [1.0, 2.0, 3.0]
    if kind in ("nan", "inf", "-inf"): values[1] = float(kind)
    if kind == "none": values[1] = None
    if kind == "text": values[1] = "0.5"
    if kind == "length": values = values[:2]
    if kind == "shape": values = np.ones((3, 1))
    return values

def fails(completions, folder, how, **columns):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(os.path.join(folder, "pids"), "a") as file: file.write(f"{os.getpid()} {child.pid}\\n")
    if "odd" in completions:
        if how == "raises": raise KeyError("odd")
        if how == "hangs": time.sleep(60)
        if how == "dies": os._exit(9)
    return [1.0] * len(completions)

def length(completions, **columns):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(MINE)
    return path


def outcome(function, policy: str) -> tuple:
    """What a run sees of the reward: its scores and which rows are kept, or the error."""
    rewards = WeightedRewards([RewardPart("odd", function, nonfinite=policy)])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = rewards(completions=["a", "b", "c"], id=["x", "y", "z"])
        except ValueError as error:
            return "error", str(error)
    return found.total.tolist(), found.keep.tolist(), [str(w.message) for w in said]


def test_a_child_process_changes_nothing_of_what_a_return_value_leads_to(mine):
    namespace: dict = {}
    exec(MINE, namespace)
    right = 0
    for kind in KINDS:
        with Isolated(f"{mine}:odd", {"kind": kind}) as child:
            for policy in POLICIES:
                here = outcome(lambda completions, kind=kind, **_: namespace["odd"](completions, kind), policy)
                assert outcome(child, policy) == here
                raised = kind in ("text", "length", "shape") or (policy == "raise" and kind not in ("none",))
                assert (here[0] == "error") is raised and ("odd" in str(here) or kind == "none"), (kind, policy, here)
                right += 1
    print(f"\nreturn values x policies: {right}/21")
    assert right == 21


@pytest.mark.parametrize("how", ["raises", "hangs", "dies"])
def test_a_failure_keeps_its_time_names_the_row_and_leaves_no_process(mine, tmp_path, how):
    options = {"folder": str(tmp_path), "how": how}
    rewards = build_rewards([{"name": f"{mine}:fails", "options": options, "timeout": 1.5}])
    began = time.monotonic()
    with pytest.raises((RuntimeError, TimeoutError)) as failed:
        rewards(completions=["a", "b", "odd"], id=["x", "y", "z"])
    seconds = time.monotonic() - began
    print(f"\n{how}: {seconds:.1f} s with a time limit of 1.5 s")
    assert seconds < 6.5 and "row 2 (id 'z')" in str(failed.value)
    rewards.parts[0].function.close()
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 3
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) >= 2 and not left


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_reward_that_fails_in_a_run_is_the_last_line(tmp_path, capsys):
    """Step, reward and row below the traceback, and exit code 1."""
    own = tmp_path / "own.py"
    own.write_text(
        "def picky(completions, id, **columns):\n"
        "    if len(set(id)) > 1 or id[0] == picky.last: picky.last = id[-1]; raise LookupError('no such colour')\n"
        "    return [0.0] * len(completions)\n"
        "picky.last = None\n"
    )
    options = ["train.steps=1", "data.train_rows=8", "eval.rows=4", "rollout.prompts_per_step=2", "eval.every=0"]
    options += ["rollout.num_generations=2", "train.micro_prompts=null", "train.save_every=0", "output.trackers=[]"]
    options += [f"rewards=[{{name: '{own}:picky'}}]", f"output.dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as ended:
        run(load_recipe(ROOT / "recipes" / "caption_ppo.yaml", options))
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 1 and any(line.startswith("Traceback") for line in said)
    assert any("own.py" in line and "line 2, in picky" in line for line in said)
    assert said[-1].startswith("error: step 1: reward 'picky', row 2 (id 'scene-")
    assert said[-1].endswith("): LookupError: no such colour")


ODD = {
    "carriage return": "a dog\rruns",
    "vertical tab": "a\x0bdog runs",
    "form feed": "a dog\x0cruns",
    "next line": "a\x85dog runs\x85",
    "line separator": "a dog\u2028runs\u2029",
    "nul": "a\0dog \0 runs",
    "100 k characters": "a dog runs " * 9_090 + "far away !",
    "pipes": "a|dog||runs ||| | |||",
    "emoji": "a \U0001f415\u200d\U0001f9ba runs \u2764\ufe0f \ud800",
}


def test_odd_text_scores_in_a_batch_as_alone(mine):
    """A scorer that talks to another in lines would shift every row behind such a text."""
    references = [["a dog runs", "one dog \u2028 runs"], ["a\x85cat", "pipes | and ||| more"], ["the dog's ball"]]
    frequencies = DocumentFrequencies.from_references(references)
    names = "cider_d cider bleu rouge_l repetition novelty richness".split()
    rewards = build_rewards([*({"name": name} for name in names), {"name": "length", "max": 20}], frequencies)
    child = WeightedRewards([RewardPart("length", Isolated(f"{mine}:length"))])
    texts = [*ODD.values(), "a dog runs"]
    columns = {"references": [references[i % 3] for i in range(len(texts))], "ended": [True] * len(texts)}
    together, counted = rewards(completions=texts, **columns), child(completions=texts)
    suite, health = score_captions(texts, columns["references"], frequencies), text_health(texts)
    right = 0
    for i, (kind, text) in enumerate([*ODD.items(), ("after them all", "a dog runs")]):
        alone = rewards(completions=[text], references=[columns["references"][i]], ended=[True])
        for name, part in alone.parts.items():
            np.testing.assert_allclose(together.parts[name][i], part[0], rtol=0, atol=1e-12, err_msg=f"{kind} {name}")
        assert counted.total[i] == len(text)
        for name, values in score_captions([text], [columns["references"][i]], frequencies).items():
            np.testing.assert_allclose(suite[name][i], values[0], rtol=0, atol=1e-12, err_msg=f"{kind} {name}")
        assert all(health[name][i] == values[0] for name, values in text_health([text]).items())
        right += kind in ODD
    child.parts[0].function.close()
    print(f"\nodd text: {right}/9")
    assert right == 9 and np.isfinite(together.total).all()
