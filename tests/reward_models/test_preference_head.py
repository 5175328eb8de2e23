"""The preference head: what it reads, what it learns, what it keeps on disk, and that it leaves a policy alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText

from reward_models.options import options_of
from reward_models.preference import (
    FUSIONS,
    Pair,
    PreferenceReward,
    Rating,
    backbone_name,
    bradley_terry_loss,
    train_preference,
)
from reward_models.preference.backbone import Backbone, Row, fingerprint, inner_model, load_backbone
from reward_models.preference.folder import save_folder
from reward_models.preference.fusion import FusionHead, PreferenceHead

BUNDLED = str(Path(__file__).parents[2] / "mmft" / "assets" / "scenes_vlm")
COLOURS = {"red": (218, 38, 40), "blue": (45, 95, 225), "green": (45, 160, 70)}
PICTURES = {name: Image.new("RGB", (96, 96), rgb) for name, rgb in COLOURS.items()}
PROMPT = "Describe the picture."


def colour_pairs(n: int, seed: int = 0) -> list[Pair]:
    """Which text is right is decided by the picture alone."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        right, wrong = rng.permutation(list(COLOURS))[:2]
        texts = [f"a {colour} {rng.choice(['square', 'background', 'wall'])}" for colour in (right, wrong)]
        pairs.append(Pair(PROMPT, (PICTURES[right],), *texts, kind="colour", id=str(i)))
    return pairs


ROWS = [
    Row(PROMPT, (PICTURES["red"],), "a red square"),
    Row("What is to be seen here, and where does it stand? Say it in one sentence.", (PICTURES["blue"],), "sky"),
    Row(PROMPT, (), "a red square on a white background and a blue circle"),
    Row([{"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image"}]}], (PICTURES["red"],), ""),
]
PICTURED = [ROWS[0], ROWS[1], Row(PROMPT, (PICTURES["red"], PICTURES["green"]), "two walls"), ROWS[3]]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    """A head of two, with an adapter; only a few steps old."""
    folder = tmp_path_factory.mktemp("judge") / "adapted"
    options = {"backbone": BUNDLED, "heads": 2, "lora": 4, "steps": 6, "batch_size": 4, "width": 32, "log_every": 3}
    train_preference(colour_pairs(16), folder, calibration=colour_pairs(8, 1), log=None, **options)
    return folder


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judge") / "frozen"
    options = {"backbone": BUNDLED, "lora": 0, "steps": 50, "batch_size": 16, "head_learning_rate": 2e-3, "width": 64}
    train_preference(colour_pairs(48), folder, calibration=colour_pairs(24, 1), log=None, **options)
    return folder


def test_its_options_come_back(adapted):
    options = {"kappa": 0.5, "mc_samples": 2, "batch_size": 3, "backbone": "somewhere", "device": "cpu"}
    reward = PreferenceReward.load(str(adapted), **options, cache_bytes=9)
    assert options_of(reward) == options | {"path": str(adapted), "cache_bytes": 9}
    assert options_of(PreferenceReward.load(adapted)) == {"path": str(adapted)}


def columns(rows) -> dict:
    return {
        "prompts": [row.prompt for row in rows],
        "completions": [row.response for row in rows],
        "images": [list(row.images) or None for row in rows],
    }


# ---------------------------------------------------------------- the head alone


