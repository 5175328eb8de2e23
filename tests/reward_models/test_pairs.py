"""Reading preference rows. Each test names the mistake it is there to catch."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from reward_models.preference.pairs import Pair, Rating, open_picture, read_pairs

PHOTOS = Path(__file__).parents[3] / "shared" / "real" / "flickr8k"
PICTURE = Image.new("RGB", (4, 3), (200, 10, 10))


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def png(image: Image.Image = PICTURE) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def one(row: dict, **options) -> Pair | Rating:
    (found,) = read_pairs([row], **options)
    return found


def refused(row: dict, **options) -> str:
    with pytest.raises(ValueError) as caught:
        read_pairs([{"chosen": "a", "rejected": "b"}, row], **options)
    return str(caught.value)


def test_trl_plain_with_explicit_prompt_keeps_the_prompt_out_of_the_texts():
    row = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "id": 7}
    assert one(row) == Pair("The sky is", (), " blue.", " green.", id="7")


def test_trl_plain_with_implicit_prompt_is_cut_between_words():
    """The longest common start in letters would tear "blue" and "black" apart: prompt "The sky is bl"."""
    pair = one({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("The sky is", "blue.", "black.")


def test_captions_of_a_picture_are_whole_texts():
    """Two captions that begin alike are no question with two answers."""
    pair = one({"image": PICTURE, "chosen": "A boy runs .", "rejected": "A boy sleeps ."}, prompt="What is this?")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("What is this?", "A boy runs .", "A boy sleeps .")
    assert pair.images == (PICTURE,)


def test_trl_conversational_explicit_and_implicit_are_the_same():
    question = [user("What colour is it?")]
    explicit = {"prompt": question, "chosen": [assistant("red")], "rejected": [assistant("blue")]}
    implicit = {"chosen": [*question, assistant("red")], "rejected": [*question, assistant("blue")]}
    both = {"prompt": question, **implicit}
    plain_prompt = {"prompt": "What colour is it?", **implicit}
    expected = Pair(question, (), "red", "blue")
    assert one(explicit) == one(implicit) == one(both) == expected
    assert one(plain_prompt) == Pair("What colour is it?", (), "red", "blue")


def test_earlier_turns_stay_in_the_prompt():
    """Taking only the first message as the prompt would lose what the answer refers to."""
    start = [user("Hello"), assistant("Yes?"), user("What is this?")]
    pair = one({"chosen": [*start, assistant("a cat")], "rejected": [*start, assistant("a dog")]})
    assert pair.prompt == start and pair.chosen == "a cat"


def test_content_parts_and_the_empty_keys_of_arrow():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What is this?"}]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]
    pair = one({"prompt": [user(parts)], "chosen": answer, "rejected": [assistant("a dog")], "images": [PICTURE]})
    assert pair.prompt == [user([{"type": "image"}, {"type": "text", "text": "What is this?"}])]
    assert (pair.chosen, pair.rejected, len(pair.images)) == ("a cat", "a dog", 1)


def test_rlhf_v_and_rlaif_v():
    """RLHF-V keeps question and answers as JSON in `text`, RLAIF-V in columns of their own."""
    inner = {"question": "What is on the table?", "chosen": "A cup.", "rejected": "A cup and two plates."}
    stored = {"bytes": png(), "path": "somewhere/else.png"}
    rest = {"image": stored, "idx": 12, "origin_dataset": "COCO", "image_path": "somewhere/else.png"}
    expected = Pair("What is on the table?", (stored["bytes"],), "A cup.", "A cup and two plates.", id="12")
    assert one({"ds_name": "RLHF-V", "text": json.dumps(inner), **rest}) == expected
    assert one({"ds_name": "RLAIF-V", **inner, **rest}) == expected
    assert open_picture(expected.images[0]).getpixel((0, 0)) == (200, 10, 10)


def test_ratings_and_margins():
    row = {"prompt": "Describe it.", "completion": [assistant("a cat")], "rating": 3, "image": PICTURE}
    assert one(row) == Rating("Describe it.", (PICTURE,), "a cat", 3.0)
    graded = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_ratings": [3, 4, 2], "rejected_ratings": [1, 1, 2]}
    assert one(graded).margin == pytest.approx(3 - 4 / 3)
    assert one({**graded, "margin": 0.5, "kind": "colour"}).margin == 0.5
    assert one({"prompt": "p", "chosen": "a", "rejected": ""}).rejected == ""


def test_pictures_in_every_form(tmp_path):
    """A path must be looked up below the given folder, and nothing opened before it is looked at."""
    PICTURE.save(tmp_path / "a.png")
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    forms = ["a.png", {"path": "a.png", "bytes": None}, {"bytes": png()}, png(), PICTURE, lambda: PICTURE]
    for form in forms:
        pair = one({**row, "image": form}, root=tmp_path)
        opened = open_picture(pair.images[0])
        assert opened.mode == "RGB" and opened.getpixel((0, 0)) == (200, 10, 10)
    assert len(one({**row, "images": ["a.png", "a.png"]}, root=tmp_path).images) == 2
    assert one({**row, "image": None}).images == ()
    assert open_picture(Image.new("L", (2, 2), 7)).mode == "RGB"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "a"}, ["rejected: missing among the columns chosen", "'completion' and 'rating'"]),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, ["rejected: the same text", "take the row out"]),
        ({"prompt": "p", "chosen": " ", "rejected": "a"}, ["chosen: empty"]),
        ({"prompt": "p", "chosen": [assistant("a")], "rejected": "b"}, ["the same form for both"]),
        ({"chosen": [user("q")], "rejected": [assistant("b")]}, ["chosen: messages of user", "one assistant message"]),
        ({"prompt": [user("p")], "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
         ["prompt: not what chosen and rejected begin with"]),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, ["prompt: int", "'role' and 'content'"]),
        ({"text": "no json", "image": PICTURE}, ["text: not JSON", "question, chosen and rejected"]),
        ({"text": '{"question": "q"}'}, ["text: JSON with question; expected"]),
        ({"prompt": "p", "completion": "a", "rating": "good"}, ["rating: got 'good'", "a finite number"]),
        ({"prompt": "p", "rating": 3}, ["completion: missing"]),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("nan")}, ["margin: got nan"]),
        ({"chosen": "a", "rejected": "b", "chosen_ratings": [1], "rejected_ratings": [2]}, ["mean 1, below", "2"]),
        ({"chosen": "a", "rejected": "b", "image": "none.jpg"}, ["image: there is no file", "none.jpg"]),
        ({"chosen": "a", "rejected": "b", "image": 5}, ["image: got int", "a path"]),
        ({"chosen": "a", "rejected": "b", "image": PICTURE, "images": [PICTURE]}, ["one of the two columns"]),
    ],
)  # fmt: skip
def test_errors_name_row_and_key_and_say_how_to_mend(row, said):
    message = refused({**row, "id": "x9"}, source="set.jsonl")
    assert message.startswith("set.jsonl: row 1 (id 'x9'): ")
    for part in said:
        assert part in message


def test_empty_and_foreign_rows():
    with pytest.raises(ValueError, match="no rows"):
        read_pairs([])
    with pytest.raises(ValueError, match="row 0 is str"):
        read_pairs(["chosen"])


def test_rows_of_a_dataset():
    """A `datasets.Dataset` gives columns of None and nested dicts of its own making."""
    import datasets

    rows = [
        {"image": {"bytes": png(), "path": None}, "prompt": [user("q")], "chosen": [assistant("a")],
         "rejected": [assistant("b")], "margin": None},
        {"image": None, "prompt": [user("r")], "chosen": [assistant("c")], "rejected": [assistant("d")], "margin": 2.0},
    ]  # fmt: skip
    dataset = datasets.Dataset.from_list(rows)
    first, second = read_pairs(dataset)
    assert open_picture(first.images[0]).size == (4, 3) and first.margin is None
    assert second == Pair([user("r")], (), "c", "d", margin=2.0)
    decoded = read_pairs(dataset.cast_column("image", datasets.Image()))
    assert open_picture(decoded[0].images[0]).size == (4, 3)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photos are not here")
def test_expert_preferences_about_photos():
    lines = (PHOTOS / "preferences.jsonl").read_text().splitlines()
    pairs = read_pairs(map(json.loads, lines), root=PHOTOS / "images")
    assert len(pairs) == 320
    assert all(isinstance(p, Pair) and p.margin > 0 and p.prompt == "Describe the picture." for p in pairs)
    assert pairs[0].chosen == "A little boy shakes the snow off of a tree ." and pairs[0].margin == 1.0
    assert open_picture(pairs[0].images[0]).mode == "RGB"
