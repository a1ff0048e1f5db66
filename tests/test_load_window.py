"""Rates from counters: a hot spot shows within a second, a pause is forgiven, restarts and strangers do not disturb."""

from collections.abc import Collection

import numpy as np
import pytest

from cluster.awaited import Awaited
from cluster.load import LoadWindow

TICK_S = 0.25


def make_window() -> LoadWindow:
    return LoadWindow(("a", "b"), 2, rise_s=0.3, fall_s=5.0)


def feed(
    window: LoadWindow, rate: float, duration_s: float, *, start_s: float = 0.0, total: int = 0
) -> tuple[float, int]:
    """Report `rate` pairs/s for expert 1 of layer b every tick; returns (time, counter)."""
    now_s = start_s
    while now_s < start_s + duration_s:
        window.count("r", {("b", 1): total}, now_s)
        now_s += TICK_S
        total += int(rate * TICK_S)
    return now_s, total


def test_a_steady_load_is_measured() -> None:
    window = make_window()
    feed(window, 1000, 10)
    assert window.rates()[1, 1] == pytest.approx(1000, rel=0.01)
    assert window.rates().sum() == window.rates()[1, 1]


def test_reading_does_not_change_what_is_read() -> None:
    window = make_window()
    now_s, total = feed(window, 1000, 3)
    window.count("r", {("b", 1): total}, now_s)
    first = window.rates()[1, 1]
    for _ in range(100):
        assert window.rates()[1, 1] == first


def test_a_step_shows_within_a_second_and_a_pause_is_forgiven() -> None:
    window = make_window()
    now_s, total = feed(window, 0, 5)
    now_s, total = feed(window, 1000, 1.25, start_s=now_s, total=total)
    assert window.rates()[1, 1] > 800
    now_s, total = feed(window, 0, 1.25, start_s=now_s, total=total)
    assert window.rates()[1, 1] > 500
    feed(window, 0, 60, start_s=now_s, total=total)
    assert window.rates()[1, 1] < 10


def test_a_hot_spot_that_moves_leaves_nothing_behind() -> None:
    window = make_window()
    total = {("a", 0): 0, ("a", 1): 0}
    for tick in range(60):
        window.count("r", dict(total), tick * TICK_S)
        total[("a", 0 if tick < 55 else 1)] += 250
    assert window.rates()[0, 1] > 900
    assert window.rates()[0, 0] < 100
    assert window.rates()[0].sum() == pytest.approx(1000, rel=0.01)


def test_the_first_report_of_a_router_only_sets_the_base() -> None:
    window = make_window()
    window.count("late", {("a", 0): 10**9}, 1.0)
    assert not window.rates().any()


def test_a_router_that_restarts_with_lower_counters_adds_nothing() -> None:
    window = make_window()
    window.count("r", {("a", 0): 1000}, 0.0)
    window.count("r", {("a", 0): 10}, 1.0)
    assert not window.rates().any()


def test_routers_add_up_and_the_forgotten_start_again() -> None:
    window = make_window()
    for source in ("r0", "r1"):
        window.count(source, {("a", 0): 0}, 0.0)
        window.count(source, {("a", 0): 500}, 100.0)
    assert window.rates()[0, 0] == pytest.approx(10.0)
    window.forget({"r0"})
    assert window.rates()[0, 0] == pytest.approx(5.0)
    window.count("r1", {("a", 0): 10**6}, 101.0)
    assert window.rates()[0, 0] == pytest.approx(5.0)


def feed_noise(window: LoadWindow, rate_LE: np.ndarray, ticks: int, *, batch: int, seed: int = 0) -> list[np.ndarray]:
    """Poisson batches of `batch` pairs; the rates after every tick."""
    rng = np.random.default_rng(seed)
    total_LE = np.zeros(rate_LE.shape, dtype=int)
    found = []
    for tick in range(ticks):
        totals = {("ab"[row], expert): int(total_LE[row, expert]) for row in range(2) for expert in range(2)}
        window.count("r", totals, tick * TICK_S)
        window.judge(tick * TICK_S)
        found.append(window.rates())
        total_LE += batch * rng.poisson(rate_LE * TICK_S / batch)
    return found


@pytest.mark.parametrize(("batch", "most"), [(1, 0.01), (16, 0.1)])
def test_noise_hardly_lifts_the_rates_above_the_truth(batch: int, most: float) -> None:
    rate_LE = np.array([[10.0, 1000.0], [100.0, 300.0]])
    found = feed_noise(make_window(), rate_LE, 800, batch=batch)
    mean_LE = np.mean(found[100:], axis=0)
    assert (np.abs(mean_LE - rate_LE) < most * rate_LE.sum(axis=1, keepdims=True)).all(), mean_LE


def test_a_forecast_of_steady_load_is_as_good_as_the_noise_allows() -> None:
    window = make_window()
    rate_LE = np.array([[100.0, 1000.0], [100.0, 300.0]])
    feed_noise(window, rate_LE, 200, batch=1)
    steady = window.forecast
    assert steady is not None
    assert steady.error < 3 * steady.noise
    assert steady.predicted == pytest.approx(1500, rel=0.1)
    assert steady.actual == pytest.approx(1500, rel=0.15)


def test_a_shift_of_the_load_shows_as_an_error_of_the_forecast() -> None:
    window = make_window()
    now_s, total = 0.0, {("a", 0): 0, ("a", 1): 0}
    errors = []
    for tick in range(48):
        window.count("r", dict(total), now_s)
        window.judge(now_s)
        if window.forecast is not None:
            errors.append(window.forecast.error)
        total[("a", int(tick >= 24))] += 250
        now_s += TICK_S
    assert max(errors) == pytest.approx(2.0, abs=0.3)  # all of it somewhere else
    assert errors[20] < 0.2


def test_an_expert_asked_for_while_absent_counts_until_nobody_can_wait_any_more() -> None:
    awaited, nothing = Awaited(("a", "b"), patience_s=30.0), np.zeros((2, 4))
    before, after = {("b", 1): 5, ("a", 0): 2}, {("b", 1): 5, ("a", 0): 4, ("b", 3): 1}
    assert awaited.count(before, after, {("a", 0)}, 100.0), "b/3 is new and nobody holds it"
    assert not awaited.count(after, after, {("a", 0)}, 101.0)

    def cells(now_s: float, *, held: Collection[tuple[str, int]] = (), open_requests: bool = False) -> list[list[int]]:
        found: list[list[int]] = np.argwhere(
            awaited.demand(nothing, held=held, open_requests=open_requests, now_s=now_s)
        ).tolist()
        return found

    assert cells(129.0) == [[1, 3]]
    assert cells(500.0, open_requests=True) == [[1, 3]], "its server takes long to start"
    assert not cells(500.0, held={("b", 3)}, open_requests=True), "what still waits does so for something else"
    assert not cells(129.0), "forgotten"
    assert not nothing.any(), "the caller's array is left alone"
