"""The Serve application: `Router` (ingress), `Placement` and a deployment for each pool of expert servers.

`serve run cluster.app:build model=DIR`, `serve deploy` and a KubeRay RayService all start from `build`.
"""

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster.config import ClusterConfig, PoolConfig
from cluster.expert_replica import ExpertServerReplica
from cluster.placement import Placement
from cluster.pulling import direct
from cluster.relay import FollowTarget, PublishTargets
from cluster.router_replica import RouterReplica
from protos.checkpoint import read_model
from protos.errors import Unavailable
from router.table import PlacementTable

PLACEMENT, EXPERT_SERVER, ROUTER = "Placement", "ExpertServer", "Router"

# Calls in flight at a replica are heartbeats and long polls: Serve's default patience of 2 s helps nobody.
_SHUTDOWN_WAIT_LOOP_S = 0.1
_REPORT_S = 2.0  # what servers report to Serve is for its dashboard and for other policies: ours does not read it
_LOGGING = {"log_level": "INFO", "enable_access_log": False}  # or every heartbeat would be a line


def build(args: ClusterConfig) -> Application:
    """The application of one cluster.

    Args:
        args: Serve passes the `args` of its YAML, or key=value pairs, through this type.

    Raises:
        UnsupportedModel: `args.model` is not a model directory we understand.
    """
    read_model(Path(args.model))  # refuse here, in one line, what would fail in every replica
    placement = serve.deployment(
        name=PLACEMENT,
        autoscaling_config=_publishing(args),
        max_ongoing_requests=10_000,  # every server and router keeps a long poll open
        ray_actor_options={"num_cpus": 0.1},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=_SHUTDOWN_WAIT_LOOP_S,
        logging_config=_LOGGING,
    )(Placement)
    router = serve.deployment(
        name=ROUTER,
        num_replicas=args.router.num_replicas,
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": args.router.num_cpus},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=10,
        graceful_shutdown_wait_loop_s=_SHUTDOWN_WAIT_LOOP_S,
        logging_config=_LOGGING,
    )(RouterReplica)
    placement_node = placement.bind(args)
    pools = [_pool_deployment(args, pool).bind(args, pool.name, placement_node) for pool in args.all_pools]
    return router.bind(args, placement_node, pools)


def deployment_name(config: ClusterConfig, pool: PoolConfig) -> str:
    """What Serve calls a pool's deployment."""
    return f"{EXPERT_SERVER}-{pool.name}" if config.pools else EXPERT_SERVER


def _pool_deployment(args: ClusterConfig, pool: PoolConfig) -> Deployment:
    found = serve.deployment(
        name=deployment_name(args, pool),
        autoscaling_config=_autoscaling(args, pool),
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus, "resources": pool.resources},
        health_check_period_s=2,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=pool.drain_timeout_s + 10,
        graceful_shutdown_wait_loop_s=_SHUTDOWN_WAIT_LOOP_S,
        logging_config=_LOGGING,
    )(ExpertServerReplica)
    return (
        found if pool.max_servers_per_node is None else found.options(max_replicas_per_node=pool.max_servers_per_node)
    )


def _publishing(args: ClusterConfig) -> AutoscalingConfig:
    """One placement; Serve has it report how many servers every pool needs."""
    return AutoscalingConfig(
        min_replicas=1,
        initial_replicas=1,
        max_replicas=1,
        metrics_interval_s=args.scaling.metrics_interval_s,
        look_back_period_s=5 * args.scaling.metrics_interval_s,
        policy=AutoscalingPolicy(policy_function=PublishTargets),  # type: ignore[no-untyped-call]
    )


def _autoscaling(args: ClusterConfig, pool: PoolConfig) -> AutoscalingConfig:
    """The pool has as many replicas as the placement says, within its bounds."""
    return AutoscalingConfig(
        min_replicas=pool.min_servers,
        initial_replicas=pool.min_servers,
        max_replicas=pool.max_servers,
        # The placement keeps its own time: Serve's delays would come on top.
        upscale_delay_s=0,
        downscale_delay_s=0,
        metrics_interval_s=_REPORT_S,
        look_back_period_s=2 * _REPORT_S,
        policy=AutoscalingPolicy(  # type: ignore[no-untyped-call]
            policy_function=FollowTarget, policy_kwargs={"pool": pool.name}
        ),
    )


def deploy(config: ClusterConfig) -> None:
    """Deploy on the Ray this process is connected to, and wait until Serve says that every deployment is healthy.

    Raises:
        UnsupportedModel: the model cannot be read.
        RuntimeError: Serve could not start the deployments.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process
    application = build(config)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": config.router.host, "port": config.router.http_port},
        logging_config=_LOGGING,
    )
    serve.run(application, name=config.name, route_prefix=config.router.route_prefix)


async def wait_until_ready(name: str, *, timeout_s: float) -> dict[str, Any]:
    """Wait until every expert has a live copy in the table that the routers use; returns the status.

    Raises:
        Unavailable: not within the time; the message says what is missing.
    """
    found: dict[str, Any] = {}
    try:
        async with asyncio.timeout(timeout_s):
            while not found or not _is_ready(found):
                found = await status(name)
                await asyncio.sleep(0.05)
    except TimeoutError as err:
        missing = f"{len(found['missing_experts'])} experts have no copy yet" if found else "no placement answers"
        raise Unavailable(f"cluster {name!r} is not ready after {timeout_s:g} s: {missing}") from err
    return found


def _is_ready(found: dict[str, Any]) -> bool:
    current = bool(found["routers"]) and all(router["epoch"] == found["epoch"] for router in found["routers"])
    return bool(found["settled"] and current and (found["cold_allowed"] or not found["missing_experts"]))


async def status(name: str) -> dict[str, Any]:
    """The placement's status of a deployed cluster (see `Placement.status`)."""
    found: dict[str, Any] = await direct(serve.get_deployment_handle(PLACEMENT, name)).status.remote()
    return found


async def table(name: str) -> PlacementTable:
    """The table that a deployed cluster's routers get now."""
    found: PlacementTable = await direct(serve.get_deployment_handle(PLACEMENT, name)).poll_table.remote(-1, 0.0)
    return found


def remove(name: str) -> None:
    """Delete a deployed cluster. Its servers need not wait for others to take over their copies."""
    with contextlib.suppress(Exception):  # a placement that is away cannot be told; deletion works all the same
        direct(serve.get_deployment_handle(PLACEMENT, name)).close.remote().result(timeout_s=3)
    serve.delete(name)
