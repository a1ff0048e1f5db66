"""Pools of expert servers: how they are configured, and how heartbeats become decisions."""

import math
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.app import build, deployment_name
from cluster.config import ClusterConfig, load_config, parse_config
from cluster.demand import Meter, Pace
from cluster.messages import ServerBeat, ServerHello
from cluster.pools import Pools, Speeds
from protos.checkpoint import read_model
from protos.errors import InvalidRequest
from protos.model import ModelSpec
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parent.parent
TWO_POOLS: list[dict[str, Any]] = [
    {"name": "fast", "num_gpus": 1, "min": 1, "max": 4, "budget_bytes": 1048576, "resources": {"h200": 1}, "cost": 3},
    {"name": "cheap", "min": 0, "max": 6, "settings": {"emulated_tokens_per_s": 500, "budget_bytes": 1 << 24}},
]


def configure(pools: list[dict[str, Any]], **fields: Any) -> ClusterConfig:
    return parse_config({"model": "m", "pools": pools, **fields})


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return read_model(tiny_model("mixtral", tmp_path_factory.mktemp("models") / "mixtral"))


# ------------------------------------------------------------------ the config


def test_pools_take_the_place_of_experts() -> None:
    config = configure(TWO_POOLS)
    fast, cheap = config.all_pools
    assert (fast.name, fast.min_servers, fast.max_servers, fast.settings.budget_bytes) == ("fast", 1, 4, 1 << 20)
    assert (cheap.name, cheap.min_servers, cheap.max_servers) == ("cheap", 0, 6)
    assert config.min_servers == 1
    assert config.pool("cheap") is cheap
    assert parse_config(config.model_dump(mode="json")) == config
    with pytest.raises(KeyError, match="there are: fast, cheap"):
        config.pool("slow")


def test_experts_are_the_one_pool_of_a_cluster_without_pools() -> None:
    config = parse_config({"model": "m", "experts": {"min_servers": 3}})
    assert config.all_pools == (config.experts,)
    assert config.pool("default").min_servers == 3


def test_min_and_max_are_short_forms_everywhere() -> None:
    assert parse_config({"model": "m", "experts": {"min": 3, "max": 5}}).experts.max_servers == 5


