"""What a server measures about itself: pace, launch cost, busy share. Time comes in as an argument."""

import threading
from collections import deque

BUSY_WINDOW_S = 1.0


class Pacer:
    """Emulation of a slower device: a launch of n routed pairs lasts at least n / rate seconds."""

    def __init__(self, tokens_per_s: float | None) -> None:
        self._tokens_per_s = tokens_per_s
        self._free_s = 0.0

    def done_s(self, start_s: float, now_s: float, tokens: int) -> float:
        """When a launch that started at start_s and computed until now_s may be answered."""
        if self._tokens_per_s is None:
            return now_s
        # Timers fire late by up to a millisecond: carrying the schedule over keeps the rate exact under load.
        begin_s = self._free_s if start_s - self._free_s < 0.01 else start_s
        self._free_s = max(now_s, begin_s + tokens / self._tokens_per_s)
        return self._free_s


class LaunchCost:
    """Expected launch time by size, learnt from the launches so far (unknown sizes count as long)."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def expected_s(self, tokens: int) -> float:
        return self._seconds.get(tokens.bit_length(), float("inf"))

    def learn(self, tokens: int, took_s: float) -> None:
        bucket = tokens.bit_length()
        old = self._seconds.get(bucket, took_s)
        self._seconds[bucket] = old + (took_s - old) * 0.1


class BusyMeter:
    """Share of the last BUSY_WINDOW_S seconds spent in launches, the running one included."""

    def __init__(self) -> None:
        self._spans: deque[tuple[float, float]] = deque()
        self._began_s: float | None = None
        self._lock = threading.Lock()

    def begin(self, now_s: float) -> None:
        self._began_s = now_s

    def end(self, now_s: float) -> None:
        assert self._began_s is not None, "end follows begin"
        with self._lock:
            self._spans.append((self._began_s, now_s))
            self._began_s = None
            while self._spans[0][1] < now_s - BUSY_WINDOW_S:
                self._spans.popleft()

    def share(self, now_s: float) -> float:
        begin_s = now_s - BUSY_WINDOW_S
        with self._lock:
            busy_s = sum(max(0.0, end - max(start, begin_s)) for start, end in self._spans)
            if self._began_s is not None:
                busy_s += now_s - max(self._began_s, begin_s)
        return min(1.0, busy_s / BUSY_WINDOW_S)