def states(n=5, t=4, m=6, h=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text, picture = torch.randn(n, t, h, generator=generator), torch.randn(n, m, h, generator=generator)
    text_mask = torch.arange(t)[None] < torch.tensor([[4], [1], [3], [2], [4]])
    picture_mask = torch.arange(m)[None] < torch.tensor([[6], [6], [2], [0], [6]])
    return text, torch.randn(n, t, generator=generator), text_mask, picture, picture_mask


@pytest.mark.parametrize("fusion", FUSIONS)
def test_garbage_in_padding_changes_nothing(fusion):
    """Kills a mean, a last state or an attention that reads padding; row 3 has no picture and row 1 one token."""
    torch.manual_seed(0)
    head = FusionHead(24, 24, 16, fusion).eval()
    text, logprobs, text_mask, picture, picture_mask = states()
    clean = head(text, logprobs, text_mask, picture, picture_mask)
    garbage = text.masked_fill(~text_mask[..., None], 1e6), logprobs.masked_fill(~text_mask, -1e6)
    dirty = head(*garbage, text_mask, picture.masked_fill(~picture_mask[..., None], -1e6), picture_mask)
    assert torch.isfinite(clean).all()
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_picture_can_turn_a_ranking_round(fusion):
    """Kills an additive head, for which the picture falls out of every comparison of two texts."""
    torch.manual_seed(0)
    head = FusionHead(24, 24, 16, fusion).eval()
    *text, picture, _ = states()
    seen = torch.ones(2, 6, dtype=torch.bool)
    one, other = (head(*(x[[0, 4]] for x in text), picture[[i, i]], seen) for i in (0, 1))
    assert abs((one[0] - one[1]) - (other[0] - other[1])) > 1e-4


def test_gates_weigh_as_they_say():
    """Kills a gate the wrong way round: fully open for the text, the picture counts for nothing."""
    *text, picture, picture_mask = states()
    for fusion in ("sum", "gated"):
        torch.manual_seed(0)
        head = FusionHead(24, 24, 16, fusion).eval()
        with torch.no_grad():
            (head.balance if fusion == "sum" else head.join.bias).fill_(1e4)
        torch.testing.assert_close(
            head(*text, picture, picture_mask), head(*text, -picture, picture_mask), rtol=0, atol=0
        )


def test_draws_are_the_same_for_every_batch_and_every_call():
    """Kills dropout from the global generator, and masks that differ from row to row."""
    torch.manual_seed(0)
    head = PreferenceHead(24, 24, 16, "concat", heads=2, dropout=0.5).eval()
    inputs = states()
    before = torch.get_rng_state()
    drawn = head(*inputs, draws=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.shape == (6, 5) and (drawn.std(0) > 0).all()
    alone = torch.cat([head(*(x[i : i + 1] for x in inputs), draws=3) for i in range(5)], dim=1)
    torch.testing.assert_close(alone, drawn, rtol=0, atol=1e-6)


def test_unknown_fusion_is_named():
    with pytest.raises(ValueError, match="fusion: unknown 'bilinear'; there are concat, sum, gated, cross_attention"):
        PreferenceHead(8, 8, 8, "bilinear")


def test_loss_by_hand():
    """Kills a margin with the wrong sign and smoothing on the wrong side. z = 1.2 - 0.2 - 0.5 = 0.5."""
    chosen, rejected = torch.tensor([1.2], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    loss = bradley_terry_loss(chosen, rejected, 0.5)
    assert float(loss) == pytest.approx(0.47407698418)  # log(1 + exp(-0.5))
    smoothed = bradley_terry_loss(chosen, rejected, 0.5, 0.1)
    assert float(smoothed) == pytest.approx(0.9 * 0.47407698418 + 0.1 * 0.97407698418)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen2_5_vl", "qwen3_vl"])
def test_reads_what_the_plain_model_reads(family, tiny_model):
    """Kills wrong positions, features at wrong places, and states one token off: one row at a time, with pixels."""
    model, processor = load_backbone(tiny_model(family))
    backbone = Backbone(model, processor)
    pictures = [Image.effect_noise(size, 90).convert("RGB") for size in ((32, 32), (40, 24))]
    rows = [
        Row("what is it", (pictures[0],), "a man"),
        Row("where is the man", (pictures[1],), "on a hill by the sea"),
        Row("where", (), "a man"),
    ]
    with torch.no_grad():
        read = backbone.read(rows)
        for i, row in enumerate(rows):
            text = backbone.render(row.prompt, len(row.images))
            inputs = (
                processor(text=[text], images=[list(row.images)], return_tensors="pt")
                if row.images
                else processor.tokenizer([text], return_tensors="pt")
            )
            response = processor.tokenizer(row.response, add_special_tokens=False)["input_ids"] + [backbone.end_id]
            ids = torch.cat([inputs.pop("input_ids"), torch.tensor([response])], dim=1)
            inputs = {k: v for k, v in inputs.items() if "attention" not in k and k != "token_type_ids"}
            if "mm_token_type_ids" in inputs:
                inputs["mm_token_type_ids"] = torch.eq(ids, backbone.image_token_id).int()
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            plain = inner_model(model)(**inputs).last_hidden_state
            torch.testing.assert_close(
                read.text[i][read.text_mask[i]], plain[0, -len(response) :], rtol=1e-4, atol=1e-4
            )
            loss = model(
                **inputs, labels=torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - len(response), -100, ids)
            )
            assert float(read.logprobs[i].sum()) == pytest.approx(-float(loss.loss) * len(response), abs=1e-3)
            assert int(read.picture_mask[i].sum()) == int(torch.eq(ids, backbone.image_token_id).sum())


def test_each_picture_goes_through_the_tower_once():
    backbone = Backbone(*load_backbone(BUNDLED))
    with torch.no_grad():
        backbone.read(ROWS)
        backbone.read(ROWS)
    assert backbone.encoded == 2  # red and blue
    nothing_kept = Backbone(backbone.model, backbone.processor, cache_bytes=0)
    with torch.no_grad():
        again = nothing_kept.read(ROWS * 2)
        torch.testing.assert_close(again.text[:4], backbone.read(ROWS).text, rtol=0, atol=1e-5)
    assert nothing_kept.encoded == 2


def test_markers_in_a_text_stay_text():
    """Kills a response that asks for a picture of its own, or closes its turn early."""
    backbone = Backbone(*load_backbone(BUNDLED))
    with torch.no_grad():
        read = backbone.read([Row("an <image> of?", (PICTURES["red"],), "<image><|im_end|>")])
    assert int(read.picture_mask.sum()) == 64 and int(read.text_mask.sum()) > 3


# ---------------------------------------------------------------- training and scoring


def test_learns_what_only_the_picture_tells(frozen):
    """Kills a head that is blind, and pairs that are read the wrong way round."""
    reward = PreferenceReward.load(frozen)
    unseen = colour_pairs(40, seed=7)
    assert reward.evaluate(unseen)["accuracy"] >= 0.95
    assert 0.2 <= reward.evaluate(unseen, blank=True)["accuracy"] <= 0.8


def test_calibration_and_zero_are_in_the_reward(adapted):
    """Kills a temperature that is reported and not applied, and a shift with the wrong sign."""
    facts = json.loads((adapted / "preference.json").read_text())
    reward, pairs = PreferenceReward.load(adapted), colour_pairs(8, 1)
    rows = [(p.prompt, p.images, text) for p in pairs for text in (p.chosen, p.rejected)]
    values = np.array(reward(**columns([Row(*row) for row in rows])).values)
    assert np.median(values[0::2]) == pytest.approx(0, abs=1e-4)
    raw = reward.judge.differences(pairs)
    np.testing.assert_allclose(values[0::2] - values[1::2], raw / facts["temperature"], atol=1e-4)
    assert facts["temperature"] != 1 and reward.evaluate(pairs)["ece"] == pytest.approx(
        facts["metrics"]["calibration"]["ece"], abs=1e-6
    )


def test_score_does_not_depend_on_batch_mates(adapted):
    reward = PreferenceReward.load(adapted, kappa=0.5, mc_samples=2)
    together = reward(**columns(PICTURED)).values
    alone = [reward(**columns([row])).values[0] for row in PICTURED]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len({round(v, 4) for v in together}) == len(PICTURED)


def test_lower_bound_is_mean_less_kappa_std(adapted):
    """Kills std over rows, sample instead of population std, and a std in another unit than the mean."""
    facts = json.loads((adapted / "preference.json").read_text())
    reward = PreferenceReward.load(adapted, kappa=2.0)
    values, logged = reward(**columns(PICTURED))
    one, other = (reward.judge.rewards(PICTURED) - facts["shift"]) / facts["scale"]
    np.testing.assert_allclose(logged["std"], np.abs(one - other) / 2, atol=1e-9)
    np.testing.assert_allclose(values, (one + other) / 2 - np.abs(one - other), atol=1e-9)


def test_one_seed_gives_one_head(tmp_path):
    options = {"backbone": BUNDLED, "fusion": "gated", "lora": 2, "steps": 2, "batch_size": 2, "heads": 2, "width": 8}
    for name in ("one", "two"):
        torch.rand(3 if name == "one" else 5)  # whatever was drawn before
        train_preference(colour_pairs(4), tmp_path / name, log=None, **options)
    weights = [(tmp_path / name / "head.safetensors").read_bytes() for name in ("one", "two")]
    adapters = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1] and adapters[0] == adapters[1]


def test_ratings_come_back_in_their_own_unit(tmp_path):
    """Kills a reward in standard deviations, and one whose shift is not turned back."""
    ratings = [Rating(PROMPT, (PICTURES[c],), f"a {c} {t}", 70.0 + 10 * (c == "red") - 10 * (t == "wall"))
               for c in COLOURS for t in ("wall", "square")]  # fmt: skip
    options = {"backbone": BUNDLED, "lora": 0, "steps": 100, "batch_size": 6, "dropout": 0.0, "width": 32}
    train_preference(ratings, tmp_path, log=None, head_learning_rate=3e-3, **options)
    rows = [Row(r.prompt, r.images, r.completion) for r in ratings]
    got = PreferenceReward.load(tmp_path)(**columns(rows)).values
    np.testing.assert_allclose(got, [r.rating for r in ratings], atol=1.0)


def test_four_bit_backbone(tmp_path, tiny_model):
    pytest.importorskip("bitsandbytes")
    options = {
        "backbone": str(tiny_model("llava")),
        "quantize": "nf4",
        "lora": 2,
        "steps": 2,
        "batch_size": 2,
        "width": 8,
    }
    train_preference(colour_pairs(4), tmp_path, log=None, **options)
    reward = PreferenceReward.load(tmp_path)
    assert np.isfinite(reward(**columns(PICTURED)).values).all()
    assert any(type(p).__name__ == "Params4bit" for p in reward.judge.backbone.model.parameters())


# ---------------------------------------------------------------- errors


def test_errors_say_what_is_wrong(adapted, tmp_path):
    reward = PreferenceReward.load(adapted)
    with pytest.raises(ValueError, match="no column 'image' or 'images'"):
        reward(prompts=[PROMPT], completions=["a"])
    with pytest.raises(ValueError, match="prompts: 2 values for 1 completions"):
        reward(prompts=[PROMPT] * 2, completions=["a"], image=[PICTURES["red"]])
    with pytest.raises(ValueError, match="places for 1 pictures, the row has 2"):
        reward(prompts=[ROWS[3].prompt], completions=["a"], images=[[PICTURES["red"]] * 2])
    with pytest.raises(ValueError, match="holds no preference head"):
        PreferenceReward.load(tmp_path)
    with pytest.raises(ValueError, match="all Pair or all Rating"):
        train_preference([*colour_pairs(1), Rating(PROMPT, (), "a", 1.0)], tmp_path, backbone=BUNDLED)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="unknown option 'batchsize'; did you mean 'batch_size'"):
        train_preference(colour_pairs(1), tmp_path, backbone=BUNDLED, batchsize=2)
    with pytest.raises(ValueError, match="could not be loaded"):
        train_preference(colour_pairs(1), tmp_path, backbone=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kappa": -1}, "kappa: expected 0 or more, got -1"),
        ({"kappa": float("nan")}, "kappa: expected a finite number, got nan"),
        ({"kappa": "1"}, "kappa: expected a finite number, got '1'"),
        ({"mc_samples": 1.7}, "mc_samples: expected a whole number of at least 0, got 1.7"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, got 0"),
        ({"cache_bytes": True}, "cache_bytes: expected a whole number of at least 0, got True"),
        ({"device": "cuda:99"}, "device: expected one of this machine, .*, got 'cuda:99'"),
        ({"device": "gpu"}, "device: .* got 'gpu'"),
        ({"backbone": 3}, "backbone: expected a folder or hub id, got 3"),
        ({"path": None}, "path: expected a folder, got None"),
    ],
)
def test_wrong_options_are_named_at_once(options, said, adapted):
    """Kills options that are rounded or compared away (NaN < 0 is false), or that fail only when a row is scored."""
    with pytest.raises(ValueError, match=f"^{said}"):
        PreferenceReward(**{"path": adapted, **options})


