"""The cache of features: bounded in memory and on disk, right after damage, shared by processes and by runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from mmft.vlm.feature_cache import FeatureCache, tower_fingerprint
from mmft.vlm.load import build_policy, load_model, lora_config
from mmft.vlm.pictures import Pictures, joined_features


def features(number: float, tokens: int = 4) -> dict:
    """64 bytes a token: one picture in fp32 (8 numbers), and two deepstack layers of the same in bf16."""
    one = torch.full((tokens, 8), float(number))
    return {"image": [one], "image/deepstack": [[one.bfloat16()], [one.bfloat16() + 1]]}


ONE = 4 * 8 * (4 + 2 + 2)  # bytes


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return len(one) == len(other) and all(map(same, one, other))


def test_memory_drops_what_was_used_longest_ago():
    cache = FeatureCache(max_bytes=2 * ONE)
    for number in (1, 2):
        cache.put(str(number), features(number))
    assert cache.get("1") is not None and cache.bytes == 2 * ONE
    cache.put("3", features(3))
    assert "2" not in cache and cache.get("2") is None and cache.bytes == 2 * ONE
    assert same(cache.get("1"), features(1)) and same(cache.get("3"), features(3))
    cache.put("big", features(4, tokens=99))  # past the budget alone
    assert cache.bytes == 2 * ONE and "big" not in cache and "1" in cache
    cache.clear()
    assert cache.bytes == 0 and cache.get("1") is None and len(cache) == 0


def test_a_copy_is_kept_and_the_batch_is_not():
    cache, batch = FeatureCache(max_bytes=1 << 20), torch.zeros(1000, 8, requires_grad=True)
    cache.put("a", {"image": [batch[:4]]})
    kept = cache.get("a")["image"][0]
    assert kept.untyped_storage().nbytes() == 4 * 8 * 4 and not kept.requires_grad


def test_without_memory_and_folder_nothing_is_kept():
    cache = FeatureCache(max_bytes=0)
    cache.put("a", features(1))
    assert not cache.active and cache.get("a") is None
    with pytest.raises(ValueError, match="fingerprint"):
        FeatureCache(folder="x")


def on_disk(folder: Path, name: str = "m", **options) -> FeatureCache:
    return FeatureCache(folder=folder, fingerprint=lambda: name, **options)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_another_run_finds_the_files_and_another_model_does_not(tmp_path):
    on_disk(tmp_path).put("a", features(1))
    later = on_disk(tmp_path)
    assert "a" not in later
    assert same(later.get("a"), features(1)) and later.read == 1
    assert later.get("a") is later.get("a") and later.read == 1  # in memory from now on
    assert on_disk(tmp_path, "other").get("a") is None and later.get("b") is None
    without_memory = on_disk(tmp_path, max_bytes=0)
    assert same(without_memory.get("a"), features(1)) and len(without_memory) == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "noise", "header"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    on_disk(tmp_path).put("a", features(1))
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-3] ^= 1  # one bit of the numbers
    broken = {"cut": data[:-9], "empty": b"", "flipped": data, "noise": os.urandom(500), "header": data[:20]}[damage]
    path.write_bytes(broken)
    cache = on_disk(tmp_path)
    assert cache.get("a") is None and not files(tmp_path)
    cache.put("a", features(2))
    assert same(on_disk(tmp_path).get("a"), features(2))


def test_the_folder_stays_within_its_bound_and_drops_the_oldest(tmp_path):
    on_disk(tmp_path).put("0", features(0))
    size = files(tmp_path)[0].stat().st_size
    (tmp_path / "features-m" / "notes.txt").write_text("mine")
    (tmp_path / "keep.safetensors").write_text("mine")
    cache = on_disk(tmp_path, max_bytes=0, disk_bytes=10 * size + size // 2)
    kept = cache._path("0")
    for number in range(1, 40):
        cache.put(str(number), features(number))
        # The clock of a file system may be too coarse to order these.
        os.utime(cache._path(str(number)), (1e9 + number, 1e9 + number))
        os.utime(kept, (1e9 + number + 0.5, 1e9 + number + 0.5))  # used all the time
        assert len(files(tmp_path / "features-m")) <= 11
    assert kept.exists() and cache._path("39").exists() and not cache._path("6").exists()
    assert (tmp_path / "features-m" / "notes.txt").exists() and (tmp_path / "keep.safetensors").exists()


def test_reading_counts_as_use(tmp_path):
    cache = on_disk(tmp_path, max_bytes=0)
    cache.put("a", features(1))
    os.utime(cache._path("a"), (1, 1))
    assert cache.get("a") is not None and cache._path("a").stat().st_mtime > 1


def test_half_written_files_are_swept_up_when_they_are_old(tmp_path):
    cache = on_disk(tmp_path, disk_bytes=100_000)
    folder = tmp_path / "features-m"
    folder.mkdir()
    (folder / ".old.half").touch(), (folder / ".new.half").touch()
    os.utime(folder / ".old.half", (1, 1))
    cache.put("a", features(1))
    assert not (folder / ".old.half").exists() and (folder / ".new.half").exists()


def test_a_folder_that_cannot_be_written_ends_the_writing_and_nothing_else(tmp_path):
    (tmp_path / "file").touch()
    cache = on_disk(tmp_path / "file")
    with pytest.warns(UserWarning, match="picture_cache: writing to .*file ends here"):
        cache.put("a", features(1))
    cache.put("b", features(2))
    assert same(cache.get("a"), features(1)) and same(cache.get("b"), features(2))


WORKER = """
import sys, torch
from mmft.vlm.feature_cache import FeatureCache
folder, start = sys.argv[1], int(sys.argv[2])
cache = FeatureCache(0, folder, disk_bytes=20_000, fingerprint=lambda: "m")
wrong = found = 0
for turn in range(300):
    key = (start + 7 * turn) % 40
    features = cache.get(str(key))
    if features is None:
        cache.put(str(key), {"image": [torch.full((8, 8), float(key))]})
    else:
        found += 1
        wrong += not bool((features["image"][0] == key).all())
