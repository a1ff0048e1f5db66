"""What `expertmesh up`, `status` and `down` do."""

import asyncio
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve

from cluster import standing
from cluster.app import remove, status
from cluster.bring_up import bring_up
from cluster.config import ClusterConfig, PoolConfig, load_config, parse_config
from cluster.local import LocalRay, NodeScaling, connect, start_ray
from cluster.models import find_model
from cluster.standing import Standing
from protos.checkpoint import read_model
from protos.errors import InvalidRequest, Unavailable
from protos.services import require_free_port

READY_TIMEOUT_S = 600.0
STATUS_TIMEOUT_S = 10.0


def read_config(path: Path | None, *, model: str | None, servers: int | None) -> ClusterConfig:
    """The config of `up`: a YAML file, or defaults with `--model`; the options win over the file.

    Raises:
        InvalidRequest: no file and no model, or a value that cannot be; names field, value and limit.
        UnsupportedModel: the model cannot be read.
    """
    if path is not None:
        config = load_config(path, model=model)
    elif model is not None:
        config = parse_config({"model": model}, where="options")
    else:
        raise InvalidRequest("a CONFIG.yaml or --model DIR is needed")
    if servers is not None:
        if servers < 1:
            raise InvalidRequest(f"--servers is {servers}, it must be at least 1")
        if config.pools:
            names = ", ".join(pool.name for pool in config.pools)
            raise InvalidRequest(f"--servers is {servers}, but the config has pools ({names}): set their min and max")
        pool = config.experts.model_dump() | {"min_servers": servers}
        pool["max_servers"] = max(servers, config.experts.max_servers)
        config = parse_config(config.model_dump() | {"experts": pool}, where="options")
    config = config.model_copy(update={"model": str(find_model(config.model))})
    read_model(Path(config.model))
    return config


def up(
    config: ClusterConfig, *, address: str | None, folder: Path, on_progress: Callable[[str], None]
) -> dict[str, Any]:
    """Deploy on the Ray at `address`, or on one started here, and wait until ready; returns the cluster's status.

    If it fails, what it started is stopped.

    Args:
        folder: where `status` and `down` will look.

    Raises:
        InvalidRequest: a cluster is up already, or a port is in use.
        Unavailable: no Ray there, or the cluster does not become ready.
    """
    before = standing.load(folder)
    if before is not None and before.alive:
        raise InvalidRequest(f"a cluster is up already, on Ray {before.address}: stop it with `expertmesh down`")
    local: LocalRay | None = None
    if address is not None:
        connect(address)  # before anything is remembered: there is nothing to stop if this fails
        address = ray.get_runtime_context().gcs_address  # "auto" may be another Ray by the time of `down`
        if config.name in serve.status().applications:
            raise InvalidRequest(f"Ray {address} has a Serve application named {config.name!r} already")
    else:
        for port in filter(None, (config.router.port, config.router.http_port)):
            require_free_port(config.router.host, port)
        on_progress("starting a local Ray")
        local = _start_ray(config)
        address = local.address
    mine = Standing(name=config.name, address=address, local_ray=local, started_by=os.getpid())
    try:
        standing.save(mine, folder)
    except BaseException:
        if local is not None:
            local.stop()
        raise
    try:
        if local is not None:
            connect(address)
        on_progress(f"deploying {config.model} on Ray {address}")
        return bring_up(config, timeout_s=READY_TIMEOUT_S, on_progress=on_progress)
    except BaseException:
        down(folder)
        raise


def wait_until_down(folder: Path) -> None:
    """Return when `expertmesh down` has stopped the cluster that this process has up."""
    while (current := standing.load(folder)) is not None and current.started_by == os.getpid():
        time.sleep(0.2)


def find_status(folder: Path) -> dict[str, Any]:
    """The status of the cluster that is up.

    Raises:
        Unavailable: none is, or it does not answer.
    """
    current = standing.load(folder)
    if current is None or not current.alive:
        raise Unavailable("no cluster is up: start one with `expertmesh up`")
    connect(current.address)
    try:
        return asyncio.run(asyncio.wait_for(status(current.name), STATUS_TIMEOUT_S))
    except Exception as err:
        raise Unavailable(
            f"cluster {current.name} on Ray {current.address} does not answer: {type(err).__name__}"
        ) from err


def down(folder: Path) -> str:
    """Stop what `up` deployed, and the Ray it started; returns a line that says what that was."""
    current = standing.load(folder)
    if current is None:
        return "no cluster is up"
    if current.local_ray is not None:
        if ray.is_initialized():
            ray.shutdown()
        current.local_ray.stop()
        stopped = f"stopped {current.name} and its local Ray {current.address}"
    else:
        try:
            if not ray.is_initialized():
                connect(current.address)
            remove(current.name)
            stopped = f"removed {current.name} from Ray {current.address}"
        except Unavailable as err:  # gone, and the cluster with it: do not stand in the way of the next `up`
            stopped = f"{err.message}: forgot {current.name}"
    standing.forget(folder)
    return stopped


def _start_ray(config: ClusterConfig) -> LocalRay:
    """A local Ray with room for the whole cluster; with limits of servers per node, as many nodes as needed."""
    pools, routers = config.all_pools, config.router
    control_cpus = 1 + routers.num_replicas * routers.num_cpus
    per_node = [pool.max_servers_per_node for pool in pools if pool.max_servers_per_node is not None]
    if len(per_node) < len(pools):
        room = _resources(pools, [pool.max_servers for pool in pools])
        return start_ray(
            num_cpus=max(os.cpu_count() or 1, math.ceil(control_cpus + room.pop("CPU"))),
            num_gpus=math.ceil(room.pop("GPU")),
            resources=room,
        )
    room = _resources(pools, per_node)
    return start_ray(
        num_cpus=math.ceil(control_cpus),
        nodes=NodeScaling(
            min_nodes=max(math.ceil(pool.min_servers / limit) for pool, limit in zip(pools, per_node, strict=True)),
            max_nodes=max(math.ceil(pool.max_servers / limit) for pool, limit in zip(pools, per_node, strict=True)),
            cpus_per_node=max(1, math.ceil(room.pop("CPU"))),
            gpus_per_node=max(1, math.ceil(room.pop("GPU"))),
            resources=room,
        ),
    )


def _resources(pools: Sequence[PoolConfig], counts: Sequence[int]) -> dict[str, float]:
    """What that many servers of each pool reserve together."""
    total = {"CPU": 0.0, "GPU": 0.0}
    for pool, count in zip(pools, counts, strict=True):
        for name, amount in {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}.items():
            total[name] = total.get(name, 0.0) + count * amount
    return total