def test_pictures_of_both_columns_are_read(adapted):
    """Kills one column hiding the other, and a made-up value where the head has seen no picture in training."""
    reward = PreferenceReward.load(adapted)
    red, blue = PICTURES["red"], PICTURES["blue"]
    given = {"prompts": [PROMPT] * 5, "completions": ["a red wall"] * 5}
    values, logged = reward(**given, image=[red, blue, None, None, red], images=[None, [], None, [red, blue], [blue]])
    rows = [Row(PROMPT, pictures, "a red wall") for pictures in ((red,), (blue,), (red, blue), (blue,))]
    expected = reward.mean_and_std(rows)[0]
    np.testing.assert_allclose([values[i] for i in (0, 1, 3, 4)], expected, atol=1e-5)
    assert values[2] is None and logged["std"][2] is None and logged["std"][0] > 0
    assert reward(prompts=[PROMPT], completions=["a"], image=[None]).values == [None]


def test_a_head_that_has_seen_texts_alone_judges_them(tmp_path):
    pairs = [*colour_pairs(2), Pair(PROMPT, (), "yes", "no")]
    train_preference(pairs, tmp_path, log=None, backbone=BUNDLED, lora=0, steps=1, batch_size=2, width=8)
    reward = PreferenceReward.load(tmp_path)
    assert np.isfinite(reward(prompts=[PROMPT], completions=["a"]).values).all()


