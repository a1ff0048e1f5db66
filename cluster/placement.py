"""The placement deployment: membership, load, plans, epochs. A shell around `fleet`, `load` and `planner`.

One replica. Its state is soft: servers and routers tell it everything again when it restarts, while requests go on
with the last table. Servers and routers pull: they report, and wait here (long polls) for their assignment or table.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import numpy.typing as npt
import ray

from cluster.awaited import Awaited
from cluster.config import ClusterConfig
from cluster.fleet import Fleet
from cluster.journal import Journal
from cluster.load import LoadWindow
from cluster.members import may_be_unread
from cluster.messages import Assignment, Key, RouterBeat, ServerBeat, ServerHello, ServerReply
from cluster.metrics import Metrics
from cluster.overview import (
    copies_by_count,
    demand_line,
    hottest,
    layer_balance,
    mass_at_risk,
    router_lines,
    server_line,
)
from cluster.planner import plan
from cluster.planner_input import planner_input
from cluster.pools import Pools
from cluster.pulling import log_to_serve
from cluster.spare import keep_spare_worker
from protos import expert_pb2
from protos.checkpoint import read_model
from protos.services import CHANNEL_OPTIONS, status_method
from router.table import PlacementTable

log = logging.getLogger("expertmesh.placement")

PROBE_TIMEOUT_S = 0.5
METRICS_S = 1.0


class Placement:
    """See the module docstring. Runs on the replica's event loop; every method is short or waits without work.

    Args:
        config: the cluster's.
    """

    def __init__(self, config: ClusterConfig) -> None:
        log_to_serve()
        self._config = config
        self._knobs = knobs = config.placement
        self._spec = spec = read_model(Path(config.model))
        self._fleet = Fleet(
            num_experts=spec.num_experts,
            expected_servers=config.min_servers,
            dead_after_s=knobs.dead_after_s,
            settle_s=knobs.settle_s,
            load_bytes_per_s=knobs.load_bytes_per_s,
        )
        self._window = LoadWindow(spec.layers, spec.num_experts, rise_s=knobs.load_rise_s, fall_s=knobs.load_fall_s)
        self._awaited = Awaited(spec.layers, patience_s=config.router.settings.default_timeout_s)
        self._beats: dict[str, ServerBeat] = {}
        self._routers: dict[str, RouterBeat] = {}
        self._pools = Pools(config, num_experts=len(spec.layers) * spec.num_experts, top_k=spec.top_k)
        self._missing: set[Key] = set()
        self._wanted_copies = self._needed_copies = 0
        self._metrics = Metrics(config.name)
        self._journal = Journal(self._metrics)
        self._measured_s = 0.0  # when the metrics were last set
        self._news = asyncio.Event()  # replaced at every change: what long polls wait for
        self._replan = asyncio.Event()
        self._probing: set[str] = set()
        loop = asyncio.get_running_loop()
        self._planning = loop.create_task(self._plan_forever())
        self._spare = loop.create_task(keep_spare_worker(config.all_pools))

    # ------------------------------------------------------------------ expert servers

    async def register(
        self, hello: ServerHello, held: frozenset[Key], highest_epoch: int, seq: int, copy_bytes: int
    ) -> Assignment:
        """A server process joins, or comes back."""
        self._fleet.copy_bytes = max(self._fleet.copy_bytes, copy_bytes)
        self._pools.joined(hello)
        with self._acting(replan=True):
            found = self._fleet.register(hello, held=held, highest_epoch=highest_epoch, seq=seq, now_s=time.monotonic())
        self._note("server_joined", f"{hello.server_id} on {hello.node}, holding {len(held)} copies")
        return found

    async def beat_server(self, beat: ServerBeat) -> ServerReply | None:
        """A server's heartbeat; None asks it to register."""
        with self._acting(replan=bool(beat.failed)):
            known = self._fleet.report_server(
                beat.server_id,
                held=beat.held,
                applied_version=beat.applied_version,
                seq=beat.seq,
                now_s=time.monotonic(),
                failed=beat.failed,
            )
        for (layer, expert), reason in beat.failed.items():
            self._note("load_failed", f"expert {expert} of layer {layer} on {beat.server_id}: {reason}")
        hello = self._hello(beat.server_id)
        if not known or hello is None:
            return None
        self._beats[beat.server_id] = beat
        self._pools.beat_server(hello, beat, time.monotonic())
        return ServerReply(epoch=self._fleet.epoch)

    async def poll_assignment(self, server_id: str, version: int, timeout_s: float) -> Assignment | None:
        """The server's assignment as soon as its version is another; None asks the server to register."""
        await self._wait(lambda: self._fleet.version(server_id) != version, timeout_s)
        return self._fleet.assignment(server_id)

    async def drain(self, server_id: str) -> None:
        """The server is to stop: move its copies away."""
        with self._acting(replan=True):
            self._fleet.drain(server_id, time.monotonic())
        self._note("server_draining", server_id)

    async def leave(self, server_id: str) -> None:
        """The server has stopped serving."""
        self._remove(server_id, "server_left", server_id)

    # ------------------------------------------------------------------ routers

    async def beat_router(self, beat: RouterBeat) -> None:
        """A router's heartbeat: acknowledges epochs, brings demand."""
        with self._acting():
            self._fleet.report_router(
                beat.router_id,
                epoch=beat.epoch,
                oldest_epoch=beat.oldest_epoch,
                known_servers=beat.known_servers,
                now_s=time.monotonic(),
            )
        before = self._routers.get(beat.router_id)
        self._window.count(beat.router_id, beat.demand, time.monotonic())
        self._pools.beat_router(beat.router_id, sum(beat.demand.values()), beat.queued_tokens, time.monotonic())
        self._routers[beat.router_id] = beat
        held = self._fleet.table.copies
        asked = before.demand if before else {} if beat.queued_tokens else beat.demand  # the first may be waiting
        if self._awaited.count(asked, beat.demand, held, time.monotonic()):
            self._replan.set()

    async def poll_table(self, epoch: int, timeout_s: float) -> PlacementTable | None:
        """The table as soon as it is newer than `epoch`; None if it is not within the time."""
        await self._wait(lambda: self._fleet.epoch > epoch, timeout_s)
        return self._fleet.table if self._fleet.epoch > epoch else None

    async def report_lost(self, server_id: str, reason: str) -> None:
        """A router lost a server. If it really is gone, its copies are re-placed at once."""
        hello = self._hello(server_id)
        if hello is None or server_id in self._probing:
            return
        self._probing.add(server_id)
        try:
            alive = await self._probe(hello)
        finally:
            self._probing.discard(server_id)
        if not alive and self._hello(server_id) is not None:
            self._remove(server_id, "server_lost", f"{server_id}: {reason}")

    # ------------------------------------------------------------------ everybody

    async def status(self) -> dict[str, Any]:
        """The cluster as `expertmesh status` shows it. Plain values."""
        fleet, spec = self._fleet, self._spec
        routers = [beat for router_id, beat in self._routers.items() if router_id in fleet.routers]
        load_LE = self._window.rates()
        return {
            "model": self._config.model,
            "name": self._config.name,
            "epoch": fleet.epoch,
            "settled": fleet.settled,
            "cold_allowed": self._knobs.min_copies == 0,  # experts without a copy are no fault
            "placement": {"node": ray.get_runtime_context().get_node_id()[-8:], "pid": os.getpid()},
            "router": {
                "grpc": routers[0].address if routers else None,
                "http": f"{_host_of(routers[0].address) if routers else self._config.router.host}:"
                f"{self._config.router.http_port}",
            },
            "routers": router_lines(routers),
            "servers": self._server_lines(),
            "pools": self._pools.status(fleet.servers),
            "experts": hottest(spec, fleet.table, load_LE),
            "single_copy_experts": copies_by_count(spec, fleet, 1),
            "missing_experts": copies_by_count(spec, fleet, 0),
            "mass_at_risk": self._at_risk(load_LE),
            "outstanding_copies": fleet.outstanding,
            "balancedness": self._balance(load_LE),
            "demand": demand_line(routers, load_LE, self._window.forecast),
            "events": list(self._journal.events),
        }

    async def close(self) -> None:
        """The application is about to be deleted: servers need not wait for others to take over."""
        with self._acting():
            self._fleet.close(time.monotonic())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: how many servers every pool is to have (see `cluster.relay`), decided at this moment."""
        for change in self._pools.decide(
            servers=self._fleet.servers,
            draining=self._fleet.draining,
            routers=self._fleet.routers,
            load_LE=self._demand(),
            needed_copies=self._needed_copies,
            denied_copies=self._wanted_copies,
            now_s=time.monotonic(),
        ):
            self._journal.note("scaling", epoch=self._fleet.epoch, **change)
        return self._pools.numbers()

    async def check_health(self) -> None:
        """Serve's hook: the planning task must be alive."""
        if self._planning.done():
            raise RuntimeError("the planning task has ended")

    # ------------------------------------------------------------------ planning

    async def _plan_forever(self) -> None:
        took_s = 0.0
        while True:
            # A large model's plan takes a while: leave the loop most of the time.
            pause_s = max(self._knobs.plan_interval_s, 5 * took_s)
            waits_s = time.monotonic()
            try:
                async with asyncio.timeout(pause_s):
                    await self._replan.wait()
            except TimeoutError:
                pass
            self._replan.clear()
            started_s = time.monotonic()
            unread = may_be_unread(started_s - waits_s, pause_s, took_s, self._knobs)
            try:
                await self._plan_once(expire=not unread)
            except Exception:
                log.exception("planning failed; the last plan stays")
            took_s = time.monotonic() - started_s

    async def _plan_once(self, *, expire: bool) -> None:
        now_s = time.monotonic()
        lost: tuple[str, ...] = ()
        if expire:
            with self._acting():
                lost = self._fleet.expire(now_s)
        for server_id in lost:
            self._beats.pop(server_id, None)
            self._note("server_lost", f"{server_id}: silent for {self._knobs.dead_after_s} s")
        alive = set(self._fleet.routers)
        self._window.forget(alive)
        self._measure(now_s)
        self._routers = {router_id: beat for router_id, beat in self._routers.items() if router_id in alive}
        if not self._fleet.settled or not self._fleet.servers:
            return
        inputs = planner_input(
            self._knobs, self._fleet, layers=self._spec.layers, load_LE=self._demand(), speed=self._pools.speed
        )
        found = await asyncio.to_thread(plan, inputs)
        self._wanted_copies = found.wanted_copies
        self._needed_copies = found.needed_copies
        if set(found.missing) != self._missing:
            self._missing = set(found.missing)
            self._note("memory", f"{len(found.missing)} experts have no place within the servers' budgets")
        if found.steps:
            with self._acting():
                self._fleet.adopt(found.copies, found.steps, time.monotonic())
            self._progress()  # it may only have discarded what waited, which changes no table
            self._journal.planned(found, self._fleet.copy_bytes, self._fleet.epoch, now_s)

    # ------------------------------------------------------------------ parts

    def _demand(self) -> npt.NDArray[np.float64]:
        held, waiting = self._fleet.table.copies, any(beat.queued_tokens for beat in self._routers.values())
        return self._awaited.demand(self._window.rates(), held=held, open_requests=waiting, now_s=time.monotonic())

    async def _probe(self, hello: ServerHello) -> bool:
        """Whether that very process still answers. One that only hangs counts as gone once it also missed beats."""
        async with grpc.aio.insecure_channel(hello.address, options=CHANNEL_OPTIONS) as channel:
            try:
                answer = await status_method(channel)(expert_pb2.StatusRequest(), timeout=PROBE_TIMEOUT_S)
                return answer.server_id == hello.server_id
            except grpc.aio.AioRpcError as err:
                if err.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    return False
        last_seen_s = self._fleet.last_seen_s(hello.server_id)
        return last_seen_s is not None and time.monotonic() - last_seen_s < 2 * self._knobs.heartbeat_s

    def _remove(self, server_id: str, kind: str, detail: str) -> None:
        with self._acting(replan=True):
            self._fleet.remove_server(server_id, time.monotonic())
        self._beats.pop(server_id, None)
        self._note(kind, detail)

    def _hello(self, server_id: str) -> ServerHello | None:
        return next((hello for hello in self._fleet.servers if hello.server_id == server_id), None)

    def _server_lines(self) -> list[dict[str, Any]]:
        draining = self._fleet.draining
        return [
            server_line(
                hello,
                self._beats.get(hello.server_id),
                draining=hello.server_id in draining,
                loading=self._fleet.loading(hello.server_id),
                speed=self._pools.speed(hello),
            )
            for hello in self._fleet.servers
        ]

    def _balance(self, load_LE: npt.NDArray[np.float64]) -> dict[str, float]:
        draining = self._fleet.draining
        speeds = {
            hello.server_id: self._pools.speed(hello)
            for hello in self._fleet.servers
            if hello.server_id not in draining
        }
        return layer_balance(self._fleet.table, self._spec.layers, load_LE, speeds)

    def _at_risk(self, load_LE: npt.NDArray[np.float64]) -> float:
        return mass_at_risk(self._fleet.table, self._spec.layers, load_LE, losses=max(1, self._knobs.survive))

    def _measure(self, now_s: float) -> None:
        """Set the metrics, once in METRICS_S."""
        self._window.judge(now_s)
        if now_s - self._measured_s < METRICS_S:
            return
        self._measured_s = now_s
        fleet, load_LE = self._fleet, self._window.rates()
        copies = [len(held) for held in fleet.table.copies.values()]
        self._metrics.placement(
            epoch=fleet.epoch,
            outstanding=fleet.outstanding,
            single=copies.count(1),
            missing=load_LE.size - len(copies) + copies.count(0),
            at_risk=self._at_risk(load_LE),
            demand=float(load_LE.sum()),
        )
        self._metrics.balance(self._balance(load_LE))
        self._metrics.experts(
            (found["layer"], found["expert"], found["pairs_per_s"], found["copies"])
            for found in hottest(self._spec, fleet.table, load_LE)
        )
        self._metrics.servers(self._server_lines())
        self._metrics.forecast(self._window.forecast)

    @contextmanager
    def _acting(self, *, replan: bool = False) -> Iterator[None]:
        """Around every event: afterwards wake the long polls if anything changed, and the planner if asked to."""
        revision, settled = self._fleet.revision, self._fleet.settled
        yield
        if self._fleet.revision != revision:
            news, self._news = self._news, asyncio.Event()
            news.set()
            self._progress()
        if replan or self._fleet.settled != settled:
            self._replan.set()

    def _progress(self) -> None:
        fleet = self._fleet
        self._journal.progress(fleet.outstanding, fleet.pop_overtaken(), fleet.epoch, time.monotonic())

    async def _wait(self, ready: Callable[[], bool], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not ready():
                    await self._news.wait()
        except TimeoutError:
            pass

    def _note(self, kind: str, detail: str) -> None:
        self._journal.note(kind, detail, self._fleet.epoch)


def _host_of(address: str) -> str:
    return address.rpartition(":")[0]
