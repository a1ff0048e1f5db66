"""Load: patterns as drawn, traces as recorded, every answer accounted for, wrong ones found. Over real gRPC."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cluster.checking import Checker
from cluster.loadgen import NOT_SENT, LoadGenerator, Sample, Tally, percentiles, report
from cluster.patterns import Pattern, draw_routing, expert_shares, parse_pattern
from cluster.rates import GRAIN_S, Departures, RateProfile, parse_rate
from cluster.routed_traffic import RoutedTraffic, recorded_rate
from cluster.run_load import run_load
from cluster.traces import RoutingTrace, load_matrix
from cluster.traffic import DrawnTraffic, TraceTraffic, Work
from experts.config import ExpertServerConfig
from protos import common_pb2, router_pb2
from protos.checkpoint import read_model
from protos.errors import InvalidRequest, Unavailable
from protos.tracefile import RoutedTokens, TraceInfo, TraceWriter
from router.client import RouterClient
from router.gate import Routing
from tests.mesh import Mesh, mesh
from tests.tiny_models import DIM, NUM_EXPERTS, TOP_K, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen2_moe", tmp_path_factory.mktemp("models") / "qwen2_moe")


# ---------------------------------------------------------------------- patterns


@given(
    num_experts=st.integers(2, 64),
    top_k=st.integers(1, 8),
    exponent=st.floats(0, 20),
)
def test_zipf_shares_are_a_distribution_that_distinct_experts_can_have(
    num_experts: int, top_k: int, exponent: float
) -> None:
    assume(top_k <= num_experts)
    share_E = expert_shares(Pattern(kind="zipf", exponent=exponent), num_experts=num_experts, top_k=top_k)
    assert share_E.sum() == pytest.approx(1)
    assert share_E.max() <= 1 / top_k + 1e-9
    assert (np.diff(share_E) <= 1e-12).all()


def test_hot_experts_get_exactly_their_share() -> None:
    share_E = expert_shares(parse_pattern("hot:2:0.6"), num_experts=8, top_k=2)
    assert share_E[:2].tolist() == pytest.approx([0.3, 0.3])
    assert share_E[2:].tolist() == pytest.approx([0.4 / 6] * 6)


@pytest.mark.parametrize("text", ["hot:1:0.8", "hot:8:0.5", "hot:7:0.1"])
def test_a_share_that_distinct_experts_cannot_have_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=text.rsplit(":", 1)[0]):
        expert_shares(parse_pattern(text), num_experts=8, top_k=2)


@pytest.mark.parametrize(
    "text",
    ["", "even", "uniform:1", "zipf", "zipf:x", "zipf:-1", "zipf:nan", "hot:1", "hot:0:0.5", "hot:1:2", "trace:"],
)
def test_a_pattern_that_is_none_names_what_is_allowed(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is none of uniform"):
        parse_pattern(text)


@given(seed=st.integers(0, 1000), num_experts=st.integers(2, 32), top_k=st.integers(1, 8), exponent=st.floats(0, 4))
def test_a_token_s_experts_are_distinct_and_its_weights_sum_to_one(
    seed: int, num_experts: int, top_k: int, exponent: float
) -> None:
    assume(top_k <= num_experts)
    share_E = expert_shares(Pattern(kind="zipf", exponent=exponent), num_experts=num_experts, top_k=top_k)
    routing = draw_routing(share_E, num_tokens=50, top_k=top_k, rng=np.random.default_rng(seed))
    assert routing.expert_TK.shape == (50, top_k)
    assert routing.expert_TK.min() >= 0
    assert routing.expert_TK.max() < num_experts
    assert all(len(set(row)) == top_k for row in routing.expert_TK.tolist())
    assert routing.weight_TK.sum(axis=1) == pytest.approx(np.ones(50), abs=1e-5)


def test_drawn_experts_have_their_shares() -> None:
    share_E = expert_shares(parse_pattern("zipf:1"), num_experts=16, top_k=2)
    routing = draw_routing(share_E, num_tokens=20000, top_k=2, rng=np.random.default_rng(0))
    drawn_E = np.bincount(routing.expert_TK.ravel(), minlength=16) / routing.expert_TK.size
    assert drawn_E == pytest.approx(share_E, abs=0.01)


# ---------------------------------------------------------------------- traffic


def test_a_trace_is_sent_in_order_and_starts_again() -> None:
    states = {"0": torch.arange(10.0).unsqueeze(1), "2": torch.arange(100.0, 104.0).unsqueeze(1)}
    traffic = TraceTraffic(states, num_tokens=4)
    sent = [traffic.next() for _ in range(6)]
    assert [work.layer for work in sent] == ["0", "2"] * 3
    assert [work.x_TD.flatten().tolist() for work in sent if work.layer == "0"] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 0, 1],
    ]
    assert sent[1].x_TD.flatten().tolist() == sent[3].x_TD.flatten().tolist() == [100, 101, 102, 103]


def test_a_request_longer_than_the_trace_repeats_it() -> None:
    work = TraceTraffic({"0": torch.arange(3.0).unsqueeze(1)}, num_tokens=7).next()
    assert work.x_TD.flatten().tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_layers_have_different_hottest_experts() -> None:
    model = router_pb2.DescribeResponse(
        dim=4, num_experts=8, top_k=2, layers=["0", "1", "2"], dtype=common_pb2.DTYPE_FLOAT32
    )
    traffic = DrawnTraffic(parse_pattern("zipf:2"), model, num_tokens=500)
    hottest = {}
    for _ in range(3):
        work = traffic.next()
        assert work.routing is not None
        hottest[work.layer] = int(np.bincount(work.routing.expert_TK.ravel(), minlength=8).argmax())
    assert hottest == {"0": 0, "1": 1, "2": 2}


def moving(clock: Callable[[], float], *, seed: int = 0) -> DrawnTraffic:
    model = router_pb2.DescribeResponse(
        dim=4, num_experts=32, top_k=2, layers=["0", "1"], dtype=common_pb2.DTYPE_FLOAT32
    )
    return DrawnTraffic(parse_pattern("zipf:1.2"), model, num_tokens=2000, seed=seed, move_every_s=10.0, clock=clock)


def test_a_hot_spot_moves_to_other_experts_in_every_layer_when_its_time_is_over() -> None:
    now_s = 100.0
    traffic = moving(lambda: now_s)

    def drawn() -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
        works = [traffic.next() for _ in range(2)]
        return {
            work.layer: np.bincount(work.routing.expert_TK.ravel(), minlength=32) / work.routing.expert_TK.size
            for work in works
            if work.routing is not None
        }

    hottest = []
    for now_s, num_moves in ((100.0, 0), (109.9, 0), (110.0, 1), (119.9, 1), (145.0, 4)):  # noqa: B007
        found, wanted = drawn(), traffic.shares(num_moves)
        assert traffic.num_moves == num_moves
        for layer in ("0", "1"):
            assert found[layer] == pytest.approx(wanted[layer], abs=0.02)
        hottest.append(tuple(int(share_E.argmax()) for share_E in found.values()))
    assert traffic.began_s == 100.0
    assert hottest[0] == hottest[1] == (0, 1)
    assert hottest[2] == hottest[3]
    assert len(set(hottest)) == 3


@given(num_moves=st.integers(0, 5), seed=st.integers(0, 9))
def test_where_a_hot_spot_goes_depends_on_the_seed_alone(num_moves: int, seed: int) -> None:
    first, second = (moving(lambda: 0.0, seed=seed).shares(num_moves) for _ in range(2))
    for layer, share_E in first.items():
        assert share_E.tolist() == second[layer].tolist()
        assert sorted(share_E) == sorted(expert_shares(parse_pattern("zipf:1.2"), num_experts=32, top_k=2))
    if num_moves:
        assert first["0"].tolist() != moving(lambda: 0.0, seed=seed + 1).shares(num_moves)["0"].tolist()


# ---------------------------------------------------------------------- routing traces


async def test_a_recorded_load_can_be_replayed_with_the_same_experts_and_weights(model: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.parquet", tmp_path / "second.parquet"
    with mesh(model) as served:
        address = served.router.address
        done = await load_for(address, "zipf:1.2", rate=40.0, concurrency=None, duration_s=1.0, record=first)
        demand = served.router.report().demand
        again = await load_for(address, f"trace:{first}", concurrency=None, duration_s=0.9, record=second)
    assert done["requests"]["failed"] == again["requests"]["failed"] == 0  # type: ignore[index]
    assert again["checks"]["wrong"] == 0  # type: ignore[index]
    assert done["record"] == {"file": str(first), "tokens": done["tokens"], "left_out": 0}
    trace = RoutingTrace(first)
    assert trace.info.stage == "effective"
    [(_, load_LE)] = load_matrix(trace)
    first_s, last_s = trace.span_s
    counted = {
        (layer, expert): round(load_LE[row, expert] * (last_s - first_s))
        for row, layer in enumerate(trace.info.layers)
        for expert in np.flatnonzero(load_LE[row]).tolist()
    }
    assert counted == demand
    assert 0.5 < again["requests"]["sent"] / done["requests"]["sent"] < 1.1  # type: ignore[index]
    for layer, pairs in routed(second).items():
        assert pairs == routed(first)[layer][: len(pairs)]


def routed(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(expert, weight) of all pairs of each layer."""
    trace = RoutingTrace(path)
    [batch] = list(trace.batches())
    pairs = list(zip(batch.expert_P.tolist(), batch.weight_P.tolist(), strict=True))
    return {
        layer: [pair for pair, here in zip(pairs, batch.layer_T[batch.rows()] == row, strict=True) if here]
        for row, layer in enumerate(trace.info.layers)
    }