def test_one_head_has_no_bound(frozen):
    with pytest.raises(ValueError, match="kappa: the head is one"):
        PreferenceReward.load(frozen, kappa=1.0)


@pytest.mark.parametrize("name", ["head.safetensors", "adapter/adapter_model.safetensors", "preference.json"])
def test_altered_files_are_refused(name, adapted, tmp_path):
    folder = shutil.copytree(adapted, tmp_path / "copy")
    raw = bytearray((folder / name).read_bytes())
    raw[-3] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(ValueError, match=f"{name}.* (was altered|is no JSON)"):
        PreferenceReward.load(folder)


def test_a_head_of_an_earlier_version_is_refused(adapted, tmp_path):
    folder = shutil.copytree(adapted, tmp_path / "copy")
    path = folder / "preference.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(ValueError, match="format 1, expected 2; it is of an earlier version: train the head again"):
        PreferenceReward.load(folder)


# ---------------------------------------------------------------- the folder

QUICK = {"backbone": BUNDLED, "lora": 0, "steps": 1, "batch_size": 2, "width": 8, "log": None}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("foreign", ["recipe.yaml", "adapter/adapter_model.safetensors", "head.safetensors"])
def test_a_folder_with_something_else_is_left_alone(foreign, tmp_path):
    """Kills the loss of a training run whose folder was named by mistake; said before anything is trained."""
    path = tmp_path / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("hours of work")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds other files .* and no preference.json; expected a new or empty folder"):
        train_preference(colour_pairs(2), tmp_path, **QUICK | {"backbone": "not even looked for"})
    with pytest.raises(ValueError, match="holds other files"):  # also if they came while it was trained
        save_folder(tmp_path, {}, PreferenceHead(8, 8, 8), None)
    assert contents(tmp_path) == before


