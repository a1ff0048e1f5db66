"""Simulated clusters: nothing is lost or invented, queues behave as theory says, and the real code does its part."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cli import main
from cluster.config import ClusterConfig, parse_config
from cluster.patterns import parse_pattern
from cluster.sim_control import Foresight
from cluster.sim_report import SLICE_S, recoveries
from cluster.sim_servers import Machine
from cluster.simulate import Fault, Simulation, choose_scale
from cluster.workloads import Diurnal, DrawnHeat, Workload, flash_crowd, pattern_shares
from protos.errors import InvalidRequest
from router.table import CopyShare
from tests.tiny_models import tiny_model

LAYERS, EXPERTS, TOP_K = ("0", "1"), 8, 2
COPY_BYTES = 1000
MACHINE = Machine(pairs_per_s=2000.0, emulated=True, start_s=1.5, load_bytes_per_s=COPY_BYTES * 200)


def config(
    *,
    servers: tuple[int, int] = (3, 3),
    copies: int = 16,
    name: str = "default",
    placement: dict[str, Any] | None = None,
    **overflow: Any,
) -> ClusterConfig:
    return parse_config(
        {
            "model": "simulated",
            "router": {"settings": {"overflow": overflow}},
            "placement": placement or {},
            "experts": {
                "name": name,
                "min_servers": servers[0],
                "max_servers": servers[1],
                "settings": {"budget_bytes": copies * COPY_BYTES},
            },
            "scaling": {"downscale_delay_s": 4},
        }
    )


def workload(pattern: str = "zipf:1", rate: Any = 60.0, *, num_tokens: int = 16, **fields: Any) -> Workload:
    shares = pattern_shares(parse_pattern(pattern), num_layers=len(LAYERS), num_experts=EXPERTS, top_k=TOP_K)
    heat = DrawnHeat(shares, top_k=TOP_K, **{key: fields.pop(key) for key in ("move", "every_s") if key in fields})
    return Workload(
        layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, heat=heat, rate=rate, num_tokens=num_tokens, **fields
    )


def simulate(cluster: ClusterConfig, load: Workload, seconds: float, **options: Any) -> dict[str, Any]:
    machine = options.pop("machine", MACHINE)
    warm_up_s = options.pop("warm_up_s", 0.0)
    return Simulation(cluster, load, machine, copy_bytes=COPY_BYTES, **options).run(seconds, warm_up_s=warm_up_s)


def account(found: dict[str, Any], load: Workload) -> tuple[int, int]:
    """Pairs offered, and pairs that the ledger knows."""
    ledger = found["ledger"]
    return found["requests"]["sent"] * load.pairs, ledger["computed"] + ledger["dropped"] + ledger["failed"]


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rate=st.sampled_from([20.0, 150.0, 300.0]),
    chain=st.sampled_from([("copy", "wait", "fail"), ("copy", "next_expert", "drop"), ("drop",), ("wait", "fail")]),
    capacity=st.sampled_from([None, 0.5]),
    lost=st.booleans(),
    visits=st.sampled_from([1, 3]),
    scale=st.sampled_from([1, 4]),
)
def test_every_pair_is_computed_dropped_or_failed(
    seed: int, rate: float, chain: tuple[str, ...], capacity: float | None, lost: bool, visits: int, scale: int
) -> None:
    load = workload(rate=rate, visits=visits)
    faults = [Fault(at_s=1.0, server=1)] if lost else []
    cluster = config(chain=chain, capacity_factor=capacity)
    found = simulate(cluster, load, 1.5, seed=seed, faults=faults, scale=scale)
    offered, known = account(found, load)
    assert offered == known
    ledger = found["ledger"]
    assert ledger["copied"] + ledger["waited"] + ledger["rerouted"] <= ledger["computed"]


def test_the_same_seed_gives_the_same_document_and_another_one_another() -> None:
    one, same, other = (json.dumps(simulate(config(), workload(poisson=True), 3.0, seed=seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_queue_waits_as_an_m_d_1_queue_does() -> None:
    """One server, constant service times, arrivals at random: the Pollaczek-Khinchine formula."""
    service_s, busy = 0.1, 0.5
    cluster = parse_config(
        {
            "model": "simulated",
            "router": {"settings": {"max_batches_in_flight": 10**6, "max_batch_tokens": 10}},
            "placement": {"heartbeat_s": 5, "dead_after_s": 20, "plan_interval_s": 20},
            "experts": {
                "min_servers": 1,
                "max_servers": 1,
                "settings": {"budget_bytes": 16 * COPY_BYTES, "max_launch_tokens": 10},
            },
        }
    )
    load = workload("uniform", busy / service_s, num_tokens=10, poisson=True)
    machine = Machine(pairs_per_s=10 * TOP_K / service_s, launch_s=0, hop_s=0, client_s=0, batch_s=0, message_s=0)
    sim = Simulation(cluster, load, machine, copy_bytes=COPY_BYTES, seed=5)
    sim.run(1000.0)
    wait_s = float(np.mean(sim.record.took_s)) - service_s
    assert wait_s == pytest.approx(busy / (2 * (1 - busy)) * service_s, rel=0.15)


def test_an_idle_cluster_answers_in_the_time_of_one_launch_and_the_way() -> None:
    load = workload("uniform", 2.0)
    found = simulate(config(servers=(1, 1)), load, 10.0)
    machine = MACHINE
    expected_s = machine.client_s + machine.batch_s + 2 * machine.message_s + 2 * machine.hop_s + 32 / 2000
    assert found["latency_s"]["p50"] == pytest.approx(expected_s, rel=1e-6)


def test_jitter_lengthens_the_tail_as_its_exponential_distribution_says() -> None:
    load = workload("uniform", 20.0)
    sim = Simulation(config(servers=(1, 1)), load, replace(MACHINE, jitter_s=0.004), copy_bytes=COPY_BYTES, seed=5)
    sim.run(100.0)
    extra_s = np.array(sim.record.took_s) - simulate(config(servers=(1, 1)), load, 10.0)["latency_s"]["p50"]
    assert np.mean(extra_s) == pytest.approx(0.004, rel=0.1)
    assert np.percentile(extra_s, 99) == pytest.approx(0.004 * np.log(100), rel=0.15)


@pytest.mark.parametrize("kind", ["kill", "silent"])
def test_rows_of_a_lost_server_are_computed_elsewhere(kind: Any) -> None:
    found = simulate(config(), workload(rate=170.0), 5.0, faults=[Fault(at_s=1.003, server=0, kind=kind)])
    assert found["requests"]["failed"] == 0
    assert found["ledger"]["retried"] > 0
    assert "s0000 lost" in " ".join(event["what"] for event in found["events"])
    [started_s] = [event["at_s"] for event in found["events"] if event["what"] == "s0003 started"]
    assert started_s == pytest.approx(1.003 + MACHINE.replace_s + MACHINE.start_s)
    assert found["timeline"][-1]["servers"] == 3


def test_what_met_a_killed_server_waits_until_routers_notice() -> None:
    fault = Fault(at_s=1.003, server=0)
    soon_s, late_s = (
        simulate(config(), workload(rate=30.0), 3.0, faults=[fault], machine=replace(MACHINE, notice_s=notice_s))[
            "latency_s"
        ]["max"]
        for notice_s in (0.0, 0.5)
    )
    assert late_s - soon_s == pytest.approx(0.5, abs=0.1)


def test_copies_load_once_their_server_has_opened_them() -> None:
    fault = Fault(at_s=1.003, server=0)

    def slowest_s(load_s: float) -> float:
        machine = replace(MACHINE, load_s=load_s, load_bytes_per_s=1e12)
        return float(simulate(config(), workload(rate=30.0), 3.0, faults=[fault], machine=machine)["latency_s"]["max"])

    assert slowest_s(0.3) - slowest_s(0.0) == pytest.approx(0.3, abs=0.1)


def test_a_hot_spot_gets_more_copies_and_latency_recovers_as_no_static_placement_does() -> None:
    load = workload("hot:1:0.45", 150.0, move="jump", every_s=5.0)
    follows, stays = (simulate(config(), load, 10.0, static=static, slo_s=0.15) for static in (False, True))
    phases = follows["placement"]["phases"]
    assert phases[1]["copies_loaded"] > 0
    assert not any(phase["copies_loaded"] for phase in stays["placement"]["phases"])
    settled = -2  # the last moment is that of the next jump
    assert follows["timeline"][settled]["balancedness_mean"] > stays["timeline"][settled]["balancedness_mean"]
    assert follows["slo"]["goodput_share"] > stays["slo"]["goodput_share"]


@pytest.mark.parametrize("survive", [0, 1])
def test_a_static_placement_replaces_what_is_lost_and_moves_nothing_else(survive: int) -> None:
    load = workload("hot:1:0.45", 150.0)
    cluster = config(copies=24, placement={"survive": survive})
    sims = [
        Simulation(cluster, load, MACHINE, copy_bytes=COPY_BYTES, faults=faults, static=True)
        for faults in ((), [Fault(at_s=2.0, server=1)])
    ]
    (before, _), (after, found) = [(sim.placement.fleet, sim.run(10.0)) for sim in sims]
    whole, left = before.current, after.current
    lost = {key for key, copies in whole.items() if all(copy.server_id == "s0001" for copy in copies)}
    assert {key: copies for key, copies in left.items() if key not in lost} == {
        key: rest(copies, "s0001") for key, copies in whole.items() if key not in lost
    }
    assert left.keys() == whole.keys()
    phase = found["placement"]["phases"][-1]
    assert (phase["planned_loads"], phase["planned_unloads"]) == (len(lost), 0)
    assert bool(lost) == (survive == 0)


def rest(copies: tuple[CopyShare, ...], lost: str) -> tuple[CopyShare, ...]:
    """The copies that stay, with the shares that a fleet gives them."""
    kept = [copy for copy in copies if copy.server_id != lost]
    total = sum(copy.share for copy in kept)
    return tuple(CopyShare(server_id=copy.server_id, share=copy.share / total) for copy in kept)


@pytest.mark.parametrize("name", ["default", "gpu-large"])
def test_a_flash_crowd_brings_servers_and_they_leave_again(name: str) -> None:
    load = workload("uniform", flash_crowd(40, 250, at_s=3, hold_s=8))
    found = simulate(config(servers=(2, 6), name=name), load, 30.0)
    servers = [row["servers"] for row in found["timeline"]]
    assert servers[0] == servers[-1] == 2
    assert max(servers) >= 4
    assert found["requests"]["failed"] == 0
    assert found["servers"]["seconds"] < 30 * max(servers)


def test_capacity_drops_what_exceeds_it() -> None:
    load = workload("hot:1:0.5", 8.0, num_tokens=256)
    kept = simulate(config(servers=(1, 1)), load, 3.0)
    cut = simulate(config(servers=(1, 1), capacity_factor=1.0, chain=["drop"]), load, 3.0)
    assert kept["ledger"]["dropped"] == 0
    # Half of all pairs go to one of 8 experts, which keeps 1/8 of them: 3/8 are dropped.
    assert cut["ledger"]["dropped"] / cut["ledger"]["pairs"] == pytest.approx(3 / 8, abs=0.01)


def test_a_coarse_simulation_agrees_with_an_exact_one() -> None:
    load = workload("zipf:1", 300.0, num_tokens=4)
    exact, coarse = (simulate(config(servers=(2, 3)), load, 6.0, scale=scale) for scale in (1, 4))
    assert coarse["tokens_per_s"] == pytest.approx(exact["tokens_per_s"], rel=0.03)
    assert coarse["servers"]["seconds"] == pytest.approx(exact["servers"]["seconds"], rel=0.15)
    assert abs(coarse["latency_s"]["p50"] - exact["latency_s"]["p50"]) < 0.05


def test_the_scale_keeps_the_number_of_simulated_requests_in_bounds() -> None:
    assert choose_scale(workload(rate=10.0), 10) == 1
    load = workload(rate=Diurnal(low=10, high=4000, period_s=10), visits=2)
    assert choose_scale(load, 10) == 20


def test_a_clairvoyant_cluster_is_there_before_the_crowd() -> None:
    load = workload("uniform", flash_crowd(40, 250, at_s=6, hold_s=5))
    seer = Foresight(utilisation=0.8, lead_s=3.0)
    found = simulate(config(servers=(2, 6)), load, 20.0, foresight=seer, slo_s=0.2)
    assert [row["servers"] for row in found["timeline"]][5] == 5  # 250 * 32 pairs/s at 0.8 * 2000 each
    assert found["slo"]["outside_s"] == 0


@pytest.mark.parametrize("move", ["jump", "drift"])
def test_a_clairvoyant_plan_may_be_made_before_the_beginning(move: str) -> None:
    load = workload(move=move, every_s=2.0)
    found = simulate(config(servers=(2, 6)), load, 3.0, foresight=Foresight(utilisation=0.8, lead_s=2.5))
    assert found["requests"]["failed"] == 0


def test_several_pools_are_refused() -> None:
    cluster = parse_config({"model": "simulated", "pools": [{"name": "fast"}, {"name": "slow"}]})
    with pytest.raises(InvalidRequest, match=r"pools is given \(fast, slow\), but the simulator simulates one pool"):
        simulate(cluster, workload(), 1.0)


def test_requests_that_are_open_at_the_end_count_with_what_they_took() -> None:
    load = workload("uniform", 300.0)  # 9,600 pairs per second for servers that compute 6,000
    found = simulate(config(), load, 4.0)
    requests = found["requests"]
    assert requests["sent"] == pytest.approx(1200, abs=1)
    assert requests["answered"] == requests["sent"]
    assert found["latency_s"]["max"] > 1.5
    assert found["slo"]["longest_outside_s"] > 3
    assert found["tokens_per_s"] < 6000 / TOP_K * 1.05  # what the servers compute, not what they were sent
    assert found["servers"]["seconds"] == pytest.approx(12, abs=0.5)
    assert found["timeline"][-1]["at_s"] == 4


def test_requests_that_nobody_answers_are_outside_the_slo() -> None:
    machine = replace(MACHINE, replace_s=1000.0)
    faults = [Fault(at_s=2.0, server=0) for _ in range(3)]
    found = simulate(config(), workload("uniform", 20.0), 4.0, faults=faults, machine=machine, slo_s=0.2)
    assert found["requests"]["failed"] == pytest.approx(40, abs=2)
    assert found["slo"]["outside_s"] == pytest.approx(2, abs=SLICE_S)
    assert found["slo"]["goodput_share"] == pytest.approx(0.5, abs=0.03)
    assert [onset["onset_s"] for onset in found["slo"]["onsets"]] == [2.0]
    assert [phase["from_s"] for phase in found["placement"]["phases"]] == [0, 2]


def test_a_fault_between_two_jumps_is_an_onset_among_them() -> None:
    load = workload(move="jump", every_s=2.0)
    found = simulate(config(), load, 6.0, faults=[Fault(at_s=3.0, server=0), Fault(at_s=4.0, server=0)])
    assert [onset["onset_s"] for onset in found["slo"]["onsets"]] == [2.0, 3.0, 4.0]


def test_a_recovery_ends_with_the_last_slice_outside_before_the_next_onset() -> None:
    outside_S = np.zeros(40, dtype=np.bool_)  # 10 s
    outside_S[[8, 9, 11]] = True  # 2 to 2.5 s, and until 3 s
    outside_S[16:20] = True  # 4 to 5 s: until the next onset
    found = recoveries(outside_S, [2.0, 4.0, 5.0])
    assert [(onset["onset_s"], onset["back_within_slo_s"]) for onset in found] == [(2.0, 1.0), (4.0, None), (5.0, 0.0)]
    assert recoveries(outside_S, []) == []


@pytest.fixture(scope="module")
def cluster_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulate")
    file = folder / "cluster.yaml"
    model = tiny_model("mixtral", folder / "model")
    file.write_text(f"model: {model}\nexperts: {{settings: {{emulated_tokens_per_s: 2000}}}}\n")
    return file


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cluster_file: Path
) -> Callable[..., tuple[int, str, str]]:
    """`expertmesh simulate` in this process: status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expertmesh", "simulate", str(cluster_file), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return (ended.value.code, *capfd.readouterr())

    return run


