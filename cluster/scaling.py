"""How many expert servers: the policy that Serve's controller asks ten times a second.

Up at once to what the work needs, down only after the need has been lower for the whole `downscale_delay_s`
(Kubernetes' stabilisation window), so that a square wave with a shorter period changes nothing. The work is counted
in servers: the sum of busy shares, which does not depend on how many servers share it, plus the backlog to be worked
off in `drain_backlog_s`. A pool at its limit hides how much more it was asked for: then it grows by 1 / target_busy.

Serve pickles this module by value into its controller, so it imports the standard library alone; an exception there
would stall every application, so the shell turns one into "no change".
"""

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BUSY, BACKLOG, NEEDED, BUDGET = "busy_share", "backlog_s", "needed_bytes", "budget_bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLoad:
    """One server's work. `backlog_s`: how long it would take to work off its queue."""

    busy_share: float
    backlog_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """What the decision depends on, at one moment.

    Args:
        loads: of the running servers that have reported.
        target: servers asked for so far, starting ones included.
        needed_bytes: memory for one copy of every expert and what the planner was denied.
        budget_bytes: memory of one server.
    """

    loads: Sequence[ServerLoad]
    target: int
    needed_bytes: float = 0.0
    budget_bytes: float = 0.0


class Scaling:
    """The pure decision; time is an argument.

    Args:
        min_servers, max_servers: bounds.
        target_busy: mean busy share to aim for.
        upscale_busy: mean busy share from which servers are added; the gap to target_busy keeps it steady.
        drain_backlog_s: time in which a backlog should be worked off.
        downscale_delay_s: how long the need must have been lower.
    """

    def __init__(
        self,
        *,
        min_servers: int,
        max_servers: int,
        target_busy: float,
        upscale_busy: float,
        drain_backlog_s: float,
        downscale_delay_s: float,
    ) -> None:
        self._min, self._max = min_servers, max_servers
        self._target_busy, self._upscale_busy = target_busy, upscale_busy
        self._drain_backlog_s = drain_backlog_s
        self._downscale_delay_s = downscale_delay_s
        self._needs: deque[tuple[float, int]] = deque()  # (time, need), needs decreasing: the window's maximum is first
        self._since_s: float | None = None

    def decide(self, pool: Pool, now_s: float) -> int:
        """The number of servers to have from now on."""
        if self._since_s is None:
            self._since_s = now_s
        memory = math.ceil(min(pool.needed_bytes / pool.budget_bytes, self._max)) if pool.budget_bytes else 0
        floor = max(self._min, memory)
        work = sum(load.busy_share + load.backlog_s / self._drain_backlog_s for load in pool.loads)
        need = self._bound(max(math.ceil(min(work / self._target_busy, self._max) - 1e-9), floor))

        while self._needs and self._needs[-1][1] <= need:
            self._needs.pop()
        self._needs.append((now_s, need))
        while self._needs[0][0] < now_s - self._downscale_delay_s:
            self._needs.popleft()

        if need > pool.target:
            pressed = bool(pool.loads) and work / len(pool.loads) > self._upscale_busy
            return need if pressed else max(pool.target, self._bound(floor))
        if now_s - self._since_s < self._downscale_delay_s:
            return self._bound(pool.target)
        return self._bound(min(pool.target, self._needs[0][1]))

    def _bound(self, servers: int) -> int:
        return max(self._min, min(servers, self._max))


class ScalingPolicy(Scaling):
    """Serve's autoscaling policy: reads the replicas' `record_autoscaling_stats`, never raises, never blocks."""

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Serve's contract (ray.serve.autoscaling_policy, 2.60): context in, (replicas, policy state) out."""
        try:
            metrics: Mapping[str, Mapping[Any, float]] = ctx.aggregated_metrics or {}
            busy, backlog = metrics.get(BUSY, {}), metrics.get(BACKLOG, {})
            pool = Pool(
                loads=[ServerLoad(busy_share=busy[key], backlog_s=backlog.get(key, 0.0)) for key in busy],
                target=ctx.target_num_replicas,
                needed_bytes=max(metrics.get(NEEDED, {}).values(), default=0.0),
                budget_bytes=max(metrics.get(BUDGET, {}).values(), default=0.0),
            )
            return self.decide(pool, ctx.current_time), {}
        except Exception:
            logging.getLogger("ray.serve").exception("expert server scaling: keeping %s", ctx.target_num_replicas)
            return ctx.target_num_replicas, {}
