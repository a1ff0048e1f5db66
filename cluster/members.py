"""What the fleet knows of one server and of one router. Time is an argument."""

from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.config import PlacementConfig
from cluster.messages import Assignment, Key, ServerHello

MAX_AHEAD = 64  # loads a server is asked for at a time: what follows may still be overtaken
STUCK_S = 2.0  # a full server that waits so long for a copy to leave lets go of copies that others hold as well


@dataclass(slots=True, kw_only=True)
class Server:
    """A member that may hold copies."""

    hello: ServerHello
    last_seen_s: float
    version: int = 1
    applied: int = 0  # the assignment version whose unloads the server has done
    seq: int = 0
    draining: bool = False
    released: bool = False
    assigned: dict[Key, int] = field(default_factory=dict)  # copy -> version that asked for it
    live: set[Key] = field(default_factory=set)  # observed, and not about to be unloaded
    retiring: dict[Key, int] = field(default_factory=dict)  # copy -> first epoch without it
    failed: dict[Key, float] = field(default_factory=dict)  # copy -> when loading it may be tried again
    lets_go: bool = False  # loads wait for room that nothing is about to make
    _full_since_s: float | None = None

    @property
    def loading(self) -> int:
        """Copies it was asked for and has not reported."""
        return len(self.assigned) - len(self.live)

    @property
    def room(self) -> int:
        """Loads it can be asked for now."""
        return min(self.hello.max_copies - len(self.assigned), MAX_AHEAD - self.loading)

    def assignment(self, sources: Callable[[Key], tuple[str, ...]]) -> Assignment:
        """What it is to hold now; `sources` says where a copy that it has not yet can be fetched from."""
        missing = self.assigned.keys() - self.live
        return Assignment(
            version=self.version,
            copies=tuple(self.assigned),
            released=self.released,
            sources={key: found for key in missing if (found := sources(key))},
        )

    def look_stuck(self, waiting: int, now_s: float) -> bool:
        """Judge `lets_go` from the loads that wait for this server; True if it became so just now."""
        if not waiting or self.retiring or len(self.assigned) < self.hello.max_copies:
            self._full_since_s, self.lets_go = None, False
            return False
        if self._full_since_s is None:
            self._full_since_s = now_s
        before, self.lets_go = self.lets_go, now_s - self._full_since_s >= STUCK_S
        return self.lets_go and not before


@dataclass(slots=True, kw_only=True)
class Router:
    """A member that uses the table."""

    epoch: int
    oldest: int
    last_seen_s: float
    known: frozenset[str]


def may_be_unread(waited_s: float, pause_s: float, took_s: float, knobs: PlacementConfig) -> bool:
    """Whether reports of the others may wait to be read, because it was this process that stood still.

    Args:
        waited_s: since the last plan, at most `pause_s` if it did not.
        took_s: of the last plan, standing still included.
    """
    still_s = knobs.dead_after_s / 2
    return waited_s > pause_s + still_s or (took_s > still_s and waited_s < knobs.heartbeat_s)