def trace_of(path: Path, times_s: list[float], *, tokens: int = 5) -> RoutingTrace:
    info = TraceInfo(model="m", layers=("0",), num_experts=8, num_choices=8, top_k=2)
    with TraceWriter(path, info) as writer:
        for number, time_s in enumerate(times_s):
            expert_TK = np.tile(np.array([[number % 8, -1]], dtype=np.int32), (tokens, 1))
            weight_TK = np.ones((tokens, 2), dtype=np.float32)
            token_T = np.arange(tokens)
            writer.write(
                [RoutedTokens(time_s=time_s, layer="0", token_T=token_T, expert_TK=expert_TK, weight_TK=weight_TK)]
            )
    return RoutingTrace(path)


def test_a_replay_has_the_trace_s_requests_in_order_and_starts_again(tmp_path: Path) -> None:
    model = router_pb2.DescribeResponse(dim=4, num_experts=8, top_k=2, layers=["0"], dtype=common_pb2.DTYPE_FLOAT32)
    traffic = RoutedTraffic(trace_of(tmp_path / "t.parquet", [0.0, 1.0]), model, max_tokens=3)
    works = [traffic.next() for _ in range(6)]
    assert [len(work.x_TD) for work in works] == [3, 2, 3, 2, 3, 2]
    routings = [work.routing for work in works if work.routing is not None]
    assert [int(routing.expert_TK[0, 0]) for routing in routings] == [0, 0, 1, 1, 0, 0]
    assert routings[0].expert_TK.tolist() == [[0, -1]] * 3
    assert routings[0].weight_TK.tolist() == [[1, 0]] * 3
    other = router_pb2.DescribeResponse(dim=4, num_experts=4, top_k=2, layers=["0"])
    with pytest.raises(
        InvalidRequest, match=r"t\.parquet: is of a model with 8 experts and layers 0, the router serves 4"
    ):
        RoutedTraffic(trace_of(tmp_path / "t.parquet", [0.0]), other, max_tokens=3)


