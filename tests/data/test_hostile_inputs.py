"""Files by strangers: rows 22, 23 and 26 of the reliability table, for pictures, clips and sounds."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import zlib
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from data.clips import write_clip, write_sound
from data.hostile import data_folder, png, png_bomb, png_header, saved, sixteen_kinds, smooth
from PIL import Image

from mmft.data import Clips, OpenedRows, Sounds, UsableRows, check_rows, load_rows, opened_here
from mmft.data.mp4 import check_tables
from mmft.data.rows import PICTURES, FileRows, open_picture, write_skipped
from mmft.data.video import check_clip
from mmft.vlm.media import media_of
from reward_models.preference.pairs import read_pairs

ROOT = Path(__file__).parents[2]


@contextmanager
def within(seconds: float):
    """Fails where something is waited for: a pipe without a writer, a device without an end."""

    def late(*_):
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- row 22: the kinds of pictures -----------------------------------------------------------------


def test_sixteen_kinds_are_right_or_an_error_that_says_why(tmp_path):
    kinds, right, refused = sixteen_kinds(tmp_path), 0, 0
    for number, (name, truth) in enumerate(kinds.items()):
        if isinstance(truth, str):
            with pytest.raises(ValueError) as caught:
                open_picture(tmp_path / name, row=str(number))
            assert str(caught.value).startswith(f"row {number}: picture {tmp_path / name} ")
            assert truth in str(caught.value), caught.value
            refused += 1
            continue
        image = open_picture(tmp_path / name, row=str(number))
        assert image.mode == "RGB" and image.size == truth.shape[1::-1], name
        error = np.abs(np.asarray(image, float) - truth).mean()
        print(f"{name}: mean error {error:.3f} of 255")
        assert error <= 1, (name, error)
        right += 1
    assert (right, refused) == (9, 7)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation):
    stored, exif = smooth(), Image.Exif()
    exif[0x0112] = orientation
    mirrored = stored[:, ::-1] if orientation in (2, 4, 5, 7) else stored
    upright = np.rot90(mirrored, {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}[orientation])
    image = open_picture(saved(Image.fromarray(stored), "PNG", exif=exif))
    assert np.array_equal(np.asarray(image), upright)


def test_bad_rows_are_an_error_that_lists_them_or_are_left_out_and_counted(tmp_path, capsys):
    kinds = data_folder(tmp_path)
    bad = {name for name, truth in kinds.items() if isinstance(truth, str)}
    with pytest.raises(ValueError, match=f"{len(bad)} of 16 rows cannot be used") as caught:
        load_rows(str(tmp_path), "all")
    assert all(f"row {name}: picture" in str(caught.value) for name in bad)
    rows = load_rows(str(tmp_path), "all", bad_rows="skip", prompt="What is it?")
    assert isinstance(rows, UsableRows) and len(rows) == 16 - len(bad) == len(rows.references())
    assert {row["id"] for row in rows} == set(kinds) - bad and rows[0]["prompt"] == "What is it?"
    assert [rows.text(i)["id"] for i in range(len(rows))] == [row["id"] for row in rows]
    write_skipped(tmp_path, train=rows, eval=rows.rows)
    said = [json.loads(line) for line in (tmp_path / "skipped_rows.jsonl").read_text().splitlines()]
    assert {line["row"] for line in said} == bad and {line["split"] for line in said} == {"train"}
    assert all(kinds[line["row"]] in line["reason"] for line in said)
    assert f"{len(bad)} of train, 0 of eval" in capsys.readouterr().err


def test_what_only_decoding_shows_is_found_by_decoding(tmp_path):
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in smooth()))
    (tmp_path / "a.png").write_bytes(png(40, 24, 8, 2, pixels[: len(pixels) // 2]))  # its checksums are right
    rows = FileRows([{"id": "a", "prompt": "", "picture": "a.png", "references": ["x"]}], tmp_path)
    check_rows(rows, decode=0)
    with pytest.raises(ValueError, match="row a: picture .*a.png is damaged"):
        check_rows(rows)


def test_a_picture_that_breaks_later_gives_its_place_to_the_next(tmp_path):
    names = ["a.png", "b.png", "c.png"]
    for name, colour in zip(names, ((9, 0, 0), (0, 9, 0), (0, 0, 9)), strict=True):
        Image.new("RGB", (2, 2), colour).save(tmp_path / name)
    rows = UsableRows(FileRows([{"id": n, "prompt": "", "picture": n, "references": [n]} for n in names], tmp_path))
    (tmp_path / "c.png").write_bytes(b"gone bad")
    with pytest.warns(UserWarning, match="left out: row c.png"):
        assert rows[2]["id"] == "a.png"
    assert len(rows) == 3 and rows.references() == [["a.png"], ["b.png"], ["a.png"]] and list(rows.skipped) == [2]
    for name in names:
        (tmp_path / name).unlink()
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="no row is left"):
        rows[0]
    with pytest.raises(ValueError, match="none of 3 rows can be used"):
        UsableRows(rows.rows)


def _mutations(content: bytes, stream: random.Random, count: int):
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(stream.randint(1, 8)):
            changed[stream.randrange(len(changed))] = stream.randrange(256)
        yield bytes(changed[: stream.randrange(1, len(changed))] if stream.random() < 0.3 else changed)


@pytest.mark.parametrize("count", [40, pytest.param(4000, marks=pytest.mark.soak)])
def test_garbled_files_end_in_a_picture_or_a_plain_error(count):
    stream, rgb, opened, refused = random.Random(0), Image.fromarray(smooth()), 0, 0
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "JPEG2000"):
        whole = saved(rgb, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
        assert open_picture(whole).mode == "RGB", kind
        for content in _mutations(whole, stream, count):
            try:
                assert open_picture(content, where="row 1").mode == "RGB"
                opened += 1
            except ValueError as error:
                assert str(error).startswith("row 1 "), error
                refused += 1
    print(f"{opened} opened, {refused} refused")
    assert opened > count and refused > count


def test_programs_and_icons_that_call_themselves_pictures_are_not_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    inner = png_header(12_000, 12_000)  # Pillow would unpack it before anybody can ask for its size
    icon = struct.pack("<3H4B2H2I", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(inner), 22) + inner
    with pytest.raises(ValueError, match="row 1: picture is not a picture in a known format"):
        open_picture(icon, row="1")
    assert Image.open(tmp_path / "a.png").format == "EPS"  # Pillow would hand it to Ghostscript
    with pytest.raises(ValueError, match=r"row 1: picture .*a.png is not a picture in a known format"):
        open_picture(tmp_path / "a.png", row="1")


# --- pictures in columns ---------------------------------------------------------------------------


def test_columns_of_a_dataset_are_opened_here(tmp_path):
    import datasets

    deep = np.full((4, 6), 25_700, np.uint16)
    content, path = saved(Image.fromarray(deep), "PNG"), tmp_path / "b.png"
    path.write_bytes(content)
    closed = datasets.Image(decode=False)
    one = datasets.Dataset.from_dict(
        {"prompt": ["a"] * 3, "image": [{"bytes": content}, {"path": str(path)}, {"bytes": png_header(12_000, 12_000)}]}
    ).cast_column("image", closed)
    several = datasets.Dataset.from_dict({"prompt": ["a"], "images": [[{"bytes": content}, {"bytes": content}]]})
    several = several.cast_column("images", datasets.List(datasets.Image()))
    rows = opened_here(one.cast_column("image", datasets.Image()))
    assert rows[0]["image"].getpixel((0, 0)) == rows[1]["image"].getpixel((0, 0)) == (100, 100, 100)
    with pytest.raises(ValueError, match=r"row 2: image has 12000 x 12000 pixels"):
        rows[2]
    assert [image.getpixel((0, 0)) for image in opened_here(several)[0]["images"]] == [(100, 100, 100)] * 2
    plain = [{"prompt": "a"}]
    assert opened_here(plain) is plain


# --- row 23: bombs ---------------------------------------------------------------------------------

_REFUSALS = """
import sys, warnings, io
from pathlib import Path
warnings.simplefilter("ignore")
import av, datasets
from PIL import Image
from mmft.data import Clips, Sounds, opened_here, load_rows
from mmft.data.rows import open_picture, FileRows, check_rows
from mmft.data.video import check_clip
from mmft.vlm.media import media_of
from mmft.vlm.media import media_of
from reward_models.preference.pairs import open_picture as open_for_judge

