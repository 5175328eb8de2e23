"""The built-in world. Each test names the mistake it is there to catch."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from mmft.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIDE,
    SPLITS,
    Background,
    Scene,
    SceneObject,
    attribute_claims,
    captions,
    make_scene,
    render,
    scene_rows,
)


def thing(shape: str, colour: str, size: str, x: float, y: float, radius: float) -> SceneObject:
    return SceneObject(shape, colour, size, x, y, radius, 0.0, COLOURS[colour])


@pytest.fixture
def scene() -> Scene:
    """A large red circle on the left and a small blue square on the right, on plain white."""
    objects = (thing("circle", "red", "large", 26, 48, 19), thing("square", "blue", "small", 74, 48, 8))
    return Scene(0, objects, Background("white", "plain"), 0.0)


# --- determinism: a hidden global random state, or an order that depends on the process ---------------


def test_same_seed_same_world_whatever_the_global_state() -> None:
    random.seed(1)
    np.random.seed(1)
    first = [(make_scene(s), captions(make_scene(s)), render(make_scene(s)).tobytes()) for s in range(20)]
    random.seed(2)
    np.random.seed(2)
    before = (random.getstate(), np.random.get_state()[1].tolist())
    again = [(make_scene(s), captions(make_scene(s)), render(make_scene(s)).tobytes()) for s in reversed(range(20))]
    assert first == again[::-1]
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


def test_words_of_a_seed_never_drift() -> None:
    """The weights were trained on these very captions: a changed draw would silently change the task."""
    text = "\n".join(line for seed in range(200) for line in captions(make_scene(seed)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "c12f76618d45f5dc"


def test_more_captions_keep_the_first() -> None:
    assert captions(make_scene(5), 8)[:5] == captions(make_scene(5))


# --- the world -----------------------------------------------------------------------------------------


def test_scenes_are_in_bounds_and_varied() -> None:
    scenes = [make_scene(s) for s in range(400)]
    assert {len(s.objects) for s in scenes} == {1, 2, 3, 4}
    assert {o.shape for s in scenes for o in s.objects} == set(SHAPES)
    assert {o.colour for s in scenes for o in s.objects} == set(COLOURS)
    assert {s.background.colour for s in scenes} == set(BACKGROUNDS)
    for s in scenes:
        assert len({(o.colour, o.shape) for o in s.objects}) == len(s.objects)
        for o in s.objects:
            assert min(o.box) >= 0 and max(o.box) <= SIDE
    assert any(s.noise > 0 for s in scenes) and any(s.noise == 0 for s in scenes)
    assert any(r == "behind" for s in scenes for _, r, _ in s.relations())


def test_places_and_relations_follow_the_picture_not_the_maths_axis(scene: Scene) -> None:
    """y grows downwards: a common slip makes "above" mean below."""
    assert [o.place for o in scene.objects] == ["left", "right"]
    assert scene.relation(0, 1) == "left of" and scene.relation(1, 0) == "right of"
    up, down = thing("star", "green", "small", 48, 10, 8), thing("ring", "pink", "small", 48, 86, 8)
    tall = Scene(0, (up, down), Background("black", "plain"), 0.0)
    assert tall.relation(0, 1) == "above" and [o.place for o in tall.objects] == ["top", "bottom"]
    near = Scene(0, (up, thing("ring", "pink", "small", 52, 14, 8)), Background("black", "plain"), 0.0)
    assert near.relation(1, 0) == "in front of" and near.relation(0, 1) == "behind"


def test_the_stated_colour_is_at_the_stated_place(scene: Scene) -> None:
    picture = render(scene)
    assert picture.mode == "RGB" and picture.size == (SIDE, SIDE)
    assert picture.getpixel((26, 48)) == COLOURS["red"]
    assert picture.getpixel((74, 48)) == COLOURS["blue"]
    assert picture.getpixel((50, 5)) == BACKGROUNDS["white"]


def test_later_objects_cover_earlier_ones() -> None:
    below, above = thing("square", "red", "large", 48, 48, 20), thing("circle", "blue", "small", 48, 48, 8)
    stacked = Scene(0, (below, above), Background("white", "plain"), 0.0)
    assert render(stacked).getpixel((48, 48)) == COLOURS["blue"]
    assert render(stacked).getpixel((60, 48)) == COLOURS["red"]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_its_own_silhouette(shape: str) -> None:
    def mask(name: str) -> np.ndarray:
        lone = Scene(0, (thing(name, "red", "large", 48, 48, 20),), Background("white", "plain"), 0.0)
        return np.asarray(render(lone))[..., 1] < 140

    mine = mask(shape)
    assert 200 < mine.sum() < 1400
    for other in SHAPES:
        if other != shape:
            theirs = mask(other)
            assert (mine & theirs).sum() / (mine | theirs).sum() < 0.9, (shape, other)


def test_noise_changes_pixels_but_not_their_mean(scene: Scene) -> None:
    grainy = Scene(scene.seed, scene.objects, scene.background, 10.0)
    clean, noisy = (np.asarray(render(s), dtype=float) for s in (scene, grainy))
    assert not np.array_equal(clean, noisy)
    assert abs((noisy - clean)[40:56, 18:34].mean()) < 3


# --- captions ------------------------------------------------------------------------------------------


def test_captions_are_clean_varied_and_true() -> None:
    texts: list[str] = []
    for seed in range(600):
        world = make_scene(seed)
        for text in captions(world):
            assert 5 <= len(text.split()) <= 16 and text == text.lower() and text.replace(" ", "").isalpha(), text
            true, total = attribute_claims(text, world)
            assert 0 < true == total, (text, world)
            assert text.split()[-1] not in "a an the of on in at to and with is it".split(), text
            texts.append(text)
    assert len(set(texts)) > 0.9 * len(texts)
    openings = {" ".join(t.split()[:2]) for t in texts}
    assert len(openings) > 60


def test_references_of_one_scene_disagree_in_wording() -> None:
    """Five copies of one template would leave reinforcement learning no consensus to find."""
    distinct = [len(set(captions(make_scene(seed)))) for seed in range(200)]
    assert np.mean(distinct) > 4.5


# --- claims: hand-written captions against a hand-made scene -------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a large red circle and a small blue square on a white background", (5, 5)),
        ("A big red disc, a tiny blue box.", (4, 4)),
        ("a red round shape", (1, 1)),
        ("two shapes on a white background", (2, 2)),
        ("three shapes", (0, 1)),
        ("a red square", (0, 1)),
        ("a blue circle and a red square", (0, 2)),
        ("a small red circle", (1, 2)),
        ("a huge green star", (0, 2)),
        ("a circle", (1, 1)),
        ("a red shape", (1, 1)),
        ("a white circle", (0, 1)),
        ("a striped white backdrop", (1, 2)),
        ("a red circle and a red circle and a red circle", (1, 3)),
        ("a red circle plus a blue square", (2, 2)),
        ("a red plus sign", (0, 1)),
        ("two red circles", (1, 1)),
        ("a man rides a horse", (0, 0)),
        ("", (0, 0)),
        ("red red blue large", (0, 0)),
    ],
)
def test_attribute_claims(scene: Scene, caption: str, expected: tuple[int, int]) -> None:
    assert attribute_claims(caption, scene) == expected


# --- splits and rows -----------------------------------------------------------------------------------


def test_splits_are_disjoint_and_large_enough() -> None:
    seen: set[int] = set()
    for name, seeds in SPLITS.items():
        assert not seen & set(seeds), name
        seen |= set(seeds)
    assert len(SPLITS["train"]) >= 20_000
    assert len(SPLITS["validation"]) >= 1_000 and len(SPLITS["test"]) >= 2_000
    assert len(set(SPLITS) - {"train", "validation", "test"}) >= 2


def test_rows_are_lazy_and_text_agrees_with_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = scene_rows("test", limit=3)
    full = rows[2]
    assert list(full) == rows.column_names and full["image"].size == (SIDE, SIDE)

    def no_drawing(_: Scene) -> None:
        raise AssertionError("a picture was drawn for its text")

    monkeypatch.setattr("mmft.data.scenes.render", no_drawing)
    text = rows.text(2)
    assert "image" not in text and text["picture"] == full["id"]
    assert all(text[key] == full[key] for key in rows.column_names if key != "image")
    assert rows.references()[2] == full["references"] and len(full["references"]) == 5
    assert len(rows) == 3 and len(rows[1:]) == 2 and rows.text(-1) == text


def test_row_errors_name_the_split() -> None:
    with pytest.raises(ValueError, match=r"'val'.*validation"):
        scene_rows("val")
    with pytest.raises(IndexError):
        scene_rows("test", 2)[2]
    with pytest.raises(ValueError, match="limit"):
        scene_rows("test", 0)