def test_a_replay_has_the_trace_s_rate_over_time_or_a_multiple_of_it(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t.parquet", [*(i / 100 for i in range(100)), *(1 + i / 10 for i in range(10)), 2.0])
    rate = recorded_rate(trace, max_tokens=100)
    assert [rate(when_s) for when_s in (0.0, 0.6, 1.1, 1.6, 2.1)] == pytest.approx([100, 100, 10, 10, 100], abs=3)
    double = recorded_rate(trace, max_tokens=100, mean=111.0)
    assert [double(when_s) for when_s in (0.1, 0.3, 0.6, 0.9, 1.1)] == pytest.approx([200, 200, 20, 20, 200], abs=6)


# ---------------------------------------------------------------------- rates


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "nan", "inf", "1:", "0:1,x", "5:1,4:2", "0:0,1:0", "0:-1,1:1"])
def test_a_rate_that_is_none_says_what_is_allowed(text: str) -> None:
    with pytest.raises(InvalidRequest, match="expected R"):
        parse_rate(text)


def test_a_rate_is_a_number_or_points_joined_by_straight_lines() -> None:
    assert parse_rate("12.5") == 12.5
    profile = parse_rate("1:10,3:30,3:5,4:0")
    assert callable(profile)
    found = [profile(when_s) for when_s in (0, 1, 2, 2.5, 3, 3.5, 4, 100)]
    assert found == pytest.approx([10, 10, 20, 25, 5, 2.5, 0, 0])


