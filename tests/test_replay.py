"""Replayed traces: tokens, shares and rates of a moment are those recorded around it, however few were recorded."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import parse_config
from cluster.replay import LayerTrace, TraceHeat, replay, trace_heat
from cluster.routed_traffic import recorded_rate
from cluster.sim_servers import Machine
from cluster.simulate import Simulation
from cluster.traces import RoutingTrace
from cluster.workloads import Faster, Workload
from protos.errors import InvalidRequest
from protos.tracefile import RoutedTokens, TraceInfo, TraceWriter
from router.gate import Routing

EXPERTS, TOP_K = 8, 2
RNG = np.random.default_rng(0)
INFO = TraceInfo(model="m", layers=("0",), num_experts=EXPERTS, num_choices=EXPERTS, top_k=TOP_K, sampled_share=0.01)


def written(path: Path, times_s: Sequence[float], experts: Callable[[float], list[int]]) -> RoutingTrace:
    """A sample of 1 %: one token at each time."""
    with TraceWriter(path, INFO) as writer:
        for number, time_s in enumerate(times_s):
            expert_TK = np.array([experts(time_s)], dtype=np.int32)
            weight_TK = np.full((1, TOP_K), 0.5, dtype=np.float32)
            token_T = np.array([number])
            writer.write(
                [RoutedTokens(time_s=time_s, layer="0", token_T=token_T, expert_TK=expert_TK, weight_TK=weight_TK)]
            )
    return RoutingTrace(path)


def rows(path: Path, **columns: pa.Array | list[object]) -> RoutingTrace:
    """Three tokens of one layer, with some columns replaced."""
    whole: dict[str, pa.Array | list[object]] = {
        "time_s": [10.0, 11.0, 12.0],
        "layer": ["0", "0", "0"],
        "token": [0, 1, 2],
        "expert_ids": [[0, 1], [2, 1], [3, 0]],
        "weights": [[0.5, 0.5]] * 3,
    }
    pq.write_table(pa.table(whole | columns), path)
    return RoutingTrace(path)


def moving(path: Path) -> RoutingTrace:
    """20 s with 10 recorded tokens per second; experts 0 and 1 are hot before half of it, then 6 and 7."""
    return written(path, [i / 10 for i in range(201)], lambda time_s: [0, 1] if time_s < 10 else [6, 7])


def drawn(workload: Workload, now_s: float) -> set[int]:
    return set(workload.heat.routing(0, 64, now_s, RNG).expert_TK.ravel().tolist())


def test_tokens_are_those_of_the_window_in_order_and_again() -> None:
    layer = LayerTrace(
        time_N=np.array([0.0, 0.5, 0.9, 1.5, 4.0]),
        expert_NK=np.array([[0, 1], [2, 3], [4, 5], [6, -1], [7, 0]], dtype=np.int32),
        weight_NK=np.full((5, 2), 0.5, dtype=np.float32),
    )
    heat = TraceHeat([layer], num_experts=EXPERTS)

    def first(num_tokens: int, now_s: float) -> list[int]:
        return [int(expert) for expert in heat.routing(0, num_tokens, now_s, RNG).expert_TK[:, 0]]

    assert first(2, 0.0) == [0, 2]
    assert first(4, 0.5) == [2, 4, 0, 2]
    assert first(2, 1.2) == first(2, 1.9) == [6, 6]
    assert first(5, 2.0) == [0, 2, 4, 6, 7]  # a window without tokens: all, as its shares are the mean
    assert first(2, 4.0) == first(2, 8.0) == [0, 2]
    assert heat.shares(0.2)[0] == pytest.approx([1 / 6] * 6 + [0, 0])
    assert heat.shares(1.2)[0, 6] == 1.0
    assert heat.shares(2.5)[0] == pytest.approx([2 / 9] + [1 / 9] * 7)
    assert [heat.tokens_per_s(now_s) for now_s in (0.5, 1.5, 2.5, 3.5, 4.5)] == [3, 1, 0, 1, 3]


def test_a_recorded_file_becomes_a_workload(tmp_path: Path) -> None:
    columns = {
        "time_s": pa.array([10.0, 10.0, 11.0, 12.0]),
        "layer": pa.array(["0", "1", "0", "1"]),
        "token": pa.array([0, 0, 1, 1]),
        "expert_ids": pa.array([[0, 1], [2, 1], [3, 0], [1, 2]], pa.list_(pa.int32())),
        "weights": pa.array([[0.6, 0.4]] * 4, pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), tmp_path / "trace.parquet")
    workload = replay(RoutingTrace(tmp_path / "trace.parquet"), num_tokens=2, visits=2)
    assert (workload.layers, workload.num_experts, workload.top_k) == (("0", "1"), 4, 2)
    assert workload.requests_per_s(0.0) == pytest.approx(0.5)  # 2 tokens in 2 s, in each of 2 layers
    found = [workload.heat.routing(row, 2, now_s, RNG).expert_TK.tolist() for row in (0, 1) for now_s in (0.5, 1.5)]
    assert found == [[[0, 1]] * 2, [[3, 0]] * 2, [[2, 1]] * 2, [[1, 2]] * 2]


@pytest.mark.parametrize("times", [1.0, 4.0])
def test_the_heat_of_a_sampled_trace_moves_at_the_recorded_speed_at_any_rate(tmp_path: Path, times: float) -> None:
    workload = replay(moving(tmp_path / "t.parquet"), num_tokens=10, visits=1)
    workload = replace(workload, rate=Faster(rate=workload.rate, factor=times))
    assert workload.requests_per_s(3.0) == pytest.approx(100 * times)  # 10 tokens a second, 1 % of them recorded
    for now_s in (0.0, 5.0, 9.9, 20.5):
        assert drawn(workload, now_s) == {0, 1}
        assert workload.load(now_s)[0, :2].sum() == pytest.approx(2000 * times, rel=0.11)
    for now_s in (10.1, 15.0, 19.9):
        assert drawn(workload, now_s) == {6, 7}
        assert workload.load(now_s)[0, 6:].sum() == pytest.approx(2000 * times, rel=0.11)


def test_simulated_tokens_follow_the_recorded_heat(tmp_path: Path) -> None:
    workload = replay(moving(tmp_path / "t.parquet"), num_tokens=10, visits=1)
    assert isinstance(workload.heat, TraceHeat)
    seen: list[tuple[float, Routing]] = []

    class Seen(TraceHeat):
        def routing(self, row: int, num_tokens: int, now_s: float, rng: np.random.Generator) -> Routing:
            found = super().routing(row, num_tokens, now_s, rng)
            seen.append((now_s, found))
            return found

    heat = Seen(workload.heat._layers, num_experts=EXPERTS)
    settings = {"budget_bytes": 16 * 1000}
    config = parse_config({"model": "simulated", "experts": {"min_servers": 2, "max_servers": 2, "settings": settings}})
    machine = Machine(pairs_per_s=4000.0, emulated=True)
    Simulation(config, replace(workload, heat=heat), machine, copy_bytes=1000).run(19.9)
    hot_before = [bool((routing.expert_TK < 2).all()) for now_s, routing in seen if now_s < 10]
    hot_after = [bool((routing.expert_TK >= 6).all()) for now_s, routing in seen if now_s >= 10]
    assert all(hot_before)
    assert all(hot_after)
    assert sum(len(routing.expert_TK) for _, routing in seen) == pytest.approx(19_900, rel=0.02)


def test_the_rate_is_the_recorded_one_over_time(tmp_path: Path) -> None:
    times_s = [*np.arange(0, 5, 0.1), *np.arange(5, 10.05, 0.02)]  # 10 tokens a second, then 50
    workload = replay(written(tmp_path / "t.parquet", times_s, lambda _: [0, 1]), num_tokens=100, visits=1)
    found = [workload.requests_per_s(now_s) for now_s in (0.5, 3.5, 6.5, 9.0, 10.6)]
    assert found == pytest.approx([10, 10, 50, 50, 10], rel=0.1)


def test_a_token_may_have_more_experts_than_the_trace_says(tmp_path: Path) -> None:
    trace = written(tmp_path / "t.parquet", [10.0], lambda _: [0, 1])
    table = pq.read_table(tmp_path / "t.parquet")
    longer = table.set_column(3, table.field(3), pa.array([[0, 1, 2]], table.field(3).type))
    longer = longer.set_column(4, table.field(4), pa.array([[0.5, 0.3, 0.2]], table.field(4).type))
    pq.write_table(pa.concat_tables([table, longer]), tmp_path / "t.parquet")
    trace = RoutingTrace(tmp_path / "t.parquet")
    workload = replay(trace, num_tokens=2, visits=1)
    assert (trace.info.top_k, workload.top_k) == (2, 3)
    assert workload.heat.routing(0, 2, 0.0, RNG).expert_TK.tolist() == [[0, 1, -1], [0, 1, 2]]


def test_a_trace_that_spans_years_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    trace = rows(tmp_path / "t.parquet", time_s=[0.0, 1.0, 1.7e9])
    with pytest.raises(InvalidRequest, match=r"spans 1\.7e\+09 s: 1700000001 windows of 1 s take .* limit is 1073"):
        trace_heat(trace)
    with pytest.raises(InvalidRequest, match=r"t\.parquet: time_s spans .* windows of 0\.5 s take .* bytes, limit is"):
        recorded_rate(trace, max_tokens=100)
