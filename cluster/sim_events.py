"""The simulator's clock: actions at moments, run in order. Nothing here or in what it runs reads a real clock."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Action = Callable[..., Any]


class Clock:
    """Simulated seconds. Actions of the same moment run in the order in which they were asked for."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s
        self.num_events = 0
        self._heap: list[tuple[float, int, Action, tuple[Any, ...]]] = []

    def at(self, when_s: float, action: Action, *args: Any) -> None:
        """Run action(*args) at `when_s`; what is past runs now, after all that was asked for before."""
        self.num_events += 1
        heappush(self._heap, (max(when_s, self.now_s), self.num_events, action, args))

    def after(self, delay_s: float, action: Action, *args: Any) -> None:
        """Run action(*args) in `delay_s` seconds."""
        self.at(self.now_s + delay_s, action, *args)

    def every(self, interval_s: float, action: Action, *, first_s: float = 0.0) -> None:
        """Run action() every `interval_s` seconds from `first_s` seconds on, until it returns False."""

        def repeat() -> None:
            if action() is not False:
                self.after(interval_s, repeat)

        self.after(first_s, repeat)

    def run(self, until_s: float) -> None:
        """Run everything that is due up to `until_s`, which is then the time."""
        while self._heap and self._heap[0][0] <= until_s:
            self.now_s, _, action, args = heappop(self._heap)
            action(*args)
        self.now_s = until_s
