"""From a config to a cluster that answers: deploy, wait until every expert has a live copy and the router answers.

Everything here assumes that this process is connected to a Ray (see `cluster.local`).
"""

import asyncio
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from ray import serve

from cluster.app import deploy, status
from cluster.config import ClusterConfig
from protos.errors import ExpertmeshError, Unavailable
from router.client import RouterClient

POLL_S = 0.1

# What a replica that failed to start says in Serve's report of it: "... protos.errors.InvalidRequest: port ...".
_OUR_ERROR = re.compile(r"protos\.errors\.\w+(?:\x1b\[\d+m)?: (?P<message>[^\n]+)")


def bring_up(
    config: ClusterConfig, *, timeout_s: float, on_progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Deploy and wait until ready; returns the cluster's status.

    Args:
        timeout_s: of the whole; a cluster that lacks resources would wait for ever.
        on_progress: called with a line when there is something new to say.

    Raises:
        UnsupportedModel: the model cannot be read.
        Unavailable: a deployment failed, or it is not ready in time; the message says what is missing.
    """
    end_s = time.monotonic() + timeout_s
    _deploy(config, end_s)
    found, missing = asyncio.run(_until_ready(config, end_s, on_progress))
    if missing:
        raise Unavailable(f"{config.name} is not ready after {timeout_s:g} s: {missing}")
    return found


def missing_to_be_ready(found: dict[str, Any], config: ClusterConfig) -> str:
    """What a status says is missing before the cluster can serve every request, "" if nothing."""
    serving = sum(server["state"] == "serving" for server in found["servers"])
    if serving < config.min_servers:
        return f"{serving} of {config.min_servers} expert servers"
    if not found["settled"]:
        return "the placement waits for its servers to report"
    if found["missing_experts"] and not found["cold_allowed"]:
        reasons = [event["detail"] for event in found["events"] if event["kind"] in ("load_failed", "memory")]
        why = f": {reasons[-1]}" if reasons else ""
        return f"{len(found['missing_experts'])} experts without a live copy{why}"
    if not found["router"]["grpc"]:
        return "no router yet"
    return ""


def _deploy(config: ClusterConfig, end_s: float) -> None:
    """`deploy` on a thread: Serve waits for resources without end."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            deploy(config)
        except BaseException as err:
            failed.append(err)

    thread = threading.Thread(target=run, name="expertmesh-deploy", daemon=True)
    thread.start()
    while thread.is_alive() and time.monotonic() < end_s:
        thread.join(POLL_S)
    if thread.is_alive():
        raise Unavailable(f"{config.name} is not deployed in time: {_serve_message(config.name)}")
    if failed:
        if isinstance(failed[0], ExpertmeshError):
            raise failed[0]
        reasons = _OUR_ERROR.findall(f"{failed[0]} {_serve_message(config.name)}")
        reason = reasons[-1] if reasons else " ".join(str(failed[0]).split())[:500]
        raise Unavailable(f"{config.name} could not be deployed: {reason}") from failed[0]


def _serve_message(name: str) -> str:
    """What Serve has to say about deployments that are not healthy."""
    try:
        application = serve.status().applications[name]
    except Exception as err:
        return f"Serve does not answer ({type(err).__name__})"
    return "; ".join(
        f"{deployment}: {detail.status.value}: {detail.message}"
        for deployment, detail in application.deployments.items()
        if detail.status.value != "HEALTHY"
    )


async def _until_ready(
    config: ClusterConfig, end_s: float, on_progress: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """The status, and what is still missing at `end_s` ("" if nothing)."""
    said = ""
    while True:
        try:
            found, missing = await _look(config)
        except Exception as err:  # Ray's and Serve's errors while the placement is starting
            found, missing = {}, f"the placement does not answer ({type(err).__name__})"
        if not missing or time.monotonic() > end_s:
            return found, missing
        if missing != said:
            said = missing
            on_progress(f"waiting: {missing}")
        await asyncio.sleep(POLL_S)


async def _look(config: ClusterConfig) -> tuple[dict[str, Any], str]:
    found = await asyncio.wait_for(status(config.name), 5.0)
    missing = missing_to_be_ready(found, config)
    if missing:
        return found, missing
    async with RouterClient(found["router"]["grpc"]) as client:
        try:
            answer = await client.describe(timeout_s=2.0)
        except ExpertmeshError as err:
            return found, f"the router at {client.address} does not answer: {err.message}"
    return found, "" if answer.epoch else "the router has no table yet"
