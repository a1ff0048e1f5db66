"""Loads in order: missing experts at once, others by gain within the byte budget; old copies until new ones serve."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.loads import LoadQueue
from cluster.routable import routable
from cluster.steps import Load, Reason
from router.table import CopyShare

SERVERS = ("a", "b", "c")


def load(expert: int, server_id: str, gain: float = 0.0, reason: Reason = "load") -> Load:
    return Load(key=("0", expert), server_id=server_id, reason=reason, gain=gain)


def test_the_most_urgent_and_then_the_most_useful_loads_go_first() -> None:
    queue = LoadQueue()
    for order in (load(0, "a", 0.1), load(1, "b", 0.3), load(2, "a", 0.9, "survival"), load(3, "a", 0.0, "missing")):
        queue.add(order)
    queue.add(load(4, "b", 0.0, "drain"))
    taken = queue.take({"a": 9, "b": 9}, copy_bytes=1, now_s=0.0)
    assert [key[1] for _, key in taken] == [3, 4, 1, 0, 2]
    assert not len(queue)


def test_a_server_without_room_holds_back_nobody_else() -> None:
    queue = LoadQueue()
    for expert in range(4):
        queue.add(load(expert, "a", gain=1.0))
    queue.add(load(9, "b", gain=0.1))
    assert queue.take({"a": 1, "b": 1}, copy_bytes=1, now_s=0.0) == [("a", ("0", 0)), ("b", ("0", 9))]
    assert queue.waiting("a") == 3


@given(
    seconds=st.lists(st.floats(0.001, 2.0), min_size=1, max_size=30),
    copy_bytes=st.integers(1, 500),
    bytes_per_s=st.floats(10.0, 1000.0),
)
def test_no_more_moves_than_the_budget_and_one_copy(seconds: list[float], copy_bytes: int, bytes_per_s: float) -> None:
    queue = LoadQueue(bytes_per_s)
    for expert in range(2000):
        queue.add(load(expert, "a"))
    now_s, moved = 0.0, len(queue.take({"a": 2000}, copy_bytes, 0.0))
    for passed_s in seconds:
        now_s += passed_s
        moved += len(queue.take({"a": 2000}, copy_bytes, now_s))
    burst = max(1.0, 0.1 * bytes_per_s)
    assert moved * copy_bytes <= now_s * bytes_per_s + burst + copy_bytes + 1e-6


def test_what_a_leaving_server_holds_alone_waits_for_no_budget() -> None:
    queue = LoadQueue(1.0)
    for expert in range(4):
        queue.add(load(expert, "a", reason="drain"))
    queue.add(load(4, "a"))
    queue.add(load(5, "a"))
    taken = [key[1] for _, key in queue.take({"a": 9}, copy_bytes=1000, now_s=0.0)]
    assert taken == [0, 1, 2, 3, 4], "the budget is overdrawn by one copy at most"


def test_a_load_of_an_expert_that_has_lost_its_last_copy_becomes_urgent() -> None:
    queue = LoadQueue(1.0)
    for expert in range(3):
        queue.add(load(expert, "a", gain=1 - expert / 10))
    assert len(queue.take({"a": 9}, copy_bytes=1000, now_s=0.0)) == 1
    queue.urge([("0", 2), ("0", 9)])
    assert queue.take({"a": 9}, copy_bytes=1000, now_s=0.0) == [("a", ("0", 2))]
    assert len(queue) == 1


def test_a_load_given_up_is_not_taken_and_one_asked_for_again_takes_its_new_turn() -> None:
    queue = LoadQueue()
    queue.add(load(0, "a", 0.9))
    queue.add(load(1, "a", 0.5))
    assert queue.discard(("0", 0), "a")
    assert not queue.discard(("0", 0), "a")
    assert not queue.discard(("0", 7), "nobody")
    queue.add(load(0, "a", 0.1))
    assert [key[1] for _, key in queue.take({"a": 5}, 1, 0.0)] == [1, 0]


@given(
    target=st.sets(st.sampled_from(SERVERS)),
    live=st.sets(st.sampled_from(SERVERS)),
    stuck=st.sets(st.sampled_from(SERVERS)),
)
def test_an_expert_with_a_live_copy_is_always_routable_and_only_to_live_copies(
    target: set[str], live: set[str], stuck: set[str]
) -> None:
    wanted = tuple(CopyShare(server_id=server_id, share=1 / len(target)) for server_id in sorted(target))
    found = routable(wanted, live, stuck)
    named = {copy.server_id for copy in found}
    assert named <= live
    assert bool(named) == bool(live)
    assert not found or abs(sum(copy.share for copy in found) - 1) < 1e-9
    assert target & live <= named
    if target and target <= live:
        assert named == target
    elif not stuck:
        assert named == live  # what is there serves until all of the target does
