"""Load per expert, from the counters that routers report: it follows a surprise at once and noise slowly.

A hot spot should get its copies within a second, a pause in the traffic should not cost it them, and the noise of
small counts should move nothing. Hence two estimates per layer, both exponentially weighted averages with a short and
a long time constant. The *volume* rises with the short one and falls with the long one. The *shares* of the experts
change with the short one, up and down, where a count is further from its expectation than chance explains, and with
the long one otherwise; without traffic they stay. So a hot spot that moves leaves nothing behind, and a pause does.

Chance is the Poisson noise of the count, widened by how much more the counts have scattered so far, because pairs
arrive in batches: a single batch is no surprise. (An average that simply rose faster than it fell would sit above the
truth, and most for the coldest experts.)

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
        rise_s: time constant of surprises, until the estimate has caught up.
        fall_s: time constant otherwise, and of a volume that falls.
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
                at_s=now_s,
                total_LE=total_LE,
                volume_L=np.zeros(self._shape[0]),
                rising_L=np.zeros(self._shape[0], dtype=bool),
                share_LE=np.zeros(self._shape),
                moving_LE=np.zeros(self._shape, dtype=np.int8),
                scatter=1.0,
            )
            return
        elapsed_s = now_s - before.at_s
        if elapsed_s <= 0:
            return
        pairs_LE = np.maximum(total_LE - before.total_LE, 0)
        self._counted_LE += pairs_LE
        self._routers[source] = before.after(now_s, total_LE, pairs_LE, rise_s=self._rise_s, fall_s=self._fall_s)

    def forget(self, sources: set[str]) -> None:
        """Keep only these routers: the load of the others has gone elsewhere, or nowhere."""
        self._routers = {source: found for source, found in self._routers.items() if source in sources}

    def rates(self) -> Loads:
        """rate_LE: the sum over all routers. Reading does not change it."""
        return sum((found.rates() for found in self._routers.values()), start=np.zeros(self._shape))

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counters:
    """One router's last report and what is known of its load.

    `rising_L` and `moving_LE` (a sign) are surprises that the estimate has not caught up with yet; `scatter` is the
    variance of the counts in Poisson variances.
    """

    at_s: float
    total_LE: Loads
    volume_L: Loads
    rising_L: npt.NDArray[np.bool_]
    share_LE: Loads
    moving_LE: npt.NDArray[np.int8]
    scatter: float

    def rates(self) -> Loads:
        """rate_LE."""
        rate_LE: Loads = self.volume_L[:, None] * self.share_LE
        return rate_LE

    def after(self, now_s: float, total_LE: Loads, pairs_LE: Loads, *, rise_s: float, fall_s: float) -> "_Counters":
        """What is known once these pairs have been counted since `at_s`."""
        elapsed_s = now_s - self.at_s
        rise, fall = 1 - math.exp(-elapsed_s / rise_s), 1 - math.exp(-elapsed_s / fall_s)
        pairs_L = pairs_LE.sum(axis=1)
        busy_L = pairs_L > 0

        usual_L = self.volume_L * elapsed_s
        more_L = pairs_L - usual_L > SURPRISE * np.sqrt(self.scatter * (usual_L + self.scatter))
        rising_L = more_L | (self.rising_L & (pairs_L > usual_L))
        volume_L = self.volume_L + np.where(rising_L, rise, fall) * (pairs_L / elapsed_s - self.volume_L)

        first_L = busy_L & ~self.share_LE.any(axis=1)
        now_LE = pairs_LE / np.maximum(pairs_L, 1)[:, None]
        expected_LE = pairs_L[:, None] * self.share_LE
        surprise_LE = (pairs_LE - expected_LE) / np.sqrt(self.scatter * (expected_LE + self.scatter))
        sign_LE = np.sign(surprise_LE).astype(np.int8)
        moving_LE = np.where(np.abs(surprise_LE) > SURPRISE, sign_LE, np.where(sign_LE == self.moving_LE, sign_LE, 0))
        # Half of the usual traffic tells half as much about the shares.
        told_L = np.minimum(pairs_L / np.maximum(usual_L, 1), 1)[:, None]
        weight_LE = np.where(moving_LE != 0, rise, fall) * told_L
        share_LE = np.where(first_L[:, None], now_LE, self.share_LE + weight_LE * (now_LE - self.share_LE))
        share_LE = share_LE / np.maximum(share_LE.sum(axis=1, keepdims=True), 1e-300)

        # The scatter is learnt from what was no surprise.
        known_LE = (busy_L & ~first_L)[:, None] & ((expected_LE >= 1) | (pairs_LE >= 1))
        scatter = self.scatter
        if known_LE.any():
            usual = scatter * float(np.minimum(surprise_LE[known_LE] ** 2, SURPRISE**2).mean())
            scatter = max(1.0, scatter + fall * (usual - scatter))
        return _Counters(
            at_s=now_s,
            total_LE=total_LE,
            volume_L=volume_L,
            rising_L=rising_L,
            share_LE=share_LE,
            moving_LE=np.where(busy_L[:, None], moving_LE, self.moving_LE),
            scatter=scatter,
        )


@dataclass(frozen=True, slots=True)
class _Mark:
    """Where a forecast began."""

    at_s: float
    counted_LE: Loads
    rate_LE: Loads
