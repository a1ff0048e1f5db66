"""A warm worker process on this node, for the server that starts here next.

A Ray worker imports Ray, torch and Serve before it can become a replica: seconds of processor time, at the moment when
a server is missing. Ray starts such workers ahead only when a node starts, so the first server of a node is quick and
every later one slow (measured on two cores: 0.2 s against 4 s and more). The raylet has a method to start them at any
time, which Ray's own core calls; there is no public one. If it is not there, a server starts as slowly as before.
"""

import asyncio
import logging
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import grpc.aio
import psutil
import ray
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

from cluster.config import PoolConfig

log = logging.getLogger("expertmesh.cluster")

KEEP_S = 30 * 24 * 3600  # Ray ends idle workers early unless it is told how long to keep them
LOOK_S = 15.0  # not at once: the surge that has called a server needs the processor first
_TIMEOUT_S = 5.0


async def keep_spare_worker(pools: Sequence[PoolConfig]) -> None:
    """See that the next server on this node finds a warm worker, whoever takes the last one, until cancelled.

    Args:
        pools: whose servers may come; a node that has not what one of them needs gets no worker.
    """
    try:
        node = _this_node()
        while node and any(_fits(pool, node["Resources"]) for pool in pools):
            await asyncio.sleep(random.uniform(LOOK_S, 2 * LOOK_S))  # servers of a node look one after the other
            if not _has_spare_worker() and not await start_spare_worker():
                return
    except Exception as err:  # a head start that is not there is no reason to fail
        log.info("no spare worker: %s: %s", type(err).__name__, err)


async def start_spare_worker() -> bool:
    """Ask this node's raylet for one more idle worker of our job. False, with a log line, if it will not."""
    context, node = ray.get_runtime_context(), _this_node()
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


def _has_spare_worker() -> bool:
    """Whether this node's raylet, our parent, has a worker without work, or is starting one."""
    for worker in psutil.Process(os.getppid()).children():
        with suppress(psutil.Error):  # it has just ended
            command = worker.cmdline()
            if command[:1] == ["ray::IDLE"] or any(word.endswith("default_worker.py") for word in command):
                return True
    return False
