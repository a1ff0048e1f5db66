"""Paces of servers: what counts, and when they differ."""

import math

import numpy as np
import pytest

from router.pace import ServerPace, relative_speeds


def test_an_unknown_pace_is_infinite_and_the_first_answer_sets_it() -> None:
    pace = ServerPace()
    assert pace.pairs_per_s == math.inf
    pace.learn(100, 0.5)
    assert pace.pairs_per_s == pytest.approx(200)


def test_small_launches_do_not_make_a_server_look_slow() -> None:
    pace = ServerPace()
    for _ in range(20):  # 1 ms of overhead, 1,000 pairs/s: a large launch, then a hundred of one pair
        pace.learn(500, 0.001 + 0.5)
        for _ in range(100):
            pace.learn(1, 0.001 + 0.001)
    assert pace.pairs_per_s > 800


def test_a_pace_follows_a_server_that_slows_down() -> None:
    pace = ServerPace()
    for rate in (1000, 250):
        for _ in range(50):
            pace.learn(100, 100 / rate)
    assert pace.pairs_per_s == pytest.approx(250, rel=0.01)


def test_paces_become_speeds_only_where_they_clearly_differ() -> None:
    assert relative_speeds(np.array([np.inf, np.inf])) is None
    assert relative_speeds(np.array([900.0, 1000.0, 1200.0, np.inf])) is None
    found = relative_speeds(np.array([500.0, 510.0, 2100.0, np.inf]))
    assert found is not None
    assert found.tolist() == [1.0, 1.0, 4.0, 1.0]
