"""Experts that were asked for while no server held them: somebody may still be waiting.

Demand that is counted once decays, while its request waits for a server to start. So such an expert counts as asked
for until the usual wait is over, and longer while no server holds it and requests are open, or a cluster of none would
start a server and not load what it was started for.

Shapes: L layers, E experts.
"""

from collections.abc import Container, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cluster.messages import Key

PAIRS_PER_S = 1.0  # what such an expert counts with at least: more than nothing


class Awaited:
    """See the module docstring; time is an argument.

    Args:
        layers: names, in row order.
        patience_s: how long a request waits if it does not say.
    """

    def __init__(self, layers: Sequence[str], *, patience_s: float) -> None:
        self._rows = {layer: row for row, layer in enumerate(layers)}
        self._patience_s = patience_s
        self._until_s: dict[Key, float] = {}

    def count(self, before: Mapping[Key, int], after: Mapping[Key, int], held: Container[Key], now_s: float) -> bool:
        """Compare two reports of a router; returns whether it asked for experts outside `held`."""
        asked = [key for key, pairs in after.items() if key not in held and pairs > before.get(key, 0)]
        self._until_s |= dict.fromkeys(asked, now_s + self._patience_s)
        return bool(asked)

    def demand(
        self, load_LE: npt.NDArray[np.float64], *, held: Container[Key], open_requests: bool, now_s: float
    ) -> npt.NDArray[np.float64]:
        """The load, with at least PAIRS_PER_S for every awaited expert."""
        self._until_s = {
            key: until_s
            for key, until_s in self._until_s.items()
            if until_s > now_s or (open_requests and key not in held)
        }
        found_LE = load_LE.copy()
        for layer, expert in self._until_s:
            row = self._rows[layer]
            found_LE[row, expert] = max(found_LE[row, expert], PAIRS_PER_S)
        return found_LE