folder = Path(sys.argv[1])

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

def column(path):
    rows = datasets.Dataset.from_dict({"image": [{"bytes": path.read_bytes()}]})
    opened_here(rows.cast_column("image", datasets.Image()))[0]

def checked(path):
    check_rows(FileRows([{"id": 1, "prompt": "", "picture": path.name, "references": ["x"]}], path.parent), decode=0)

ways = {"file": open_picture, "bytes": lambda path: open_picture(path.read_bytes()), "column": column,
        "check": checked, "open already": lambda path: media_of({"image": Image.open(path)}, "1"),
        "preference pair": open_for_judge}
tries = [(name, way, folder / file) for file in ("144.png", "400.png") for name, way in ways.items()
         if (name, file) != ("open already", "400.png")]  # that one Pillow itself refuses
tries += [("clip", lambda path: Clips().open(path, "row 1"), path) for path in sorted(folder.glob("clip.*"))]
tries += [("sound", lambda path: Sounds().open(path, "row 1"), path) for path in sorted(folder.glob("*.wav"))]
opened_here(datasets.Dataset.from_dict({"a": [1]}))
open_picture(folder / "good.png")
Clips().open(folder / "good.mp4", "row 1")
before = peak()
for name, way, path in tries:
    try:
        way(path)
        print("OPENED", name, path.name)
    except ValueError as error:
        print("refused", name, path.name, round(peak() - before), "MB", str(error)[:90])
