"""Replica choice: which copy of its expert computes each routed pair.

A small group of pairs of one expert goes whole to one copy: the planner's shares are the odds of a draw, and the less
loaded of two drawn copies wins (power of two choices, Mitzenmacher 2001). A server that gets a message of this batch
anyway is preferred while its load allows: fewer messages, and a token's row travels there only once. A large group is
split by the shares, unless that leaves one of its servers clearly more to do than the others, for its speed: then so
that what they have to do evens out (water-filling). What they have to do is what is in flight, what was placed before,
and what the shares want of the large groups to come.

Shapes: P pairs to place, E experts, C most copies of one expert, S servers.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from router.table import LayerPlacement

SPLIT_TOKENS = 32  # larger groups of one expert are split; smaller ones gain nothing from a GEMM of fewer rows
PREFER_LOAD = 1.25  # a server contacted anyway may carry this much more load than the draw's winner ...
PREFER_PAIRS = 32  # ... plus at most this many pairs
MESSAGE_WORTH_S = 0.002  # ... or what the slowest server computes in this time
UNEVEN = 1.1  # a server with this many times the even load has clearly more to do
_FEW_PAIRS = 64  # up to here plain Python is faster than numpy


def message_worth(pairs_per_s: float) -> float:
    """How many routed pairs a message less is worth, where the slowest server has this pace."""
    return min(PREFER_PAIRS, MESSAGE_WORTH_S * pairs_per_s)


def choose_copies(
    expert_P: npt.NDArray[np.int32],
    placement: LayerPlacement,
    *,
    load_S: npt.NDArray[np.float64],
    capacity: int | None = None,
    prefer_pairs: float = PREFER_PAIRS,
    speed_S: npt.NDArray[np.float64] | None = None,
    rng: np.random.Generator,
) -> npt.NDArray[np.int32]:
    """Choose a server for every pair.

    Args:
        expert_P: expert of each pair, in token order; a split group goes to its copies in contiguous runs.
        placement: the layer's live copies (`LayerPlacement.without` leaves servers out).
        load_S: routed pairs in flight per server; not changed.
        capacity: most pairs per copy, None for no limit.
        prefer_pairs: how many pairs a message is worth; fewer where servers are slow.
        speed_S: speeds of the servers, relative to each other; None: all alike.
        rng: draws.

    Returns:
        server_P, -1 for pairs of an expert without a live copy, and for those beyond what its copies may take.
    """
    if placement.server_EC.shape[1] == 1 and capacity is None:
        return placement.server_EC[:, 0][expert_P]
    chooser = _Chooser(placement, load_S, capacity, prefer_pairs, speed_S, rng)
    if len(expert_P) <= _FEW_PAIRS:
        return _choose_few(expert_P.tolist(), chooser)
    server_P = placement.server_EC[:, 0][expert_P]
    count_E = np.bincount(expert_P, minlength=len(placement.num_copies_E))
    # Experts with one copy and room on it are settled; the loop below is over the others.
    open_E = (count_E > 0) & (placement.num_copies_E > 1)
    if capacity is not None:
        open_E |= count_E > capacity
    experts = np.flatnonzero(open_E).tolist()
    if not experts:
        return server_P
    settled = np.flatnonzero((count_E > 0) & (placement.num_copies_E == 1) & ~open_E)
    chooser.settle(placement.server_EC[settled, 0].tolist(), count_E[settled].tolist())
    order_P = stable_order(expert_P)
    ends = np.cumsum(count_E).tolist()
    sizes = count_E.tolist()
    for expert in chooser.in_turn((expert, sizes[expert]) for expert in experts):
        start = ends[expert] - sizes[expert]
        for server, count in chooser.place(expert, sizes[expert]):
            server_P[order_P[start : start + count]] = server
            start += count
        server_P[order_P[start : ends[expert]]] = -1
    return server_P


def stable_order(values_P: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """The stable sorting order of small non-negative integers (-1 allowed); numpy's radix sort is for 16 bits only."""
    narrow = values_P.astype(np.int16)
    return np.argsort(narrow if (narrow == values_P).all() else values_P, kind="stable")


