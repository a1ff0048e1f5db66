"""Layers that have no copies yet, filled whole: hottest expert first, each onto the least loaded server.

That is Graham's LPT rule (1969). An expert is split only where it would pass the water level of the servers, and its
parts carry exactly what fits below it. The bins of a layer then go to servers of equal speed, the fullest bin to the
server with the most free bytes: over many layers that keeps bytes as even as loads. Where bytes bind (small fast
servers beside large slow ones) the next hottest expert goes to the server that wants the most load per free slot
instead: hot experts meet few slots, cold ones many.

Shapes: L layers, E experts, S servers.
"""

import math
from collections.abc import Callable, Sequence
from heapq import heapify, heapreplace

import numpy as np
import numpy.typing as npt

from cluster.planner_draft import Draft, Shares

_ABOVE_GOAL = 0.01  # fill for a little more than the goal: the last experts do not fit exactly
_SMALL_PART = 0.05  # of a server's level: a smaller part is not worth a copy

Rank = Callable[[int, float, int], float]  # server, its load, its copies -> the server of lowest rank is next


def fill_layers(draft: Draft, rows: Sequence[int], wanted_LE: npt.NDArray[np.bool_]) -> None:
    """Place the wanted experts of layers without copies. Bytes for one copy of each must be free."""
    num_wanted = int(wanted_LE[rows].sum())
    spare = min(int(draft.free_S.sum()) - num_wanted, draft.moves_left)
    level_L = water_levels(draft, rows, spare, aim=min(draft.inputs.goal + _ABOVE_GOAL, 1.0))
    order_LE = np.argsort(-draft.weight_LE[rows], axis=1, kind="stable")
    binding = bool((num_wanted * draft.speed_S / draft.speed_S.sum() > draft.free_S).any())
    for place, row in enumerate(rows):
        experts = order_LE[place][wanted_LE[row, order_LE[place]]].tolist()
        pour = _Pour(draft, row, experts, level_L[place], 0 if draft.idle_L[row] else spare)
        shares_E = None if binding else pour.by_load()
        if shares_E is None:
            shares_E = pour.by_slots(draft.free_S / (len(rows) - place))
        draft.fill_layer(row, shares_E)
        for expert in pour.split_experts:
            weight = draft.weights(row)[expert] / float(draft.total_L[row])
            _, *parts = sorted((-share, server) for server, share in shares_E[expert].items())
            for share, server in parts:
                draft.loads[(row, expert, server)] = ("load", -share * weight)
        spare -= pour.num_splits
        draft.moves_left -= pour.num_splits


