"""How fast each server computes, as its answers tell.

Shapes: S servers.
"""

import math

import numpy as np
import numpy.typing as npt

_MEMORY_S = 1.0  # of computing: what was longer ago hardly counts


class ServerPace:
    """Routed pairs per second of one server while it computes: pairs over seconds of its answers' launches, the newest
    counting most.

    Small launches are mostly overhead and say little about how fast a server is. In a ratio of sums they count little,
    and as what is old fades by computing time, many of them do not push a large one out.
    """

    def __init__(self) -> None:
        self._pairs = self._seconds = 0.0

    @property
    def pairs_per_s(self) -> float:
        """Infinite until something is known."""
        return self._pairs / self._seconds if self._seconds else math.inf

    def learn(self, pairs: float, seconds: float) -> None:
        """A launch of so many pairs took `seconds` > 0."""
        keep = math.exp(-seconds / _MEMORY_S)
        self._pairs = keep * self._pairs + pairs
        self._seconds = keep * self._seconds + seconds


def relative_speeds(pace_S: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """Paces (infinite: not known yet) in steps of two around their median, so that equal servers count as equal.

    None if all do.
    """
    known_S = np.isfinite(pace_S)
    if not known_S.any():
        return None
    ratio_S = np.where(known_S, pace_S, 1.0) / np.median(pace_S[known_S])
    step_S = np.where(known_S, np.round(np.log2(ratio_S)), 0.0)
    return np.asarray(2.0**step_S) if step_S.any() else None
