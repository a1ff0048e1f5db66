"""What a simulated cluster is asked for: how many requests, of what shape, and which experts they go to, over time.

A workload is a rate of requests (`cluster.rates`) and a heat: each expert's share of its layer's pairs at a moment,
drawn from a pattern or a load matrix that may jump or drift, or what a recorded trace went to (`cluster.replay`). Its
load is therefore a function of time, known in advance: the simulator draws requests from it, a clairvoyant planner
reads it.

Shapes: L layers, E experts, T tokens of a request, K experts per token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from cluster.patterns import Pattern, draw_routing, expert_shares, ranks_after_moves
from cluster.rates import Rate, RateProfile, parse_rate
from protos.errors import InvalidRequest
from router.gate import Routing

Shares = npt.NDArray[np.float64]


class Heat(Protocol):
    """Which experts the pairs go to, over time, from 0 on."""

    def shares(self, now_s: float) -> Shares:
        """share_LE: each expert's share of its layer's pairs; rows sum to 1. Do not write to it."""

    def routing(self, row: int, num_tokens: int, now_s: float, rng: np.random.Generator) -> Routing:
        """Experts and weights of the next tokens of the row-th layer."""

    def onsets(self, until_s: float) -> list[float]:
        """Moments before `until_s` from which other experts are hot."""


class DrawnHeat:
    """Shares that stay, jump to another arrangement, or drift from one to the next.

    An arrangement says which expert has which of its layer's shares; each is independent of those before, and the
    moves are those of the load generator (`cluster.patterns.ranks_after_moves`).

    Args:
        share_LE: the first arrangement; no share above 1/K, since a token takes an expert once.
        top_k: K.
        move: whether the heat moves, and how.
        every_s: seconds between jumps, or in which it drifts to the next arrangement.
        seed: of the arrangements.

    Raises:
        InvalidRequest: a share is negative or above 1/K, or a layer has none.
    """

    def __init__(
        self,
        share_LE: Shares,
        *,
        top_k: int,
        move: Literal["never", "jump", "drift"] = "never",
        every_s: float = math.inf,
        seed: int = 0,
    ) -> None:
        total_L = share_LE.sum(axis=1)
        if not (np.isfinite(share_LE).all() and (share_LE >= 0).all() and (total_L > 0).all()):
            raise InvalidRequest("a layer's load must be finite, not negative, and above 0 in sum")
        self._share_LE: Shares = share_LE / total_L[:, None]
        row, expert = np.unravel_index(int(self._share_LE.argmax()), share_LE.shape)
        if self._share_LE[row, expert] > 1 / top_k + 1e-9:
            raise InvalidRequest(
                f"expert {expert} of row {row} has {self._share_LE[row, expert]:.3g} of its layer's load; with {top_k} "
                f"different experts per token the limit is {1 / top_k:.3g}"
            )
        self._falling_LE = -np.sort(-self._share_LE, axis=1)
        self._top_k, self._move, self._every_s, self._seed = top_k, move, every_s, seed
        self._arrangements: dict[int, Shares] = {0: self._share_LE}

    def shares(self, now_s: float) -> Shares:
        if self._move == "never":
            return self._share_LE
        moves = int(now_s / self._every_s)
        part, before_LE = now_s / self._every_s - moves, self._arrangement(moves)
        if self._move == "jump":
            return before_LE
        between_LE: Shares = before_LE + part * (self._arrangement(moves + 1) - before_LE)
        return between_LE

    def routing(self, row: int, num_tokens: int, now_s: float, rng: np.random.Generator) -> Routing:
        return draw_routing(self.shares(now_s)[row], num_tokens=num_tokens, top_k=self._top_k, rng=rng)

    def onsets(self, until_s: float) -> list[float]:
        if self._move != "jump":
            return []
        return [self._every_s * i for i in range(1, math.ceil(until_s / self._every_s))]

    def _arrangement(self, moves: int) -> Shares:
        found = self._arrangements.get(moves)
        if found is None:
            num_layers, num_experts = self._share_LE.shape
            rank_LE = np.stack(
                [
                    ranks_after_moves(moves, layer=layer, num_experts=num_experts, seed=self._seed)
                    for layer in range(num_layers)
                ]
            )
            found = self._arrangements[moves] = np.take_along_axis(self._falling_LE, rank_LE, axis=1)
        return found


def pattern_shares(pattern: Pattern, *, num_layers: int, num_experts: int, top_k: int) -> Shares:
    """share_LE of a pattern, as the load generator arranges it before its first move.

    Raises:
        InvalidRequest: the pattern is a trace, or the model cannot have it.
    """
    if pattern.kind == "trace":
        raise InvalidRequest("the pattern trace:FILE names hidden states; recorded routings are a trace of their own")
    share_E = expert_shares(pattern, num_experts=num_experts, top_k=top_k)
    return np.stack(
        [share_E[ranks_after_moves(0, layer=i, num_experts=num_experts, seed=0)] for i in range(num_layers)]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A load as a function of time. Before time 0 it is that of time 0.

    Args:
        layers: names, in row order.
        heat: which experts.
        rate: requests per second.
        num_tokens: T of every request.
        visits: layers a request goes through, one after another; requests begin where the one before ended.
        poisson: requests come at random instead of evenly.
    """

    layers: tuple[str, ...]
    num_experts: int
    top_k: int
    heat: Heat
    rate: Rate
    num_tokens: int
    visits: int = 1
    poisson: bool = False

    @property
    def pairs(self) -> int:
        """Routed pairs of one request, over all its visits."""
        return self.num_tokens * self.top_k * self.visits

    def requests_per_s(self, now_s: float) -> float:
        return float(self.rate(max(now_s, 0.0)) if callable(self.rate) else self.rate)

    def pairs_per_s(self, now_s: float) -> float:
        """Of all layers."""
        return self.requests_per_s(now_s) * self.pairs

    def load(self, now_s: float) -> npt.NDArray[np.float64]:
        """load_LE: routed pairs per second of every expert."""
        per_layer = self.pairs_per_s(now_s) / len(self.layers)
        load_LE: npt.NDArray[np.float64] = self.heat.shares(max(now_s, 0.0)) * per_layer
        return load_LE


