"""Loads that are planned but not asked for yet: whose turn it is, and how many bytes may move per second.

What has no live copy comes first, then what leaving servers hold alone; neither is held back. Loads that only make
things better wait for their share of a byte budget, over the whole fleet: weights that move compete with requests for
memory, disks and links. Among them the order is balance before survival, each by its gain.

A newer plan overtakes: a load that has not been asked for is simply forgotten.
"""

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.messages import Key
from cluster.steps import Load

_URGENCY = {"missing": 0, "drain": 1, "load": 2, "survival": 3}
_CAN_WAIT = _URGENCY["load"]
_BURST_S = 0.1  # so much of the budget may be saved up while nothing moves

_Turn = tuple[int, float, int]  # urgency, minus gain, order of arrival


@dataclass(slots=True)
class _Line:
    """The loads that wait for one server. The heap may hold turns that were given up or changed since."""

    turns: dict[Key, _Turn] = field(default_factory=dict)
    heap: list[tuple[_Turn, Key]] = field(default_factory=list)

    def first(self) -> tuple[_Turn, Key] | None:
        while self.heap and self.turns.get(self.heap[0][1]) != self.heap[0][0]:
            heapq.heappop(self.heap)
        return self.heap[0] if self.heap else None


class LoadQueue:
    """See the module docstring. Time is an argument.

    Args:
        bytes_per_s: budget of the loads for balance and survival; None: no limit.
    """

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self._bytes_per_s = bytes_per_s
        self._lines: dict[str, _Line] = {}
        self._count = 0
        self._credit = 0.0  # bytes that may move now; negative after a load larger than what was saved up
        self._at_s: float | None = None

    def __len__(self) -> int:
        return sum(len(line.turns) for line in self._lines.values())

    def waiting(self, server_id: str) -> int:
        """Loads that wait for this server."""
        line = self._lines.get(server_id)
        return len(line.turns) if line else 0

    def add(self, load: Load) -> None:
        """Queue a load, or change the turn of one that waits."""
        self._count += 1
        turn = (_URGENCY[load.reason], -load.gain, self._count)
        line = self._lines.setdefault(load.server_id, _Line())
        line.turns[load.key] = turn
        heapq.heappush(line.heap, (turn, load.key))

    def want(self, key: Key, server_id: str, load: Load | None) -> None:
        """Queue a load that is known, or else keep the turn of one that waits; any other is missing."""
        line = self._lines.get(server_id)
        if load is not None or line is None or key not in line.turns:
            self.add(load or Load(key=key, server_id=server_id, reason="missing"))

    def urge(self, keys: Iterable[Key]) -> None:
        """These experts have lost their last live copy, or are about to: what waits for them is missing now."""
        for key in keys:
            for line in self._lines.values():
                if key in line.turns:
                    _, gain, count = line.turns[key]
                    line.turns[key] = turn = (_URGENCY["missing"], gain, count)
                    heapq.heappush(line.heap, (turn, key))

    def discard(self, key: Key, server_id: str) -> bool:
        """A newer plan does without this load. False: it did not wait."""
        line = self._lines.get(server_id)
        return line is not None and line.turns.pop(key, None) is not None

    def drop_server(self, server_id: str) -> None:
        """The server is gone."""
        self._lines.pop(server_id, None)

    def take(self, room: Mapping[str, int], copy_bytes: int, now_s: float) -> list[tuple[str, Key]]:
        """The loads whose turn it is, as (server id, key), most urgent first.

        Args:
            room: copies each server can take now.
            copy_bytes: of one copy.
        """
        self._refill(now_s)
        left = dict(room)
        heads: list[tuple[_Turn, str]] = []
        for server_id in self._lines:
            self._push_head(heads, server_id, left)
        taken: list[tuple[str, Key]] = []
        while heads:
            (urgency, *_), server_id = heapq.heappop(heads)
            if urgency >= _CAN_WAIT and self._credit <= 0:
                continue  # another server's first load may be urgent
            line = self._lines[server_id]
            _, key = heapq.heappop(line.heap)
            del line.turns[key]
            left[server_id] -= 1
            if urgency >= _CAN_WAIT:
                self._credit -= copy_bytes
            taken.append((server_id, key))
            self._push_head(heads, server_id, left)
        return taken

    def _push_head(self, heads: list[tuple[_Turn, str]], server_id: str, left: Mapping[str, int]) -> None:
        first = self._lines[server_id].first()
        if first is not None and left.get(server_id, 0) > 0:
            heapq.heappush(heads, (first[0], server_id))

    def _refill(self, now_s: float) -> None:
        if self._bytes_per_s is None:
            self._credit = math.inf
            return
        burst = max(1.0, self._bytes_per_s * _BURST_S)
        if self._at_s is None:
            self._credit = burst
        elif now_s > self._at_s:
            self._credit = min(self._credit + (now_s - self._at_s) * self._bytes_per_s, burst)
        self._at_s = max(now_s, self._at_s or now_s)
