"""The Serve application: `Router` (ingress), `ExpertServer` and `Placement`, built from one config.

`serve run cluster.app:build model=DIR`, `serve deploy` and a KubeRay RayService all start from `build`.
"""

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster.config import ClusterConfig
from cluster.expert_replica import ExpertServerReplica
from cluster.placement import Placement
from cluster.pulling import direct
from cluster.router_replica import RouterReplica
from protos.checkpoint import read_model
from protos.errors import Unavailable

PLACEMENT, EXPERT_SERVER, ROUTER = "Placement", "ExpertServer", "Router"

# Calls in flight at a replica are heartbeats and long polls: Serve's default patience of 2 s helps nobody.
_SHUTDOWN_WAIT_LOOP_S = 0.1
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
        num_replicas=1,
        max_ongoing_requests=10_000,  # every server and router keeps a long poll open
        ray_actor_options={"num_cpus": 0.1},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=_SHUTDOWN_WAIT_LOOP_S,
        logging_config=_LOGGING,
    )(Placement)
    experts = serve.deployment(
        name=EXPERT_SERVER,
        autoscaling_config=_autoscaling(args),
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": args.experts.num_cpus, "num_gpus": args.experts.num_gpus},
        health_check_period_s=2,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=args.experts.drain_timeout_s + 10,
        graceful_shutdown_wait_loop_s=_SHUTDOWN_WAIT_LOOP_S,
        logging_config=_LOGGING,
    )(ExpertServerReplica)
    if args.experts.max_servers_per_node is not None:
        experts = experts.options(max_replicas_per_node=args.experts.max_servers_per_node)
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
    return router.bind(args, placement_node, experts.bind(args, placement_node))


def _autoscaling(args: ClusterConfig) -> AutoscalingConfig:
    pool, scaling = args.experts, args.scaling
    return AutoscalingConfig(
        min_replicas=pool.min_servers,
        initial_replicas=pool.min_servers,
        max_replicas=pool.max_servers,
        # The policy keeps its own time: Serve's delays would come on top.
        upscale_delay_s=0,
        downscale_delay_s=0,
        metrics_interval_s=scaling.metrics_interval_s,
        look_back_period_s=scaling.look_back_s,
        policy=AutoscalingPolicy(  # type: ignore[no-untyped-call]
            policy_function="cluster.scaling:ScalingPolicy",
            policy_kwargs={
                "min_servers": pool.min_servers,
                "max_servers": pool.max_servers,
                "target_busy": scaling.target_busy,
                "upscale_busy": scaling.upscale_busy,
                "drain_backlog_s": scaling.drain_backlog_s,
                "downscale_delay_s": scaling.downscale_delay_s,
            },
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
    return found["settled"] and not found["missing_experts"] and current


async def status(name: str) -> dict[str, Any]:
    """The placement's status of a deployed cluster (see `Placement.status`)."""
    found: dict[str, Any] = await direct(serve.get_deployment_handle(PLACEMENT, name)).status.remote()
    return found


def remove(name: str) -> None:
    """Delete a deployed cluster. Its servers need not wait for others to take over their copies."""
    with contextlib.suppress(Exception):  # a placement that is away cannot be told; deletion works all the same
        direct(serve.get_deployment_handle(PLACEMENT, name)).close.remote().result(timeout_s=3)
    serve.delete(name)
