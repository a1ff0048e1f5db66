"""Scaling with a simulated clock: pools follow demand in one step, memory always, and noise never."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cover import Servers
from cluster.demand import Meter
from cluster.scaling import START_S, STEADY_S, SURGE_S, Decision, Pool, Reason, Scaling, Work

TICK_S = 0.05
BEAT_S = 0.25
PACE = 1000.0  # routed pairs per second of one server
KNOBS = {"target_busy": 0.6, "upscale_busy": 0.8, "drain_backlog_s": 2.0, "downscale_delay_s": 5.0}
ONE = Servers(min_servers=2, max_servers=8, pairs_per_s=PACE, max_copies=10)


def make(**changes: float) -> Scaling:
    return Scaling(**(KNOBS | changes))


def steadily(pairs_per_s: float, **others: float) -> Work:
    return Work(steady=pairs_per_s, latest=pairs_per_s, before=pairs_per_s, **others)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Change:
    at_s: float
    before: int
    after: int
    reason: Reason


def simulate(
    demand_at: Callable[[float], float],
    duration_s: float,
    *,
    servers: Servers = ONE,
    start_s: float = 1.5,
    copies: int = 0,
    knows_demand: bool = True,
    **knobs: float,
) -> list[Change]:
    """Changes of one pool under `demand_at(t)` pairs/s, with routers that report every BEAT_S and servers that take
    `start_s` to run. What the servers cannot do waits. With knows_demand=False only busy shares are reported."""
    scaling = make(**knobs)
    meter = Meter(STEADY_S + 1)
    target = running = servers.min_servers
    ready: list[float] = []
    waiting = total = busy_s = 0.0
    busy = Meter(STEADY_S)
    changes = []
    for tick in range(round(duration_s / TICK_S)):
        now_s = tick * TICK_S
        running += sum(at_s <= now_s for at_s in ready)
        ready = [at_s for at_s in ready if at_s > now_s]
        total += demand_at(now_s) * TICK_S
        done = min(waiting + demand_at(now_s) * TICK_S, running * PACE * TICK_S)
        waiting += demand_at(now_s) * TICK_S - done
        share = done / (running * PACE * TICK_S) if running else 0.0
        busy_s += running * share * TICK_S
        busy.read(busy_s, now_s)
        if tick % round(BEAT_S / TICK_S) == 0 and knows_demand:
            meter.read(total, now_s)
        work = Work(
            steady=meter.rate(STEADY_S),
            latest=meter.rate(SURGE_S),
            before=meter.rate(SURGE_S, ago_s=SURGE_S),
            backlog_pairs=waiting if knows_demand else 0.0,
            copies=copies,
        )
        seen = servers if knows_demand else replace(servers, pairs_per_s=0.0)
        pool = Pool(name="default", servers=seen, running=running, busy=busy.rate(STEADY_S), busy_now=running * share)
        found = scaling.decide(work, [pool], now_s)["default"]
        if found.servers != target:
            changes.append(Change(now_s, target, found.servers, found.reason))
        ready += [now_s + start_s] * (found.servers - target)
        if found.servers < target:
            running = min(running, found.servers)
            ready = ready[: found.servers - running]
        target = found.servers
    return changes


# ------------------------------------------------------------------ up


@pytest.mark.parametrize("onset_s", [10.0, 10.05, 10.1, 10.2])
def test_a_load_step_is_answered_in_one_step_with_what_it_needs(onset_s: float) -> None:
    (change,) = simulate(lambda now_s: 500 if now_s < onset_s else 4200, 14)
    assert (change.before, change.after) == (2, 7), "4200 pairs/s on servers of 1000 that should be 60 % busy"
    assert change.at_s - onset_s <= 2 * BEAT_S + TICK_S
    assert change.reason == Reason.DEMAND


def test_a_pool_at_its_limit_grows_in_one_step_because_the_excess_shows_at_the_routers() -> None:
    pegged = Pool(name="default", servers=ONE, running=2, busy=2.0)
    assert make().decide(steadily(4700), [pegged], 0.0)["default"].servers == 8


def test_a_backlog_asks_for_what_works_it_off_in_time() -> None:
    pool = Pool(name="default", servers=ONE, running=2, busy=1.9)
    found = make().decide(steadily(1500, backlog_pairs=8000), [pool], 0.0)["default"]
    assert (found.servers, found.reason) == (6, Reason.BACKLOG), "1500 arrive, 8000 go in drain_backlog_s = 2 s"
    assert "8,000 pairs wait" in found.detail


def test_one_large_request_is_no_surge() -> None:
    """1500 pairs at once, after a pause: gone within drain_backlog_s."""
    assert not simulate(lambda now_s: 1500 / TICK_S if now_s == 200 * TICK_S else 0, 20)


def test_servers_on_the_way_count() -> None:
    assert len(simulate(lambda now_s: 500 if now_s < 10 else 3000, 40, start_s=3)) == 1


def test_before_any_server_has_told_its_pace_busy_shares_decide() -> None:
    changes = simulate(lambda now_s: 500 if now_s < 10 else 4200, 40, knows_demand=False)
    assert [change.reason for change in changes] == [Reason.BUSY] * len(changes)
    assert [(change.before, change.after) for change in changes[:2]] == [(2, 4), (4, 7)], "never just one more"


def test_a_ramp_is_followed_without_overshoot() -> None:
    changes = simulate(lambda now_s: 50 * now_s, 90)
    assert [change.after for change in changes] == sorted(change.after for change in changes)
    for change in changes:
        assert change.after <= 50 * change.at_s / PACE / 0.6 + 1


# ------------------------------------------------------------------ down, and steady


def test_down_only_after_the_whole_delay_and_in_one_step() -> None:
    up, down = simulate(lambda now_s: 4200 if 5 <= now_s < 10 else 300, 30)
    assert (up.after, down.after) == (7, 2)
    assert 15 <= down.at_s <= 15 + STEADY_S + 2 * BEAT_S
    assert down.reason == Reason.FLOOR


def test_servers_that_take_long_to_start_are_waited_for_while_work_waits() -> None:
    """Callers that wait for answers ask for no more than the one server there is can do."""
    scaling, one = make(), replace(ONE, min_servers=1)
    busy, idle = steadily(950, backlog_pairs=9000), Work()
    counts = []
    for tick in range(600):
        pool = Pool(name="default", servers=one, running=1, busy=1.0, busy_now=1.0)
        counts.append(scaling.decide(busy if tick < 400 else idle, [pool], tick * TICK_S)["default"].servers)
    assert counts[0] == counts[400] == 6, "20 s later they still have not started"
    assert counts[-1] == 1, "and if nobody asks any more, they need not"


@pytest.mark.parametrize("period_s", [1.0, 2.0, 4.0, 6.0, 8.0])
def test_a_square_wave_faster_than_the_delay_changes_nothing_once_it_is_known(period_s: float) -> None:
    changes = simulate(lambda now_s: 3000 if now_s % period_s < period_s / 2 else 300, 80)
    assert (changes[0].before, changes[0].after) == (2, 5)
    assert all(change.at_s < KNOBS["downscale_delay_s"] + 2 * STEADY_S for change in changes)
    assert len(changes) <= 2, "at most a step back to what a wave faster than the mean needs"


@pytest.mark.parametrize("period_s", [14.0, 40.0])
def test_a_slower_square_wave_changes_the_pool_once_per_direction_and_period(period_s: float) -> None:
    changes = simulate(lambda now_s: 3000 if now_s % period_s < period_s / 2 else 300, 6 * period_s)
    for begin in range(6):
        period = [change for change in changes if begin * period_s <= change.at_s < (begin + 1) * period_s]
        assert sum(change.after > change.before for change in period) <= 1
        assert sum(change.after < change.before for change in period) <= 1


@pytest.mark.parametrize("demand", [0.0, 1100.0, 1500.0, 1590.0, 2400.0, 4000.0])
def test_steady_demand_comes_to_rest(demand: float) -> None:
    assert all(change.at_s < 3 for change in simulate(lambda _: demand, 60))


@pytest.mark.parametrize("seed", range(5))
def test_noise_around_the_aim_changes_nothing(seed: float) -> None:
    """Requests of 20 pairs that arrive as a Poisson process, 120 a second on four servers."""
    rng = np.random.default_rng(int(seed))
    arrivals = rng.poisson(0.6 * 4 * PACE / 20 * TICK_S, size=2000) * 20 / TICK_S
    servers = replace(ONE, min_servers=4)
    changes = simulate(lambda now_s: float(arrivals[round(now_s / TICK_S)]), 100, servers=servers)
    assert len(changes) <= 1
    assert all(change.after <= 6 for change in changes)


def test_a_fresh_decision_shrinks_nothing_that_it_has_not_watched() -> None:
    scaling = make()
    pool = Pool(name="default", servers=ONE, running=6)
    first = scaling.decide(Work(), [pool], 100.0)["default"]
    assert (first.servers, first.at_most) == (6, False), "Serve may have started more: it keeps them"
    assert scaling.decide(Work(), [pool], 104.0)["default"].servers == 6
    later = scaling.decide(Work(), [pool], 105.1)["default"]
    assert (later.servers, later.at_most) == (2, True)


# ------------------------------------------------------------------ none, and memory

EMPTY = replace(ONE, min_servers=0)


def test_to_none_when_nobody_asks_and_from_none_when_somebody_does() -> None:
    changes = simulate(lambda now_s: 700 if now_s < 5 or now_s >= 30 else 0, 40, servers=EMPTY)
    (gone,) = [change for change in changes if change.after == 0]
    assert gone.reason == Reason.IDLE
    assert 10 <= gone.at_s <= 10 + 2 * STEADY_S
    woken = next(change for change in changes if change.at_s > gone.at_s)
    assert woken.after == 1, "the first server is asked for before the rate is known"
    assert woken.reason in (Reason.DEMAND, Reason.BACKLOG)
    assert woken.at_s - 30 <= TICK_S


def test_from_none_to_what_a_rush_needs_without_waiting_for_the_first_server() -> None:
    changes = simulate(lambda now_s: 4200 if now_s >= 10 else 0, 16, servers=EMPTY, start_s=3)
    (ordered,) = [change for change in changes if change.after == 7]
    assert ordered.at_s - 10 <= 2 * BEAT_S + TICK_S


def test_a_waiting_request_keeps_the_last_server_and_wakes_the_first() -> None:
    scaling, pool = make(), Pool(name="default", servers=EMPTY)
    for tick in range(200):
        assert scaling.decide(Work(), [pool], tick * TICK_S)["default"].servers == 0
    assert scaling.decide(Work(backlog_pairs=1), [pool], 11.0)["default"].servers == 1


def test_a_pool_that_never_ran_starts_with_one_server_to_find_out() -> None:
    unknown = replace(EMPTY, pairs_per_s=0.0, max_copies=0)
    for work in (Work(backlog_pairs=9000), steadily(5000), Work(copies=640)):
        assert make().decide(work, [Pool(name="default", servers=unknown)], 0.0)["default"].servers == 1


def test_memory_alone_asks_for_servers_and_keeps_them() -> None:
    changes = simulate(lambda _: 0.0, 60, copies=35)
    assert [(change.before, change.after, change.reason) for change in changes] == [(2, 4, Reason.MEMORY)]


# ------------------------------------------------------------------ several pools

FAST = Servers(min_servers=1, max_servers=4, pairs_per_s=4000, max_copies=10, rank=1.0, cost=2.0)
CHEAP = Servers(min_servers=1, max_servers=6, pairs_per_s=500, max_copies=100, rank=0.125, cost=1.0)


def counts(work: Work, fast: Servers = FAST, cheap: Servers = CHEAP) -> tuple[int, int]:
    pools = [Pool(name="fast", servers=fast, running=1), Pool(name="cheap", servers=cheap, running=1)]
    found = make().decide(work, pools, 0.0)
    return found["fast"].servers, found["cheap"].servers


def test_load_grows_the_pool_that_computes_most_for_its_cost() -> None:
    assert counts(steadily(6000)) == (3, 1)


def test_memory_grows_the_pool_that_holds_most_for_its_cost() -> None:
    assert counts(Work(copies=300)) == (1, 3)


def test_a_full_pool_leaves_the_rest_to_the_next() -> None:
    assert counts(steadily(10_000)) == (4, 2)


def test_what_memory_brings_in_compute_is_not_bought_twice() -> None:
    fast, cheap = replace(FAST, min_servers=0), replace(CHEAP, pairs_per_s=2000, rank=0.5)
    assert counts(steadily(2300, copies=190), fast, cheap) == (1, 2), "0 and 2 would be short of 3834 by nothing"


def test_each_pool_says_why() -> None:
    pools = [Pool(name="fast", servers=FAST, running=1), Pool(name="cheap", servers=CHEAP, running=1)]
    found = make().decide(steadily(6000, copies=300), pools, 0.0)
    assert (found["fast"].reason, found["cheap"].reason) == (Reason.DEMAND, Reason.MEMORY)
    assert "6,000 pairs/s" in found["fast"].detail
    assert "100 on a server" in found["cheap"].detail


def test_servers_that_do_not_come_are_replaced_by_those_of_another_pool() -> None:
    scaling = make()

    def decide(now_s: float) -> tuple[int, int]:
        pools = [Pool(name="fast", servers=FAST, running=1), Pool(name="cheap", servers=CHEAP, running=1)]
        found = scaling.decide(steadily(6000), pools, now_s)
        return found["fast"].servers, found["cheap"].servers

    assert decide(0.0) == decide(TICK_S) == (3, 1)
    assert decide(START_S) == (3, 1), "they may still come"
    assert decide(START_S + 1) == (3, 6), "asked for all the same"


def test_a_pool_alone_goes_on_asking_for_servers_that_do_not_come() -> None:
    scaling = make()
    for now_s in (0.0, TICK_S, START_S, 2 * START_S):
        found = scaling.decide(steadily(6000), [Pool(name="fast", servers=FAST, running=1)], now_s)
        assert found["fast"].servers == 3


# ------------------------------------------------------------------ whatever comes

rates = st.floats(0, 1e9)
sizes = st.builds(
    lambda low, more, pace, room, rank, cost: Servers(
        min_servers=low, max_servers=low + more, pairs_per_s=pace, max_copies=room, rank=rank, cost=cost
    ),
    st.integers(0, 4),
    st.integers(1, 6),
    st.sampled_from([0.0, 1.0, 777.7, 1e6]),
    st.integers(0, 1000),
    st.floats(0.01, 1),
    st.floats(0.1, 10),
)
works = st.builds(
    lambda steady, latest, before, backlog, copies: Work(
        steady=steady, latest=latest, before=before, backlog_pairs=backlog, copies=copies
    ),
    rates,
    rates,
    rates,
    rates,
    st.integers(0, 100_000),
)


@settings(max_examples=200)
@given(st.lists(sizes, min_size=1, max_size=3), st.lists(works, min_size=1, max_size=6), st.integers(0, 12))
def test_bounds_always_hold_and_nothing_rises_without_a_need(
    pools: list[Servers], story: list[Work], running: int
) -> None:
    scaling = make()
    before: dict[str, Decision] = {}
    for step, work in enumerate(story):
        asked = [Pool(name=str(i), servers=each, running=running, busy=0.5) for i, each in enumerate(pools)]
        found = scaling.decide(work, asked, float(step))
        for pool in asked:
            assert pool.servers.min_servers <= found[pool.name].servers <= pool.servers.max_servers
        assert not before or work != Work() or all(found[name].servers <= before[name].servers for name in before)
        before = found


@settings(max_examples=100)
@given(st.integers(0, 4), st.floats(0, 6000), st.floats(0, 1))
def test_more_demand_never_means_fewer_servers(running: int, demand: float, more: float) -> None:
    pool = Pool(name="default", servers=replace(EMPTY, max_servers=20), running=running)
    less = make().decide(steadily(demand), [pool], 0.0)["default"].servers
    assert make().decide(steadily(demand * (1 + more)), [pool], 0.0)["default"].servers >= less


def test_changes_are_described_pairwise() -> None:
    """The simulation above reports every change, so that the tests see what Serve would."""
    changes = simulate(lambda now_s: 3000 if now_s % 40 < 20 else 300, 160)
    assert all(first.after == second.before for first, second in itertools.pairwise(changes))