@given(
    points=st.lists(st.tuples(st.floats(0, 20), st.floats(0, 50)), min_size=1, max_size=5),
    steps=st.lists(st.floats(0.001, 0.7), min_size=1, max_size=40),
)
def test_so_many_requests_leave_as_the_rate_s_integral_says_however_often_one_asks(
    points: list[tuple[float, float]], steps: list[float]
) -> None:
    profile = RateProfile(points=tuple(sorted(points)))
    departures, now_s = Departures(0.0), 0.0
    due: list[float] = []
    for step_s in steps:
        now_s += step_s
        while (next_s := departures.next(profile, now_s=now_s)) is not None:
            due.append(next_s)
    when = np.linspace(0, now_s, 20_001)
    rates = np.array([profile(when_s) for when_s in when])
    integral = float(((rates[1:] + rates[:-1]) / 2).sum() * now_s / 20_000)
    jumps = max(rate for _, rate in points) * GRAIN_S * (len(points) + 1)  # a step is felt within a grain
    assert len(due) == pytest.approx(integral + 0.5, abs=1.5 + jumps)
    assert due == sorted(due)
    assert all(0 <= due_s <= now_s for due_s in due)


def test_a_postponed_departure_does_not_make_up_for_the_time_it_waited() -> None:
    departures = Departures(0.0)
    assert departures.next(lambda when_s: 10.0, now_s=0.0) == 0.0
    departures.postpone(5.0)
    due = [departures.next(lambda when_s: 10.0, now_s=5.2) for _ in range(3)]
    assert due == [pytest.approx(5.1), pytest.approx(5.2), None]


# ---------------------------------------------------------------------- the generator, on a real data path


async def drive(served: Mesh, *, share: float = 1.0, seconds: float = 1.0, **options: object) -> dict[str, object]:
    async with RouterClient(served.router.address) as client:
        traffic = DrawnTraffic(parse_pattern("zipf:1"), await client.describe(), num_tokens=16)
        checker = Checker(served.spec, share=share)
        load = LoadGenerator(client, traffic, checker=checker, **options)  # type: ignore[arg-type]
        took_s = await load.run_for(seconds)
        await checker.close()
    return report(load.tally, checker.checks, seconds=took_s)


async def test_a_closed_loop_accounts_for_every_pair(model: Path) -> None:
    with mesh(model) as served:
        document = await drive(served, concurrency=3)
        totals = served.router.report().totals
    requests, ledger, checks = document["requests"], document["ledger"], document["checks"]
    assert isinstance(requests, dict)
    assert isinstance(ledger, dict)
    assert isinstance(checks, dict)
    assert requests["failed"] == 0
    assert requests["sent"] == requests["answered"] == totals.requests > 0
    assert document["tokens"] == requests["sent"] * 16 == totals.tokens
    assert ledger["pairs"] == ledger["computed"] == requests["sent"] * 16 * TOP_K == totals.pairs
    assert checks["checked"] > 0
    assert checks["checked"] + checks["skipped"] == requests["sent"]
    assert checks["wrong"] == 0, checks["first_wrong"]


async def test_an_open_loop_keeps_its_rate_whatever_the_answers_do(model: Path) -> None:
    with mesh(model) as served:
        document = await drive(served, rate=40.0, seconds=2.0, share=0.1)
    requests = document["requests"]
    assert isinstance(requests, dict)
    assert 70 <= requests["sent"] <= 81


async def test_lossy_answers_are_checked_on_their_effective_routing(model: Path) -> None:
    overflow = router_pb2.OverflowPolicy(chain=["next_expert", "drop"], capacity_factor=1.0, max_score_gap=0.02)
    spec = read_model(model)
    states = {layer: torch.randn(512, DIM, generator=torch.Generator().manual_seed(1)) for layer in spec.layers}
    with mesh(model) as served:
        async with RouterClient(served.router.address) as client:
            checker = Checker(spec, share=1.0)
            load = LoadGenerator(
                client, TraceTraffic(states, num_tokens=64), concurrency=1, checker=checker, overflow=overflow
            )
            await load.run_for(1.0)
            await checker.close()
        totals = served.router.report().totals
    assert load.tally.totals.rerouted > 0
    assert load.tally.totals.dropped > 0
    assert (load.tally.totals.rerouted, load.tally.totals.dropped) == (totals.rerouted, totals.dropped)
    assert checker.checks.checked > 0
    assert checker.checks.wrong == 0, checker.checks.first_wrong


