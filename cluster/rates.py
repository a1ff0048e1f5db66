"""When the requests of an open loop leave: constant rates, rates that change over time, and the departures they make.

A request is due each time the integral of the rate passes another whole number, so that a rate that rises slowly from
nothing sends what it should, and a change is felt at once.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from protos.errors import InvalidRequest

Rate = float | Callable[[float], float]  # requests per second; a function takes the seconds since the load began

GRAIN_S = 0.02  # a rate is taken as constant for so long


@dataclass(frozen=True, slots=True, kw_only=True)
class RateProfile:
    """A piecewise linear rate through `points` (seconds, requests per second); beyond the ends, the ends' rates.

    Two points with the same second make a step; from there on the second one counts.
    """

    points: tuple[tuple[float, float], ...]

    def __call__(self, elapsed_s: float) -> float:
        after = bisect_right(self.points, elapsed_s, key=lambda point: point[0])
        if not 0 < after < len(self.points):
            return self.points[min(after, len(self.points) - 1)][1]
        (begin_s, low), (end_s, high) = self.points[after - 1], self.points[after]
        return low + (high - low) * (elapsed_s - begin_s) / (end_s - begin_s)


def parse_rate(text: str) -> Rate:
    """Read `R`, or `S:R,S:R,...`, the points of a piecewise linear rate.

    Raises:
        InvalidRequest: anything else, no rate above 0, or seconds that go back.
    """
    try:
        if ":" not in text:
            if 0 < (rate := float(text)) < float("inf"):
                return rate
        else:
            parts = [point.split(":") for point in text.split(",")]
            points = tuple((float(when), float(rate)) for when, rate in parts)
            rising = all(before[0] <= after[0] for before, after in pairwise(points))
            finite = all(0 <= value < float("inf") for point in points for value in point)
            if rising and finite and max(rate for _, rate in points) > 0:
                return RateProfile(points=points)
    except ValueError:
        pass
    raise InvalidRequest(
        f"--rate is {text!r}, expected R (requests per second, above 0) or S:R,S:R,... (rates at rising seconds)"
    )


class Departures:
    """When requests are due, asked as time goes on. The first one leaves as soon as the rate is above 0."""

    def __init__(self, now_s: float) -> None:
        self._at_s = now_s
        self._accrued = 1.0  # requests, at `_at_s`

    def next(self, rate: Callable[[float], float], *, now_s: float) -> float | None:
        """The next departure up to `now_s`, on the same clock; None: there is none.

        Args:
            rate: requests per second at a moment of this clock.
        """
        while True:
            per_s = max(rate(self._at_s), 0.0)
            if per_s > 0 and self._accrued >= 1.0:
                self._accrued -= 1.0
                return self._at_s
            if self._at_s >= now_s:
                return None
            end_s = min(self._at_s + GRAIN_S, now_s)
            if per_s > 0 and self._accrued + per_s * (end_s - self._at_s) >= 1.0:
                self._at_s += (1.0 - self._accrued) / per_s
                self._accrued = 1.0
            else:
                self._accrued += per_s * (end_s - self._at_s)
                self._at_s = end_s

    def postpone(self, now_s: float) -> None:
        """What was due before `now_s` is due then, one request at most."""
        self._at_s = max(self._at_s, now_s)

    def patience_s(self, per_s: float) -> float:
        """Seconds to wait before asking again, at the rate of now: until the next departure, or until it may change."""
        return min(max(1.0 - self._accrued, 0.0) / per_s, GRAIN_S) if per_s > 0 else GRAIN_S
