"""Load per expert, from the counters that routers report: rates that rise at once and fall slowly.

A hot spot should get its copies within a second, a pause in the traffic should not cost it them: hence an
exponentially weighted average with two time constants.

Shapes: L layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence

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
        self._rate_LE = np.zeros(self._shape)
        self._seen: dict[str, npt.NDArray[np.float64]] = {}
        self._pending_LE = np.zeros(self._shape)
        self._updated_s: float | None = None

    def count(self, source: str, totals: Mapping[tuple[str, int], int]) -> None:
        """Take a router's counters since its start; the difference to its previous report is new load."""
        total_LE = np.zeros(self._shape)
        for (layer, expert), pairs in totals.items():
            total_LE[self._rows[layer], expert] = pairs
        before_LE = self._seen.get(source)
        self._seen[source] = total_LE
        if before_LE is not None:  # a first report may cover any time: it only sets the base
            self._pending_LE += np.maximum(total_LE - before_LE, 0)

    def forget(self, sources: set[str]) -> None:
        """Keep only the counters of these sources."""
        self._seen = {source: total_LE for source, total_LE in self._seen.items() if source in sources}

    def rates(self, now_s: float) -> npt.NDArray[np.float64]:
        """rate_LE, with everything counted so far folded in."""
        if self._updated_s is None:
            self._updated_s = now_s
        elapsed_s = now_s - self._updated_s
        if elapsed_s <= 0:
            return self._rate_LE
        self._updated_s = now_s
        fresh_LE, self._pending_LE = self._pending_LE / elapsed_s, np.zeros(self._shape)
        rise, fall = 1 - math.exp(-elapsed_s / self._rise_s), 1 - math.exp(-elapsed_s / self._fall_s)
        self._rate_LE = self._rate_LE + np.where(fresh_LE > self._rate_LE, rise, fall) * (fresh_LE - self._rate_LE)
        return self._rate_LE
