"""The expert server deployment: one `ExpertServer` in a Serve replica that obeys its assignment.

It pulls, like a kubelet: registers, reports, waits for its assignment, unloads and loads until it matches, reports
again. If the placement restarts it registers again with what it holds. Tokens never pass through here: the server's
gRPC data path has its own thread and loop.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import grpc.aio
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.config import ClusterConfig
from cluster.demand import Pace
from cluster.messages import Assignment, Key, ServerBeat, ServerHello
from cluster.pulling import POLL_S, answer, direct, forever, log_to_serve, pause
from cluster.scaling import BACKLOG, BUSY
from cluster.spare import keep_spare_worker
from experts.service import ExpertServer
from protos import expert_pb2
from protos.checkpoint import Checkpoint
from protos.services import status_method

log = logging.getLogger("expertmesh.experts")

LOAD_SLICE_S = 0.1  # loaded copies are reported at least this often
SELF_PROBE_S = 2.0
LEAVE_S = 5.0


class ExpertServerReplica:
    """See the module docstring.

    Args:
        config: the cluster's.
        pool: name of the pool this server belongs to.
        placement: handle of the `Placement` deployment.
    """

    def __init__(self, config: ClusterConfig, pool: str, placement: DeploymentHandle[Any]) -> None:
        log_to_serve()
        self._config = config
        self._pool = config.pool(pool)
        self._placement = direct(placement)
        checkpoint = Checkpoint.open(Path(config.model))
        server_id = serve.get_replica_context().replica_id.unique_id
        self._server = ExpertServer(checkpoint.spec, self._pool.settings, server_id=server_id, checkpoint=checkpoint)
        address = self._server.start(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        report = self._server.report()
        self._copy_bytes = self._server.copy_bytes
        self._hello = ServerHello(
            server_id=server_id,
            address=address,
            node=ray.get_runtime_context().get_node_id()[-8:],
            pid=report.pid,
            max_copies=report.budget_bytes // self._copy_bytes,
            pool=pool,
        )
        self._warm: frozenset[Key] = frozenset()  # loaded and run once; the server may hold more for a moment
        self._failed: dict[Key, str] = {}
        self._assignment: Assignment | None = None  # None: not registered
        self._applied = 0
        self._seq = 0
        self._epoch = 0
        self._pace = Pace()
        self._applying = asyncio.Lock()
        self._news = asyncio.Event()  # a new assignment
        self._beat_now = asyncio.Event()
        self._released = asyncio.Event()
        self._probe = grpc.aio.insecure_channel(address)
        loop = asyncio.get_running_loop()
        self._spare = loop.create_task(keep_spare_worker(config.all_pools))
        self._tasks = [loop.create_task(forever(step)) for step in (self._beat, self._poll, self._apply)]

    # ------------------------------------------------------------------ Serve's hooks

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For other policies than ours (see `cluster.relay`), and for Serve's metrics."""
        report, capacity = self._server.report(), self._pace.capacity
        return {BUSY: report.busy_share, BACKLOG: report.queue_tokens / capacity if capacity else 0.0}

    async def check_health(self) -> None:
        """Healthy: the data path answers and the control tasks run."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"a control task of server {self._hello.server_id} has ended: {task}")
        await status_method(self._probe)(expert_pb2.StatusRequest(), timeout=SELF_PROBE_S)

    async def __del__(self) -> None:
        """Leave without losing a request: copies move first, then routers forget us, then work in flight ends."""
        self._server.drain()
        self._hello = replace(self._hello, draining=True)  # a placement that restarts meanwhile learns it too
        if not self._released.is_set():  # it is where the whole application goes
            await self._leave(self._hello.server_id)
        for task in (*self._tasks, self._spare):
            task.cancel()
        await self._probe.close()
        await asyncio.to_thread(self._server.stop, 5.0)

    async def _leave(self, server_id: str) -> None:
        try:
            async with asyncio.timeout(self._pool.drain_timeout_s):
                while True:  # the placement may be restarting
                    try:
                        await answer(self._placement.drain.remote(server_id))
                        break
                    except Exception as err:
                        log.info("draining %s: the placement does not answer (%s)", server_id, type(err).__name__)
                        await asyncio.sleep(0.2)
                await self._released.wait()
        except Exception as err:
            log.warning("server %s leaves without having been released: %s %s", server_id, type(err).__name__, err)
        with suppress(Exception):  # or routers find out by themselves
            async with asyncio.timeout(LEAVE_S):
                await answer(self._placement.leave.remote(server_id))

    # ------------------------------------------------------------------ control tasks, each step repeated for ever

    async def _beat(self) -> None:
        """Report; register where the placement does not know us."""
        await pause(self._beat_now, self._config.placement.heartbeat_s)
        self._beat_now.clear()
        if self._assignment is None:
            async with self._applying:  # what we hold must not change while we say it
                await self._register()
            return
        report, failed = self._server.report(), dict(self._failed)
        self._pace.observe(sum(report.tokens.values()), report.busy_share, time.monotonic())
        self._seq += 1
        beat = ServerBeat(
            server_id=report.server_id,
            held=self._warm,
            applied_version=self._applied,
            seq=self._seq,
            failed=failed,
            bytes=report.bytes,
            budget_bytes=report.budget_bytes,
            queue_tokens=report.queue_tokens,
            busy_share=report.busy_share,
            pairs_per_s=self._pace.rate,
            capacity_pairs_per_s=report.emulated_tokens_per_s or self._pace.capacity,
            loaded={source: asdict(totals) for source, totals in report.loaded.items()},
        )
        reply = await answer(self._placement.beat_server.remote(beat))
        if reply is None:
            self._assignment = None
            self._beat_now.set()
            return
        self._failed = {key: reason for key, reason in self._failed.items() if key not in failed}
        self._epoch = reply.epoch

    async def _register(self) -> None:
        self._seq += 1
        found = await answer(
            self._placement.register.remote(self._hello, self._warm, self._epoch, self._seq, self._copy_bytes)
        )
        self._applied = found.version
        self._take(found)

    async def _poll(self) -> None:
        """Wait for the next assignment."""
        current = self._assignment
        if current is None:
            await asyncio.sleep(0.02)
            return
        found = await answer(
            self._placement.poll_assignment.remote(self._hello.server_id, current.version, POLL_S), extra_s=POLL_S
        )
        if self._assignment is not current:
            return  # registered again meanwhile: the answer may be of another placement
        if found is None:
            self._assignment = None
            self._beat_now.set()
        else:
            self._take(found)

    def _take(self, found: Assignment) -> None:
        is_news = found != self._assignment
        self._assignment = found  # also if only its sources are newer
        if is_news:
            self._news.set()
            if found.released:
                self._released.set()

    async def _apply(self) -> None:
        """Make what we hold match the assignment: unload first, then load slice by slice, reporting each."""
        await self._news.wait()
        self._news.clear()
        async with self._applying:
            wanted, started_s = self._assignment, time.monotonic()
            if wanted is None:
                return
            surplus = self._warm - set(wanted.copies)
            self._warm -= surplus
            if surplus:
                await asyncio.to_thread(self._server.unload, sorted(surplus))
            self._applied = wanted.version
            loaded: frozenset[Key] = frozenset()
            missing = [key for key in wanted.copies if key not in self._warm and key not in self._failed]
            if missing:
                loaded, failed = await asyncio.to_thread(self._load_slice, missing, wanted.sources)
                self._warm |= loaded
                self._failed |= failed
                self._news.set()  # look again: there may be more to load, or another assignment
        if surplus or missing:
            self._beat_now.set()
            took_s = time.monotonic() - started_s
            log.info(
                "assignment %d: %d unloaded, %d of %d to load, %d held, %.3f s; since the start %s",
                wanted.version, len(surplus), len(loaded), len(missing), len(self._warm), took_s,
                ", ".join(f"{totals.copies} from {source}" for source, totals in self._server.report().loaded.items()),
            )  # fmt: skip

    def _load_slice(
        self, keys: Sequence[Key], sources: Mapping[Key, Sequence[str]]
    ) -> tuple[frozenset[Key], dict[Key, str]]:
        """Load for a while, in order. Returns what is warm now and what failed, with the reason.

        Requests wait for a copy that no other server holds.
        """
        end_s = time.monotonic() + LOAD_SLICE_S
        loaded: list[Key] = []
        for key in keys:
            try:
                self._server.load([key], sources, urgent=key not in sources)
            except Exception as err:  # out of memory included: what was loaded before must be known all the same
                log.error("copy %s cannot be loaded: %s: %s", key, type(err).__name__, err)
                self._server.unload([key])
                return frozenset(loaded), {key: f"{type(err).__name__}: {err}"}
            loaded.append(key)
            if time.monotonic() > end_s:
                break
        return frozenset(loaded), {}
