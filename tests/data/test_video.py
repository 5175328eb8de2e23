"""Clips: the right frames, at the right times, and every broken file named."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from data.clips import number_of, square, turn, write_clip
from PIL import Image

from mmft.data import Rows, check_rows, load_rows
from mmft.data import video as video_module
from mmft.data.rows import OpenedRows
from mmft.data.video import Clips, check_clip, open_clip

EVEN = [100 * i for i in range(42)]


def numbers(clip) -> list[int]:
    return [number_of(picture) for picture in clip["frames"]]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),  # B-frames: packets are not in the order of their times
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.avi", "mpeg4"),
        ("a.ts", "libx264"),  # the first frame is not at zero
        ("a.h264", "libx264"),  # no times at all
    ],
)
def test_the_frames_in_the_middle_of_even_stretches(tmp_path, name, codec):
    path = write_clip(tmp_path / name, EVEN, codec)
    clip = open_clip(path, "row 1", frames=4)
    # 42 frames of 0.1 s; the middles of four stretches of 1.05 s lie at 0.525, 1.575, 2.625 and 3.675 s.
    assert numbers(clip) == [5, 15, 26, 36]
    if name != "a.h264":
        assert clip["times"] == pytest.approx([0.525, 1.575, 2.625, 3.675], abs=0.02)
        assert clip["duration"] == pytest.approx(4.2, abs=0.05)
    assert all(frame.mode == "RGB" and frame.size == (192, 48) for frame in clip["frames"])


def test_a_variable_frame_rate_is_sampled_by_time(tmp_path):
    # One second with 10 frames a second, then 3 s in which nothing moves, then one second again.
    stamps = [100 * i for i in range(10)] + [4000 + 100 * i for i in range(10)]
    clip = open_clip(write_clip(tmp_path / "a.mp4", stamps), "row 1", frames=4)
    # Middles: 0.625, 1.875, 3.125, 4.375 s. By frame count they would be 2, 7, 12, 17.
    assert numbers(clip) == [6, 9, 9, 13]
    assert clip["times"] == pytest.approx([0.625, 1.875, 3.125, 4.375], abs=0.02)


def test_only_what_leads_up_to_a_frame_is_decoded(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", EVEN, gop=5)
    taken, decoded = [], []
    whole = video_module._picture
    monkeypatch.setattr(video_module, "_picture", lambda *a: taken.append(1) or whole(*a))
    real = video_module.enumerate if hasattr(video_module, "enumerate") else enumerate
    monkeypatch.setattr(
        video_module, "enumerate", lambda frames: real(decoded.append(1) or f for f in frames), raising=False
    )
    assert numbers(open_clip(path, "row 1", frames=2)) == [10, 31]
    assert len(taken) == 2 and len(decoded) <= 4  # 32 without a jump to the key frame before


def test_a_wrong_index_costs_time_and_nothing_else(tmp_path):
    path = write_clip(tmp_path / "a.mkv", EVEN, gop=12)
    # Keys that are none: the jump lands behind the frame or before it, and the frame is the right one all the same.
    picture = video_module._pictures(path, "row 1", [1700], [0, 1700], 768)[1700]
    assert number_of(picture) == 17


def test_a_rotated_clip_is_turned_upright(tmp_path):
    path = write_clip(tmp_path / "a.mp4", EVEN[:8])
    turn(path)
    frame = open_clip(path, "row 1", frames=1)["frames"][0]
    assert frame.size == (48, 192)
    # Clockwise: what was above is at the right, what was at the left is above.
    white = np.argwhere(np.asarray(frame.convert("L")) > 127)
    assert white.mean(0) == pytest.approx(np.argwhere(np.rot90(square(4), -1)[..., 0]).mean(0), abs=1)


def test_long_frames_are_made_smaller_and_short_clips_show_a_frame_again(tmp_path):
    clip = open_clip(write_clip(tmp_path / "a.mp4", EVEN[:2]), "row 1", frames=4, max_side=96)
    assert [frame.size for frame in clip["frames"]] == [(96, 24)] * 4
    assert [number_of(frame.resize((192, 48))) for frame in clip["frames"]] == [0, 0, 1, 1]
    single = open_clip(write_clip(tmp_path / "b.mp4", [0]), "row 1", frames=2)
    assert numbers(single) == [0, 0] and single["duration"] > 0


def test_lists_of_frames_are_thinned_and_never_padded():
    frames = [Image.fromarray(square(i)) for i in range(9)]
    clip = open_clip(frames, "row 1", frames=3)
    assert numbers(clip) == [1, 4, 7] and clip["times"] == [1.0, 4.0, 7.0] and clip["duration"] == 9.0
    assert len(open_clip(frames[:2], "row 1", frames=8)["frames"]) == 2
    assert open_clip(clip, "row 1", frames=8)["times"] == clip["times"]


def error(path, **options) -> str:
    with pytest.raises(ValueError) as caught:
        open_clip(path, f"row 7: clip {path}", **options)
    assert str(caught.value).startswith(f"row 7: clip {path}")
    return str(caught.value)


def test_broken_files_are_named(tmp_path):
    good = write_clip(tmp_path / "a.mp4", EVEN)
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:4,\n{good}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile {good.name}\n")
    assert "does not exist" in error(tmp_path / "none.mp4")
    assert "is empty" in error(tmp_path / "empty.mp4")
    assert "is a folder" in error(tmp_path)
    for name in ("cut.mp4", "text.mp4", "list.m3u8", "list.ffconcat"):  # a playlist would open other files
        assert "is no clip or is damaged" in error(tmp_path / name)
    assert "expected at least 1" in error(good, frames=0)
    with pytest.raises(ValueError, match="row 3 has no frames"):
        open_clip([], "row 3")
    with pytest.raises(ValueError, match="row 3: expected a path"):
        open_clip(["a.png"], "row 3")


def test_a_clip_without_frames_and_a_sound_are_no_clips(tmp_path):
    import av
    from data.clips import write_sound

    for name, said in (("a.avi", "has no frames"), ("a.mkv", "is no clip or is damaged")):
        with av.open(str(tmp_path / name), "w") as file:
            stream = file.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            file.start_encoding()
        assert said in error(tmp_path / name)
    assert "holds no video, only audio" in error(write_sound(tmp_path / "a.wav"))


def test_a_clip_that_breaks_off_after_its_header_is_damaged(tmp_path):
    import av

    good = tmp_path / "a.mp4"
    with av.open(str(good), "w", options={"movflags": "faststart"}) as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 192, 48, "yuv420p"
        for number in range(40):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(square(number), format="rgb24")))
        file.mux(stream.encode())
    data = good.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) - 400])
    assert "is damaged" in error(tmp_path / "cut.mp4")


def test_without_pyav_it_is_said_what_to_install(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", EVEN[:2])
    monkeypatch.setitem(sys.modules, "av", None)
    assert r"pip install 'mmft[video]'" in error(path)


# --- rows ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "clips"
    (root / "videos").mkdir(parents=True)
    for name in "ab":
        write_clip(root / "videos" / f"{name}.mp4", EVEN)
    (root / "captions.csv").write_text("video,caption\na.mp4,a square\nb.mp4,moves on\na.mp4,goes right\n")
    (root / "train.txt").write_text("b.mp4\na.mp4\n")
    return root


def test_a_folder_of_clips_gives_rows_of_several_pictures(folder):
    rows = load_rows(str(folder), "train", clips=Clips(frames=4))
    assert isinstance(rows, Rows) and rows.column_names == ["id", "prompt", "images", "references"]
    row = rows[1]
    assert [number_of(picture) for picture in row["images"]] == [5, 15, 26, 36]
    assert row["prompt"] == "Describe the clip." and row["references"] == ["a square", "goes right"]
    assert rows.text(0)["picture"] == "b.mp4"
    check_rows(rows)
    assert len(load_rows(str(folder), "train")[0]["images"]) == 8


def test_native_rows_keep_the_clip_in_one_piece(folder):
    row = load_rows(str(folder), "train", clips=Clips(frames=4, native=True))[0]
    assert set(row) == {"id", "prompt", "video", "references"}
    assert len(row["video"]["frames"]) == 4 and row["video"]["duration"] == pytest.approx(4.2, abs=0.05)


def test_a_bad_clip_is_found_before_training(folder):
    (folder / "videos" / "b.mp4").write_bytes(b"no clip at all")
    with pytest.raises(ValueError, match=r"1 of 2 rows cannot be used:\n  row b\.mp4: clip .*b\.mp4 is no clip or is"):
        load_rows(str(folder), "train")
    with pytest.raises(ValueError, match="is no clip"):
        check_clip(folder / "videos" / "b.mp4", "row 1")


def test_msrvtt_json(folder):
    (folder / "captions.csv").unlink(), (folder / "train.txt").unlink()
    videos = [{"video_id": name, "split": split} for name, split in (("a", "train"), ("b", "validate"))]
    sentences = [{"video_id": name, "caption": f"of {name}", "sen_id": i} for i, name in enumerate("bab")]
    (folder / "captions.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    assert load_rows(str(folder), "validate").references() == [["of b", "of b"]]
    (folder / "captions.json").write_text(json.dumps({"videos": videos[:1], "sentences": sentences}))
    with pytest.raises(ValueError, match=r"sentences\[0\]: video_id 'b' is not among the videos"):
        load_rows(str(folder), "train")


def test_a_card_of_clips(folder, tmp_path):
    (folder / "videos").rename(folder / "mp4")
    card = tmp_path / "mine.yaml"
    card.write_text("name: mine\nroot: clips\nmedia: video\nimages: mp4\nprompt: What moves?\n")
    row = load_rows(str(card), "all")[0]
    assert row["prompt"] == "What moves?" and len(row["images"]) == 8


def test_the_column_video_of_any_rows_is_opened(folder):
    path = folder / "videos" / "a.mp4"
    table = [
        {"id": "x", "prompt": "p", "video": str(path)},
        {"id": "y", "prompt": "p", "video": {"path": None, "bytes": path.read_bytes()}},
        {"id": "z", "prompt": "p"},
        {"id": "w", "prompt": "p", "video": "nowhere.mp4"},
    ]
    rows = OpenedRows(table, "video", Clips(frames=4).reader)
    assert [number_of(picture) for picture in rows[0]["images"]] == [5, 15, 26, 36]
    assert [number_of(picture) for picture in rows[1:][0]["images"]] == [5, 15, 26, 36]
    assert rows[2] == table[2]
    with pytest.raises(ValueError, match=r"row w: video nowhere\.mp4 does not exist"):
        rows[3]
