"""The roofline: the count of work must agree with torch's own counter, and its shares must be the right way up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _ceilings, _work, roofline
from benchmarks._models import SHAPES, build

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One measurement of the tiny shape, with ceilings taken from single calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ceilings, "SQUARES", (64,))
        patch.setattr(_ceilings, "bandwidths", lambda device: {"read": {1: 1e9}, "copy": {1: 2e9}})
        patch.setattr(_ceilings, "seconds", lambda function, device, least=0.0: 1e-6)
        return roofline.measure(TINY, build(TINY, tmp_path_factory.mktemp("tiny")), 2, "float32")


def test_nothing_that_must_be_done_is_more_than_what_was_done(found) -> None:
    for part, work in found["work"].items():
        assert 0 < work["flops"] <= found["done"][part], part
    # No padding, masks or shortcuts in the tower: there the two counts are one.
    assert found["work"]["vision"]["flops"] == found["done"]["vision"]


def test_parts_add_up_to_the_trainers_own_times(found) -> None:
    for step in range(2):
        parts = sum(found["seconds"][part][step] for part in roofline.PARTS)
        assert parts == pytest.approx(found["phases"]["all"][step], rel=0.2, abs=0.02)
        rollout = sum(found["seconds"][part][step] for part in ("prepare", "vision", "prefill", "decode"))
        assert rollout == pytest.approx(found["phases"]["time/rollout"][step], rel=0.1, abs=0.01)
        assert all(found["seconds"][part][step] > 0 for part in roofline.PARTS)


@pytest.mark.parametrize("first", [False, True])
def test_work_of_an_adapted_layer_is_that_of_autograd(first: bool) -> None:
    rows, inner, outer, rank = 5, 24, 36, 2
    layer = _work.Linear(inner, outer, rank, first, last=False)
    assert not layer.folds(rows)
    work = _work.Work()
    _work._forward(work, [layer], rows, 1, 1, adapters_see=rows)
    _work._backward(work, [layer], rows, 1, 1, rows)

    x, weight = torch.randn(rows, inner, requires_grad=not first), torch.randn(outer, inner)
    a, b = torch.randn(rank, inner, requires_grad=True), torch.randn(outer, rank, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (x @ weight.t() + (x @ a.t()) @ b.t()).sum().backward()
    assert work.flops == counter.get_total_flops()


def test_folding_is_counted_where_it_is_the_cheaper_way() -> None:
    layer, rows = _work.Linear(24, 36, 2, first=False, last=False), 400
    assert layer.folds(rows)
    work = _work.Work()
    _work._forward(work, [layer], rows, 1, 1, adapters_see=rows)
    # W + BA once, and one product: worked by hand.
    assert work.flops == 2 * 36 * 2 * 24 + 2 * 400 * 24 * 36


def test_last_layer_counts_only_where_a_token_is_predicted() -> None:
    layer = _work.Linear(3, 5, 0, first=False, last=True)
    work = _work.Work()
    _work._forward(work, [layer], 100, 7, 2)
    assert work.flops == 2 * (2 * 7 * 3 * 5)


def test_shares_and_bounds_by_hand() -> None:
    none = {"flops": 0.0, "bytes": 0.0, "working_set": 0.0}
    work = dict.fromkeys(roofline.PARTS[1:], none) | {
        "update": {"flops": 30e9, "bytes": 1e9, "working_set": 1e9},
        "decode": {"flops": 1e9, "bytes": 4e9, "working_set": 1e9},
    }
    found = {
        "ceilings": {
            "float32": {512: 80e9, 1024: 100e9},
            "bfloat16": {1024: 200e9},
            "bandwidth": {"read": {1: 50e9, 1024: 20e9}, "copy": {1: 10e9, 1024: 10e9}},
        },
        "work": work,
        "rates": dict.fromkeys(roofline.PARTS[1:], 60e9),
        "seconds": {part: [1.0, 1.0, 9.0] for part in roofline.PARTS},
        "phases": {"time/update": [1.0]},
        "done": dict.fromkeys(roofline.PARTS, 0.0) | {"update": 33e9},
    }
    lines = roofline.lines_of(found, "float32")
    assert lines["update"]["of_peak"] == pytest.approx(0.3)  # 30 of 100 GFLOP/s
    assert lines["update"]["of_sizes"] == pytest.approx(0.5)
    assert lines["update"]["bound"] == pytest.approx(0.3)  # operations are the limit
    assert lines["decode"]["bound"] == pytest.approx(0.2)  # bytes are: 4 GB at 20 GB/s
    assert lines["iteration"]["seconds"] == pytest.approx(6.0)
    assert "NOT met" in roofline.table(found, SHAPES["smolvlm256m"], "float32").splitlines()[-1]
    found["work"]["update"]["flops"] = 50e9
    assert roofline.table(found, SHAPES["smolvlm256m"], "float32").endswith(": met")


def test_bandwidth_is_that_of_the_level_that_holds_the_bytes() -> None:
    rates = {"read": {1: 50.0, 64: 30.0}, "copy": {1: 10.0, 64: 40.0}}
    assert _ceilings.bandwidth_for(1 << 20, rates) == 50.0
    assert _ceilings.bandwidth_for(2 << 20, rates) == 40.0
    assert _ceilings.bandwidth_for(1 << 40, rates) == 40.0


def test_plot(found, tmp_path: Path) -> None:
    roofline.plot(found, TINY, "float32", tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 1000