print(wrong, found)
"""


def test_two_processes_share_a_folder(tmp_path):
    root = Path(__file__).parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WORKER, str(tmp_path), str(start)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for start in (0, 13)
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        wrong, found = map(int, out.split())
        assert wrong == 0 and found > 0
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 20_000 * (1 + 2 / 16)
    assert not list(tmp_path.rglob("*.half"))


def test_the_fingerprint_follows_tower_and_processor_and_not_the_decoder():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.tower, self.decoder = nn.Linear(40, 40), nn.Linear(4, 4)
            self.config = type("Config", (), {"name_or_path": "here"})()

    class Settings:
        def __init__(self, **values):
            self.to_dict = lambda: values

    processor = type("Processor", (), {"image_processor": Settings(size=32)})()
    model = Model()
    first = tower_fingerprint(model, model.decoder, processor)
    again = Model()
    assert first == tower_fingerprint(again, again.decoder, processor)
    with torch.no_grad():
        model.decoder.weight += 1
    assert tower_fingerprint(model, model.decoder, processor) == first
    seen = {first}
    processor.image_processor = Settings(size=64)
    seen.add(tower_fingerprint(model, model.decoder, processor))
    with torch.no_grad():
        model.tower.weight *= 1.001
    seen.add(tower_fingerprint(model, model.decoder, processor))
    seen.add(tower_fingerprint(model.bfloat16(), model.decoder, processor))
    model.config.name_or_path = "there"
    seen.add(tower_fingerprint(model, model.decoder, processor))
    assert len(seen) == 5


@pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen3_vl"])
def test_another_run_encodes_nothing_and_a_changed_tower_everything(family, tiny_model, tmp_path):
    pixels = torch.randint(256, (3, 40, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    rows = [{"prompt": "p", "image": Image.fromarray(p)} for p in pixels] + [{"prompt": "none"}]
    ids = ["a", "b", "c", "d"]

    def run(change=False, adapters=True) -> tuple[Pictures, dict]:
        model, processor = load_model(str(tiny_model(family)))
        if change:
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "vision" in n or "visual" in n).mul_(1.01)
        policy = build_policy(model, processor, lora_config(model, r=4)) if adapters else None
        pictures = Pictures(policy.model if policy else model, processor, cache_folder=str(tmp_path))
        batch = pictures.prompts(rows, ids, torch.device("cpu"))
        with torch.no_grad():
            pictures.encode(batch, keep=True)
        return pictures, joined_features(batch)

    first, made = run()
    second, found = run(adapters=False)  # the same towers under adapters and not
    third, other = run(change=True)
    assert (first.encoded, second.encoded, second.cache.read, third.encoded) == (3, 0, 3, 3)
    assert same(made, found) and not same(made, other)
    again = second.prompts(rows, ids, torch.device("cpu"))
    assert all(record.features is not None for record in again.visuals[:3]) and not again.visuals[0].tensors.keys() - {
        "image_grid_thw"
    }