def _choose_few(experts: list[int], chooser: "_Chooser") -> npt.NDArray[np.int32]:
    groups: dict[int, list[int]] = {}
    for position, expert in enumerate(experts):
        groups.setdefault(expert, []).append(position)
    servers = [-1] * len(experts)
    for expert in chooser.in_turn([(expert, len(positions)) for expert, positions in groups.items()]):
        rest = iter(groups[expert])
        for server, count in chooser.place(expert, len(groups[expert])):
            for _ in range(count):
                servers[next(rest)] = server
    return np.array(servers, dtype=np.int32)


class _Chooser:
    """Places one group after another, and keeps the loads and the contacted servers up to date meanwhile."""

    __slots__ = ("_capacity", "_contacted", "_loads", "_placement", "_prefer_pairs", "_rng", "_speeds")

    def __init__(
        self,
        placement: LayerPlacement,
        load_S: npt.NDArray[np.float64],
        capacity: int | None,
        prefer_pairs: float,
        speed_S: npt.NDArray[np.float64] | None,
        rng: np.random.Generator,
    ) -> None:
        self._placement = placement
        self._loads: list[float] = load_S.tolist()
        self._capacity = capacity
        self._prefer_pairs = prefer_pairs
        self._speeds: list[float] = [1.0] * len(self._loads) if speed_S is None else speed_S.tolist()
        self._rng = rng
        self._contacted: set[int] = set()

    def settle(self, servers: list[int], counts: list[int]) -> None:
        """Count pairs that have no choice."""
        for server, count in zip(servers, counts, strict=True):
            self._add(server, count)

    def in_turn(self, groups: Iterable[tuple[int, int]]) -> list[int]:
        """The experts of groups (expert, size), in the order to place them: no choice, small by falling size, large.

        Large ones are divisible, so they even out what the others leave. They will reach most of their servers,
        which therefore count as contacted, and as loaded with what the shares want, from the start.
        """
        fixed: list[int] = []
        small: list[tuple[int, int]] = []
        large: list[int] = []
        for expert, size in groups:
            servers, shares = self._placement.copies(expert)
            if len(servers) <= 1:
                fixed.append(expert)
            elif self._splits(size):
                large.append(expert)
                self._contacted.update(servers)
                self._expect(servers, shares, size)
            else:
                small.append((-size, expert))
        small.sort()
        return fixed + [expert for _, expert in small] + large

    def place(self, expert: int, size: int) -> list[tuple[int, int]]:
        """Runs (server, count) for the pairs of one expert, in their order; pairs left over are for nobody."""
        servers, shares = self._placement.copies(expert)
        if len(servers) > 1 and not self._splits(size):
            runs = [(self._pick(servers, shares), size)]
        elif len(servers) > 1:
            self._expect(servers, shares, -size)
            runs = self._split(servers, shares, size)
        else:
            room = size if self._capacity is None else min(size, self._capacity)
            runs = [(server, room) for server in servers]
        for server, count in runs:
            self._add(server, count)
        return runs

    def _splits(self, size: int) -> bool:
        return size > SPLIT_TOKENS or (self._capacity is not None and size > self._capacity)

    def _add(self, server: int, count: int) -> None:
        self._loads[server] += count
        self._contacted.add(server)

    def _pick(self, servers: list[int], shares: list[float]) -> int:
        contacted = self._contacted
        bounds = list(accumulate(shares))
        best, other = self._draw(servers, bounds), self._draw(servers, bounds)
        if self._busy(other) < self._busy(best):
            best = other
        if best in contacted:
            return best
        near = min((server for server in servers if server in contacted), key=self._busy, default=best)
        return near if self._busy(near) <= PREFER_LOAD * self._busy(best) + self._prefer_pairs else best

    def _busy(self, server: int) -> float:
        """How long its load takes a server, in pairs of one of speed 1."""
        return self._loads[server] / self._speeds[server]

    def _draw(self, servers: list[int], bounds: list[float]) -> int:
        index = bisect_right(bounds, self._rng.random() * bounds[-1])
        return servers[min(index, len(servers) - 1)]  # the product may round up to the last bound

    def _expect(self, servers: list[int], shares: list[float], size: int) -> None:
        """What the shares want of a large group, until it is placed (then with a negative size)."""
        total = sum(shares)
        for server, share in zip(servers, shares, strict=True):
            self._loads[server] += size * share / total

    def _split(self, servers: list[int], shares: list[float], size: int) -> list[tuple[int, int]]:
        # Every split expert offers its runs in the same order of servers: a token whose experts are all split then
        # tends to meet the same server, and its row travels once.
        copies = sorted(zip(servers, shares, strict=True))
        speeds = [self._speeds[server] for server, _ in copies]
        loads = [max(self._loads[server], 0.0) for server, _ in copies]
        total = sum(share for _, share in copies)
        wanted = [size * share / total for _, share in copies]
        most = size if self._capacity is None else self._capacity
        level = UNEVEN * (size + sum(loads)) / sum(speeds)
        if all(
            want <= most and want + load <= level * speed
            for want, load, speed in zip(wanted, loads, speeds, strict=True)
        ):
            counts = _whole(wanted, size, most)
        else:
            idle = min(load / speed for load, speed in zip(loads, speeds, strict=True))
            busier = [load - idle * speed for load, speed in zip(loads, speeds, strict=True)]
            counts = fill(size, busier, speeds, limit=self._capacity)
        return [(server, count) for (server, _), count in zip(copies, counts, strict=True) if count]