@pytest.mark.parametrize(
    ("pools", "fields", "words"),
    [
        (TWO_POOLS, {"experts": {"max_servers": 7}}, ["experts and pools are both given"]),
        ([TWO_POOLS[0]] * 2, {}, ["two of them are named 'fast'"]),
        ([{"min": 1}, {"min": 2}], {}, ["two of them are named 'default'"]),
        ([TWO_POOLS[0] | {"speed": 2}, TWO_POOLS[1]], {}, ["speed", "'cheap'", "all or for none"]),
        ([TWO_POOLS[0] | {"weight_dtype": "int8"}, TWO_POOLS[1]], {}, ["fast: int8", "cheap: compute"]),
        ([{"name": "x", "min": 5, "max": 2}], {}, ["pools.0", "max_servers (2)", "min_servers (5)"]),
        ([{"name": "x", "min": 1, "min_servers": 2}], {}, ["min is given as 1", "min_servers as 2"]),
        ([{"name": "x", "budget_bytes": 1, "settings": {"budget_bytes": 2}}], {}, ["budget_bytes is given here and"]),
        ([{"name": "x", "speed": 0}], {}, ["pools.0.speed", "greater than 0"]),
        ([{"name": "Two Words"}], {}, ["pools.0.name", "Two Words"]),
    ],
)
def test_wrong_pools_give_one_line_that_names_the_field(
    pools: list[dict[str, Any]], fields: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        configure(pools, **fields)
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message


def test_every_pool_is_a_deployment_of_its_own(spec: ModelSpec) -> None:
    config = configure(TWO_POOLS).model_copy(update={"model": str(spec.path)})
    arguments: Any = build(config)._bound_deployment.init_args
    pools = arguments[2]
    fast, cheap = [node._bound_deployment for node in pools]
    assert [fast.name, cheap.name] == [deployment_name(config, pool) for pool in config.pools]
    assert fast.ray_actor_options == {"num_cpus": 0.5, "num_gpus": 1, "resources": {"h200": 1}}
    bounds = [pool._deployment_config.autoscaling_config for pool in (fast, cheap)]
    assert [(each.min_replicas, each.initial_replicas, each.max_replicas) for each in bounds] == [(1, 1, 4), (0, 0, 6)]


def test_the_example_is_a_config_with_two_kinds_of_servers() -> None:
    fast, roomy = load_config(ROOT / "examples" / "pools.yaml").all_pools
    assert fast.settings.budget_bytes < roomy.settings.budget_bytes
    assert (fast.settings.emulated_tokens_per_s or 0) > (roomy.settings.emulated_tokens_per_s or 0)


def test_the_pools_in_the_kubernetes_guide_are_accepted() -> None:
    text = (ROOT / "k8s" / "README.md").read_text()
    block = re.search(r"^    pools:\n(?:      .*\n)+", text, re.M)
    assert block is not None
    pools = configure(yaml.safe_load(textwrap.dedent(block[0]))["pools"]).pools
    assert [pool.name for pool in pools] == ["h100", "l4"]


def test_one_pool_keeps_the_name_that_dashboards_know() -> None:
    config = parse_config({"model": "m"})
    assert deployment_name(config, config.experts) == "ExpertServer"


# ------------------------------------------------------------------ rates


def test_a_rate_is_the_growth_over_a_window_wherever_the_readings_fell() -> None:
    meter = Meter(3.0)
    for tick in range(17):
        meter.read(100 * tick * 0.25, tick * 0.25)
    meter.read(500, 4.25)
    assert meter.rate(0.25) == pytest.approx(400)
    assert meter.rate(0.25, ago_s=0.25) == pytest.approx(100)
    assert meter.rate(1.0) == pytest.approx(175)


def test_late_and_repeated_readings_are_ignored() -> None:
    meter = Meter(3.0)
    for total, now_s in ((0, 0.0), (50, 1.0), (40, 0.9), (40, 1.1), (50, 1.0)):
        meter.read(total, now_s)
    assert meter.rate(1.0) == pytest.approx(50)


@given(st.lists(st.tuples(st.floats(0.001, 1), st.integers(0, 1000)), max_size=40), st.floats(0.01, 2))
def test_rates_are_never_negative_and_never_above_the_fastest_growth(
    steps: list[tuple[float, int]], window_s: float
) -> None:
    meter, now_s, total, fastest = Meter(2.0), 0.0, 0, 0.0
    meter.read(0, 0.0)
    for pause_s, more in steps:
        now_s, total, fastest = now_s + pause_s, total + more, max(fastest, more / pause_s)
        meter.read(total, now_s)
        assert -1e-6 <= meter.rate(window_s) <= fastest * (1 + 1e-6) + 1e-6


def test_the_pace_is_the_work_over_the_busy_time() -> None:
    pace = Pace()
    for tick in range(40):
        pace.observe(round(300 * tick * 0.25), 0.3, tick * 0.25)
    assert pace.rate == pytest.approx(300, rel=0.02)
    assert pace.capacity == pytest.approx(1000, rel=0.02)


def test_a_server_that_idles_neither_tells_a_pace_nor_forgets_it() -> None:
    pace = Pace()
    pace.observe(0, 0.05, 0.0)
    pace.observe(100, 0.05, 2.0)
    assert pace.capacity == 0.0
    for tick in range(20):
        pace.observe(100 + 250 * tick, 1.0, 3 + tick * 0.25)
    busy = pace.capacity
    assert busy == pytest.approx(1000, rel=0.05)
    for tick in range(100):
        pace.observe(100, 0.0, 10 + tick * 0.25)
    assert pace.capacity == busy


def test_a_server_at_its_limit_that_became_slower_says_so_within_seconds() -> None:
    pace, done = Pace(), 0
    for tick in range(80):
        done += 250 if tick < 40 else 100
        pace.observe(done, 1.0, tick * 0.25)
    assert pace.capacity == pytest.approx(400, rel=0.15)


# ------------------------------------------------------------------ speeds


def test_equal_pools_stay_equal_however_they_are_measured() -> None:
    speeds = Speeds({"a": None, "b": None})
    for noise in (1.0, 1.1, 0.92, 1.08, 0.9):
        speeds.observe({"a": 1000.0, "b": 1000.0 * noise})
        assert speeds.of("a") == speeds.of("b") == 1.0


def test_a_slower_pool_is_measured_in_steps() -> None:
    speeds = Speeds({"fast": None, "cheap": None})
    speeds.observe({"fast": 8000.0, "cheap": 1000.0})
    assert (speeds.of("fast"), speeds.of("cheap")) == (1.0, 0.125)
    speeds.observe({"fast": 8000.0, "cheap": 1200.0})
    assert speeds.of("cheap") == 0.125, "half a step changes nothing"


def test_configured_speeds_win_and_unknown_ones_count_as_the_fastest() -> None:
    assert Speeds({"a": 3.0}).of("a") == 3.0
    speeds = Speeds({"a": None, "b": None})
    speeds.observe({"a": 500.0, "b": 0.0})
    assert (speeds.of("a"), speeds.of("b")) == (1.0, 1.0)


# ------------------------------------------------------------------ from heartbeats to decisions


class Members:
    """Heartbeats of a cluster with a clock."""

    def __init__(self, pools: list[dict[str, Any]]) -> None:
        config = configure(pools, scaling={"downscale_delay_s": 5}, placement={"min_copies": 0})
        self.pools = Pools(config, num_experts=16, top_k=2)
        self.hellos: list[ServerHello] = []
        self.draining: set[str] = set()
        self.asked = 0.0
        self.now_s = 0.0

    def join(self, name: str, pool: str, *, max_copies: int = 50) -> None:
        hello = ServerHello(server_id=name, address="h:1", node="n", pid=1, max_copies=max_copies, pool=pool)
        self.hellos.append(hello)
        self.pools.joined(hello)

    def run(self, seconds: float, *, pairs_per_s: float, queued_tokens: int = 0, copies: int = 0) -> list[str]:
        """Heartbeats for a while; returns the changes in words."""
        said = []
        for _ in range(math.ceil(seconds / 0.25)):
            self.now_s += 0.25
            self.asked += pairs_per_s * 0.25
            for hello in self.hellos:
                beat = ServerBeat(
                    server_id=hello.server_id,
                    held=frozenset(),
                    applied_version=0,
                    seq=0,
                    failed={},
                    bytes=0,
                    budget_bytes=0,
                    queue_tokens=0,
                    busy_share=0.5,
                    pairs_per_s=0.0,
                    capacity_pairs_per_s={"fast": 2000.0, "cheap": 500.0}[hello.pool],
                )
                self.pools.beat_server(hello, beat, self.now_s)
            self.pools.beat_router("r", pairs=round(self.asked), queued_tokens=queued_tokens, now_s=self.now_s)
            changes = self.pools.decide(
                servers=self.hellos,
                draining=self.draining,
                routers=("r",),
                load_LE=np.zeros((2, 8)),
                needed_copies=0,
                denied_copies=copies,
                now_s=self.now_s,
            )
            said += ["{pool} {before} -> {servers} {reason}".format(**change) for change in changes]
        return said


def test_demand_grows_the_pool_that_gives_most_for_its_cost_and_says_so() -> None:
    members = Members(TWO_POOLS)
    members.join("f", "fast")
    members.join("c", "cheap")
    assert members.run(3, pairs_per_s=500) == []
    assert members.run(1, pairs_per_s=4000) == ["fast 1 -> 4 demand"]
    found = {pool["name"]: pool for pool in members.pools.status(members.hellos)}
    assert (found["fast"]["target"], found["fast"]["reason"], found["fast"]["servers"]) == (4, "demand", 1)
    assert "4,000 pairs/s arrive" in found["fast"]["detail"]
    assert found["cheap"]["speed"] == 0.25


def test_a_placement_that_starts_anew_does_not_keep_servers_that_are_leaving() -> None:
    members = Members(TWO_POOLS)
    for name in "abcd":
        members.join(name, "fast")
    members.draining = {"c", "d"}
    members.run(1, pairs_per_s=0)
    assert members.pools.numbers()["at_least/fast"] == 2


def test_memory_grows_the_roomy_pool() -> None:
    members = Members(TWO_POOLS)
    members.join("f", "fast", max_copies=10)
    members.join("c", "cheap", max_copies=100)
    members.run(1, pairs_per_s=0, copies=0)
    assert members.run(1, pairs_per_s=0, copies=250) == ["cheap 1 -> 3 memory"]


def test_a_pool_that_never_ran_holds_what_its_budget_promises() -> None:
    members = Members(TWO_POOLS)
    members.join("f", "fast", max_copies=10)
    assert {pool["name"]: pool["max_copies"] for pool in members.pools.status(members.hellos)} == {
        "fast": 10,
        "cheap": 160,
    }


def test_open_requests_wake_a_pool_of_none() -> None:
    members = Members([{"name": "cheap", "min": 0, "max": 3}])
    assert members.run(10, pairs_per_s=0) == []
    assert members.run(1, pairs_per_s=0, queued_tokens=16) == ["cheap 0 -> 1 demand"]


def test_serve_is_told_a_ceiling_only_when_the_need_was_watched_for_the_whole_delay() -> None:
    members = Members(TWO_POOLS)
    members.run(1, pairs_per_s=0)
    assert members.pools.numbers() == {"at_least/fast": 1.0, "at_least/cheap": 0.0}
    members.run(5, pairs_per_s=0)
    assert members.pools.numbers()["at_most/cheap"] == 0.0
