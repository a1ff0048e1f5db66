"""When the placement trusts its own clock: silence counts only if there was time to hear."""

import pytest

from cluster.config import PlacementConfig
from cluster.members import may_be_unread


@pytest.mark.parametrize("plan_interval_s", [0.25, 2.0, 20.0])
def test_a_pause_as_long_as_it_was_meant_is_no_reason_to_doubt_a_silence(plan_interval_s: float) -> None:
    knobs = PlacementConfig(plan_interval_s=plan_interval_s)
    assert not may_be_unread(plan_interval_s + 0.1, plan_interval_s, 0.1, knobs)
    assert not may_be_unread(20.0, 20.0, 4.0, knobs), "a plan that took long is followed by a long pause"


def test_a_process_that_stood_still_has_not_read_what_the_others_said() -> None:
    knobs = PlacementConfig(dead_after_s=3.0)
    assert may_be_unread(4.0, 0.25, 0.1, knobs), "in the pause"
    assert may_be_unread(0.0, 20.0, 4.0, knobs), "in the plan, and woken at once"