print("growth", round(peak() - before))
Image.MAX_IMAGE_PIXELS = None
Image.open(folder / "144.png").load()
print("control", round(peak() - before))
"""


def test_bombs_are_refused_from_their_headers(tmp_path):
    """A child process tells how its peak memory grew; decoding one of the files after that shows that it would see."""
    import av

    bomb = png_bomb(12_032, 12_032)
    assert len(bomb) < 430_000 and 12_032**2 > 144e6
    (tmp_path / "144.png").write_bytes(bomb)
    (tmp_path / "400.png").write_bytes(png_header(20_000, 20_000))
    (tmp_path / "good.png").write_bytes(saved(Image.fromarray(smooth()), "PNG"))
    write_clip(tmp_path / "good.mp4", [0, 100, 200])
    for kind in ("avi", "mov", "mp4"):  # frames larger than the container says
        with av.open(str(tmp_path / f"clip.{kind}"), "w") as file:
            stream = file.add_stream("png", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
            file.start_encoding()
            packet = av.Packet(bomb)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 1000)
            packet.is_keyframe = True
            file.mux(packet)
    (tmp_path / "slow.wav").write_bytes(wav(rate=1, samples=1_000_000))
    (tmp_path / "long.wav").write_bytes(wav(rate=16_000, samples=31 * 16_000))
    child = subprocess.run(
        [sys.executable, "-c", _REFUSALS, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    print(child.stdout)
    assert child.returncode == 0, child.stderr
    assert "OPENED" not in child.stdout and child.stdout.count("refused ") == 2 * 6 - 1 + 3 + 2
    said = {key: int(value) for key, value in (line.split() for line in child.stdout.splitlines()[-2:])}
    assert said["growth"] < 100, child.stdout
    assert said["control"] > 400, child.stdout


def wav(rate: int, samples: int) -> bytes:
    """Eight-bit silence, one channel."""
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + samples, b"WAVE", b"fmt ", 16, 1, 1, rate, rate, 1, 8)
    return head + struct.pack("<4sI", b"data", samples) + b"\x80" * samples


def test_a_clip_of_more_pixels_than_allowed_is_found_by_looking(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", [0, 100])
    check_clip(path, "row 1")
    monkeypatch.setattr("mmft.data.containers.MAX_PIXELS", 192 * 48 - 1)
    with pytest.raises(ValueError, match="row 1 has 192 x 48 pixels"):
        check_clip(path, "row 1")


# --- row 26: paths ---------------------------------------------------------------------------------


@pytest.fixture
def traps(tmp_path) -> dict[str, str]:
    """What is wrong with a name -> the name, below ``inside``. The pictures that they lead to are there and sound."""
    folder = tmp_path / "inside"
    folder.mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    return {
        "up": "../secret.png",
        "link": "link.png",
        "absolute": str(tmp_path / "secret.png"),
        "url": f"file://{tmp_path / 'secret.png'}",
        "pipe": "pipe.png",
        "device": "zero.png",
    }


def test_six_paths_are_refused_within_a_second(traps, tmp_path):
    refused = 0
    for number, name in enumerate(traps.values()):
        rows = FileRows([{"id": number, "prompt": "", "picture": name, "references": ["x"]}], tmp_path / "inside")
        with within(1.0), pytest.raises(ValueError, match=f"row {number}"):
            rows[0]
        refused += 1
    assert refused == 6


@pytest.mark.parametrize(("media", "below"), [("image", "images"), ("video", "videos"), ("audio", "sounds")])
def test_folders_refuse_them_for_every_medium(traps, tmp_path, media, below):
    (tmp_path / "set").mkdir()
    (tmp_path / "inside").rename(tmp_path / "set" / below)
    for name in traps.values():
        (tmp_path / "set" / "captions.csv").write_text(f"{media},caption\n{name},words\n")
        with within(1.0), pytest.raises(ValueError, match=r"is refused|outside of|special file"):
            load_rows(str(tmp_path / "set"), "all")


def test_preference_files_refuse_them(traps, tmp_path):
    for name in traps.values():
        for value in (name, {"path": name, "bytes": None}):
            with within(1.0), pytest.raises(ValueError, match=r"row 0: image: .*(outside|no file)"):
                read_pairs([{"chosen": "a", "rejected": "b", "image": value}], root=tmp_path / "inside")
    kept = read_pairs([{"chosen": "a", "rejected": "b", "image": str(tmp_path / "secret.png")}])
    assert kept[0].images  # without a folder the paths are the caller's own


@pytest.mark.parametrize("reader", [PICTURES, Clips().reader, Sounds().reader])
def test_columns_of_paths_wait_for_nothing(traps, tmp_path, reader):
    for name in (str(tmp_path / "inside" / "pipe.png"), "/dev/zero", traps["url"], "http://127.0.0.1:9/a.png"):
        for value in (name, {"path": name, "bytes": None}):
            rows = OpenedRows([{"id": "7", "file": value}], "file", reader)
            with within(1.0), pytest.raises(ValueError, match=r"row 7: file.*(special file|does not exist)"):
                rows[0]


@pytest.mark.parametrize("file", ["captions.csv", "train.txt"])
def test_lists_and_captions_that_never_end_are_refused(tmp_path, file):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / "a.png")
    (tmp_path / "captions.csv").write_text("image,caption\na.png,words\n")
    (tmp_path / "train.txt").write_text("a.png\n")
    card = tmp_path / "card.yaml"
    card.write_text(f"name: x\nroot: {tmp_path}\nsplits: {{train: train.txt}}\n")
    assert len(load_rows(str(card), "train")) == 1  # an absolute root is the card's own to name
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (tmp_path / file).unlink()
        make(tmp_path / file)
        with within(1.0), pytest.raises(ValueError, match="special file"):
            load_rows(str(card), "train")


# --- clips and sounds ------------------------------------------------------------------------------


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def test_tables_that_claim_more_frames_than_the_file_has_bytes(tmp_path):
    """FFmpeg would set aside 70 bytes for each: 3.4 GB for the fifty million of this file."""
    content = bytearray(write_clip(tmp_path / "a.mp4", [0, 100, 200]).read_bytes())
    for kind, place, numbers in (
        (b"stsz", 8, (1, 50_000_000)),  # of one byte each
        (b"stts", 12, (50_000_000, 1)),
        (b"stsc", 12, (1, 50_000_000, 1)),
    ):
        start = content.index(kind) + place
        content[start : start + 4 * len(numbers)] = struct.pack(f">{len(numbers)}I", *numbers)
    (tmp_path / "b.mp4").write_bytes(content)
    for source in (tmp_path / "b.mp4", {"bytes": bytes(content), "path": None}):
        with within(1.0), pytest.raises(ValueError, match=r"row 1 .*stsz\) claim 50000000 samples"):
            Clips().open(source, "row 1")
    table = _box(b"stsz", struct.pack(">III", 0, 1, 50_000_000))
    for outer in (b"udta", b"edts", b"wave", b"free", b"cmov"):  # FFmpeg reads a table wherever it stands
        hidden = _box(b"moov", _box(b"trak", _box(outer, table)))
        with pytest.raises(ValueError, match="row 1 .*(claim 50000000 samples|cmov)"):
            Clips().open({"bytes": bytes(content[:32]) + hidden, "path": None}, "row 1")
    runs = _box(b"moof", _box(b"traf", _box(b"trun", struct.pack(">II", 0, 9_000)) * 100))  # each alone would do
    with pytest.raises(ValueError, match=r"row 1 .*trun\) claim"):
        Clips().open({"bytes": bytes(content[:32]) + runs + bytes(9_000), "path": None}, "row 1")
    quiet = write_sound(tmp_path / "quiet.wav", seconds=0.1).read_bytes()[:44] + b"\0\0\1\0" * 2_000_000
    check_tables(io.BytesIO(quiet), "row 1", "sound")  # its numbers are not taken for boxes
    nested = b"".join(struct.pack(">I4s", 8 * (2000 - i), b"moov") for i in range(2000))
    with pytest.raises(ValueError, match="row 1 is no clip"):
        Clips().open({"bytes": nested, "path": None}, "row 1")
    boxes = struct.pack(">I4s", 8, b"free") * 200_001
    with pytest.raises(ValueError, match="row 1 has more than 200000 boxes"):
        Clips().open({"bytes": boxes, "path": None}, "row 1")


def test_garbled_clips_and_sounds_end_in_frames_or_a_plain_error(tmp_path):
    stream, counts = random.Random(1), {"clip": [0, 0], "sound": [0, 0]}
    for kind, path, reader in (
        ("clip", write_clip(tmp_path / "a.mp4", [0, 100, 200]), Clips(frames=2)),
        ("sound", write_sound(tmp_path / "a.wav", seconds=0.1), Sounds()),
    ):
        for content in _mutations(path.read_bytes(), stream, 40):
            try:
                reader.open({"bytes": content, "path": None}, "row 1")
                counts[kind][0] += 1
            except ValueError as error:
                assert str(error).startswith("row 1 "), error
                counts[kind][1] += 1
    print(counts)
    assert all(opened and refused for opened, refused in counts.values())


def test_a_picture_that_is_open_already_is_converted_as_files_are():
    deep = Image.open(io.BytesIO(saved(Image.fromarray(np.full((2, 2), 25_700, np.uint16)), "PNG")))
    assert media_of({"image": deep}, "1")["image"][0].getpixel((0, 0)) == (100, 100, 100)


def test_frames_and_pictures_that_are_not_decoded_yet():
    """Frames by the rules of pictures; a file that breaks only now names its row."""
    deep = Image.fromarray(np.full((4, 6), 25_700, np.uint16))
    frames = media_of({"video": [deep, deep]}, "7")["video"][0]["frames"]
    assert [frame.getpixel((0, 0)) for frame in frames] == [(100, 100, 100)] * 2
    whole = saved(Image.fromarray(smooth()), "JPEG")
    for row in (lambda cut: {"image": cut}, lambda cut: {"video": [cut, cut]}):
        with pytest.raises(ValueError, match="row 7: a picture is damaged"):
            media_of(row(Image.open(io.BytesIO(whole[:-20]))), "7")


@pytest.mark.parametrize("name", ["", "~nobody-of-this-name"])
def test_data_sets_that_are_not_there(name):
    with pytest.raises(ValueError, match="was not found"):
        load_rows(name, "train")