def water_levels(draft: Draft, rows: Sequence[int], spare: int, *, aim: float) -> npt.NDArray[np.float64]:
    """The load per unit of speed that no server of these layers should pass [len(rows)].

    It is that of balancedness `aim`, raised by the same factor in all layers as far as bytes for `spare` more copies
    ask for (every byte then buys about the same), and in a layer whose hottest expert may not have enough copies.
    """
    weight_LE, count_LE = draft.weight_LE[rows], np.maximum(draft.count_LE[rows], 1)
    usual = draft.speed_S.mean() * draft.level_L[rows]

    def affordable(factor: float) -> bool:
        need_LE = np.ceil(weight_LE / (factor * usual)[:, None] - 1e-9)
        return float(np.maximum(need_LE - count_LE, 0).sum()) <= max(spare, 0)

    low = high = 1 / aim
    while not affordable(high):
        low, high = high, 2 * high
    for _ in range(12 if high > low else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if affordable(middle) else (middle, high)
    fastest = np.sort(draft.speed_S)[-draft.most :].sum()
    level_L: npt.NDArray[np.float64] = np.maximum(high * draft.level_L[rows], weight_LE.max(axis=1) / fastest)
    return level_L


class _Pour:
    """One layer: its experts, hottest first, poured into servers that are full at a level."""

    def __init__(self, draft: Draft, row: int, experts: list[int], level: float, may_split: int) -> None:
        self._draft, self._experts, self._may_split = draft, experts, may_split
        self._weight_E = draft.weights(row)
        self._speed_S: list[float] = draft.speed_S.tolist()
        self._full_S: list[float] = [level * speed for speed in self._speed_S]
        self._bin_E: list[int] = []
        self._parts: dict[int, dict[int, float]] = {}  # of experts that are split: bin -> load
        self.num_splits = 0

    @property
    def split_experts(self) -> list[int]:
        return list(self._parts)

    def by_load(self) -> list[Shares] | None:
        """Into the least loaded server for its speed, whatever its bytes; None if the bins do not fit then."""
        draft, speed_S = self._draft, self._speed_S
        used_S = self._pour(lambda server, load, _: load / speed_S[server])
        server_S = np.empty(draft.num_servers, dtype=np.int64)  # of each bin
        for speed in np.unique(draft.speed_S):
            like = np.flatnonzero(draft.speed_S == speed)
            bins = like[np.argsort(-used_S[like], kind="stable")]
            server_S[bins] = like[np.argsort(-draft.free_S[like], kind="stable")]
        if (used_S > draft.free_S[server_S]).any():
            return None
        return self._shares(server_S.tolist())

    def by_slots(self, slots_S: npt.NDArray[np.float64]) -> list[Shares]:
        """Into the server that wants the most load per slot.

        Args:
            slots_S: the free copies that this layer should use of each server; what is free is the hard limit.
        """
        full_S, free_S = self._full_S, self._draft.free_S.tolist()
        share_S: list[float] = slots_S.tolist()

        def rank(server: int, load: float, used: int) -> float:
            if used >= free_S[server]:
                return math.inf
            return (load - full_S[server]) / max(share_S[server] - used, 0.25)

        self._pour(rank)
        return self._shares(list(range(len(full_S))))

    def _pour(self, rank: Rank) -> npt.NDArray[np.int64]:
        """Decide which bin every expert goes into, or which parts of it; returns how many copies a bin then has."""
        weight_E, full_S = self._weight_E, self._full_S
        load_S, used_S = [0.0] * len(full_S), [0] * len(full_S)
        self._bin_E, self._parts, self.num_splits = [-1] * len(weight_E), {}, 0
        heap = [(rank(place, 0.0, 0), place) for place in range(len(full_S))]
        heapify(heap)

        def take(place: int, load: float) -> None:
            load_S[place] += load
            used_S[place] += 1
            heapreplace(heap, (rank(place, load_S[place], used_S[place]), place))

        for expert in self._experts:
            weight, place = weight_E[expert], heap[0][1]
            if weight <= (full_S[place] - load_S[place]) * (1 + 1e-9):  # nearly all: the loop's short way
                self._bin_E[expert] = place
                take(place, weight)
                continue
            rest, parts = weight, dict[int, float]()
            while True:
                place = heap[0][1]
                room, least = full_S[place] - load_S[place], _SMALL_PART * full_S[place]
                if rest <= room * (1 + 1e-9) or min(room, rest - least) < least:
                    break
                if self.num_splits == self._may_split or len(parts) + 1 == self._draft.most:
                    break
                parts[place] = min(room, rest - least)
                rest -= parts[place]
                self.num_splits += 1
                take(place, parts[place])
            take(place, rest)
            if parts:
                self._parts[expert] = parts | {place: parts.get(place, 0.0) + rest}
            else:
                self._bin_E[expert] = place
        return np.array(used_S)

    def _shares(self, server_S: list[int]) -> list[Shares]:
        """The copies, once it is known which server every bin is."""
        shares_E = [{server_S[place]: 1.0} if place >= 0 else {} for place in self._bin_E]
        for expert, parts in self._parts.items():
            weight = self._weight_E[expert]
            shares_E[expert] = {server_S[place]: load / weight for place, load in parts.items()}
        return shares_E
