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

import grpc.aio
import psutil
import ray
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

log = logging.getLogger("expertmesh.cluster")

KEEP_S = 30 * 24 * 3600  # Ray ends idle workers early unless it is told how long to keep them
AFTER_S = 5.0  # the server that has just started needs the processor first
_TIMEOUT_S = 5.0


async def keep_spare_worker() -> None:
    """A while after a server has started: see that the next one on this node finds a warm worker."""
    await asyncio.sleep(AFTER_S + random.uniform(0, AFTER_S))  # servers that started together start one spare, not many
    try:
        if not _has_idle_worker():
            await start_spare_worker()
    except Exception as err:  # a head start that is not there is no reason to fail
        log.info("no spare worker: %s: %s", type(err).__name__, err)


async def start_spare_worker() -> bool:
    """Ask this node's raylet for one more idle worker of our job. False, with a log line, if it will not."""
    context = ray.get_runtime_context()
    node_id = context.get_node_id()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    node = next((node for node in nodes if node["NodeID"] == node_id), None)
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
            log.info("no spare worker on node %s: %s: %s", node_id[-8:], err.code().name, err.details())
            return False
    return True


def _has_idle_worker() -> bool:
    """Whether this node's raylet, our parent, has a worker without work."""
    workers = psutil.Process(os.getppid()).children()
    return any(worker.cmdline()[:1] == ["ray::IDLE"] for worker in workers)