async def test_failed_requests_are_counted_by_class_and_do_not_stop_the_load(model: Path) -> None:
    with mesh(model, experts=ExpertServerConfig(emulated_tokens_per_s=200)) as served:
        document = await drive(served, concurrency=4, timeout_s=0.05, seconds=1.5)
        while any(server.report().queue_tokens for server in served.servers.values()):
            await asyncio.sleep(0.01)
    requests, errors = document["requests"], document["errors"]
    assert isinstance(requests, dict)
    assert isinstance(errors, dict)
    assert errors["DeadlineExceeded"] > 4
    assert sum(errors.values()) == requests["failed"]
    assert str(document["first_error"]).startswith("DeadlineExceeded: ")


async def test_a_router_that_went_away_is_an_error_class(model: Path) -> None:
    with mesh(model) as served:
        async with RouterClient(served.router.address) as client:
            traffic = DrawnTraffic(parse_pattern("uniform"), await client.describe(), num_tokens=4)
            load = LoadGenerator(client, traffic, concurrency=2)
            stop = asyncio.Event()
            running = asyncio.create_task(load.run(stop))
            while not load.tally.answered:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(served.router.stop, 0.1)
            while not load.tally.errors["Unavailable"]:
                await asyncio.sleep(0.01)
            stop.set()
            await running
    assert load.tally.answered > 0


async def test_the_rate_can_be_changed_while_it_runs_and_every_request_is_a_sample(model: Path) -> None:
    samples: list[Sample] = []
    with mesh(model) as served:
        async with RouterClient(served.router.address) as client:
            traffic = DrawnTraffic(parse_pattern("uniform"), await client.describe(), num_tokens=4)
            load = LoadGenerator(client, traffic, rate=0.0, on_sample=samples.append)
            stop = asyncio.Event()
            running = asyncio.create_task(load.run(stop))
            await asyncio.sleep(0.1)
            assert not samples
            load.rate = 100.0
            while len(samples) < 20:
                await asyncio.sleep(0.01)
            load.rate = 0.0
            while load.num_open:
                await asyncio.sleep(0.01)
            stop.set()
            await running
    assert load.tally.answered == len(samples)
    assert all(sample.ledger is not None and sample.num_tokens == 4 for sample in samples)


async def test_a_rate_may_change_over_time_and_samples_say_when_they_were_due(model: Path) -> None:
    samples: list[Sample] = []
    with mesh(model) as served:
        async with RouterClient(served.router.address) as client:
            traffic = DrawnTraffic(parse_pattern("uniform"), await client.describe(), num_tokens=4)
            steps = RateProfile(points=((0, 20), (0.5, 20), (0.5, 80), (1.5, 80)))
            load = LoadGenerator(client, traffic, rate=steps, on_sample=samples.append)
            began_s = asyncio.get_running_loop().time()
            await load.run_for(1.5)
    due_s = np.array(sorted(sample.due_s for sample in samples)) - began_s
    assert 8 <= (due_s < 0.5).sum() <= 12
    assert 70 <= (due_s >= 0.5).sum() <= 84


async def test_a_postponing_load_waits_where_another_fails_its_requests(model: Path) -> None:
    slow = ExpertServerConfig(emulated_tokens_per_s=400)
    tallies = {}
    with mesh(model, experts=slow) as served:
        for postpone in (False, True):
            async with RouterClient(served.router.address) as client:
                traffic = DrawnTraffic(parse_pattern("uniform"), await client.describe(), num_tokens=16)
                load = LoadGenerator(client, traffic, rate=200.0, max_open=4, postpone=postpone)
                await load.run_for(1.0)
                tallies[postpone] = load.tally
    assert tallies[False].errors[NOT_SENT] > 50
    assert tallies[False].first_error == "NotSent: 4 requests are open"
    assert not tallies[True].errors
    assert 0 < tallies[True].totals.requests < 100


# ---------------------------------------------------------------------- checking


