"""How many servers each pool has: a pure decision, with time as an argument.

Up in one step to what the work needs, also when every server is at its limit: the need comes from what is asked for
(routed pairs per second at the routers' gates, and the backlog) over what a server can do, not from what the servers
manage to answer. Down only after the need has been lower for the whole `downscale_delay_s` (Kubernetes' stabilisation
window), so that a square wave with a shorter period changes nothing. To the pools' minimum, to none where that is
their minimum, and from none.

Shares of the capacity that is there (starting servers included) decide when servers are added:

    more than 1              at once, if it lasts for two windows of SURGE_S, so that one large request is no surge
    more than upscale_busy   as a mean of STEADY_S, so that noise adds nothing; the aim is then target_busy

The simulator runs this module, so does the placement, which publishes the numbers to Serve (`relay.py`).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from cluster.cover import Servers, cover

SURGE_S = 0.25
STEADY_S = 2.0
START_S = 120.0  # a server that has not come by then (no node, no image, a crash) is not counted on

# What servers report to Serve, for other policies than this one.
BUSY, BACKLOG = "busy_share", "backlog_s"


class Reason(StrEnum):
    """What asks for that many servers."""

    DEMAND = "demand"  # routed pairs per second
    BACKLOG = "backlog"  # routed pairs that wait
    BUSY = "busy"  # busy servers, while none has told its pace
    MEMORY = "memory"  # copies that have to fit
    FLOOR = "floor"  # the pool's minimum
    IDLE = "idle"  # nothing: nobody asks


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the servers are to do, at one moment.

    Args:
        steady: routed pairs per second asked for, mean of the last STEADY_S.
        latest, before: the same over the last SURGE_S and the SURGE_S before.
        backlog_pairs: routed pairs that wait or run.
        copies: live copies that have to fit: the fewest there may be, and those the planner was denied.
    """

    steady: float = 0.0
    latest: float = 0.0
    before: float = 0.0
    backlog_pairs: float = 0.0
    copies: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One pool, at one moment.

    Args:
        servers: bounds and sizes; `pairs_per_s` and `max_copies` are 0 while no server has told.
        running: servers that have reported.
        busy: the sum of their busy shares, mean of the last STEADY_S.
        busy_now: the same, as last reported.
    """

    name: str
    servers: Servers
    running: int = 0
    busy: float = 0.0
    busy_now: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How many servers a pool is to have.

    Args:
        servers: to have from now on.
        detail: the reason in words, with the numbers.
        at_most: False while the need has not been watched for the whole delay: whoever has more keeps it.
    """

    servers: int
    reason: Reason
    detail: str
    at_most: bool