def test_an_earlier_head_is_replaced_and_nothing_else(adapted, tmp_path):
    folder = shutil.copytree(adapted, tmp_path / "copy")
    (folder / "notes.txt").write_text("mine")
    run = shutil.copytree(folder, tmp_path / "run")
    (run / "adapter" / "adapter_model.safetensors").write_text("of a policy trained into the same folder")
    before = contents(run)
    with pytest.raises(ValueError, match="adapter_model.safetensors is not a file of the preference head"):
        train_preference(colour_pairs(2), run, **QUICK)
    assert contents(run) == before
    train_preference(colour_pairs(2), folder, **QUICK)
    assert PreferenceReward.load(folder).facts["adapter"] is False
    assert set(contents(folder)) == {"notes.txt", "README.md", "head.safetensors", "preference.json"}


def test_a_head_says_its_backbones_name_and_not_where_it_lay(tmp_path):
    """Kills machine paths in what is shared, PEFT's own file among it; and a missing backbone found in mid-run."""
    options = QUICK | {"lora": 2, "backbone_name": "scenes-vlm"}
    train_preference(colour_pairs(2), tmp_path / "named", **options)
    place = str(Path(BUNDLED).parent).encode()
    assert not [name for name, raw in contents(tmp_path / "named").items() if place in raw]
    assert backbone_name(tmp_path / "named") == "scenes-vlm"
    assert "backbone: `scenes-vlm`" in (tmp_path / "named" / "README.md").read_text()
    with pytest.raises(ValueError, match="'scenes-vlm' could not be loaded .* trained on as option backbone"):
        PreferenceReward.load(tmp_path / "named").prepare()
    reward = PreferenceReward.load(tmp_path / "named", backbone=BUNDLED)
    reward.prepare()
    judge = reward.judge
    reward.prepare()
    assert reward.judge is judge
    train_preference(colour_pairs(2), tmp_path / "folder", **QUICK)
    assert backbone_name(tmp_path / "folder") == BUNDLED
    assert "backbone: `scenes_vlm`" in (tmp_path / "folder" / "README.md").read_text()


