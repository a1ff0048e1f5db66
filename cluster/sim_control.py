"""The control plane in simulated time: `cluster.placement` and Serve's autoscaling, around the real decisions.

What is exact: the fleet's states and epochs (`cluster.fleet`), load estimation (`cluster.load`, `cluster.awaited`),
plans (`cluster.planner`), the number of servers (`cluster.pools`). What is modelled: calls take `control_s`, a plan
takes `plan_s`, a new server registers after `start_s`; of several servers Serve may stop, the youngest goes; routers
tell of absent experts with their next heartbeat, where real ones beat at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cluster.awaited import Awaited
from cluster.config import ClusterConfig
from cluster.fleet import Fleet
from cluster.load import LoadWindow
from cluster.messages import Key, ServerBeat, ServerHello
from cluster.planner import Plan, plan
from cluster.planner_input import planner_input
from cluster.pools import Pools
from cluster.relay import AT_LEAST, AT_MOST
from cluster.sim_events import Clock
from cluster.sim_router import SimRouter
from cluster.sim_servers import Machine, SimServer
from cluster.steps import Load, Reshare, Unload
from cluster.workloads import Workload
from router.table import CopyShare

DECIDE_S = 0.1  # Serve's controller asks a policy so often
LINGER_S = 1.0  # a server that left answers what is still on its way


@dataclass(frozen=True, slots=True, kw_only=True)
class Foresight:
    """A clairvoyant baseline: plans and servers follow the load that will be, not the one that was measured.

    Args:
        utilisation: work over capacity that its servers are meant to have.
        lead_s: how far ahead servers are asked for; at least what one takes to be useful.
        load_lead_s: how far ahead copies are planned.
    """

    utilisation: float
    lead_s: float
    load_lead_s: float = 0.5

    def servers(self, workload: Workload, now_s: float, pairs_per_s: float) -> int:
        """Enough at every moment of the lead: what is needed soon is started now, and kept if it is needed again."""
        moments_s = np.arange(now_s, now_s + self.lead_s + DECIDE_S, DECIDE_S).tolist()
        most = max(workload.pairs_per_s(moment_s) for moment_s in moments_s)
        return int(np.ceil(most / (pairs_per_s * self.utilisation) - 1e-9))


class SimPlacement:
    """The placement deployment's shell, in simulated time.

    Args:
        routers: of the cluster; the caller fills it.
        servers: all that ever were, by id; the caller adds to it.
        static: keep the first complete plan; later ones only re-place what a lost or leaving server held.
    """

    def __init__(
        self,
        clock: Clock,
        config: ClusterConfig,
        machine: Machine,
        workload: Workload,
        *,
        routers: Sequence[SimRouter],
        servers: Mapping[str, SimServer],
        copy_bytes: int,
        foresight: Foresight | None = None,
        static: bool = False,
    ) -> None:
        knobs = config.placement
        self.fleet = Fleet(
            num_experts=workload.num_experts,
            expected_servers=config.min_servers,
            dead_after_s=knobs.dead_after_s,
            settle_s=knobs.settle_s,
            copy_bytes=copy_bytes,
            load_bytes_per_s=knobs.load_bytes_per_s,
        )
        self.window = LoadWindow(
            workload.layers, workload.num_experts, rise_s=knobs.load_rise_s, fall_s=knobs.load_fall_s
        )
        self._awaited = Awaited(workload.layers, patience_s=config.router.settings.default_timeout_s)
        self._asked: dict[str, Mapping[Key, int]] = {}  # by router, as it last reported
        self.num_plans = self.loads = self.unloads = 0
        self.pools = Pools(config, num_experts=len(workload.layers) * workload.num_experts, top_k=workload.top_k)
        self._needed_copies = self._denied_copies = 0
        self._clock, self._knobs, self._machine, self._workload = clock, knobs, machine, workload
        self._routers, self._servers = routers, servers
        self._foresight, self._static, self._complete = foresight, static, False
        self._sent_version: dict[str, int] = {}
        self._sent_epoch = 0
        self._planning = self._again = False
        clock.every(knobs.plan_interval_s, self.replan)

    # ------------------------------------------------------------------ events, each when it arrives

    def register(self, server: SimServer) -> None:
        """A server process joins."""
        if server.alive:
            now_s = self._clock.now_s
            self.fleet.register(server.hello, held=server.warm, highest_epoch=0, seq=0, now_s=now_s)
            self.pools.joined(server.hello)
            self._after(replan=True)

    def beat_server(self, beat: ServerBeat) -> None:
        self.fleet.report_server(
            beat.server_id,
            held=beat.held,
            applied_version=beat.applied_version,
            seq=beat.seq,
            now_s=self._clock.now_s,
            failed=beat.failed,
        )
        hello = next((hello for hello in self.fleet.servers if hello.server_id == beat.server_id), None)
        if hello is not None:
            self.pools.beat_server(hello, beat, self._clock.now_s)
        self._after()

    def acknowledge(self, router: SimRouter, epoch: int, oldest: int) -> None:
        """What a router says about epochs. A real one says it with a whole heartbeat, demand included."""
        known = frozenset(server.server_id for server in router.snapshot.table.servers)
        now_s = self._clock.now_s
        self.fleet.report_router(router.router_id, epoch=epoch, oldest_epoch=oldest, known_servers=known, now_s=now_s)
        self._after()

    def beat_router(self, router: SimRouter, epoch: int, oldest: int) -> None:
        self.acknowledge(router, epoch, oldest)
        now_s = self._clock.now_s
        demand, queued_tokens = router.demand(), router.queued_tokens * router.scale
        self.window.count(router.router_id, demand, now_s)
        self.pools.beat_router(router.router_id, pairs=sum(demand.values()), queued_tokens=queued_tokens, now_s=now_s)
        before = self._asked.get(router.router_id, {} if queued_tokens else demand)
        self._asked[router.router_id] = demand
        if self._awaited.count(before, demand, self.fleet.table.copies, now_s):
            self.replan()

    def drain(self, server_id: str) -> None:
        self.fleet.drain(server_id, self._clock.now_s)
        self._after(replan=True)

    def remove(self, server_id: str) -> None:
        """The server has left, or a router lost it and a probe finds it dead."""
        self.fleet.remove_server(server_id, self._clock.now_s)
        self._after(replan=True)

    def report_lost(self, server_id: str) -> None:
        if not self._servers[server_id].alive:
            self.remove(server_id)

    def _after(self, *, replan: bool = False) -> None:
        """After every event: assignments and tables that changed go out; a change of members plans at once."""
        _, _, *versions = self.fleet.revision
        for hello, version in zip(self.fleet.servers, versions, strict=True):
            if self._sent_version.get(hello.server_id) != version:
                self._sent_version[hello.server_id] = version
                found = self.fleet.assignment(hello.server_id)
                self._clock.after(self._machine.control_s, self._servers[hello.server_id].take, found)
        if self.fleet.epoch != self._sent_epoch:
            self._sent_epoch = self.fleet.epoch
            for router in self._routers:
                self._clock.after(self._machine.control_s, router.adopt, self.fleet.table)
        if replan:
            self.replan()

    def decide_servers(self) -> Mapping[str, float]:
        """What the placement's replica reports to Serve."""
        self.pools.decide(
            servers=self.fleet.servers,
            draining=self.fleet.draining,
            routers=self.fleet.routers,
            load_LE=self._measured(),
            needed_copies=self._needed_copies,
            denied_copies=self._denied_copies,
            now_s=self._clock.now_s,
        )
        return self.pools.numbers()

    # ------------------------------------------------------------------ planning

    def replan(self) -> None:
        """Make a plan now; while one is being made, another one afterwards."""
        self._again = self._planning
        if self._planning:
            return
        self.fleet.expire(self._clock.now_s)
        self._after()
        if self.fleet.settled:
            self._planning = True
            knobs = self._knobs
            if self._static and self._complete:
                knobs = knobs.model_copy(update={"max_moves": 0, "survive": 0})
            inputs = planner_input(
                knobs, self.fleet, layers=self._workload.layers, load_LE=self._load(), speed=self.pools.speed
            )
            self._clock.after(self._machine.plan_s, self._adopt, plan(inputs))

    def _adopt(self, found: Plan) -> None:
        self._planning = False
        self.num_plans += 1
        self._needed_copies, self._denied_copies = found.needed_copies, found.wanted_copies
        if self._static and self._complete:
            found = only_replaced(found, self.fleet.current)
        self._complete = self._complete or not found.missing
        if found.steps:
            self.loads += sum(isinstance(step, Load) for step in found.steps)
            self.unloads += sum(isinstance(step, Unload) for step in found.steps)
            self.fleet.adopt(found.copies, found.steps, self._clock.now_s)
            self._after()
        if self._again:
            self.replan()

    def _load(self) -> npt.NDArray[np.float64]:
        if self._foresight is not None:
            return self._workload.load(self._clock.now_s + self._foresight.load_lead_s)
        return self._measured()

    def _measured(self) -> npt.NDArray[np.float64]:
        held, waiting = self.fleet.table.copies, any(router.queued_tokens for router in self._routers)
        return self._awaited.demand(self.window.rates(), held=held, open_requests=waiting, now_s=self._clock.now_s)


