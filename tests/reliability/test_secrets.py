"""Row 31: planted tokens leave no trace in what a run, a crash, a card and a push write, print and send."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub, environment, fake_hub

from mmft.recipe import load_recipe
from mmft.recipe.secrets import HIDDEN, redact, redacted, stored_login

ROOT = Path(__file__).parents[2]
NAME = "ann/scenes-ppo"
TOKENS = {
    "env, the Hub's": "hf_" + "Zq4" * 11 + "Z",
    "env, another service's": "5f3c9a" * 6 + "5f3c",
    "env, by its name alone": "correct horse battery",
    "recipe, by its shape": "sk-proj-" + "Ab1_" * 8,
    "recipe, by its key": "swordfish-42",
    "command line, by its key": "hunter2 hunter2",
    "command line, by its shape": "github_pat_" + "a1B" * 12,
}
HUB, WANDB, PLAIN, SHAPED, KEYED, TYPED, LOOSE = TOKENS.values()
# A judge as users write them: it gets its keys as options, prints them, and names them when it fails.
JUDGE = """
import os, sys, warnings

def judge(completions, api_key, password, model, note, fails, **_):
    assert (api_key, password, model, note) == {keys!r}, "the reward did not get its keys"
    secrets = [api_key, password, model, note, os.environ["WANDB_API_KEY"], os.environ["JUDGE_PASSWORD"]]
    print("asking with", *secrets)
    sys.stderr.write("asking with " + " ".join(secrets) + "\\n")
    warnings.warn("asked with " + " ".join(secrets))
    judge.calls = getattr(judge, "calls", 0) + 1
    if fails and judge.calls == 2:
        raise RuntimeError("401 Unauthorized for " + " ".join(secrets))
    return [float(len(text)) for text in completions]
"""
RECIPE = """
rewards:
  - name: cider_d
  - name: {judge}
    weight: 0.1
    options: {{api_key: {keyed}, model: {shaped}, fails: {fails}}}
