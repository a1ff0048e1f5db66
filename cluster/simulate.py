"""A cluster in simulated time: the real planner, scaling policy, router decisions and batching, on simulated servers.

It answers what a cluster of a config would do under a workload, without the machines: "what if I lose server 3, use
capacity factor 1.25, double the traffic". Two fidelities, one code:

- scale 1: every request, batch, message and launch is an event;
- scale n: one simulated request stands for n real ones that travel together (as if the merger had merged
  them), so that models of 61 x 256 experts on 32 servers simulate minutes in about a minute. Loads, queues,
  servers, copies and their timing stay; what is smaller than one such batch does not: latencies below its service time,
  and the noise of single tokens, which a smaller sample overstates (capacity factors drop somewhat too much).

Deterministic: the same arguments give the same result.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from cluster.config import ClusterConfig
from cluster.messages import ServerBeat
from cluster.rates import Departures
from cluster.sim_control import Foresight, SimPlacement, SimPool, hello_of
from cluster.sim_events import Clock
from cluster.sim_exchange import SimRequest
from cluster.sim_report import Moment, Record, balancedness, document
from cluster.sim_router import SimRouter
from cluster.sim_servers import Machine, SimServer
from cluster.workloads import Workload
from protos.errors import DeadlineExceeded, InvalidRequest, Overloaded

SETUP_S = 5.0  # the cluster comes up before time 0: there loading takes no time, and nothing is sent or counted
GRAIN_S = 1e-5  # departures are sent at most so late: a clock that moves by rounding errors would stand still
DRAIN_STEP_S = 0.1  # after the end, whether requests are still open is looked at so often
MAX_OPEN = 1024  # as in cluster/loadgen.py
VISITS_PER_S = 400.0  # requests times visits in one simulated second that `choose_scale` aims at


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """At `at_s` the `server`-th running server (0 is the oldest) is lost.

    "kill": its connections break, so routers notice after the machine's notice_s. "silent": after hop_timeout_s.
    """

    at_s: float
    server: int
    kind: Literal["kill", "silent"] = "kill"


class Simulation:
    """One run, once. `record` has every request afterwards.

    Args:
        config: of the cluster; `model` is not read.
        workload: what it is asked for, from time 0 on.
        machine: how fast things are.
        copy_bytes: memory of one copy; what fits is experts.settings.budget_bytes over that.
        row_bytes: of a token's hidden state on the wire; 0: messages are not cut.
        faults: servers to lose.
        slo_s: latency a request may have.
        foresight: makes planner and scaling clairvoyant; None: they see what they measure.
        static: keep the first plan; only what is lost is re-placed.
        max_open: requests that the load generator keeps open; what is due beyond that fails.
        scale: see the module docstring.
        seed: of everything that is drawn.

    Raises:
        InvalidRequest: the config has several pools, or a server cannot hold a single copy.
    """

    def __init__(
        self,
        config: ClusterConfig,
        workload: Workload,
        machine: Machine,
        *,
        copy_bytes: int,
        row_bytes: int = 0,
        faults: Sequence[Fault] = (),
        slo_s: float = 0.25,
        foresight: Foresight | None = None,
        static: bool = False,
        max_open: int = MAX_OPEN,
        scale: int = 1,
        seed: int = 0,
    ) -> None:
        check_one_pool(config)
        max_copies = config.experts.settings.budget_bytes // copy_bytes
        if max_copies < 1:
            raise InvalidRequest(
                f"budget_bytes ({config.experts.settings.budget_bytes}) is below one expert ({copy_bytes} bytes)"
            )
        self._config, self._workload, self._machine = config, workload, machine
        self._copy_bytes, self._max_copies, self._scale = copy_bytes, max_copies, scale
        self._max_open = max(1, max_open // scale)
        self._faults = sorted(faults, key=lambda fault: fault.at_s)
        self._clock = Clock(-SETUP_S)
        self._rng = np.random.default_rng(seed)
        self.record = Record(slo_s, scale)
        self._open: set[SimRequest] = set()
        self._servers: dict[str, SimServer] = {}
        self._routers: list[SimRouter] = []
        self._turn = 0
        self._until_s = 0.0
        self._phases: list[dict[str, float]] = []
        self.placement = SimPlacement(
            self._clock,
            config,
            machine,
            workload,
            routers=self._routers,
            servers=self._servers,
            copy_bytes=copy_bytes,
            foresight=foresight,
            static=static,
        )
        for i in range(config.router.num_replicas):
            self._add_router(f"r{i}", row_bytes, np.random.default_rng((seed, i)))
        self.pool = SimPool(
            self._clock,
            config,
            machine,
            workload,
            self.placement,
            make=self._make,
            on_stop=partial(self._cut_off, reason="stopped"),
            foresight=foresight,
        )

    def run(self, duration_s: float, *, warm_up_s: float = 0.0) -> dict[str, Any]:
        """Simulate `duration_s` seconds from time 0 on, and then until every request is answered or timed out.

        Requests due within `duration_s` count; those due in the warm-up are left out of the latencies. Servers, copies,
        events and the timeline are those of `duration_s`. Every fault is before it.
        """
        assert all(fault.at_s < duration_s for fault in self._faults)
        clock, self._until_s = self._clock, duration_s
        onsets_s = sorted({*self._workload.heat.onsets(duration_s), *(fault.at_s for fault in self._faults)})
        for mark_s in sorted({0.0, *onsets_s}):
            clock.at(mark_s, self._mark)
        for fault in self._faults:
            clock.at(fault.at_s, self._lose, fault)
        clock.at(0.0, self._begin)
        clock.run(duration_s)
        self._mark()
        server_seconds, copies = self.pool.server_seconds, self.placement.fleet.table.copies
        last_s = duration_s + self._config.router.settings.default_timeout_s
        while self._open and clock.now_s < last_s:
            clock.run(min(clock.now_s + DRAIN_STEP_S, last_s))
        assert not self._open
        return document(
            self.record,
            seconds=duration_s,
            warm_up_s=warm_up_s,
            onsets_s=onsets_s,
            server_seconds=server_seconds,
            placement={
                "copies": sum(map(len, copies.values())),
                "copy_bytes": self._copy_bytes,
                "phases": [
                    {"from_s": now["at_s"], "to_s": then["at_s"]}
                    | {name: then[name] - now[name] for name in now if name != "at_s"}
                    for now, then in zip(self._phases, self._phases[1:], strict=False)
                ],
            },
        )

    # ------------------------------------------------------------------ load

    def _begin(self) -> None:
        self._departures = Departures(0.0)
        self.pool.server_seconds = 0.0
        self._depart()
        self._clock.every(1.0, self._look, first_s=1.0)

    def _rate(self, now_s: float) -> float:
        return self._workload.requests_per_s(now_s) / self._scale

    def _depart(self) -> None:
        now_s, rate = self._clock.now_s, self._rate(self._clock.now_s)
        if self._workload.poisson:
            if rate:
                self._send(now_s)
            next_s = now_s + (self._rng.exponential(1 / rate) if rate else 0.02)
            if next_s <= self._until_s:
                self._clock.at(next_s, self._depart)
            return
        while (due_s := self._departures.next(self._rate, now_s=now_s)) is not None:
            self._send(due_s)
        if now_s < self._until_s:
            next_s = now_s + max(self._departures.patience_s(rate), GRAIN_S)
            self._clock.at(min(next_s, self._until_s), self._depart)

    def _send(self, due_s: float) -> None:
        workload, record = self._workload, self.record
        first, self._turn = self._turn, self._turn + 1
        request = SimRequest(
            due_s=due_s,
            row=first * workload.visits % len(workload.layers),
            visits_left=workload.visits,
            num_tokens=workload.num_tokens,
            deadline_s=due_s + self._config.router.settings.default_timeout_s,
            finished=self._finished,
        )
        record.offered += 1
        self._open.add(request)
        if len(self._open) > self._max_open:
            request.finish(Overloaded(f"{self._max_open * self._scale} requests are open"))
            return
        router = self._routers[first % len(self._routers)]
        self._clock.after(self._machine.client_s / 2, router.submit, request)
        self._clock.at(request.deadline_s, self._expire, router, request)

    def _expire(self, router: SimRouter, request: SimRequest) -> None:
        if not request.done:
            router.fail(request, DeadlineExceeded("no answer within default_timeout_s"))

    def _finished(self, request: SimRequest) -> None:
        ended_s = self._clock.now_s + self._machine.client_s / 2
        self._open.discard(request)
        self.record.finished(request, ended_s - request.due_s, ended_s, pairs=self._workload.pairs * self._scale)

    # ------------------------------------------------------------------ servers and routers

    def _make(self, server_id: str) -> SimServer:
        hello = hello_of(server_id, max_copies=self._max_copies, pool=self._config.experts.name)

        def report(beat: ServerBeat) -> None:
            self._clock.after(self._machine.control_s, self.placement.beat_server, beat)

        server = self._servers[server_id] = SimServer(
            self._clock, hello, self._machine, self._config.experts.settings, copy_bytes=self._copy_bytes, report=report
        )
        self._say(f"{server_id} started")
        return server

    def _add_router(self, router_id: str, row_bytes: int, rng: np.random.Generator) -> None:
        clock, machine = self._clock, self._machine

        def tell(event: Callable[[SimRouter, int, int], None]) -> None:
            snapshot = router.snapshot
            clock.after(machine.control_s, event, router, snapshot.table.epoch, snapshot.oldest_epoch)

        router = SimRouter(
            clock,
            router_id,
            self._config.router.settings,
            machine,
            self._workload,
            servers=self._servers,
            rng=rng,
            on_lost=lambda server_id: clock.after(machine.control_s, self.placement.report_lost, server_id),
            on_table=lambda: tell(self.placement.acknowledge),
            row_bytes=row_bytes,
            scale=self._scale,
        )
        self._routers.append(router)
        clock.every(self._config.placement.heartbeat_s, lambda: tell(self.placement.beat_router))

    def _lose(self, fault: Fault) -> None:
        running = sorted(self.pool.running)
        if fault.server >= len(running):
            self._say(f"no server {fault.server} to lose: {len(running)} are running")
            return
        server_id = running[fault.server]
        self.pool.lose(server_id)
        self._say(f"{server_id} lost ({fault.kind})")
        silent_s, machine = self._config.router.settings.hop_timeout_s, self._machine
        notice_s = silent_s if fault.kind == "silent" else machine.notice_s
        self._clock.after(notice_s, self._cut_off, self._servers[server_id], fault.kind)

    def _cut_off(self, server: SimServer, reason: str) -> None:
        """Every router notices that the server is gone."""
        if reason == "stopped":
            self._say(f"{server.hello.server_id} left")
        for router in self._routers:
            router.lose(server.hello.server_id, reason)

    # ------------------------------------------------------------------ what is seen

    def _say(self, what: str) -> None:
        if 0 <= self._clock.now_s <= self._until_s:
            self.record.events.append((self._clock.now_s, what))

    def _mark(self) -> None:
        placement = self.placement
        copies = sum(server.loaded_copies for server in self._servers.values())
        self._phases.append(
            {
                "at_s": self._clock.now_s,
                "plans": placement.num_plans,
                "epochs": placement.fleet.epoch,
                "planned_loads": placement.loads,
                "planned_unloads": placement.unloads,
                "copies_loaded": copies,
                "bytes_loaded": copies * self._copy_bytes,
            }
        )

    def _look(self) -> bool:
        now_s, record, workload = self._clock.now_s, self.record, self._workload
        if now_s > self._until_s:
            return False
        took_s = np.array(record.took_s[bisect_right(record.ended_s, now_s - 1.0) :])
        took_s = took_s[np.isfinite(took_s)]
        serving = [server_id for server_id, server in self.pool.running.items() if server.warm]
        table = self._routers[0].snapshot.current
        even_L = balancedness(table, workload.layers, workload.load(now_s), serving) if serving else np.zeros(1)
        record.moments.append(
            Moment(
                at_s=now_s,
                offered_tokens_per_s=workload.requests_per_s(now_s) * workload.num_tokens,
                tokens_per_s=float(len(took_s) * workload.num_tokens * self._scale),
                p99_s=float(np.percentile(took_s, 99)) if len(took_s) else None,
                servers=len(self.pool.running),
                paid_servers=self.pool.paid,
                copies=sum(map(len, table.copies.values())),
                balancedness_mean=float(even_L.mean()),
                balancedness_min=float(even_L.min()),
                pairs_in_flight=self._scale * sum(sum(router.pairs_in_flight.values()) for router in self._routers),
            )
        )
        return True


def check_one_pool(config: ClusterConfig) -> None:
    """Refuse what cannot be simulated.

    Raises:
        InvalidRequest: the config lists its servers in `pools`.
    """
    if config.pools:
        names = ", ".join(pool.name for pool in config.pools)
        raise InvalidRequest(f"pools is given ({names}), but the simulator simulates one pool: describe it in experts")


def choose_scale(workload: Workload, duration_s: float) -> int:
    """The smallest scale at which the busiest second of a run has at most VISITS_PER_S visits."""
    moments_s = np.linspace(0, duration_s, 200).tolist()
    most = max(workload.requests_per_s(moment_s) for moment_s in moments_s) * workload.visits
    return max(1, int(np.ceil(most / VISITS_PER_S)))
