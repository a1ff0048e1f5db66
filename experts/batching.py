"""Which queued calls run next: oldest work first, everything queued for the same layer in one launch.

A pure state machine: time comes in as an argument, calls and decisions come out. There is no artificial wait: what
has arrived while the previous launch ran is merged, nothing is held back for more to come.
"""

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from protos.errors import Overloaded

P = TypeVar("P")


@dataclass(slots=True, kw_only=True, eq=False)
class Call(Generic[P]):
    """One ComputeRequest in the queue; `work` is what the server needs to run it.

    num_tokens counts routed pairs, the unit of queue budgets and service rates; num_rows counts token rows.
    """

    call_id: int
    stream: Hashable
    layer: str
    num_rows: int
    num_tokens: int
    arrived_s: float
    deadline_s: float  # absolute on the server's clock; inf for none
    work: P


@dataclass(slots=True)
class Batcher(Generic[P]):
    """The queue of one expert server.

    Args:
        max_queue_tokens: routed pairs waiting or running beyond which `admit` raises Overloaded.
        max_launch_rows: rows merged into one launch (a single larger call still runs, alone).
    """

    max_queue_tokens: int
    max_launch_rows: int
    _queues: dict[str, deque[Call[P]]] = field(default_factory=dict)
    _waiting_tokens: int = 0
    _running_tokens: int = 0
    _seconds_per_token: float = 0.0

    @property
    def queue_tokens(self) -> int:
        """Routed pairs waiting or running."""
        return self._waiting_tokens + self._running_tokens

    def admit(self, call: Call[P]) -> None:
        """Queue a call.

        A call larger than the whole budget is taken when the queue is empty: it could never be admitted otherwise, and
        messages are bounded.

        Raises:
            Overloaded: the queue is full; retry_after_s estimates, from the measured rate, when it has room.
        """
        excess = self.queue_tokens + call.num_tokens - self.max_queue_tokens
        if excess > 0 and self.queue_tokens > 0:
            raise Overloaded(
                f"{call.num_tokens} routed pairs on top of {self.queue_tokens} queued exceed "
                f"max_queue_tokens ({self.max_queue_tokens})",
                retry_after_s=excess * self._seconds_per_token,
            )
        self._queues.setdefault(call.layer, deque()).append(call)
        self._waiting_tokens += call.num_tokens

    def take(self) -> list[Call[P]]:
        """The calls of the next launch: the layer whose head is oldest, as many of its calls as fit. May be empty."""
        heads = [queue for queue in self._queues.values() if queue]
        if not heads:
            return []
        queue = min(heads, key=lambda calls: calls[0].arrived_s)
        batch = [queue.popleft()]
        rows = batch[0].num_rows
        while queue and rows + queue[0].num_rows <= self.max_launch_rows:
            rows += queue[0].num_rows
            batch.append(queue.popleft())
        tokens = sum(call.num_tokens for call in batch)
        self._waiting_tokens -= tokens
        self._running_tokens += tokens
        return batch

    def finish(self, batch: Collection[Call[P]], *, took_s: float) -> None:
        """The launch of `batch` ended after `took_s` seconds: frees its budget, updates the measured rate."""
        tokens = sum(call.num_tokens for call in batch)
        self._running_tokens -= tokens
        if tokens:
            rate = took_s / tokens
            self._seconds_per_token += (rate - self._seconds_per_token) * (0.2 if self._seconds_per_token else 1.0)

    def expire(self, now_s: float) -> list[Call[P]]:
        """Remove and return the queued calls whose deadline has passed."""
        return list(self._remove(lambda call: call.deadline_s <= now_s))

    def cancel(self, stream: Hashable, call_ids: Collection[int] | None = None) -> list[Call[P]]:
        """Remove and return queued calls of a stream: those named, or all when it broke."""
        return list(self._remove(lambda call: call.stream == stream and (call_ids is None or call.call_id in call_ids)))

    def _remove(self, matches: Callable[[Call[P]], bool]) -> Iterator[Call[P]]:
        for layer, queue in self._queues.items():
            gone = [call for call in queue if matches(call)]
            if gone:
                self._queues[layer] = deque(call for call in queue if not matches(call))
                self._waiting_tokens -= sum(call.num_tokens for call in gone)
                yield from gone
