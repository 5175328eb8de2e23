"""Broken recipes, each with the one message that it must get: its place, and words that must stand in it.

Read by tests/recipe/test_broken.py, in this process, and by benchmarks/broken_recipes.py, in a fresh one for each.
The places are counted in the text, never taken from the reader that is tested.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Broken:
    """One recipe. ``place`` is ``file:line`` or ``command line``; ``key`` follows it, and ``words`` are in the rest."""

    text: str | bytes
    place: str
    key: str
    words: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    beside: dict[str, str] = field(default_factory=dict)  # other files in its folder

    def write(self, folder: Path) -> Path:
        for name, text in {"r.yaml": self.text, **self.beside}.items():
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder / "r.yaml"

    def missed(self, problems: list[str], folder: Path) -> str:
        """What is wrong with the problems that were found; nothing where they are right."""
        said = [problem.replace(f"{folder}/", "") for problem in problems]
        start = f"{self.place}: {self.key}: " if self.key else f"{self.place}: "
        if len(said) != 1 or not said[0].startswith(start) or not all(word in said[0] for word in self.words):
            return f"expected {start}… with {self.words}, got {said}"
        return ""


def _shipped(line: str, instead: str, key: str, *words: str, file: str = "caption_ppo") -> Broken:
    """A shipped recipe with one line changed, given without its comment; the message must point there."""
    lines = (ROOT / "recipes" / f"{file}.yaml").read_text().splitlines()
    found = [number for number, text in enumerate(lines) if text.split("#")[0].rstrip() == line]
    assert len(found) == 1, f"{line!r} stands in {file}.yaml {len(found)} times"
    lines[found[0]] = instead
    return Broken("\n".join(lines) + "\n", f"r.yaml:{found[0] + 1}", key, words)


# One typo or one wrong type in a recipe that is right otherwise.
SLIPS = {
    "typo in a section": _shipped("algorithm:", "algoritm:", "algoritm", "unknown key", "mean algorithm?"),
    "typo in a key": _shipped("  steps: 60", "  step: 60", "train.step", "unknown key", "mean train.steps?"),
    "typo three deep": _shipped("    alpha: 32", "    alhpa: 32", "model.lora.alhpa", "mean model.lora.alpha?"),
    "typo in an item": _shipped("    weight: 1.0", "    wieght: 1.0", "rewards.0.wieght", "mean rewards.0.weight?"),
    "typo in a reward": _shipped("  - name: bleu", "  - name: blue", "rewards.1.name", 'got "blue"', "mean bleu?"),
    "typo in a choice": _shipped(
        "  tune: lora", "  tune: lorra", "model.tune", 'got "lorra"', "lora, full", "mean lora?"
    ),
    "capital letter": _shipped("  gamma: 1.0", "  Gamma: 1.0", "algorithm.Gamma", "mean algorithm.gamma?"),
    "plural": _shipped(
        "  temperature: 1.0", "  temperatures: 1.0", "rollout.temperatures", "mean rollout.temperature?"
    ),
    "another library's spelling": _shipped(
        "  cliprange: 0.2", "  clip_range: 0.2", "algorithm.clip_range", "mean algorithm.cliprange?"
    ),
    "hyphen for underscore": _shipped(
        "  learning_rate: 1.0e-3", "  learning-rate: 1.0e-3", "train.learning-rate", "mean train.learning_rate?"
    ),
    "right key, wrong section": _shipped(
        "  warmup_steps: 0", "  num_generations: 4", "train.num_generations", "mean rollout.num_generations?"
    ),
    "Python's None": _shipped("  critic: head", "  critic: None", "model.critic", 'got "None"', "mean none?"),
    "typo for a preference head": _shipped(
        "  fusion: cross_attention", "  fusoin: sum", "head.fusoin", "mean head.fusion?", file="train_preference"
    ),
    "text for a whole number": _shipped(
        "  steps: 60", "  steps: many", "train.steps", 'got "many"', "a whole number >= 1"
    ),
    "quoted number": _shipped(
        "  learning_rate: 1.0e-3", '  learning_rate: "1e-3"', "train.learning_rate", "mean 1e-3 without quotes?"
    ),
    "fraction for a whole number": _shipped(
        "    r: 16", "    r: 16.5", "model.lora.r", "got 16.5", "a whole number >= 1"
    ),
    "true for a number": _shipped("seed: 0", "seed: true", "seed", "got true", "a whole number >= 0"),
    "number for true": _shipped("    dora: false", "    dora: 1", "model.lora.dora", "got 1", "true or false"),
    "number for text": _shipped("  name: scenes-vlm", "  name: 7", "model.name", "got 7", "text that is not empty"),
    "text for a section": Broken(
        "seed: 0\nmodel: scenes-vlm\n", "r.yaml:2", "model", ('got "scenes-vlm"', "a section with keys (name,")
    ),
    "null for a section": Broken("seed: 0\ndata:\n", "r.yaml:2", "data", ("got null", "a section with keys (name,")),
    "section for a list": Broken(
        "rewards: {name: bleu}\n", "r.yaml:1", "rewards", ("got a section with keys", "a list of one or more items")
    ),
    "text for a list": _shipped(
        "  trackers: [tensorboard]", "  trackers: wandb", "output.trackers", 'got "wandb"', "a list"
    ),
    "null for a number": _shipped(
        "  kl_coef: 0.02", "  kl_coef: null", "algorithm.kl_coef", "got null", "a finite number >= 0"
    ),
    "wrong type for a preference head": _shipped(
        "  heads: 1", "  heads: one", "head.heads", 'got "one"', "a whole number >= 1", file="train_preference"
    ),
}

VALUES = {
    "below the range": _shipped("  temperature: 1.0", "  temperature: 0", "rollout.temperature", "got 0", "> 0"),
    "above the range": _shipped("  gamma: 1.0", "  gamma: 1.01", "algorithm.gamma", "got 1.01", "> 0 and <= 1"),
    "reward without a name": Broken(
        "rewards:\n- name: bleu\n- weight: 1\n", "r.yaml:3", "rewards.1.name", ("missing, expected cider_d",)
    ),
    "flow style": Broken(
        "model: {tune: lora,\n  critc: none}\n", "r.yaml:2", "model.critc", ("did you mean model.critic?",)
    ),
    "empty list": Broken("seed: 1\nrewards: []\n", "r.yaml:2", "rewards", ("got a list of 0", "one or more items")),
    "empty text": Broken("data: {name: ''}\n", "r.yaml:1", "data.name", ('got ""', "text that is not empty")),
    "no repository": _shipped(
        "  push_to_hub: null", "  push_to_hub: model", "output.push_to_hub", 'got "model"', "user/name of a repository"
    ),
}

IMPOSSIBLE = {
    "leave-one-out of one": Broken(
        "model:\n  critic: none\nrollout:\n  num_generations: 1\n",
        "r.yaml:4",
        "rollout.num_generations",
        ("got 1, expected 2 or more with model.critic none",),
    ),
    "ragged minibatches": _shipped(
        "  num_mini_batches: 1",
        "  num_mini_batches: 5",
        "algorithm.num_mini_batches",
        "got 5, expected a divisor",
        "(32)",
    ),
    "a2c twice": Broken(
        "algorithm:\n  name: a2c\n  num_ppo_epochs: 2\n",
        "r.yaml:3",
        "algorithm.num_ppo_epochs",
        ("got 2, expected 1 with algorithm.name a2c",),
    ),
    "quantized and full": Broken(
        "model:\n  quantize: nf4\n  tune: full\n",
        "r.yaml:2",
        "model.quantize",
        ("got nf4", "null with model.tune full"),
    ),
    "no reward": Broken(
        "seed: 1\nrewards:\n- {name: bleu, weight: 0}\n", "r.yaml:2", "rewards", ("got weight 0 everywhere",)
    ),
    "pairs without a place": Broken(
        "pairs:\n  source: rows\nhead: {}\n", "r.yaml:2", "pairs.name", ("got null", "a .jsonl file")
    ),
}

_BOMB = "\n".join(
    ["a0: &a0 [1,1,1,1,1,1,1,1,1]"] + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
)
HOSTILE = {
    "given twice": Broken("seed: 1\nmodel:\n  tune: lora\nseed: 2\n", "r.yaml:4", "seed", ("twice (first on line 1)",)),
    "given twice, deeper": Broken(
        "train:\n  steps: 1\n  steps: 2\n", "r.yaml:3", "train.steps", ("given twice (first on line 2)",)
    ),
    "no for false": _shipped(
        "  whiten_rewards: false", "  whiten_rewards: no", "algorithm.whiten_rewards", 'got "no"', "mean false?"
    ),
    "not a number": _shipped("  kl_coef: 0.02", "  kl_coef: .nan", "algorithm.kl_coef", "got nan", "a finite number"),
    "infinite": _shipped("  timeout: 1800.0", "  timeout: .inf", "train.timeout", "got inf", "a finite number > 0"),
    "a tag that calls": Broken(
        "seed: !!python/object/apply:os.getpid []\n", "r.yaml:1", "seed", ("got the tag", "expected a plain list")
    ),
    "a tag that reads": Broken("model:\n  name: !env HOME\n", "r.yaml:2", "model.name", ("got the tag !env",)),
    "a false tag": Broken("seed: !!int abc\n", "r.yaml:1", "seed", ("got 'abc' tagged", "expected a plain value")),
    "alias bomb": Broken(_BOMB, "r.yaml:5", "a4", ("too many values", "check aliases")),
    "alias of itself": Broken("model: &m\n  lora: *m\n", "r.yaml:1", "model", ("too many values", "check aliases")),
    "alias of nothing": Broken("seed: 1\nmodel: *m\n", "r.yaml:2", "", ("not valid YAML", "undefined alias")),
    "merge key": Broken("seed: 1\n<<: {seed: 2}\n", "r.yaml:2", "", ("got the key <<", "extends")),
    "empty": Broken("", "r.yaml:1", "", ("the file is empty, expected keys",)),
    "only comments": Broken("# nothing\n", "r.yaml:1", "", ("the file is empty",)),
    "not UTF-8": Broken(b"seed: 1\nmodel: {name: caf\xe9}\n", "r.yaml:2", "", ("byte 0xe9 is not UTF-8", "saved as")),
    "UTF-16": Broken("seed: 1\n".encode("utf-16"), "r.yaml:1", "", ("byte 0xff is not UTF-8", "saved as")),
    "ten megabytes": Broken("# " + "x" * 10_000_000 + "\n", "r.yaml", "", ("longer than 256 KiB", "short")),
    "five thousand deep": Broken("seed: " + "[" * 5000, "r.yaml:1", "", ("nested too deeply",)),
    "tab": Broken("train:\n\tsteps: 3\n", "r.yaml:2", "", ("not valid YAML", "indent with spaces, not tabs")),
    "colon in a text": Broken(
        "data:\n  prompt: Say: what\n", "r.yaml:2", "", ("not valid YAML", "quote a text that holds a colon")
    ),
    "bracket left open": Broken("seed: 1\nmodel: {name: x\ndata: 3\n", "r.yaml:3", "", ("not valid YAML", "':'")),
    "control character": Broken("seed: 1\nmodel: {name: a\x00b}\n", "r.yaml:2", "", ("not valid YAML", "not allowed")),
    "two documents": Broken("seed: 1\n---\nseed: 2\n", "r.yaml:2", "", ("not valid YAML", "one recipe per file")),
    "list at the top": Broken("- seed\n", "r.yaml:1", "", ("got a list at the top", "expected keys with values")),
}

EXTENDED = {
    "no such base": Broken(
        "seed: 1\nextends: bse.yaml\n",
        "r.yaml:2",
        "extends",
        ('got "bse.yaml", no such file', "did you mean base.yaml?"),
        beside={"base.yaml": "seed: 2\n"},
    ),
    "a circle": Broken(
        "extends: a.yaml\n",
        "a.yaml:2",
        "extends",
        ('got "r.yaml"', "comes back to itself (r.yaml -> a.yaml -> r.yaml)"),
        beside={"a.yaml": "seed: 1\nextends: r.yaml\n"},
    ),
    "itself": Broken("extends: r.yaml\n", "r.yaml:1", "extends", ("comes back to itself (r.yaml -> r.yaml)",)),
    "a chain without end": Broken(
        "extends: 1.yaml\n",
        "7.yaml:1",
        "extends",
        ('got "8.yaml"', "at most 8 recipes"),
        beside={f"{i}.yaml": f"extends: {i + 1}.yaml\n" for i in range(1, 12)},
    ),
    "a device": Broken(
        "extends: /dev/zero\n", "r.yaml:1", "extends", ('got "/dev/zero"', "the path of another recipe")
    ),
    "a folder": Broken(
        "extends: ../d.yaml/..\n", "r.yaml:1", "extends", ('got "../d.yaml/.."', "the path of another recipe")
    ),
    "an address": Broken(
        "extends: https://example.org/r.yaml\n", "r.yaml:1", "extends", ('got "https://', "no such file", "a path")
    ),
    "a list of bases": Broken("extends: [a.yaml]\n", "r.yaml:1", "extends", ("got a list of 1", "the path of another")),
    "extends in a section": Broken("train:\n  extends: a.yaml\n", "r.yaml:2", "train.extends", ("got an unknown key",)),
    "key of two sections": Broken(
        "learning_rate: 1.0\n", "r.yaml:1", "learning_rate", ("got an unknown key", "did you mean train.learning_rate?")
    ),
    "extend": Broken("extend: a.yaml\n", "r.yaml:1", "extend", ("got an unknown key", "did you mean extends?")),
    "typo in the base": Broken(
        "extends: base.yaml\ntrain: {learning_rate: 1e-4}\n",
        "base.yaml:3",
        "train.stps",
        ("unknown key", "did you mean train.steps?"),
        beside={"base.yaml": "seed: 1\ntrain:\n  stps: 3\n"},
    ),
    "broken base": Broken(
        "extends: base.yaml\n",
        "base.yaml:2",
        "",
        ("not valid YAML", "indent with spaces"),
        beside={"base.yaml": "train:\n\tsteps: 1\n"},
    ),
    "what does not go with the base": Broken(
        "extends: base.yaml\nrollout:\n  prompts_per_step: 6\n",
        "r.yaml:3",
        "algorithm.num_mini_batches",
        ("got 4, expected a divisor of rollout.prompts_per_step (6)",),
        beside={"base.yaml": "algorithm: {num_mini_batches: 4}\n"},
    ),
}

OVERRIDDEN = {
    "typo": Broken("seed: 1\n", "command line", "train.step", ("did you mean train.steps?",), ("train.step=3",)),
    "wrong type": Broken(
        "seed: 1\n", "command line", "train.steps", ('got "x"', "whole number >= 1"), ("train.steps=x",)
    ),
    "two dots": Broken("seed: 1\n", "command line", "'a..b=3'", ("expected key.sub=value",), ("a..b=3",)),
    "no key": Broken("seed: 1\n", "command line", "'=3'", ("expected key.sub=value",), ("=3",)),
    "too deep": Broken(
        "model: {}\n", "command line", "model", ("too many values",), ("model.lora=" + "[" * 20 + "]" * 20,)
    ),
    "no such item": Broken(
        "seed: 1\n", "command line", "rewards.5.weight", ("got item 5, but rewards has 0",), ("rewards.5.weight=1",)
    ),
    "below a number": Broken("seed: 1\n", "command line", "seed.x", ("seed is 1, expected a section",), ("seed.x=3",)),
    "tag": Broken("seed: 1\n", "command line", "train.steps", ("got the tag !x",), ("train.steps=!x 1",)),
    "half a list": Broken("seed: 1\n", "command line", "", ("not valid YAML",), ("output.trackers=[a",)),
    "extends": Broken("seed: 1\n", "command line", "extends", ('got "b.yaml"', "in the file"), ("extends=b.yaml",)),
    "combination": Broken(
        "algorithm: {num_mini_batches: 4}\n",
        "command line",
        "algorithm.num_mini_batches",
        ("got 4, expected a divisor",),
        ("rollout.prompts_per_step=6",),
    ),
}

GROUPS = {
    "slip": SLIPS,
    "value": VALUES,
    "impossible": IMPOSSIBLE,
    "hostile": HOSTILE,
    "extends": EXTENDED,
    "override": OVERRIDDEN,
}
BROKEN = {f"{group}: {name}": broken for group, cases in GROUPS.items() for name, broken in cases.items()}
