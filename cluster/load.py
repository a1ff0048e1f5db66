"""Load per expert, from the counters that routers report: rates that follow a surprise at once and noise slowly.

A hot spot should get its copies within a second, a pause in the traffic should not cost it them, and the noise of
small counts should move nothing. Hence an exponentially weighted average with two time constants: the short one where
a report is higher than chance explains, the long one otherwise. Chance is the Poisson noise of the count, widened by
how much more the counts have scattered so far, because pairs arrive in batches: a single batch is no surprise.
(An average that simply rose faster than it fell would sit above the truth, and most for the coldest experts.)

Each router's rates are taken over its own report intervals: a window that mixed them would see bursts where reports
and readings beat against each other.

Shapes: L layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Loads = npt.NDArray[np.float64]

SURPRISE = 3.0  # standard deviations
HORIZON_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the rates of a while ago said about the time since, and what it was.

    Args:
        predicted, actual: routed pairs per second, over all experts.
        error: sum over experts of |predicted - actual|, over the sum of actual.
        noise: the error that a perfect forecast would have made, from the Poisson noise of the counts alone.
    """

    predicted: float
    actual: float
    error: float
    noise: float


class LoadWindow:
    """Routed pairs per second of every expert, over all routers.

    Args:
        layers: names, in row order.
        num_experts: E.
        rise_s: time constant where load is surprisingly high, until the rate has caught up.
        fall_s: time constant otherwise.
    """

    def __init__(self, layers: Sequence[str], num_experts: int, *, rise_s: float, fall_s: float) -> None:
        self._rows = {layer: row for row, layer in enumerate(layers)}
        self._shape = (len(layers), num_experts)
        self._rise_s, self._fall_s = rise_s, fall_s
        self._routers: dict[str, _Counters] = {}
        self._counted_LE = np.zeros(self._shape)  # pairs, over all routers that ever were
        self._mark: _Mark | None = None
        self.forecast: Forecast | None = None

    def count(self, source: str, totals: Mapping[tuple[str, int], int], now_s: float) -> None:
        """Take a router's counters since its start; what is new since its previous report is load in that time."""
        total_LE = np.zeros(self._shape)
        for (layer, expert), pairs in totals.items():
            total_LE[self._rows[layer], expert] = pairs
        before = self._routers.get(source)
        if before is None:  # a first report may cover any time: it only sets the base
            self._routers[source] = _Counters(
                now_s, total_LE, np.zeros(self._shape), np.zeros(self._shape, dtype=bool), 1.0
            )
            return
        elapsed_s = now_s - before.at_s
        if elapsed_s <= 0:
            return
        pairs_LE = np.maximum(total_LE - before.total_LE, 0)
        self._counted_LE += pairs_LE
        expected_LE = before.rate_LE * elapsed_s
        surprise_LE = (pairs_LE - expected_LE) / np.sqrt(before.scatter * (expected_LE + before.scatter))
        rise, fall = 1 - math.exp(-elapsed_s / self._rise_s), 1 - math.exp(-elapsed_s / self._fall_s)
        rising_LE = (surprise_LE > SURPRISE) | (before.rising_LE & (surprise_LE > 0))  # until it has caught up
        weight_LE = np.where(rising_LE, rise, fall)
        rate_LE = before.rate_LE + weight_LE * (pairs_LE / elapsed_s - before.rate_LE)
        # How far the counts scatter, in Poisson variances: learnt from what was no surprise.
        usual_LE = before.scatter * np.minimum(surprise_LE**2, SURPRISE**2)
        busy_LE = (expected_LE >= 1.0) | (pairs_LE >= 1.0)
        scatter = before.scatter
        if busy_LE.any():
            scatter = max(1.0, scatter + fall * (float(usual_LE[busy_LE].mean()) - scatter))
        self._routers[source] = _Counters(now_s, total_LE, rate_LE, rising_LE, scatter)

    def forget(self, sources: set[str]) -> None:
        """Keep only these routers: the load of the others has gone elsewhere, or nowhere."""
        self._routers = {source: found for source, found in self._routers.items() if source in sources}

    def rates(self) -> Loads:
        """rate_LE: the sum over all routers. Reading does not change it."""
        return sum((found.rate_LE for found in self._routers.values()), start=np.zeros(self._shape))

    def judge(self, now_s: float) -> None:
        """Once every HORIZON_S: compare what the rates predicted with what was counted since; sets `forecast`."""
        mark = self._mark
        if mark is not None and now_s - mark.at_s < HORIZON_S:
            return
        if mark is not None:
            elapsed_s = now_s - mark.at_s
            pairs_LE = self._counted_LE - mark.counted_LE
            total = float(pairs_LE.sum())
            if total:
                predicted_LE = mark.rate_LE * elapsed_s
                self.forecast = Forecast(
                    predicted=float(predicted_LE.sum()) / elapsed_s,
                    actual=total / elapsed_s,
                    error=float(np.abs(predicted_LE - pairs_LE).sum()) / total,
                    noise=float(np.sqrt(2 / math.pi * pairs_LE).sum()) / total,  # mean |error| of a normal variable
                )
        self._mark = _Mark(now_s, self._counted_LE.copy(), self.rates())


@dataclass(frozen=True, slots=True)
class _Counters:
    """One router's last report, its rates, and the scatter of its counts in Poisson variances."""

    at_s: float
    total_LE: Loads
    rate_LE: Loads
    rising_LE: npt.NDArray[np.bool_]  # surprised, and still below what is counted
    scatter: float


@dataclass(frozen=True, slots=True)
class _Mark:
    """Where a forecast began."""

    at_s: float
    counted_LE: Loads
    rate_LE: Loads