def fill(size: int, loads: Sequence[float], speeds: Sequence[float], *, limit: int | None) -> list[int]:
    """Split `size` pairs over copies so that (load + pairs) / speed evens out: water-filling, in whole pairs.

    Args:
        size: pairs to split.
        loads: load each copy's server has already; only what exceeds the least loaded one counts.
        speeds: > 0, of the copies' servers, relative to each other.
        limit: most pairs per copy, None for no limit. The counts sum to less than `size` only if all reach it.
    """
    most = size if limit is None else limit
    if most * len(speeds) <= size:
        return [most] * len(speeds)
    lowest = min(loads)
    excess = [load - lowest for load in loads]
    amounts = [0.0] * len(speeds)
    left, rising = float(size), list(range(len(speeds)))
    while rising:
        level = _level(left, [(excess[i], speeds[i]) for i in rising])
        for i in rising:
            amounts[i] = max(0.0, level * speeds[i] - excess[i])
        full = [i for i in rising if amounts[i] > most]
        if not full:
            break
        for i in full:  # a copy at its limit stays there, the others share what it could not take
            amounts[i] = float(most)
        left -= most * len(full)
        rising = [i for i in rising if i not in full]
    return _whole(amounts, size, most)


def _level(amount: float, copies: list[tuple[float, float]]) -> float:
    """The level up to which copies (load, speed) fill with `amount`: sum of max(0, level * speed - load) = amount."""
    load_sum = speed_sum = level = 0.0
    for load, speed in sorted(copies, key=_full_at):
        if speed_sum and load >= level * speed:
            break
        load_sum += load
        speed_sum += speed
        level = (amount + load_sum) / speed_sum
    return level


def _full_at(copy: tuple[float, float]) -> float:
    return copy[0] / copy[1]


def _whole(amounts: list[float], size: int, most: int) -> list[int]:
    """Whole numbers near `amounts` that sum to `size`, none above `most` (largest remainders first)."""
    counts = [min(int(amount), most) for amount in amounts]
    missing = size - sum(counts)
    for i in sorted(range(len(counts)), key=lambda i: counts[i] - amounts[i]):
        if missing <= 0:
            break
        if counts[i] < most:
            counts[i] += 1
            missing -= 1
    return counts
