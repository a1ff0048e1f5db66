"""Rates from counters: a hot spot shows within a second, a pause is forgiven, restarts and strangers do not disturb."""

import numpy as np
import pytest

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
        window.count("r", {("b", 1): total})
        window.rates(now_s)
        now_s += TICK_S
        total += int(rate * TICK_S)
    return now_s, total


def test_a_steady_load_is_measured() -> None:
    window = make_window()
    now_s, _ = feed(window, 1000, 10)
    assert window.rates(now_s - TICK_S)[1, 1] == pytest.approx(1000, rel=0.01)
    assert window.rates(now_s - TICK_S).sum() == window.rates(now_s - TICK_S)[1, 1]


def test_a_step_shows_within_a_second_and_a_pause_is_forgiven() -> None:
    window = make_window()
    now_s, total = feed(window, 0, 5)
    now_s, total = feed(window, 1000, 1, start_s=now_s, total=total)
    assert window.rates(now_s - TICK_S)[1, 1] > 800
    feed(window, 0, 1, start_s=now_s, total=total)
    assert window.rates(now_s + 1)[1, 1] > 500
    assert window.rates(now_s + 60)[1, 1] < 10


def test_the_first_report_of_a_router_only_sets_the_base() -> None:
    window = make_window()
    window.rates(0.0)
    window.count("late", {("a", 0): 10**9})
    assert not window.rates(1.0).any()


def test_a_router_that_restarts_with_lower_counters_adds_nothing() -> None:
    window = make_window()
    window.rates(0.0)
    window.count("r", {("a", 0): 1000})
    window.count("r", {("a", 0): 10})
    assert not window.rates(1.0).any()


def test_routers_add_up_and_the_forgotten_start_again() -> None:
    window = make_window()
    window.rates(0.0)
    for source in ("r0", "r1"):
        window.count(source, {("a", 0): 0})
        window.count(source, {("a", 0): 500})
    assert window.rates(100.0)[0, 0] == pytest.approx(10.0)
    window.forget({"r0"})
    window.count("r1", {("a", 0): 10**6})
    window.count("r0", {("a", 0): 500})
    assert np.all(window.rates(1000.0) < 10)
