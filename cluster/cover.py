"""Which pools' servers are the cheapest that carry a load and hold a number of copies (pure).

Compute and memory are bought where they are cheapest: compute from the pool with the most speed for its cost, memory
from the pool with the most room for its cost, ties by the order of the configuration. What memory brings in compute, or
the other way round, is then taken off again. With a handful of pools this greedy rule is close to the optimum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_EPSILON = 1e-9  # 3.0000000001 servers are 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """One pool's servers.

    Args:
        min_servers, max_servers: bounds.
        pairs_per_s: what one of them computes.
        max_copies: what one of them holds.
        rank: speed by which pools are compared; steadier than `pairs_per_s`, which is measured.
        cost: of one of them, relative to the other pools'.
    """

    min_servers: int
    max_servers: int
    pairs_per_s: float
    max_copies: int
    rank: float = 1.0
    cost: float = 1.0


def cover(pools: Sequence[Servers], *, pairs_per_s: float, copies: int) -> list[int]:
    """How many servers of each pool carry `pairs_per_s` and hold `copies`, or as near to it as the bounds allow."""
    count = [pool.min_servers for pool in pools]
    fastest = sorted(range(len(pools)), key=lambda i: (-pools[i].rank / pools[i].cost, i))
    roomiest = sorted(range(len(pools)), key=lambda i: (-pools[i].max_copies / pools[i].cost, i))
    speed = [pool.pairs_per_s for pool in pools]
    room = [float(pool.max_copies) for pool in pools]
    _fill(count, pools, fastest, speed, pairs_per_s)
    _fill(count, pools, roomiest, room, copies)
    for i in sorted(fastest, key=lambda i: (-pools[i].cost, -fastest.index(i))):  # the dearest, the slowest first
        spare_speed = _total(count, speed) - pairs_per_s
        spare_room = _total(count, room) - copies
        spare = min(_whole(spare_speed, speed[i]), _whole(spare_room, room[i]))
        count[i] = max(pools[i].min_servers, count[i] - max(spare, 0))
    return count


def _fill(count: list[int], pools: Sequence[Servers], order: Sequence[int], size: Sequence[float], need: float) -> None:
    for i in order:
        lacking = need - _total(count, size)
        if lacking > _EPSILON * need and size[i] > 0:
            count[i] += min(math.ceil(min(lacking / size[i], 1e9) - _EPSILON), pools[i].max_servers - count[i])


def _whole(spare: float, size: float) -> int:
    """How many servers of this size the spare is worth; those of size 0 are no loss."""
    return math.floor(min(spare / size, 1e9) + _EPSILON) if size > 0 else 1_000_000_000


def _total(count: Sequence[int], size: Sequence[float]) -> float:
    return sum(number * each for number, each in zip(count, size, strict=True))