train: {{steps: 2, save_every: 1, micro_prompts: null}}
rollout: {{prompts_per_step: 2, num_generations: 2}}
data: {{train_rows: 16}}
eval: {{rows: 4, every: 1}}
output: {{dir: {out}, push_to_hub: {name}}}
"""


def launch(folder: Path, hub: FakeHub, fails: bool) -> subprocess.CompletedProcess[bytes]:
    (folder / "judge.py").write_text(JUDGE.format(keys=(KEYED, TYPED, SHAPED, LOOSE)))
    recipe = {"judge": f"{folder}/judge.py:judge", "keyed": KEYED, "shaped": SHAPED, "name": NAME}
    (folder / "recipe.yaml").write_text(RECIPE.format(**recipe, fails=str(fails).lower(), out=folder / "run"))
    typed = [f"rewards.1.options.password={TYPED}", f"rewards.1.options.note={LOOSE}"]
    command = [sys.executable, "recipes/caption_ppo.py", str(folder / "recipe.yaml"), *typed]
    env = os.environ | environment(hub, str(folder / "home")) | {"WANDB_API_KEY": WANDB, "JUDGE_PASSWORD": PLAIN}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True)


def hits(places: dict[str, bytes]) -> list[str]:
    """Where a token is found, plain or in base64."""
    found = []
    for what, token in TOKENS.items():
        forms = [token.encode(), *(base64.b64encode(b" " * i + token.encode())[4:-4] for i in range(3))]
        found += [f"{what}: {place}" for place, data in places.items() if any(form in data for form in forms)]
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sent(hub: FakeHub) -> dict[str, bytes]:
    """All that the client sent, but for the header that is there to hold the token; commits unpacked."""
    found = {}
    for i, request in enumerate(hub.requests):
        headers = {name: value for name, value in request.headers.items() if name.lower() != "authorization"}
        found[f"{i} {request.kind}"] = request.path.encode() + json.dumps(headers).encode() + request.body
    for i, commit in enumerate(hub.repositories[NAME].commits):
        found |= {f"commit {i} {name}": data for name, data in commit.items()}
    return found


def test_run_card_and_push_show_no_token(tmp_path):
    with fake_hub(HUB) as hub:
        done = launch(tmp_path, hub, fails=False)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        assert done.stdout.count(b"asking with") >= 2 and done.stderr.count(b"asking with") >= 2
        assert f"published: {hub.url}/{NAME}".encode() in done.stdout
        assert hub.requests and "README.md" in hub.repositories[NAME].files
        written = files(tmp_path / "run")
        assert {"recipe.yaml", "summary.json", "report.html", "metrics.jsonl"} <= written.keys()
        assert any(name.startswith("checkpoints/step-000001/") for name in written)
        screens = {"stdout": done.stdout, "stderr": done.stderr}
        assert not hits(written | files(tmp_path / "home") | screens | sent(hub))
        assert HIDDEN.encode() in written["recipe.yaml"] and HIDDEN.encode() in done.stdout


def test_a_crash_shows_no_token(tmp_path):
    with fake_hub(HUB) as hub:
        done = launch(tmp_path, hub, fails=True)
        assert done.returncode == 1 and b"401 Unauthorized for" in done.stderr
        assert b"Traceback" in done.stderr
        assert not hits(files(tmp_path / "run") | {"stdout": done.stdout, "stderr": done.stderr})
        assert not hub.requests, "nothing to publish"


def test_the_search_would_find_them():
    for token in TOKENS.values():
        assert hits({"x": b"a " + token.encode()}) and hits({"x": base64.b64encode(b"ab" + token.encode() + b"cd")})


def test_wrong_recipes_are_told_without_their_tokens(tmp_path, monkeypatch):
    env = os.environ | {"HF_TOKEN": HUB, "OTHER_SECRET": PLAIN}
    wrong = [f"train.steps={HUB}", f"model.quantize={PLAIN}", f"rewards.0.api_key={SHAPED}", f"{LOOSE}=1"]
    done = subprocess.run(
        [sys.executable, "recipes/caption_ppo.py", *wrong], cwd=ROOT, env=env, capture_output=True, check=False
    )
    assert done.returncode == 2 and done.stderr.count(b"command line:") == 4
    assert not hits({"stdout": done.stdout, "stderr": done.stderr})


@pytest.mark.parametrize("text", ["tokens/s 12", "a sky-blue disc", "hf_xet 1.8", "sk-learn", "AKIA", "http://a.b:8/c"])
def test_harmless_texts_stay(text):
    assert redact(text) == text


def test_what_is_hidden(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh12")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "abcdefgh34")
    assert redact("x abcdefgh12 y abcdefgh34") == f"x {HIDDEN} y abcdefgh34"
    assert redact("http://ann:pass@host:80/v1") == f"http://{HIDDEN}@host:80/v1"
    data = {
        "token": "ab",
        "token_env": "NAME",
        "list": [{"Api_Key": "cd", "n": 1}],
        "headers": {"X-Api-Key": "ef", "Authorization": "Bearer gh", "accessToken": "ij"},
        "prompt": f"say {HUB}",
        "key": None,
    }
    headers = {"X-Api-Key": HIDDEN, "Authorization": HIDDEN, "accessToken": HIDDEN}
    kept = {"headers": headers, "token": HIDDEN, "token_env": "NAME", "list": [{"Api_Key": HIDDEN, "n": 1}]}
    assert redacted(data) == kept | {"prompt": f"say {HIDDEN}", "key": None}


def test_the_stored_login_is_hidden(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("an-old-token-without-shape\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    stored_login.cache_clear()
    try:
        assert redact("x an-old-token-without-shape") == f"x {HIDDEN}"
    finally:
        stored_login.cache_clear()


def test_the_copy_of_a_recipe_is_still_one(tmp_path):
    recipe = load_recipe(ROOT / "recipes" / "caption_ppo.yaml", ["rewards.0.options={api_key: swordfish-42}"])
    assert recipe.rewards[0].options == {"api_key": "swordfish-42"}, "the run itself needs it"
    recipe.dump(tmp_path / "recipe.yaml")
    assert "swordfish" not in (tmp_path / "recipe.yaml").read_text()
    assert load_recipe(tmp_path / "recipe.yaml").train == recipe.train
