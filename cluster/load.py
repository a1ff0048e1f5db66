"""Load per expert, from the counters that routers report: rates that rise at once and fall slowly.

A hot spot should get its copies within a second, a pause in the traffic should not cost it them: hence an
exponentially weighted average with two time constants. Each router's rates are taken over its own report intervals: a
window that mixed them would see bursts where reports and readings beat against each other.

Shapes: L layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


class LoadWindow:
    """Routed pairs per second of every expert, over all routers.

    Args:
        layers: names, in row order.
        num_experts: E.
        rise_s, fall_s: time constants of rising and falling load.
    """

    def __init__(self, layers: Sequence[str], num_experts: int, *, rise_s: float, fall_s: float) -> None:
        self._rows = {layer: row for row, layer in enumerate(layers)}
        self._shape = (len(layers), num_experts)
        self._rise_s, self._fall_s = rise_s, fall_s
        self._routers: dict[str, _Counters] = {}

    def count(self, source: str, totals: Mapping[tuple[str, int], int], now_s: float) -> None:
        """Take a router's counters since its start; what is new since its previous report is load in that time."""
        total_LE = np.zeros(self._shape)
        for (layer, expert), pairs in totals.items():
            total_LE[self._rows[layer], expert] = pairs
        before = self._routers.get(source)
        if before is None:  # a first report may cover any time: it only sets the base
            self._routers[source] = _Counters(now_s, total_LE, np.zeros(self._shape))
            return
        elapsed_s = now_s - before.at_s
        if elapsed_s <= 0:
            return
        fresh_LE = np.maximum(total_LE - before.total_LE, 0) / elapsed_s
        rise, fall = 1 - math.exp(-elapsed_s / self._rise_s), 1 - math.exp(-elapsed_s / self._fall_s)
        weight_LE = np.where(fresh_LE > before.rate_LE, rise, fall)
        rate_LE = before.rate_LE + weight_LE * (fresh_LE - before.rate_LE)
        self._routers[source] = _Counters(now_s, total_LE, rate_LE)

    def forget(self, sources: set[str]) -> None:
        """Keep only these routers: the load of the others has gone elsewhere, or nowhere."""
        self._routers = {source: found for source, found in self._routers.items() if source in sources}

    def rates(self) -> npt.NDArray[np.float64]:
        """rate_LE: the sum over all routers. Reading does not change it."""
        return sum((found.rate_LE for found in self._routers.values()), start=np.zeros(self._shape))


@dataclass(frozen=True, slots=True)
class _Counters:
    """One router's last report, and its rates."""

    at_s: float
    total_LE: npt.NDArray[np.float64]
    rate_LE: npt.NDArray[np.float64]
