"""Growth: each axis changes one number, exponents are those of exact power laws, and a leak of memory is seen."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import memory_flat, scaling
from benchmarks._iteration import NewPictures
from benchmarks._models import SHAPES, build

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(TINY, tmp_path_factory.mktemp("tiny"))


def test_exponent_of_exact_power_laws() -> None:
    x = [4, 8, 16, 32]
    assert scaling.exponent(x, [3 * v for v in x]) == pytest.approx(1)
    assert scaling.exponent(x, [7 * v**0.5 for v in x]) == pytest.approx(0.5)


def test_an_axis_changes_one_number() -> None:
    for axis, values in scaling.AXES.items():
        base = asdict(scaling.place(axis, values[0])[0])
        other, pictures = scaling.place(axis, values[-1])
        changed = {name for name, value in asdict(other).items() if value != base[name]}
        assert changed == {"group": {"group"}, "group256m": {"group"}}.get(axis, {axis} - {"pictures", "model"})
        assert pictures == (values[-1] if axis == "pictures" else 1)


def _points(values, seconds) -> list[dict]:
    phases = dict.fromkeys(scaling.PHASES, 0.1)
    rest = {"phases": phases, "peak_mib": 10.0, "increase_mib": 5.0, "picture_tokens": 64, "parameters": 1}
    return [{"value": v, "seconds": s, **rest} for v, s in zip(values, seconds, strict=True)]


@pytest.mark.parametrize(
    ("axis", "values", "seconds", "met"),
    [
        ("group", (8, 32), (1.0, 2.9), True),
        ("group", (8, 32), (1.0, 3.1), False),
        ("prompts", (8, 32), (1.0, 4.0), True),
        ("prompts", (8, 32), (1.0, 5.0), False),
    ],
)
def test_verdicts(axis: str, values, seconds, met: bool) -> None:
    last = scaling.table(axis, _points(values, seconds)).splitlines()[-1]
    assert last.endswith(": met" if met else ": NOT met")


def test_a_point_is_measured_and_pictures_are_counted(folder: Path) -> None:
    one, two = (scaling.measure(TINY, folder, pictures, 1) for pictures in (1, 2))
    assert two["picture_tokens"] == 2 * one["picture_tokens"] > 0
    assert one["seconds"] >= sum(one["phases"].values()) * 0.99
    # Linux counts pages in batches: an iteration that takes nothing new may end a fraction below its start.
    assert one["peak_mib"] >= one["increase_mib"] > -1


def test_widened_model_has_square_the_weights_and_runs(folder: Path, tmp_path: Path) -> None:
    plain = scaling.measure(TINY, folder, 1, 1)["parameters"]
    wide = scaling.measure(TINY, scaling.widened(folder, 2, tmp_path / "wide"), 1, 1)["parameters"]
    assert 2 * plain < wide < 4 * plain  # matrices grow by 4, embeddings and norms by 2


def test_no_two_pictures_are_alike_and_none_is_kept() -> None:
    rows = NewPictures(6, 24)
    assert len({rows[i]["image"].tobytes() for i in range(6)}) == 6
    assert rows[0]["image"].tobytes() == rows[0]["image"].tobytes()
    assert rows[0]["image"] is not rows[0]["image"]
    assert len(NewPictures(6, 24, pictures=3)[0]["images"]) == 3
    with pytest.raises(IndexError):
        rows[6]


def test_drift_compares_the_second_tenth_with_the_last() -> None:
    samples = [50.0] * 10 + [100.0] * 10 + [7.0] * 70 + [103.0] * 10
    assert memory_flat.drift(samples) == (100.0, 103.0, pytest.approx(0.03))


def test_a_leak_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, honest = [], memory_flat.variety

    def leaking(completions) -> list[float]:
        kept.append(b"\1" * (8 << 20))
        return honest(completions)

    monkeypatch.setattr(memory_flat, "variety", leaking)
    samples = memory_flat.run(folder, 30, 1, 2, 3, 1.0)
    early, late, _ = memory_flat.drift(samples)
    assert late - early > 0.6 * 8 * 24  # MiB: 24 steps between the middles of steps 4-6 and 28-30
    kept.clear()


def test_plots(tmp_path: Path) -> None:
    scaling.plot({"group": _points((8, 32), (1.0, 2.9)), "prompts": _points((8, 32), (1.0, 4.0))}, tmp_path / "g.png")
    memory_flat.plot([500.0, 501.0, 500.5], tmp_path / "m.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("g.png", "m.png"))