@dataclass(frozen=True, slots=True, kw_only=True)
class Diurnal:
    """Requests per second over a day: from `low` up to `high` and back within `period_s`, as a cosine."""

    low: float
    high: float
    period_s: float

    def __call__(self, elapsed_s: float) -> float:
        swing = (1 - math.cos(2 * math.pi * elapsed_s / self.period_s)) / 2
        return self.low + (self.high - self.low) * swing


@dataclass(frozen=True, slots=True, kw_only=True)
class Faster:
    """A rate times a factor."""

    rate: Rate
    factor: float

    def __call__(self, elapsed_s: float) -> float:
        return self.factor * (self.rate(elapsed_s) if callable(self.rate) else self.rate)


def flash_crowd(base: float, peak: float, *, at_s: float, hold_s: float) -> RateProfile:
    """`base` requests per second, from `at_s` on `peak` for `hold_s` seconds, then `base` again."""
    end_s = at_s + hold_s
    return RateProfile(points=((0.0, base), (at_s, base), (at_s, peak), (end_s, peak), (end_s, base)))


_RATES: Mapping[str, tuple[str, int]] = {"diurnal": ("LOW:HIGH:PERIOD_S", 3), "flash": ("BASE:PEAK:AT_S:HOLD_S", 4)}


def parse_traffic(text: str) -> Rate:
    """Read requests per second: `diurnal:LOW:HIGH:PERIOD_S`, `flash:BASE:PEAK:AT_S:HOLD_S`, or what `parse_rate` reads.

    Raises:
        InvalidRequest: anything else.
    """
    kind, _, rest = text.partition(":")
    if kind not in _RATES:
        return parse_rate(text)
    form, count = _RATES[kind]
    try:
        values = [float(part) for part in rest.split(":")]
        if len(values) == count and all(0 <= value < math.inf for value in values) and min(values[1], values[-1]) > 0:
            if kind == "diurnal":
                return Diurnal(low=values[0], high=values[1], period_s=values[2])
            return flash_crowd(values[0], values[1], at_s=values[2], hold_s=values[3])
    except ValueError:
        pass
    raise InvalidRequest(f"--rate is {text!r}, expected {kind}:{form}, numbers from 0 on, rates in requests per second")
