"""A warm worker process on this node, for the server that starts here next.

A Ray worker imports Ray, torch and Serve before it can become a replica: seconds of processor time, at the moment when
a server is missing. Ray starts such workers ahead only when a node starts, so the first server of a node is quick and
every later one slow (measured on two cores: 0.2 s against 4 s and more). The raylet has a method to start them at any
time, which Ray's own core calls; there is no public one. If it is not there, a server starts as slowly as before.

A worker is started only while the processor has room for it, and gently (Linux' SCHED_IDLE): on a machine that is full
even gentle ones, two at a time, kept everybody waiting for seconds.

Workers are looked at in a thread: reading a process' command line waits for the lock of its memory, which a worker that
starts gently may hold for seconds while the processor is busy.
"""

import asyncio
import logging
import os
import random
import resource
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import ray
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

from cluster.config import PoolConfig

log = logging.getLogger("expertmesh.cluster")

KEEP_S = 30 * 24 * 3600  # Ray ends idle workers early unless it is told how long to keep them
LOOK_S = 5.0  # not at once: the surge that has called a server needs the processor first; but while the server lives
RETRY_S = 3.0  # while there is no room
ROOM_CORES = 0.6  # a starting worker takes more where it can, and there is no room for two on a busy small machine
_ROOM_S = 1.0
_TIMEOUT_S = 5.0
_READY_S = 120.0
_WATCH_S = 0.25
_CAP_SYS_NICE = 23


async def keep_spare_worker(pools: Sequence[PoolConfig]) -> None:
    """See that the next server on this node finds a warm worker, whoever takes the last one, until cancelled.

    Args:
        pools: whose servers may come; a node that has not what one of them needs gets no worker.
    """
    set_idle_class(os.getpid(), idle=False)  # whoever started this process gently may be gone
    try:
        node = await asyncio.to_thread(_this_node)
        wait_s = LOOK_S
        while node and any(_fits(pool, node["Resources"]) for pool in pools):
            await asyncio.sleep(random.uniform(wait_s, 2 * wait_s))  # servers of a node look one after the other
            wait_s = LOOK_S
            if await asyncio.to_thread(_spare_worker) is not None:
                continue
            if not await asyncio.to_thread(has_room):
                wait_s = RETRY_S
                continue
            if await asyncio.to_thread(_spare_worker) is None:  # still: others of this node look for room as well
                if not await start_spare_worker():
                    return
                await _start_gently()
    except Exception as err:  # a head start that is not there is no reason to fail
        log.info("no spare worker: %s: %s", type(err).__name__, err)


def has_room() -> bool:
    """Whether this machine leaves ROOM_CORES unused; looks for a second."""
    times = psutil.cpu_times_percent(interval=_ROOM_S)
    stolen = getattr(times, "steal", 0.0)  # given to other machines by the host
    return leaves_room(psutil.cpu_count() or 1, times.idle / max(100 - stolen, 1))


def leaves_room(cores: int, unused_share: float) -> bool:
    """Whether another worker can start where this share of the time that the cores were given was not used."""
    return cores * unused_share >= ROOM_CORES


async def start_spare_worker() -> bool:
    """Ask this node's raylet for one more idle worker of our job. False, with a log line, if it will not."""
    context, node = ray.get_runtime_context(), await asyncio.to_thread(_this_node)
    if node is None:
        return False
    request = node_manager_pb2.PrestartWorkersRequest(  # type: ignore[attr-defined]
        language=common_pb2.Language.PYTHON,  # type: ignore[attr-defined]
        job_id=bytes.fromhex(context.get_job_id()),
        num_workers=1,
        keep_alive_duration_secs=KEEP_S,
    )
    request.runtime_env_info.serialized_runtime_env = context.get_runtime_env_string()  # type: ignore[no-untyped-call]
    async with grpc.aio.insecure_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        try:
            raylet = node_manager_pb2_grpc.NodeManagerServiceStub(channel)  # type: ignore[no-untyped-call]
            await raylet.PrestartWorkers(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as err:
            log.info("no spare worker on node %s: %s: %s", context.get_node_id()[-8:], err.code().name, err.details())
            return False
    return True


def _this_node() -> dict[str, Any] | None:
    """What Ray says about our node, totals of its resources included."""
    node_id = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return next((node for node in nodes if node["NodeID"] == node_id), None)


def _fits(pool: PoolConfig, has: Mapping[str, float]) -> bool:
    """Whether an empty node with these resources could take a server of the pool."""
    needs = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}
    return all(has.get(name, 0.0) >= amount for name, amount in needs.items())


async def _start_gently() -> None:
    """Let the worker that is starting have what others leave of the processor, until it is ready or has work."""
    if not may_leave_idle_class():
        return
    seconds = 0.0
    while (worker := await asyncio.to_thread(_spare_worker, starting=True)) is None:
        await asyncio.sleep(_WATCH_S)
        seconds += _WATCH_S
        if seconds > _TIMEOUT_S:
            return
    set_idle_class(worker.pid, idle=True)
    try:
        with suppress(psutil.Error):
            quiet = 0
            while quiet < 4 and seconds < _READY_S and await asyncio.to_thread(_is_spare, worker):
                await asyncio.sleep(_WATCH_S)
                seconds += _WATCH_S
                set_idle_class(worker.pid, idle=True)  # of threads that have come since
                quiet = quiet + 1 if await asyncio.to_thread(_is_quiet, worker) else 0
    finally:
        set_idle_class(worker.pid, idle=False)


def may_leave_idle_class() -> bool:
    """Whether this process may undo what `set_idle_class` does: going there is free, coming back is not."""
    if resource.getrlimit(resource.RLIMIT_NICE)[0] >= 20 - os.getpriority(os.PRIO_PROCESS, 0):
        return True
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_NICE & 1)
    return False


def set_idle_class(pid: int, *, idle: bool) -> None:
    """Whether the threads of a process have only what others leave of the processor (Linux' SCHED_IDLE)."""
    policy = os.SCHED_IDLE if idle else os.SCHED_OTHER
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                os.sched_setscheduler(int(thread), policy, os.sched_param(0))


def _spare_worker(*, starting: bool = False) -> psutil.Process | None:
    """A worker of this node's raylet, our parent, without work or about to be; only the latter if `starting`."""
    for worker in psutil.Process(os.getppid()).children():
        with suppress(psutil.Error):  # it has just ended
            if _is_starting(worker) if starting else _is_spare(worker):
                return worker
    return None


def _is_spare(worker: psutil.Process) -> bool:
    return _is_starting(worker) or _is_idle(worker)


def _is_quiet(worker: psutil.Process) -> bool:
    """Whether it has no work and has used next to nothing of the processor since the last call."""
    busy_percent = worker.cpu_percent()
    return _is_idle(worker) and busy_percent < 5


def _is_idle(worker: psutil.Process) -> bool:
    title: list[str] = worker.cmdline()[:1]
    return title == ["ray::IDLE"]


def _is_starting(worker: psutil.Process) -> bool:
    return any(word.endswith("default_worker.py") for word in worker.cmdline())
