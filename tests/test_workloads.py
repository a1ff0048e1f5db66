"""Workloads: the load they say is the load they draw, and it moves when it should."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.patterns import expert_shares, parse_pattern, ranks_after_moves
from cluster.replay import LayerTrace, TraceHeat, replay
from cluster.traces import RoutingTrace
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


def test_a_trace_replays_its_tokens_in_order_and_begins_again() -> None:
    layer = LayerTrace(
        time_N=np.array([0.0, 0.5, 1.5]),
        expert_NK=np.array([[0, 1], [2, 3], [4, -1]], dtype=np.int32),
        weight_NK=np.full((3, 2), 0.5, dtype=np.float32),
    )
    heat = TraceHeat([layer], num_experts=EXPERTS)
    rng = np.random.default_rng(0)
    assert heat.routing(0, 2, 0.0, rng).expert_TK.tolist() == [[0, 1], [2, 3]]
    assert heat.routing(0, 2, 0.0, rng).expert_TK.tolist() == [[4, -1], [0, 1]]
    assert heat.shares(0.2)[0, :4] == pytest.approx([0.25] * 4)
    assert heat.shares(1.2)[0, 4] == 1.0
    assert heat.tokens_per_s == 2.0


def test_a_recorded_file_becomes_a_workload(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    experts = [[0, 1], [2, 1], [3, 0], [1, 2]]
    columns = {
        "time_s": pa.array([10.0, 10.0, 11.0, 12.0]),
        "layer": pa.array(["0", "1", "0", "1"]),
        "token": pa.array([0, 0, 1, 1]),
        "expert_ids": pa.array(experts, pa.list_(pa.int32())),
        "weights": pa.array([[0.6, 0.4]] * 4, pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), tmp_path / "trace.parquet")
    workload = replay(RoutingTrace(tmp_path / "trace.parquet"), num_tokens=2, visits=2)
    assert (workload.layers, workload.num_experts, workload.top_k) == (("0", "1"), 4, 2)
    assert workload.requests_per_s(0.0) == pytest.approx(0.5)  # 2 tokens in 2 s, in each of 2 layers
    rng = np.random.default_rng(0)
    assert [workload.heat.routing(row, 2, 0.0, rng).expert_TK.tolist() for row in (0, 1)] == [
        [[0, 1], [3, 0]],
        [[2, 1], [1, 2]],
    ]