class Scaling:
    """Decides for all pools of a cluster; one instance per cluster, asked again and again.

    Args:
        target_busy: busy share to aim for when servers are added.
        upscale_busy: busy share from which they are; the gap keeps the pools steady.
        drain_backlog_s: time in which a backlog should be worked off.
        downscale_delay_s: how long the need must have been lower before servers go.
    """

    def __init__(
        self, *, target_busy: float, upscale_busy: float, drain_backlog_s: float, downscale_delay_s: float
    ) -> None:
        self._target_busy, self._upscale_busy = target_busy, upscale_busy
        self._drain_backlog_s = drain_backlog_s
        self._downscale_delay_s = downscale_delay_s
        self._since_s: float | None = None
        self._came_s: dict[str, tuple[int, int, float]] = {}  # by pool: target, running, since when
        self._decided: dict[str, Decision] = {}
        self._due_s: dict[str, float] = {}  # since when a pool could shrink
        self._needs: dict[str, deque[tuple[float, int]]] = {}  # (time, need), decreasing: the window's maximum first

    def decide(self, work: Work, pools: Sequence[Pool], now_s: float) -> dict[str, Decision]:
        """The number of servers each pool should have from now on, and why."""
        if self._since_s is None:
            self._since_s = now_s
        watched = now_s - self._since_s >= self._downscale_delay_s
        asked = max(work.steady, work.latest, work.before, work.backlog_pairs) > 0
        copies = max(work.copies, int(asked))  # whoever asks needs a server at least
        servers, measured = _completed([pool.servers for pool in pools], copies)
        if not measured:  # no server has told what it can do: count in servers, by how busy they are
            busy, busy_now = sum(pool.busy for pool in pools), sum(pool.busy_now for pool in pools)
            work = Work(steady=busy, latest=busy_now, before=busy_now, copies=work.copies)
        targets = [self._target(pool) for pool in pools]
        expected = [self._expected(pool, target, now_s) for pool, target in zip(pools, targets, strict=True)]
        have = sum(count * each.pairs_per_s for count, each in zip(expected, servers, strict=True))
        held = work.steady + work.backlog_pairs / self._drain_backlog_s  # while it waits, nobody goes
        if any(pool.running < count for pool, count in zip(pools, expected, strict=True)):
            work = replace(work, backlog_pairs=0.0)  # it grows while servers start that will work it off
        required, reason, grows = self._required(work, have)
        if not measured and have:
            reason = Reason.BUSY
        grows = grows or (asked and not have)

        if len(pools) > 1:  # the others take over what does not come
            servers = [
                replace(each, max_servers=max(count, each.min_servers)) if count < target else each
                for each, count, target in zip(servers, expected, targets, strict=True)
            ]
        floors = cover(servers, pairs_per_s=0.0, copies=work.copies)
        needs = cover(servers, pairs_per_s=required, copies=copies)
        keeps = cover(servers, pairs_per_s=max(required, held), copies=copies)
        decided = {}
        for pool, each, target, floor, need, keep in zip(pools, servers, targets, floors, needs, keeps, strict=True):
            lasting = self._remember(pool.name, keep, now_s)
            wanted = need if grows else max(min(need, target), floor)
            count = max(wanted, self._shrunk(pool.name, target, lasting, keep, now_s) if watched else target)
            if count < target <= pool.servers.max_servers and each.max_servers < pool.servers.max_servers:
                count = target  # they are still asked for
            count = max(each.min_servers, min(count, pool.servers.max_servers))
            if count > need:
                why = self._decided[pool.name].reason if pool.name in self._decided else Reason.FLOOR
                detail = f"{need} would do, fewer after {self._downscale_delay_s:g} s of that"
            elif need > floor or (need and asked and not have):
                why, detail = reason, self._words(reason, work, each)
            elif need > each.min_servers:
                why, detail = Reason.MEMORY, f"{work.copies} copies, {each.max_copies} on a server"
            elif asked or each.min_servers:
                why, detail = Reason.FLOOR, f"min is {each.min_servers}"
            else:
                why, detail = Reason.IDLE, "no demand"
            decided[pool.name] = Decision(servers=count, reason=why, detail=detail, at_most=watched)
        self._decided = decided
        return decided

    def _target(self, pool: Pool) -> int:
        before = self._decided.get(pool.name)
        found = before.servers if before else 0
        if before is None or not before.at_most:
            found = max(found, pool.running)
        return max(pool.servers.min_servers, min(found, pool.servers.max_servers))

    def _expected(self, pool: Pool, target: int, now_s: float) -> int:
        """The servers to count on: those that run, and those on their way for no longer than START_S."""
        count, running, since_s = self._came_s.get(pool.name, (target, pool.running, now_s))
        if pool.running >= target or target > count or pool.running > running:
            since_s = now_s
        self._came_s[pool.name] = (target, pool.running, since_s)
        return target if now_s - since_s <= START_S else min(pool.running, target)

    def _required(self, work: Work, have: float) -> tuple[float, Reason, bool]:
        """Capacity to have, in pairs per second, what asks for it, and whether it justifies more than there is."""
        backlog = work.backlog_pairs / self._drain_backlog_s
        if min(work.latest, work.before) + backlog > have:
            now = max(work.latest, work.steady)
            demand, drain = now / self._target_busy, now + backlog
            return (demand, Reason.DEMAND, True) if demand >= drain else (drain, Reason.BACKLOG, True)
        lasting = max(work.steady, min(work.latest, work.before))  # the mean may still be rising
        return lasting / self._target_busy, Reason.DEMAND, work.steady > self._upscale_busy * have

    def _shrunk(self, name: str, target: int, lasting: int, need: int, now_s: float) -> int:
        """The target, or what has been enough for the whole delay; in one step, so not while the need still falls."""
        if lasting >= target:
            self._due_s.pop(name, None)
            return target
        due_s = self._due_s.setdefault(name, now_s)
        if lasting > need and now_s - due_s < 2 * STEADY_S:
            return target
        del self._due_s[name]
        return lasting

    def _remember(self, name: str, need: int, now_s: float) -> int:
        """The highest need of the last `downscale_delay_s`."""
        needs = self._needs.setdefault(name, deque())
        while needs and needs[-1][1] <= need:
            needs.pop()
        needs.append((now_s, need))
        while needs[0][0] < now_s - self._downscale_delay_s:
            needs.popleft()
        return needs[0][1]

    def _words(self, reason: Reason, work: Work, each: Servers) -> str:
        now = max(work.latest, work.steady)
        if reason is Reason.BUSY:
            return f"{now:.1f} servers are busy, {self._target_busy:.0%} of all is the aim"
        waits = f"{work.backlog_pairs:,.0f} pairs wait or run, and " if reason is Reason.BACKLOG else ""
        aim = f"a server does {each.pairs_per_s:,.0f} and should be {self._target_busy:.0%} busy"
        return f"{waits}{now:,.0f} pairs/s arrive; {aim}"


def _completed(pools: Sequence[Servers], copies: int) -> tuple[list[Servers], bool]:
    """The pools with an assumption for what is not known of them, and whether any speed is.

    A pool that has never run is assumed to be like the slowest and the smallest that have; before any has, a server
    counts as 1 pair/s and holds every copy, so that one is started and tells.
    """
    speeds = [pool.pairs_per_s for pool in pools if pool.pairs_per_s > 0]
    rooms = [pool.max_copies for pool in pools if pool.max_copies > 0]
    speed, room = min(speeds, default=1.0), min(rooms, default=max(copies, 1))
    found = [
        replace(
            pool, pairs_per_s=pool.pairs_per_s if pool.pairs_per_s > 0 else speed, max_copies=pool.max_copies or room
        )
        for pool in pools
    ]
    return found, bool(speeds)