def test_another_backbone_is_refused(adapted, tiny_model):
    with pytest.raises(ValueError, match="are not those that the preference head"):
        PreferenceReward.load(adapted, backbone=tiny_model("llava")).prepare()


# ---------------------------------------------------------------- sharing a policy's weights


def make_policy(rank: int = 3, targets: str = r".*language_model.*q_proj"):
    """A PeftModel whose adapter does something, in training mode but for one module, one of its weights frozen."""
    from transformers import AutoProcessor

    torch.manual_seed(1)
    base = AutoModelForImageTextToText.from_pretrained(BUNDLED, dtype=torch.float32)
    policy = get_peft_model(base, LoraConfig(r=rank, target_modules=targets, lora_dropout=0.5))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.2)
    policy.train()
    policy.get_base_model().model.vision_tower.eval()
    next(p for n, p in policy.named_parameters() if "lora_A" in n).requires_grad_(False)
    return policy, AutoProcessor.from_pretrained(BUNDLED)


def snapshot(policy) -> dict:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {n: m for n, m in policy.named_modules() if isinstance(m, BaseTunerLayer)}
    own = [(n.replace(".base_layer", ""), m) for n, m in policy.named_modules() if ".lora_" not in n]
    return {
        "trainable": [n for n, p in policy.named_parameters() if p.requires_grad],
        "modes": {(n, m.training) for n, m in own},
        "active": (list(policy.active_adapters), policy.active_adapter),
        "layers": {n: (list(m.active_adapters), m.disable_adapters) for n, m in layers.items() if "q_proj" in n},
    }


