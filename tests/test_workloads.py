"""Workloads: the load they say is the load they draw, and it moves when it should."""

import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.patterns import expert_shares, parse_pattern, ranks_after_moves
from cluster.workloads import Diurnal, DrawnHeat, Faster, Workload, flash_crowd, parse_traffic, pattern_shares
from protos.errors import InvalidRequest

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def zipf_shares() -> np.ndarray:
    return pattern_shares(parse_pattern("zipf:1.2"), num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K)


def make(heat: DrawnHeat, **fields: object) -> Workload:
    shape = {"layers": ("0", "1", "2"), "num_experts": EXPERTS, "top_k": TOP_K, "rate": 10.0, "num_tokens": 16}
    return Workload(heat=heat, **(shape | fields))  # type: ignore[arg-type]


def test_the_drawn_routing_has_the_load_that_the_workload_says() -> None:
    workload = make(DrawnHeat(zipf_shares(), top_k=TOP_K))
    rng = np.random.default_rng(0)
    for row in range(LAYERS):
        routing = workload.heat.routing(row, 20_000, 0.0, rng)
        drawn_E = np.bincount(routing.expert_TK.ravel(), minlength=EXPERTS) / routing.expert_TK.size
        assert drawn_E == pytest.approx(workload.heat.shares(0.0)[row], abs=0.01)


def test_the_load_sums_to_what_the_requests_bring() -> None:
    workload = make(DrawnHeat(zipf_shares(), top_k=TOP_K), rate=Diurnal(low=5, high=15, period_s=60), visits=3)
    for now_s in (0.0, 15.0, 30.0):
        assert workload.load(now_s).sum() == pytest.approx(workload.requests_per_s(now_s) * 16 * TOP_K * 3)
    assert [workload.requests_per_s(now_s) for now_s in (0, 15, 30, 60)] == pytest.approx([5, 10, 15, 5])


def test_a_jump_arranges_the_experts_as_the_load_generator_does() -> None:
    heat = DrawnHeat(zipf_shares(), top_k=TOP_K, move="jump", every_s=10, seed=3)
    share_E = expert_shares(parse_pattern("zipf:1.2"), num_experts=EXPERTS, top_k=TOP_K)
    for moves, now_s in ((0, 9.9), (1, 10.0), (2, 25.0)):
        for row in range(LAYERS):
            rank_E = ranks_after_moves(moves, layer=row, num_experts=EXPERTS, seed=3)
            assert heat.shares(now_s)[row] == pytest.approx(share_E[rank_E])
    assert heat.onsets(35.0) == [10.0, 20.0, 30.0]


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 100), st.floats(0, 0.1), st.integers(0, 5))
def test_a_drift_goes_on_without_a_jump_and_keeps_shares(now_s: float, step_s: float, seed: int) -> None:
    heat = DrawnHeat(zipf_shares(), top_k=TOP_K, move="drift", every_s=10, seed=seed)
    before_LE, after_LE = heat.shares(now_s), heat.shares(now_s + step_s)
    assert np.abs(after_LE - before_LE).max() <= step_s / 10 + 1e-9
    assert before_LE.sum(axis=1) == pytest.approx(np.ones(LAYERS))
    assert before_LE.max() <= 1 / TOP_K + 1e-9


@pytest.mark.parametrize("bad", [[[1, 0, 0]], [[-1, 1, 1]], [[0, 0, 0]], [[math.nan, 1, 1]]])
def test_shares_that_no_model_can_have_are_refused(bad: list[list[float]]) -> None:
    with pytest.raises(InvalidRequest):
        DrawnHeat(np.array(bad, dtype=np.float64), top_k=2)


def test_rates_are_read_from_text() -> None:
    assert parse_traffic("20") == 20.0
    flash = parse_traffic("flash:10:40:5:2")
    assert callable(flash)
    assert [flash(at_s) for at_s in (0, 4.9, 5, 6.9, 7, 100)] == [10, 10, 40, 40, 10, 10]
    assert flash == flash_crowd(10, 40, at_s=5, hold_s=2)
    assert parse_traffic("diurnal:1:9:60") == Diurnal(low=1, high=9, period_s=60)
    assert Faster(rate=flash, factor=2)(5.5) == 80


@pytest.mark.parametrize("text", ["", "diurnal", "diurnal:1:2", "diurnal:1:x:3", "flash:1:2:3:0", "flash:-1:2:3:4"])
def test_a_rate_that_is_none_is_one_clear_line(text: str) -> None:
    with pytest.raises(InvalidRequest, match="rate") as found:
        parse_traffic(text)
    assert "\n" not in found.value.message


@pytest.mark.parametrize("move", ["jump", "drift"])
def test_before_its_beginning_a_workload_is_as_at_its_beginning(move: Literal["jump", "drift"]) -> None:
    heat = DrawnHeat(zipf_shares(), top_k=TOP_K, move=move, every_s=2.0)
    workload = make(heat, rate=flash_crowd(40, 250, at_s=6, hold_s=5))
    assert workload.load(-4.5).tolist() == workload.load(0.0).tolist()
    assert make(heat, rate=Diurnal(low=5, high=15, period_s=60)).requests_per_s(-10.0) == 5