async def test_an_answer_that_is_wrong_in_any_way_is_found(model: Path) -> None:
    spec = read_model(model)
    checker = Checker(spec, share=1.0)
    x_TD = torch.randn(8, DIM, generator=torch.Generator().manual_seed(2))
    with mesh(model) as served:
        async with RouterClient(served.router.address) as client:
            answer = await client.forward("1", x_TD, return_routing=True)
            assert answer.routing is not None
            work = Work(layer="1", x_TD=x_TD)
            assert checker.examine(work, answer)[1] == ""

            off = replace(answer, y_TD=answer.y_TD * 1.001)
            assert "relative error" in checker.examine(work, off)[1]

            ledger = answer.ledger
            unbalanced = replace(answer, ledger=replace(ledger, computed=ledger.computed - 1))
            assert "ledger has 16 pairs, 15 computed and 0 dropped" in checker.examine(work, unbalanced)[1]

            undropped = replace(answer, ledger=replace(ledger, computed=15, dropped=1))
            assert "1 dropped pairs, the routing 0" in checker.examine(work, undropped)[1]

            other_TK = (answer.routing.expert_TK + 1) % NUM_EXPERTS
            others = await client.forward(
                "1",
                x_TD,
                routing=Routing(expert_TK=other_TK, weight_TK=answer.routing.weight_TK),
                return_routing=True,
            )
            assert "the routing is not the gate's" in checker.examine(work, others)[1]
            asked = replace(work, routing=answer.routing)
            assert "the routing is not the request's" in checker.examine(asked, others)[1]
    await checker.close()


# ---------------------------------------------------------------------- the command's function


async def load_for(router: str, pattern: str, **options: object) -> dict[str, object]:
    defaults: dict[str, object] = {
        "rate": None,
        "move_every_s": None,
        "concurrency": 2,
        "num_tokens": 8,
        "duration_s": 0.3,
        "timeout_s": 10.0,
        "model": None,
        "check_share": 1.0,
    }
    return await run_load(router, parse_pattern(pattern), **(defaults | options))  # type: ignore[arg-type]


async def test_a_trace_goes_through_the_model_s_own_gate(model: Path, tmp_path: Path) -> None:
    save_file({"layer.1": torch.randn(40, DIM), "other": torch.zeros(1)}, tmp_path / "trace.safetensors")
    with mesh(model) as served:
        document = await load_for(served.router.address, f"trace:{tmp_path / 'trace.safetensors'}")
        demand = served.router.report().demand
    assert document["checking"]
    assert document["checks"]["wrong"] == 0  # type: ignore[index]
    assert {layer for layer, _ in demand} == {"1"}


async def test_arguments_that_do_not_fit_the_model_are_refused(model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.safetensors"
    with mesh(model) as served:
        address = served.router.address
        with pytest.raises(InvalidRequest, match=r"tokens is 9000, limit is the router's max_request_tokens \(8192\)"):
            await load_for(address, "uniform", num_tokens=9000)
        with pytest.raises(InvalidRequest, match="no such file"):
            await load_for(address, f"trace:{trace}")
        save_file({"other": torch.zeros(1)}, trace)
        with pytest.raises(InvalidRequest, match=r"no key of layer\.0"):
            await load_for(address, f"trace:{trace}")
        save_file({"layer.0": torch.zeros(3, DIM + 1)}, trace)
        with pytest.raises(InvalidRequest, match=rf"shape \[3, {DIM + 1}\], expected \[T, {DIM}\]"):
            await load_for(address, f"trace:{trace}")
        trace.write_bytes(b"not a safetensors file")
        with pytest.raises(InvalidRequest, match="not a readable safetensors file"):
            await load_for(address, f"trace:{trace}")
        with pytest.raises(InvalidRequest, match=r"--move-every needs a pattern with hot experts .*, not uniform"):
            await load_for(address, "uniform", move_every_s=1.0)
        other = tiny_model("mixtral", tmp_path / "other")
        with pytest.raises(InvalidRequest, match="is not the served one"):
            await load_for(address, "uniform", model=other)


async def test_a_router_that_is_not_there_is_named() -> None:
    with pytest.raises(Unavailable, match=r"router 127\.0\.0\.1:1 cannot be reached"):
        await load_for("127.0.0.1:1", "uniform")


def test_percentiles_of_nothing_are_absent() -> None:
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None, "max": None}
    assert percentiles([0.001] * 99 + [1.0])["p50"] == pytest.approx(0.001)


def test_a_load_without_answers_is_still_a_report() -> None:
    tally = Tally()
    tally.totals.requests = tally.totals.failed_requests = 1
    tally.errors[NOT_SENT] += 1
    document = report(tally, None, seconds=1.0)
    assert document["requests"] == {"sent": 1, "answered": 0, "failed": 1}
    assert document["errors"] == {NOT_SENT: 1}