def policy_output(policy) -> torch.Tensor:
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # the policy is in training mode, dropout and all
        return policy(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("which", ["adapted", "frozen"])
def test_a_shared_policy_is_left_as_it_was(which, request):
    """Kills adapters left on or off, weights made trainable, modes changed, and scores that see the policy's adapter.

    The head's adapter reaches layers that the policy's does not, so that new layers are wrapped as well.
    """
    folder = request.getfixturevalue(which)
    own = PreferenceReward.load(folder)(**columns(PICTURED)).values
    policy, processor = make_policy()
    before, output, size = snapshot(policy), policy_output(policy), sum(p.numel() for p in policy.parameters())
    reward = PreferenceReward.load(folder).share(policy, processor)
    for _ in range(2):
        assert snapshot(policy) == before
        assert torch.equal(policy_output(policy), output)
        state = torch.get_rng_state()
        np.testing.assert_allclose(reward(**columns(PICTURED)).values, own, atol=1e-5)
        assert torch.equal(torch.get_rng_state(), state)
    added = sum(p.numel() for p in policy.parameters()) - size
    assert added == (0 if which == "frozen" else 27_456)  # 4 x (256 + 192 + 192 + 256 + 3 x 464) x 3 layers


def test_a_shared_policy_is_left_as_it_was_after_an_error(adapted):
    policy, processor = make_policy()
    reward = PreferenceReward.load(adapted).share(policy, processor)
    before = snapshot(policy)
    with pytest.raises(ValueError, match="row 0"):
        reward(prompts=[ROWS[3].prompt], completions=["a"], images=[[PICTURES["red"]] * 2])
    assert snapshot(policy) == before
    with policy.disable_adapter():  # as a policy does for its reference
        inside = snapshot(policy)
        reward(**columns(PICTURED))
        assert snapshot(policy) == inside


def test_sharing_is_refused_where_it_would_be_wrong(adapted):
    reward = PreferenceReward.load(adapted)
    plain = AutoModelForImageTextToText.from_pretrained(BUNDLED, dtype=torch.float32)
    with pytest.raises(ValueError, match="can share the weights of a PeftModel"):
        reward.share(plain, None)
    policy, processor = make_policy()
    weight = policy.get_base_model().get_output_embeddings().weight
    weight.requires_grad_(True)
    with pytest.raises(ValueError, match="base weights are being trained"):
        reward.share(policy, processor)
    weight.requires_grad_(False)
    reward.share(policy, processor)
    with pytest.raises(ValueError, match="an adapter 'preference' already"):
        PreferenceReward.load(adapted).share(policy, processor, "preference")
    second = PreferenceReward.load(adapted).share(policy, processor)  # under a name of its own
    np.testing.assert_allclose(second(**columns(PICTURED)).values, reward(**columns(PICTURED)).values, atol=1e-6)
    with torch.no_grad():
        weight[0, 0] += 1
    with pytest.raises(ValueError, match="are not those that the preference head was trained on"):
        PreferenceReward.load(adapted).share(policy, processor, "another")


@pytest.mark.parametrize("which", ["adapted", "frozen"])
def test_sharing_again_moves_the_head(which, request):
    """Kills a judge left in a model that is thrown away, wrapped layers included, and scores read through the old."""
    folder = request.getfixturevalue(which)
    (old, processor), (new, _) = make_policy(), make_policy()
    names, before, output = [n for n, _ in old.named_modules()], snapshot(old), policy_output(old)
    reward = PreferenceReward.load(folder, cache_bytes=1000).share(old, processor)
    values = reward(**columns(PICTURED)).values
    reward.share(new, processor)
    assert [n for n, _ in old.named_modules()] == names and list(old.peft_config) == ["default"]
    assert snapshot(old) == before and torch.equal(policy_output(old), output)
    assert reward.judge.backbone.model is new and reward.judge.backbone.cache_bytes == 1000
    np.testing.assert_allclose(reward(**columns(PICTURED)).values, values, atol=1e-5)
    reward.share(new, processor)  # the same once more: one adapter, not two
    assert list(new.peft_config) == ["default", *(["preference"] if which == "adapted" else [])]


def test_a_refused_model_is_not_scored_with_the_one_before(adapted):
    """Kills the model of an earlier trainer kept in memory when the next one cannot be shared."""
    policy, processor = make_policy()
    names = [n for n, _ in policy.named_modules()]
    reward = PreferenceReward.load(adapted).share(policy, processor)
    other, _ = make_policy()
    with torch.no_grad():
        other.get_base_model().get_output_embeddings().weight[0, 0] += 1
    with pytest.raises(ValueError, match="are not those"):
        reward.share(other, processor)
    assert [n for n, _ in policy.named_modules()] == names
    assert np.isfinite(reward(**columns(PICTURED)).values).all()
    assert reward.judge.backbone.model not in (policy, other)


def test_noise_on_any_one_linear_shows_in_the_fingerprint():
    """Kills a hash that looks at some layers only. Sixteen of the tensors were once all it saw."""
    model = load_backbone(BUNDLED)[0]
    known, linears = fingerprint(model), [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) > 30
    for linear in linears:
        kept = linear.weight.detach().clone()
        with torch.no_grad():
            linear.weight.add_(0.01 * torch.randn_like(kept))
            assert fingerprint(model) != known
            linear.weight.copy_(kept)
    assert fingerprint(model) == known


def test_fingerprint_looks_at_every_column_of_a_matrix():
    """Kills equal steps, which in a matrix fall into one column or a few: of 32 columns at least 20 are met."""
    module = torch.nn.Linear(32, 64, bias=False)
    known, met = fingerprint(module), 0
    for column in range(32):
        kept = module.weight.detach().clone()
        with torch.no_grad():
            module.weight[:, column] += 1
            met += fingerprint(module) != known
            module.weight.copy_(kept)
    assert met >= 20


def test_fingerprint_is_of_the_base_alone():
    policy, _ = make_policy()
    assert fingerprint(policy) == fingerprint(AutoModelForImageTextToText.from_pretrained(BUNDLED, dtype=torch.float32))
