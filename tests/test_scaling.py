"""Scaling with a simulated clock: the pool follows load fast, memory always, and noise never."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve.config import AutoscalingPolicy

from cluster.scaling import Pool, Scaling, ScalingPolicy, ServerLoad

TICK_S = 0.1
OPTIONS = {
    "min_servers": 2,
    "max_servers": 8,
    "target_busy": 0.6,
    "upscale_busy": 0.8,
    "drain_backlog_s": 1.0,
    "downscale_delay_s": 5.0,
}


def make(**changes: float) -> Scaling:
    return Scaling(**{**OPTIONS, **changes})  # type: ignore[arg-type]


def simulate(work_at: Callable[[float], float], duration_s: float, *, start_s: float = 1.0) -> list[tuple[float, int]]:
    """(time, servers asked for) under `work_at(t)` servers' worth of work; a new server takes `start_s` to run."""
    policy, target, running = make(), 2, 2
    ready: list[float] = []
    history = []
    for tick in range(int(duration_s / TICK_S)):
        now_s = tick * TICK_S
        running += sum(at <= now_s for at in ready)
        ready = [at for at in ready if at > now_s]
        share = work_at(now_s) / running
        loads = [ServerLoad(busy_share=min(share, 1.0), backlog_s=max(share - 1.0, 0.0))] * running
        wanted = policy.decide(Pool(loads=loads, target=target), now_s)
        ready += [now_s + start_s] * (wanted - target)
        if wanted < target:
            running = min(running, wanted)
            ready = ready[: wanted - running]
        target = wanted
        history.append((now_s, target))
    return history


def changes(history: list[tuple[float, int]]) -> list[tuple[float, int]]:
    return [after for before, after in itertools.pairwise(history) if after[1] != before[1]]


def test_a_load_step_is_answered_in_one_step() -> None:
    history = simulate(lambda now_s: 0.5 if now_s < 10 else 3.0, 30)
    (at_s, servers), *rest = changes(history)
    assert at_s == pytest.approx(10, abs=TICK_S)
    assert servers >= 5
    assert len(rest) <= 1


def test_a_pool_at_its_limit_grows_although_the_excess_is_hidden() -> None:
    policy = make()
    full = [ServerLoad(busy_share=1.0, backlog_s=0.0)] * 3
    assert policy.decide(Pool(loads=full, target=3), 0.0) == 5


def test_down_only_after_the_whole_delay() -> None:
    history = simulate(lambda now_s: 3.0 if now_s < 10 else 0.2, 30)
    down = [(at_s, servers) for at_s, servers in changes(history) if servers < 5]
    assert [servers for _, servers in down] == [2]
    assert down[0][0] == pytest.approx(15, abs=3 * TICK_S)


@pytest.mark.parametrize("period_s", [1.0, 4.0, 8.0])
def test_a_square_wave_within_the_delay_changes_the_pool_once(period_s: float) -> None:
    history = simulate(lambda now_s: 3.0 if now_s % period_s < period_s / 2 else 0.3, 60)
    assert len(changes(history)) <= 2
    assert all(after >= before for (_, before), (_, after) in itertools.pairwise(changes(history)))


def test_a_slow_square_wave_changes_the_pool_at_most_once_per_direction_and_period() -> None:
    history = simulate(lambda now_s: 3.0 if now_s % 40 < 20 else 0.3, 160)
    assert len(changes(history)) <= 2 * 4


def test_a_ramp_is_followed_without_overshoot() -> None:
    history = simulate(lambda now_s: 0.05 * now_s, 80)
    steps = [servers for _, servers in changes(history)]
    assert steps == sorted(steps)
    for now_s, servers in history:
        assert servers <= max(2, 0.05 * now_s / 0.6 + 2)


@pytest.mark.parametrize("work", [0.0, 1.2, 1.5, 1.6, 2.4, 4.0])
def test_steady_work_comes_to_rest(work: float) -> None:
    assert all(at_s < 12 for at_s, _ in changes(simulate(lambda _: work, 60)))


def test_memory_alone_asks_for_servers_and_keeps_them() -> None:
    policy = make()
    idle = [ServerLoad(busy_share=0.0, backlog_s=0.0)] * 2
    for tick in range(200):
        pool = Pool(loads=idle, target=4 if tick else 2, needed_bytes=3.5, budget_bytes=1.0)
        assert policy.decide(pool, tick * TICK_S) == 4


def test_without_reports_nothing_changes() -> None:
    policy = make()
    assert policy.decide(Pool(loads=[], target=3), 0.0) == 3


def test_a_fresh_policy_does_not_shrink_a_pool_it_has_not_watched() -> None:
    policy = make()
    idle = [ServerLoad(busy_share=0.0, backlog_s=0.0)] * 6
    assert policy.decide(Pool(loads=idle, target=6), 100.0) == 6
    assert policy.decide(Pool(loads=idle, target=6), 104.0) == 6
    assert policy.decide(Pool(loads=idle, target=6), 105.1) == 2


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 100)), max_size=8),
    st.integers(0, 12),
    st.floats(0, 1e12),
    st.floats(0, 1e9),
)
def test_the_bounds_always_hold(
    loads: list[tuple[float, float]], target: int, needed_bytes: float, budget_bytes: float
) -> None:
    servers = [ServerLoad(busy_share=busy, backlog_s=backlog) for busy, backlog in loads]
    pool = Pool(loads=servers, target=target, needed_bytes=needed_bytes, budget_bytes=budget_bytes)
    assert 2 <= make().decide(pool, 0.0) <= 8


def make_context(metrics: object) -> SimpleNamespace:
    return SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=2, current_time=50.0)


def test_the_policy_works_where_our_code_is_not_installed() -> None:
    """As in Serve's controller: unpickled in a process that cannot import `cluster`."""
    definition = AutoscalingPolicy(policy_function=ScalingPolicy, policy_kwargs=OPTIONS).get_serialized_policy_def()  # type: ignore[no-untyped-call]
    assert definition is not None
    script = f"""
import pickle, sys, types
sys.modules["cluster"] = None
policy = pickle.loads({definition!r})(**{OPTIONS!r})
metrics = {{"busy_share": {{"a": 1.0, "b": 0.9}}, "backlog_s": {{"a": 0.2}}, "budget_bytes": {{"a": 1.0}}}}
context = types.SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=2, current_time=50.0)
print(policy(context))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(4, {})", done.stderr


@pytest.mark.parametrize("metrics", [None, {}, {"busy_share": {"a": None}}, {"busy_share": 3}])
def test_the_policy_never_raises_and_keeps_what_is_there(metrics: object) -> None:
    assert ScalingPolicy(**OPTIONS)(make_context(metrics)) == (2, {})  # type: ignore[arg-type]
