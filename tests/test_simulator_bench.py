"""The simulator's benchmark: its baseline keeps the promise, and what is killed can be replaced."""

import math
from collections.abc import Callable

import pytest

from benchmarks.elasticity_slo import Outcome
from benchmarks.simulator import LONGEST_S, UTILISATIONS, cheapest_clairvoyant
from benchmarks.simulator_reality import REPLACED_WITHIN_S, WARM_UP_S, kills_within, resumed_s
from cluster.sim_control import Foresight


def test_the_cheapest_clairvoyant_is_never_one_that_breaks_the_promise() -> None:
    def day(broken: set[float]) -> Callable[[Foresight], dict[str, float]]:
        return lambda seer: {
            "server_s": 100 / seer.utilisation,
            "longest_violation_s": LONGEST_S + 1 if seer.utilisation in broken else LONGEST_S,
        }

    assert cheapest_clairvoyant(day({0.6, 0.95}), lead_s=4.0)["utilisation"] == 0.9
    assert cheapest_clairvoyant(day(set(UTILISATIONS) - {0.7}), lead_s=4.0)["utilisation"] == 0.7
    with pytest.raises(RuntimeError, match="longest violation is 6 s at best, limit is 5 s"):
        cheapest_clairvoyant(day(set(UTILISATIONS)), lead_s=4.0)


@pytest.mark.parametrize(("seconds", "kills"), [(6.0, 1), (20.0, 1), (30.0, 3), (40.0, 4)])
def test_kills_leave_time_for_a_replacement(seconds: float, kills: int) -> None:
    kills_s = kills_within(seconds)
    assert len(kills_s) == kills
    assert all(WARM_UP_S <= at_s <= WARM_UP_S + seconds - min(seconds, REPLACED_WITHIN_S) for at_s in kills_s)


def test_requests_resume_when_the_last_of_those_open_at_a_kill_is_answered() -> None:
    outcomes = sorted(
        Outcome(due_s=due_s, took_s=took_s)
        for due_s, took_s in [(0.9, 0.05), (0.95, 0.3), (0.99, 0.2), (1.01, 0.5), (2.0, math.inf), (2.99, 0.001)]
    )
    assert resumed_s(outcomes, [1.0, 3.0]) == [pytest.approx(0.25)]  # the second kill met no request that was answered
