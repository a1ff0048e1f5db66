"""The simulator's benchmark: its baseline keeps the promise, and its constants are there before they are used."""

import math
from collections.abc import Callable

import pytest

from benchmarks import simulator_reality
from benchmarks.simulator import LONGEST_S, UTILISATIONS, cheapest_clairvoyant
from cluster.config import parse_config
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


def test_a_server_that_was_not_replaced_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="replaced_s is not known: no server held copies in place of the killed one"):
        simulator_reality._machine(
            parse_config({"model": "m"}), {"p50_s": 0.04, "p99_s": 0.05, "load_bytes_per_s": 1e6}, 0.001, math.nan
        )
