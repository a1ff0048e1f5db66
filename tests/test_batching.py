"""Batching decides by values alone: hypothesis drives the queue through arbitrary histories."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.batching import Batcher, Call
from protos.errors import Overloaded


def call(
    call_id: int, *, layer: str = "0", tokens: int = 2, rows: int = 1, arrived_s: float = 0.0, stream: str = "a",
    deadline_s: float = float("inf"),
) -> Call[None]:  # fmt: skip
    return Call(
        call_id=call_id,
        stream=stream,
        layer=layer,
        num_rows=rows,
        num_tokens=tokens,
        arrived_s=arrived_s,
        deadline_s=deadline_s,
        work=None,
    )


def test_everything_queued_for_the_oldest_layer_goes_in_one_launch() -> None:
    batcher: Batcher[None] = Batcher(100, 100)
    for i, layer in enumerate(["1", "0", "1", "0", "1"]):
        batcher.admit(call(i, layer=layer, arrived_s=float(i)))
    assert [taken.call_id for taken in batcher.take()] == [0, 2, 4]
    assert [taken.call_id for taken in batcher.take()] == [1, 3]
    assert batcher.take() == []


def test_a_launch_stops_at_its_row_limit_but_a_larger_call_still_runs_alone() -> None:
    batcher: Batcher[None] = Batcher(100, 4)
    for i, rows in enumerate([3, 2, 9, 1]):
        batcher.admit(call(i, rows=rows, arrived_s=float(i)))
    assert [[taken.call_id for taken in batcher.take()] for _ in range(4)] == [[0], [1], [2], [3]]


def test_a_full_queue_refuses_with_a_hint_from_the_measured_rate() -> None:
    batcher: Batcher[None] = Batcher(10, 100)
    first = call(0, tokens=10)
    batcher.admit(first)
    with pytest.raises(Overloaded, match=r"4 routed pairs on top of 10 queued exceed max_queue_tokens \(10\)"):
        batcher.admit(call(1, tokens=4))
    batcher.finish(batcher.take(), took_s=0.1)
    batcher.admit(call(2, tokens=10))
    with pytest.raises(Overloaded) as refused:
        batcher.admit(call(3, tokens=5))
    assert refused.value.retry_after_s == pytest.approx(5 * 0.01)


def test_a_call_larger_than_the_whole_budget_runs_when_nothing_else_is_queued() -> None:
    batcher: Batcher[None] = Batcher(10, 100)
    batcher.admit(call(0, tokens=50))
    assert batcher.queue_tokens == 50
    with pytest.raises(Overloaded):
        batcher.admit(call(1, tokens=1))


def test_expired_and_cancelled_calls_leave_the_queue() -> None:
    batcher: Batcher[None] = Batcher(100, 100)
    batcher.admit(call(1, deadline_s=1.0))
    batcher.admit(call(2, stream="b"))
    batcher.admit(call(3))
    assert [gone.call_id for gone in batcher.expire(2.0)] == [1]
    assert [gone.call_id for gone in batcher.cancel("b")] == [2]
    assert [gone.call_id for gone in batcher.cancel("a", {9})] == []
    assert [gone.call_id for gone in batcher.cancel("a", {3})] == [3]
    assert batcher.queue_tokens == 0


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.integers(0, 3), st.integers(1, 9), st.integers(1, 5)),
        st.tuples(st.just("take"), st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("finish"), st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 2), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(EVENTS, st.integers(5, 40), st.integers(3, 12))
def test_tokens_balance_and_order_holds_over_any_history(
    events: list[tuple[str, int, int, int]], budget: int, max_rows: int
) -> None:
    batcher: Batcher[None] = Batcher(budget, max_rows)
    waiting: dict[int, Call[None]] = {}
    running: list[list[Call[None]]] = []
    for now, (kind, a, tokens, rows) in enumerate(events):
        if kind == "admit":
            new = call(now, layer=str(a), tokens=tokens, rows=rows, arrived_s=float(now), stream=str(a % 2))
            try:
                batcher.admit(new)
                waiting[now] = new
            except Overloaded:
                assert batcher.queue_tokens + tokens > budget
        elif kind == "take":
            batch = batcher.take()
            assert bool(batch) == bool(waiting)
            if batch:
                assert batch[0].arrived_s == min(c.arrived_s for c in waiting.values())
                assert len({c.layer for c in batch}) == 1
                assert sum(c.num_rows for c in batch) <= max(max_rows, batch[0].num_rows)
                for taken in batch:
                    del waiting[taken.call_id]
                running.append(batch)
        elif kind == "finish" and running:
            batcher.finish(running.pop(0), took_s=0.01)
        elif kind == "cancel":
            for gone in batcher.cancel(str(a)):
                del waiting[gone.call_id]
            assert not any(c.stream == str(a) for c in waiting.values())
        expected = sum(c.num_tokens for c in waiting.values()) + sum(c.num_tokens for b in running for c in b)
        assert batcher.queue_tokens == expected
