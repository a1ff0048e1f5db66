"""The pools of expert servers as the placement sees them: from heartbeats to decisions.

Keeps what the decision (`scaling.py`) is made on: demand by router, capacity and busy share by server, and what a pool
was able to do when it last had servers. Time is an argument.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.config import ClusterConfig, PoolConfig
from cluster.cover import Servers
from cluster.demand import Meter
from cluster.messages import ServerBeat, ServerHello
from cluster.relay import AT_LEAST, AT_MOST
from cluster.scaling import STEADY_S, SURGE_S, Decision, Pool, Scaling, Work

_IN_USE_PAIRS_PER_S = 0.01  # an expert below it is not asked for


class Pools:
    """See the module docstring.

    Args:
        config: the cluster's.
        num_experts: of all layers together.
        top_k: routed pairs of one token.
    """

    def __init__(self, config: ClusterConfig, *, num_experts: int, top_k: int) -> None:
        knobs = config.scaling
        self._configs = {pool.name: pool for pool in config.all_pools}
        self._top_k = top_k
        self._min_copies = config.placement.min_copies * num_experts
        self._surge_s = max(SURGE_S, config.placement.heartbeat_s)  # a report must not count in both windows
        self._scaling = Scaling(
            target_busy=knobs.target_busy,
            upscale_busy=knobs.upscale_busy,
            drain_backlog_s=knobs.drain_backlog_s,
            downscale_delay_s=knobs.downscale_delay_s,
        )
        self._routers: dict[str, _Router] = {}
        self._servers: dict[str, _Server] = {}
        self._capacity = {name: pool.settings.emulated_tokens_per_s or 0.0 for name, pool in self._configs.items()}
        self._max_copies = dict.fromkeys(self._configs, 0)
        self._speeds = Speeds({name: pool.speed for name, pool in self._configs.items()})
        self._decided: dict[str, Decision] = {}

    # ------------------------------------------------------------------ what happens

    def joined(self, hello: ServerHello) -> None:
        """A server has registered."""
        if hello.pool not in self._configs:  # of an older config, on its way out
            return
        budget = self._configs[hello.pool].settings.budget_bytes
        for name, pool in self._configs.items():
            if name == hello.pool or not self._max_copies[name]:  # a pool that never ran: as its budget promises
                self._max_copies[name] = hello.max_copies * pool.settings.budget_bytes // budget

    def beat_server(self, hello: ServerHello, beat: ServerBeat, now_s: float) -> None:
        """A server has reported."""
        if hello.pool not in self._configs:
            return
        self._servers.setdefault(beat.server_id, _Server(hello.pool)).observe(beat, now_s)
        paces = sorted(server.pairs_per_s for server in self._of(hello.pool) if server.pairs_per_s)
        if paces:
            self._capacity[hello.pool] = paces[len(paces) // 2]
        self._speeds.observe(self._capacity)

    def beat_router(self, router_id: str, pairs: int, queued_tokens: int, now_s: float) -> None:
        """A router has reported: pairs asked for since it began, tokens that are not answered yet."""
        router = self._routers.setdefault(router_id, _Router(STEADY_S + 2 * self._surge_s))
        router.asked.read(pairs, now_s)
        router.queued_tokens = queued_tokens

    def decide(
        self,
        *,
        servers: Sequence[ServerHello],
        draining: Collection[str],
        routers: Collection[str],
        load_LE: npt.NDArray[np.float64],
        needed_copies: int,
        denied_copies: int,
        now_s: float,
    ) -> list[dict[str, Any]]:
        """Decide what every pool should have from now on; returns what changes, as facts for an event.

        Args:
            servers, routers: the members.
            draining: ids of those servers that are leaving.
            load_LE: routed pairs per second of every expert.
            needed_copies: live copies that the last plan has and could not do without on fewer servers.
            denied_copies: those it would add if there were room.
        """
        members = {hello.server_id for hello in servers}
        self._servers = {server_id: server for server_id, server in self._servers.items() if server_id in members}
        self._routers = {router_id: router for router_id, router in self._routers.items() if router_id in routers}
        queued_pairs = sum(server.queued_pairs for server in self._servers.values())
        open_pairs = sum(router.queued_tokens for router in self._routers.values()) * self._top_k
        in_use = int((load_LE > _IN_USE_PAIRS_PER_S).sum()) if not self._min_copies else 0
        meters, surge_s = [router.asked for router in self._routers.values()], self._surge_s
        work = Work(
            steady=sum(meter.rate(STEADY_S) for meter in meters),
            latest=sum(meter.rate(surge_s) for meter in meters),
            before=sum(meter.rate(surge_s, ago_s=surge_s) for meter in meters),
            backlog_pairs=max(queued_pairs, open_pairs),  # what waits at a server is open at a router
            copies=max(self._min_copies, in_use, needed_copies) + denied_copies,
        )
        # Draining servers still work off what they have, but are none of those that the pool is to have.
        staying = self._servers.keys() - set(draining)
        running = [hello.pool for hello in servers if hello.server_id in staying]
        pools = [
            Pool(
                name=name,
                servers=Servers(
                    min_servers=pool.min_servers,
                    max_servers=pool.max_servers,
                    pairs_per_s=self._capacity[name],
                    max_copies=self._max_copies[name],
                    rank=self._speeds.of(name),
                    cost=pool.cost,
                ),
                running=running.count(name),
                busy=sum(server.busy for server in self._of(name)),
                busy_now=sum(server.busy_now for server in self._of(name)),
            )
            for name, pool in self._configs.items()
        ]
        before, self._decided = self._decided, self._scaling.decide(work, pools, now_s)
        return [
            _change(name, before[name].servers, found)
            for name, found in self._decided.items()
            if name in before and found.servers != before[name].servers
        ]

    # ------------------------------------------------------------------ what others read

    def speed(self, server: ServerHello) -> float:
        """What the planner counts with, relative to the other servers."""
        return server.speed * self._speeds.of(server.pool)

    def numbers(self) -> dict[str, float]:
        """The decisions as numbers for Serve (see `relay.py`)."""
        least = {AT_LEAST + name: float(found.servers) for name, found in self._decided.items()}
        return least | {AT_MOST + name: float(found.servers) for name, found in self._decided.items() if found.at_most}

    def status(self, servers: Sequence[ServerHello]) -> list[dict[str, Any]]:
        """The pools as `expertmesh status` shows them. Plain values."""
        return [self._status(name, pool, servers) for name, pool in self._configs.items()]

    def _of(self, pool: str) -> list["_Server"]:
        return [server for server in self._servers.values() if server.pool == pool]

    def _status(self, name: str, pool: PoolConfig, servers: Sequence[ServerHello]) -> dict[str, Any]:
        decided = self._decided.get(name)
        return {
            "name": name,
            "servers": sum(hello.pool == name for hello in servers),
            "target": decided.servers if decided else None,
            "reason": decided.reason if decided else None,
            "detail": decided.detail if decided else "",
            "min": pool.min_servers,
            "max": pool.max_servers,
            "speed": self._speeds.of(name),
            "pairs_per_s": self._capacity[name],
            "max_copies": self._max_copies[name],
        }


def _change(pool: str, before: int, found: Decision) -> dict[str, Any]:
    detail = f"pool {pool}: {before} -> {found.servers} servers, {found.reason}: {found.detail}"
    return {"detail": detail, "pool": pool, "before": before, "servers": found.servers, "reason": str(found.reason)}


class Speeds:
    """Relative speeds of pools for the planner: as configured, else measured in steps of a factor of 1.41.

    Servers of one pool are equal, so nothing moves between them when one is measured a little faster. Between pools a
    step is taken when the measured ratio is well beyond the middle between two.
    """

    _STEPS_PER_OCTAVE = 2
    _STICKS = 0.8  # steps; 0.5 would be the middle

    def __init__(self, configured: Mapping[str, float | None]) -> None:
        self._configured = configured
        self._steps: dict[str, int] = {}  # below the fastest pool

    def observe(self, pairs_per_s: Mapping[str, float]) -> None:
        """Take the pools' measured capacities; 0 is not known yet, and counts as the fastest."""
        fastest = max(pairs_per_s.values(), default=0.0)
        for pool, pace in pairs_per_s.items():
            if pace > 0:
                exact = self._STEPS_PER_OCTAVE * math.log2(fastest / pace)
                if abs(exact - self._steps.get(pool, math.inf)) > self._STICKS:
                    self._steps[pool] = round(exact)

    def of(self, pool: str) -> float:
        """Speed of a pool's servers: as configured, else at most 1, the fastest pool's."""
        configured = self._configured.get(pool)
        if configured is not None:
            return configured
        return float(2 ** (-self._steps.get(pool, 0) / self._STEPS_PER_OCTAVE))


class _Router:
    """What one router is asked for."""

    def __init__(self, keep_s: float) -> None:
        self.asked = Meter(keep_s)
        self.queued_tokens = 0


class _Server:
    """How busy one server is, and the pace it has told."""

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self.pairs_per_s = self.busy_now = 0.0
        self.queued_pairs = 0
        self._busy_s = Meter(STEADY_S)
        self._total_s = 0.0
        self._at_s: float | None = None

    @property
    def busy(self) -> float:
        return self._busy_s.rate(STEADY_S)

    def observe(self, beat: ServerBeat, now_s: float) -> None:
        if self._at_s is not None:
            self._total_s += beat.busy_share * max(now_s - self._at_s, 0.0)
        self._at_s = now_s
        self._busy_s.read(self._total_s, now_s)
        self.busy_now, self.pairs_per_s = beat.busy_share, beat.capacity_pairs_per_s
        self.queued_pairs = beat.queue_tokens
