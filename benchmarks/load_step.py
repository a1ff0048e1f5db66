"""From a load step to a new copy, and to a new server, taking traffic; every answer checked.

    python -m benchmarks.load_step [--repeat N] [--out FILE]

A real local Ray with fake GPUs on one node (the node is there already), a tiny Mixtral, servers emulated at 500 routed
pairs/s so that two cores can fill them. Times run from the first request of the step until the new copy, or the new
server, has computed its first routed pair of real traffic.
"""

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import ray
from ray import serve

from benchmarks.processes import ROOT
from cluster.local import connect, local_ray
from protos import expert_pb2
from protos.services import status_method
from tests.cluster_fixtures import Cluster, copies_of, deployed, load, make_batches
from tests.tiny_models import tiny_model

HOT = ("1", 3)
MIN_SERVERS = 2


async def tokens_of(address: str) -> dict[tuple[str, int], int]:
    """Routed pairs computed by each copy of one server."""
    async with grpc.aio.insecure_channel(address) as channel:
        status = await status_method(channel)(expert_pb2.StatusRequest(), timeout=5)
    return {(copy.layer, copy.expert): copy.tokens for copy in status.copies}


async def until_computing(cluster: Cluster, known: set[str], key: tuple[str, int] | None) -> float:
    """When a server outside `known` has computed pairs (of `key`, if given)."""
    while True:
        for server in (await cluster.status())["servers"]:
            if server["id"] in known:
                continue
            try:
                tokens = await tokens_of(server["grpc"])
            except grpc.aio.AioRpcError:
                continue
            if (tokens.get(key, 0) if key else sum(tokens.values())) > 0:
                return time.monotonic()
        await asyncio.sleep(0.01)


async def at_rest(cluster: Cluster) -> dict[str, Any]:
    found, _ = await cluster.until(
        lambda status: (
            len(status["servers"]) == MIN_SERVERS
            and all(server["state"] == "serving" for server in status["servers"])
            and not status["missing_experts"]
            and copies_of(status, *HOT) <= 1
        ),
        "the pool is at rest",
        timeout_s=120,
    )
    return found


async def copy_step(cluster: Cluster) -> float:
    """Seconds from a hot expert's first request to its second copy's first pair."""
    hot = make_batches(cluster.spec, keep=lambda layer, expert_TK: expert_TK[:, 0] == HOT[1], rows=8, layers=(HOT[0],))
    status = await at_rest(cluster)
    holders = {s["id"] for s in status["servers"] if HOT in await tokens_of(s["grpc"])}
    started_s = time.monotonic()
    async with load(status["router"]["grpc"], hot, concurrency=1, pause_s=0.02) as account:
        took_s = await until_computing(cluster, holders, HOT) - started_s
    account.assert_clean()
    return took_s


async def server_step(cluster: Cluster) -> float:
    """Seconds from the first request of a load two servers cannot carry to a third server's first pair."""
    batches = make_batches(cluster.spec)
    status = await at_rest(cluster)
    known = {server["id"] for server in status["servers"]}
    started_s = time.monotonic()
    async with load(status["router"]["grpc"], batches, concurrency=8) as account:
        took_s = await until_computing(cluster, known, None) - started_s
    account.assert_clean()
    return took_s


async def measure(cluster: Cluster, repeat: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"copy_s": [], "server_s": []}
    for _ in range(repeat):
        times["copy_s"].append(await copy_step(cluster))
        times["server_s"].append(await server_step(cluster))
    return times


def measure_on_ray(folder: Path, repeat: int) -> dict[str, list[float]]:
    """Deploy on the Ray of this process and measure."""
    with deployed(
        tiny_model("mixtral", folder / "m"),
        name="step",
        router={"http_port": 8271, "settings": {"compute_threads": 1}},
        experts={
            "min_servers": MIN_SERVERS,
            "max_servers": MIN_SERVERS + 1,
            "num_gpus": 1,
            "num_cpus": 0.2,
            "settings": {"compute_dtype": "float32", "compute_threads": 1, "emulated_tokens_per_s": 500},
        },
        scaling={"downscale_delay_s": 3.0},
    ) as cluster:
        return asyncio.run(measure(cluster, repeat))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, local_ray(num_cpus=8, num_gpus=4) as started:
        connect(started.address)
        try:
            times = measure_on_ray(Path(folder), args.repeat)
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
    result = {
        "target_s": {"copy_s": 1.5, "server_s": 4.0},
        "median_s": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "all_s": {name: [round(value, 3) for value in values] for name, values in times.items()},
        "emulation": "servers paced to 500 routed pairs/s, GPUs are fake",
        "versions": {name: version(name) for name in ("ray", "torch", "grpcio")},
        "machine": {"python": platform.python_version(), "cores": psutil.cpu_count(), "cpu": platform.machine()},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
        ).stdout.strip(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