def test_the_command_answers_what_if_as_one_document(command: Callable[..., tuple[int, str, str]]) -> None:
    what_if = ("--lose", "1@2", "--capacity-factor", "1.25", "--chain", "copy,drop", "--times", "2")
    status, stdout, _ = command(
        "--rate", "30", "--tokens", "8", "--duration", "4", "--servers", "3", *what_if, "--json"
    )
    found = json.loads(stdout)
    assert status == 0
    assert stdout.count("\n") == 1
    assert found["requests"]["sent"] == pytest.approx(240, abs=2)
    assert found["ledger"]["pairs"] == found["ledger"]["computed"] + found["ledger"]["dropped"]
    assert found["machine"]["pairs_per_s"] == 2000
    assert next(event["what"] for event in found["events"]) == "s0001 lost (kill)"


def test_the_command_tells_people_the_same(command: Callable[..., tuple[int, str, str]]) -> None:
    status, stdout, _ = command(
        "--rate", "flash:10:60:1:1", "--duration", "4", "--pattern", "zipf:1.2", "--visits", "0"
    )
    assert status == 0
    assert "SIMULATED 4 s" in stdout
    assert "server-seconds" in stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rate", "fast"), "rate is 'fast'"),
        (("--lose", "x"), "--lose is 'x'"),
        (("--lose", "1@-2"), "--lose is '1@-2'"),
        (("--lose", "1@60"), "--lose is '1@60', it must be before the end: --duration is 60"),
        (("--machine", "speed=1"), "--machine is 'speed=1'"),
        (("--machine", "pairs_per_s=0"), "pairs_per_s"),
        (("--duration", "0"), "--duration is 0"),
        (("--warm-up", "70"), "--warm-up is 70"),
        (("--chain", "drop,copy"), "chain"),
        (("--capacity-factor", "-1"), "capacity_factor"),
        (("--pattern", "trace:x.safetensors"), "trace"),
        (("--trace", "nowhere.parquet"), "nowhere.parquet"),
        (("--load", "nowhere.npz"), "nowhere.npz"),
        (("--load", "a.npz", "--trace", "b.parquet"), "exclude each other"),
        (("--servers", "0"), "max_servers"),
        (("--seed", "-1"), "--seed is -1"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(
    command: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], said: str
) -> None:
    status, stdout, stderr = command(*arguments)
    assert status == 2
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert said in stderr


@pytest.mark.parametrize("more", [(), ("--servers", "3"), ("--trace", "nowhere.parquet")])
def test_a_file_with_pools_is_refused_in_one_clear_line(
    command: Callable[..., tuple[int, str, str]], cluster_file: Path, more: tuple[str, ...]
) -> None:
    whole = cluster_file.read_text()
    cluster_file.write_text(whole.splitlines()[0] + "\npools: [{name: fast}, {name: slow}]\n")
    try:
        status, stdout, stderr = command(*more)
    finally:
        cluster_file.write_text(whole)
    assert (status, stdout) == (2, "")
    assert stderr.count("\n") == 1
    assert "pools is given (fast, slow), but the simulator simulates one pool" in stderr


@pytest.mark.parametrize("move", ["jump", "drift"])
def test_the_command_plans_ahead_of_a_heat_that_moves(command: Callable[..., tuple[int, str, str]], move: str) -> None:
    status, stdout, _ = command(
        "--clairvoyant", "0.8", "--move-every", "2", "--move", move, "--duration", "3", "--rate", "10", "--json"
    )
    assert status == 0
    assert json.loads(stdout)["requests"]["failed"] == 0
