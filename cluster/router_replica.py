"""The router deployment: one `RouterServer` in a Serve replica, and Serve's HTTP ingress for status and health.

It waits for tables, hands them to the router, and acknowledges an epoch once no batch uses an older one. While the
placement is away requests go on with the last table. Tokens come in over the router's own gRPC port.
"""

import asyncio
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.config import ClusterConfig
from cluster.messages import RouterBeat
from cluster.pulling import POLL_S, answer, direct, forever, log_to_serve, pause
from cluster.spare import keep_spare_worker
from protos.checkpoint import read_model
from router.service import RouterServer
from router.table import PlacementTable, empty_table

log = logging.getLogger("expertmesh.router")

PAUSE_PER_EXPERT_S = 10e-6  # after a table: to send one and take it up costs both sides some 3 us for each expert in it
ACK_POLL_S = 0.01  # how often a router that has to acknowledge looks whether its old batches are done


class RouterReplica:
    """See the module docstring.

    Args:
        config: the cluster's.
        placement: handle of the `Placement` deployment.
        pools: handles of the pools' deployments; tokens go to their servers directly, but what an application's
            ingress does not refer to is not deployed.
    """

    def __init__(
        self, config: ClusterConfig, placement: DeploymentHandle[Any], pools: list[DeploymentHandle[Any]]
    ) -> None:
        log_to_serve()
        self._config = config
        self._placement = direct(placement)
        self._pools = pools
        self._loop = asyncio.get_running_loop()
        self._id = serve.get_replica_context().replica_id.unique_id
        spec = read_model(Path(config.model))
        self._table: PlacementTable = empty_table(spec.num_experts)
        self._server = RouterServer(
            spec,
            config.router.settings,
            on_server_lost=self._on_server_lost,
            on_absent=self._on_absent,
            weight_dtype=config.weight_dtype,
        )
        self._server.start(config.router.host, config.router.port)
        self._beat_now = asyncio.Event()
        self._absent = False  # a request waits for an expert that no server holds: its demand is news
        self._lost: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self._spare = self._loop.create_task(keep_spare_worker(config.all_pools))
        self._tasks = [self._loop.create_task(forever(step)) for step in (self._beat, self._poll, self._report_lost)]

    # ------------------------------------------------------------------ Serve's hooks

    async def __call__(self, request: Request) -> Response:
        """GET /status: the cluster, as the placement sees it. GET /healthz: 200 once a table has arrived."""
        path = request.url.path.rstrip("/")
        if path.endswith("/healthz"):
            ready = self._table.epoch > 0
            return JSONResponse({"ready": ready, "epoch": self._table.epoch}, status_code=200 if ready else 503)
        if path.endswith("/status"):
            try:
                return JSONResponse(await answer(self._placement.status.remote()))
            except Exception as err:
                return JSONResponse({"error": f"placement unavailable: {type(err).__name__}"}, status_code=503)
        return JSONResponse({"error": f"no such path {path or '/'}; there are /status and /healthz"}, status_code=404)

    async def status(self) -> dict[str, object]:
        """The cluster's status over a Serve handle."""
        found: dict[str, object] = await answer(self._placement.status.remote())
        return found

    async def check_health(self) -> None:
        """Healthy: the control tasks run."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"a control task of router {self._id} has ended: {task}")

    async def __del__(self) -> None:
        """Answer what is open, then stop."""
        await asyncio.to_thread(self._server.stop, 5.0)
        for task in (*self._tasks, self._spare):
            task.cancel()

    # ------------------------------------------------------------------ control tasks, each step repeated for ever

    async def _beat(self) -> None:
        """Report epochs, demand and account; at once after a table, as soon as no batch uses an older one."""
        await pause(self._beat_now, self._config.placement.heartbeat_s)
        if self._beat_now.is_set():
            self._beat_now.clear()
            end_s = self._loop.time() + self._config.placement.heartbeat_s
            while self._server.oldest_epoch < self._table.epoch and self._loop.time() < end_s and not self._absent:
                await asyncio.sleep(ACK_POLL_S)
        self._absent = False
        report = self._server.report()
        beat = RouterBeat(
            router_id=self._id,
            address=self._reachable(report.address),
            node=ray.get_runtime_context().get_node_id()[-8:],
            pid=os.getpid(),
            epoch=report.epoch,
            oldest_epoch=report.oldest_epoch,
            known_servers=frozenset(server.server_id for server in self._table.servers),
            demand=report.demand,
            totals=asdict(report.totals)
            | {"traced_tokens": report.traced_tokens, "trace_dropped_tokens": report.trace_dropped_tokens},
            p50_s=report.p50_s,
            p99_s=report.p99_s,
            tokens_per_s=report.tokens_per_s,
            queued_tokens=report.queued_tokens,
        )
        await answer(self._placement.beat_router.remote(beat))
        if report.oldest_epoch < self._table.epoch:
            self._beat_now.set()  # an old batch still runs: acknowledge as soon as it is done

    def _reachable(self, address: str) -> str:
        """The address others can use: this node's where the router listens on every interface."""
        host, _, port = address.rpartition(":")
        if host not in ("0.0.0.0", "[::]"):
            return address
        return f"{ray.util.get_node_ip_address()}:{port}"  # type: ignore[no-untyped-call]

    async def _poll(self) -> None:
        """Wait for the next table."""
        table = await answer(self._placement.poll_table.remote(self._table.epoch, POLL_S), extra_s=POLL_S)
        if table is not None and table.epoch > self._table.epoch:
            self._table = table
            self._server.update(table)
            log.info("table %d: %d servers", table.epoch, len(table.servers))
            self._beat_now.set()
            await asyncio.sleep(PAUSE_PER_EXPERT_S * len(table.copies))  # a large re-placement publishes many

    async def _report_lost(self) -> None:
        server_id, reason = await self._lost.get()
        await answer(self._placement.report_lost.remote(server_id, reason))

    def _on_absent(self) -> None:
        """Called on the router's own loop."""

        def report() -> None:
            self._absent = True
            self._beat_now.set()

        self._loop.call_soon_threadsafe(report)

    def _on_server_lost(self, server_id: str, reason: str) -> None:
        """Called on the router's own loop."""
        self._loop.call_soon_threadsafe(self._lost.put_nowait, (server_id, reason))
