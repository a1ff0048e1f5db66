"""What is asked for, and what a server can do, from counters (pure; time is an argument).

Counters that only grow, read at irregular times: a rate is the growth over a window, wherever the readings fell in it.
"""

import math
from bisect import bisect_right
from collections import deque


class Meter:
    """Rates of one counter.

    Args:
        keep_s: how far back will be asked for.
    """

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._times: deque[float] = deque()
        self._totals: deque[float] = deque()

    def read(self, total: float, now_s: float) -> None:
        """Take a reading, the first as the base; one that is late or was overtaken says nothing new."""
        if self._times and (total < self._totals[-1] or now_s <= self._times[-1]):
            return
        self._times.append(now_s)
        self._totals.append(total)
        while len(self._times) > 2 and self._times[1] <= now_s - self._keep_s:
            self._times.popleft()
            self._totals.popleft()

    def rate(self, window_s: float, *, ago_s: float = 0.0) -> float:
        """Growth per second over the `window_s` that ended `ago_s` before the last reading; none before the first."""
        if not self._times:
            return 0.0
        end_s = self._times[-1] - ago_s
        return (self._total_at(end_s) - self._total_at(end_s - window_s)) / window_s

    def _total_at(self, at_s: float) -> float:
        after = bisect_right(self._times, at_s)
        if after == 0:
            return self._totals[0]
        if after == len(self._times):
            return self._totals[-1]
        from_s, low = self._times[after - 1], self._totals[after - 1]
        return low + (self._totals[after] - low) * (at_s - from_s) / (self._times[after] - from_s)


class Pace:
    """How many routed pairs per second a server computes, and would compute if it were always busy.

    The latter is the work done over the busy time it took. Launches merge more under load, so a server that idles
    computes at the pace of small batches: a higher pace counts within a second, a lower one only from a server at its
    limit (other experts, a slower machine), and one that is rarely busy is not asked.

    Args:
        window_s: of the busy share; the work is taken over the same span.
        rise_s, fall_s, idle_fall_s: time constants of the capacity; the last where the server is not at its limit.
    """

    MIN_BUSY, AT_LIMIT = 0.2, 0.8

    def __init__(
        self, *, window_s: float = 1.0, rise_s: float = 0.5, fall_s: float = 3.0, idle_fall_s: float = 60.0
    ) -> None:
        self._window_s = window_s
        self._rise_s, self._fall_s, self._idle_fall_s = rise_s, fall_s, idle_fall_s
        self._done = Meter(window_s)
        self._total = 0
        self._counter = 0
        self._began_s: float | None = None
        self._at_s = 0.0
        self.capacity = 0.0  # 0: not known yet

    @property
    def rate(self) -> float:
        """Pairs per second, over the last `window_s`."""
        return self._done.rate(self._window_s)

    def observe(self, pairs: int, busy_share: float, now_s: float) -> None:
        """Take a server's counter of computed pairs, which unloads may lower, and its busy share."""
        self._total += max(pairs - self._counter, 0)
        self._counter = pairs
        self._done.read(self._total, now_s)
        elapsed_s, self._at_s = now_s - self._at_s, now_s
        if self._began_s is None:
            self._began_s = now_s
        if busy_share < self.MIN_BUSY or now_s - self._began_s < self._window_s:
            return
        pace = self.rate / busy_share
        fall_s = self._fall_s if busy_share > self.AT_LIMIT else self._idle_fall_s
        weight = 1 - math.exp(-elapsed_s / (self._rise_s if pace > self.capacity else fall_s))
        self.capacity += weight * (pace - self.capacity) if self.capacity else pace