def only_replaced(found: Plan, current: Mapping[Key, tuple[CopyShare, ...]]) -> Plan:
    """The part of a plan that loads what is missing and makes room for it; all other experts stay as they are.

    Those that lost some of their copies keep the others, which take all of their traffic.
    """
    touched = {step.key for step in found.steps if not isinstance(step, Reshare) and step.reason != "surplus"}
    copies = {key: held for key, held in current.items() if key not in touched}
    copies |= {key: found.copies[key] for key in touched if key in found.copies}
    for step in found.steps:
        held = copies.get(step.key, ())
        total = sum(copy.share for copy in held)
        if held and isinstance(step, Reshare) and step.key not in touched and abs(total - 1) > 1e-9:
            touched.add(step.key)
            copies[step.key] = tuple(copy._replace(share=copy.share / total) for copy in held)
    return replace(found, copies=copies, steps=tuple(step for step in found.steps if step.key in touched))


class SimPool:
    """Serve's part: processes that start, are replaced, are drained and stop; how many, the scaling policy says.

    Args:
        make: makes the server process of an id, not yet known to anybody.
        on_stop: called with a server whose process has ended in order.
    """

    def __init__(
        self,
        clock: Clock,
        config: ClusterConfig,
        machine: Machine,
        workload: Workload,
        placement: SimPlacement,
        *,
        make: Callable[[str], SimServer],
        on_stop: Callable[[SimServer], None],
        foresight: Foresight | None = None,
    ) -> None:
        self.running: dict[str, SimServer] = {}
        self.starting: set[str] = set()
        self.draining: dict[str, SimServer] = {}
        self.server_seconds = 0.0
        self._clock, self._config, self._machine, self._workload = clock, config, machine, workload
        self._placement, self._make, self._on_stop, self._foresight = placement, make, on_stop, foresight
        self._target = config.experts.min_servers
        self._count = 0
        self._unnoticed = 0  # servers that died within the last replace_s
        for _ in range(self._target):
            self._start(0.0)
        clock.every(DECIDE_S, self._decide, first_s=DECIDE_S)

    @property
    def paid(self) -> int:
        """Servers that cost something now: those that start or leave included."""
        return len(self.running) + len(self.starting) + len(self.draining)

    def lose(self, server_id: str) -> None:
        """A running server dies; its replacement is asked for a little later."""
        self.running.pop(server_id).alive = False
        self._unnoticed += 1
        self._clock.after(self._machine.replace_s, self._notice)

    def _notice(self) -> None:
        self._unnoticed -= 1
        self._follow()

    def _decide(self) -> None:
        self.server_seconds += DECIDE_S * self.paid
        pool = self._config.experts
        if self._foresight is not None:
            need = self._foresight.servers(self._workload, self._clock.now_s, self._machine.pairs_per_s)
            self._target = max(pool.min_servers, min(need, pool.max_servers))
        else:
            numbers = self._placement.decide_servers()
            least = numbers[AT_LEAST + pool.name]
            self._target = int(max(least, min(self._target, numbers.get(AT_MOST + pool.name, self._target))))
        self._follow()
        for server_id in [server_id for server_id, server in self.draining.items() if server.released]:
            self._leave(server_id)

    def _follow(self) -> None:
        """Start what is missing, stop what is too much: those that start first, then the youngest."""
        while len(self.running) + len(self.starting) + self._unnoticed < self._target:
            self._start(self._machine.start_s)
        while len(self.running) + len(self.starting) > self._target:
            if self.starting:
                self.starting.remove(max(self.starting))
                continue
            server_id = max(self.running)
            self.draining[server_id] = server = self.running.pop(server_id)
            server.hello = replace(server.hello, draining=True)
            self._clock.after(self._machine.control_s, self._placement.drain, server_id)
            self._clock.after(self._config.experts.drain_timeout_s, self._leave, server_id)

    def _start(self, after_s: float) -> None:
        server_id = f"s{self._count:04d}"
        self._count += 1
        self.starting.add(server_id)
        self._clock.after(after_s, self._started, server_id)

    def _started(self, server_id: str) -> None:
        if server_id not in self.starting:
            return
        self.starting.remove(server_id)
        self.running[server_id] = server = self._make(server_id)
        self._clock.after(self._machine.control_s, self._placement.register, server)

        def beat() -> bool:
            if server.alive:
                server.beat()
            return server.alive

        self._clock.every(self._config.placement.heartbeat_s, beat, first_s=self._config.placement.heartbeat_s)

    def _leave(self, server_id: str) -> None:
        server = self.draining.pop(server_id, None)
        if server is not None:
            self._clock.after(self._machine.control_s, self._placement.remove, server_id)
            self._clock.after(LINGER_S, self._stopped, server)

    def _stopped(self, server: SimServer) -> None:
        server.alive = False
        self._on_stop(server)


def hello_of(server_id: str, *, max_copies: int, pool: str) -> ServerHello:
    """What a simulated server says about itself."""
    return ServerHello(server_id=server_id, address=server_id, node=server_id, pid=0, max_copies=max_copies, pool=pool)
