"""The control path on a real Ray: deploy, scale, lose servers and the placement, shrink, and never lose a request."""

import asyncio
import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cluster.local import connect, local_ray
from protos.errors import ExpertmeshError
from tests.cluster_fixtures import Account, Cluster, copies_of, deployed, load, make_batches, serving
from tests.tiny_models import tiny_model

Keep = Callable[[str, npt.NDArray[np.int32]], npt.NDArray[np.bool_]]
MIN_SERVERS, MAX_SERVERS = 2, 4


@pytest.fixture(scope="module")
def cluster(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = tiny_model("mixtral", tmp_path_factory.mktemp("models") / "mixtral")
    with deployed(
        model,
        name="test",
        router={"http_port": 8265, "settings": {"compute_threads": 1}},
        experts={
            "min_servers": MIN_SERVERS,
            "max_servers": MAX_SERVERS,
            "num_gpus": 1,
            "num_cpus": 0.2,
            # Paced, so that two cores can show a pool at its limit.
            "settings": {"compute_dtype": "float32", "compute_threads": 1, "emulated_tokens_per_s": 500},
        },
        scaling={"downscale_delay_s": 4.0},
    ) as found:
        yield found


async def at_rest(cluster: Cluster) -> str:
    """Wait for the smallest pool with everything placed; returns the router's address."""
    found, _ = await cluster.until(
        lambda status: len(status["servers"]) == len(serving(status)) == MIN_SERVERS and not status["missing_experts"],
        f"{MIN_SERVERS} servers hold every expert",
    )
    return str(found["router"]["grpc"])


def ids(status: dict[str, Any]) -> set[str]:
    return {server["id"] for server in status["servers"]}


async def test_a_deployed_cluster_answers_like_transformers(cluster: Cluster) -> None:
    address = await at_rest(cluster)
    batches = make_batches(cluster.spec)
    async with load(address, batches, concurrency=2) as account:
        await cluster.until(lambda _: account.answered >= 2 * len(batches.items), "every batch was answered")
    account.assert_clean()


def sent_to(expert: int) -> Keep:
    """Tokens whose first choice is this expert."""
    return lambda layer, expert_TK: expert_TK[:, 0] == expert


async def test_a_hot_expert_gets_more_copies_within_seconds_and_no_request_notices(cluster: Cluster) -> None:
    address = await at_rest(cluster)
    batches = make_batches(cluster.spec, keep=sent_to(3), rows=8, layers=("1",))
    before = await cluster.status()
    assert copies_of(before, "1", 3) == 1
    async with load(address, batches, concurrency=1, pause_s=0.02) as account:
        _, took_s = await cluster.until(lambda status: copies_of(status, "1", 3) >= 2, "expert 3 has two copies")
    account.assert_clean()
    assert account.retried == 0, "make before break: no router asks a server for what it does not hold"
    assert took_s < 5
    print(f"second copy after {took_s:.2f} s")


async def test_the_pool_grows_under_load_and_shrinks_after_it_without_losing_a_request(cluster: Cluster) -> None:
    address = await at_rest(cluster)
    batches = make_batches(cluster.spec)
    async with load(address, batches, concurrency=8) as account:
        _, took_s = await cluster.until(lambda status: len(serving(status)) >= 4, "four servers hold copies")
        _, traffic_s = await cluster.until(
            lambda status: sum(server["pairs_per_s"] > 0 for server in status["servers"]) >= 4, "all four compute"
        )
    async with load(address, batches, concurrency=1, pause_s=0.1) as light:
        await cluster.until(
            lambda status: len(status["servers"]) == MIN_SERVERS and not status["missing_experts"], "two servers again"
        )
    account.assert_clean()
    light.assert_clean()
    assert account.retried + light.retried == 0
    print(f"four servers after {took_s:.2f} s, all in traffic {traffic_s:.2f} s later")


async def test_a_killed_server_costs_no_request_and_is_replaced(
    cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    address = await at_rest(cluster)
    batches = make_batches(cluster.spec)
    async with load(address, batches, concurrency=2, pause_s=0.15) as account:
        before, _ = await cluster.until(lambda _: account.answered > 20, "load is running")
        victim = serving(before)[0]
        os.kill(victim["pid"], signal.SIGKILL)
        after, took_s = await cluster.until(
            lambda status: (
                all(server["id"] != victim["id"] for server in status["servers"]) and not status["missing_experts"]
            ),
            "the survivors hold every expert",
        )
        _, replaced_s = await cluster.until(
            lambda status: len(serving(status)) >= MIN_SERVERS, "a new server holds copies"
        )
        answered = account.answered
        await cluster.until(lambda _: account.answered > answered + 20, "load goes on")
    account.assert_clean()
    assert after["epoch"] > before["epoch"]
    assert "raylet" not in capfd.readouterr().out, "Ray's complaints do not end up on our standard output"
    print(f"re-placed after {took_s:.2f} s, replaced {replaced_s:.2f} s later, slowest {account.slowest_s:.2f} s")


async def test_requests_go_on_while_the_placement_is_killed_and_epochs_never_go_back(cluster: Cluster) -> None:
    address = await at_rest(cluster)
    batches = make_batches(cluster.spec)
    async with load(address, batches, concurrency=2, pause_s=0.15) as account:
        before, _ = await cluster.until(lambda _: account.answered > 20, "load is running")
        os.kill(before["placement"]["pid"], signal.SIGKILL)
        answered = account.answered
        after, took_s = await cluster.until(
            lambda status: (
                status["placement"]["pid"] != before["placement"]["pid"]
                and status["settled"]
                and ids(status) >= ids(before)
                and status["routers"]
                and status["routers"][0]["epoch"] == status["epoch"]
            ),
            "a new placement knows everyone",
        )
        assert account.answered > answered, "requests went on meanwhile"
        await used(cluster, account, after["epoch"])
    account.assert_clean()
    assert account.retried == 0
    assert after["epoch"] > before["epoch"]
    assert not after["missing_experts"]
    print(f"placement back after {took_s:.2f} s")


async def test_copies_move_between_servers_without_a_request_noticing(cluster: Cluster) -> None:
    address = await at_rest(cluster)
    epochs = []
    for expert in (0, 5, 2):
        batches = make_batches(cluster.spec, keep=sent_to(expert), rows=8, layers=("0", "2"))
        began_s = time.time()
        async with load(address, batches, concurrency=2, pause_s=0.01) as account:
            epochs.append(await moved(cluster, began_s))
            await used(cluster, account, epochs[-1])
        account.assert_clean()
        assert account.retried == 0
    assert len(set(epochs)) == 3


async def used(cluster: Cluster, account: Account, epoch: int) -> None:
    await cluster.until(lambda _: account.epochs and account.epochs[-1] >= epoch, "new requests use the epoch")


async def moved(cluster: Cluster, since_s: float) -> int:
    """Wait for a re-placement for load that is over; returns the epoch that has it."""

    def over(status: dict[str, Any]) -> bool:
        return any(
            event["kind"] == "placed" and event["at_s"] > since_s and event["reasons"].get("load")
            for event in status["events"]
        )

    found, _ = await cluster.until(over, "copies moved for load")
    return int(found["epoch"])


async def test_status_and_health_over_http(cluster: Cluster) -> None:
    await at_rest(cluster)
    base = "http://127.0.0.1:8265"
    status = json.loads(await asyncio.to_thread(lambda: urllib.request.urlopen(f"{base}/status").read()))
    assert status["model"] == cluster.config.model
    assert len(status["servers"]) == MIN_SERVERS
    health = json.loads(await asyncio.to_thread(lambda: urllib.request.urlopen(f"{base}/healthz").read()))
    assert health["ready"] is True


def test_a_second_local_ray_starts_beside_and_stops_alone(ray_cluster: str) -> None:
    import ray

    with local_ray(num_cpus=1) as second:
        assert second.address != ray_cluster
        assert second.session in second.pids()
        assert second.temp_dir.exists()
    assert not second.pids()
    assert not second.temp_dir.exists()
    assert sum(node["Alive"] for node in ray.nodes()) == 1  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1"])
def test_a_ray_that_is_not_there_gives_one_clear_error(address: str) -> None:
    with pytest.raises(ExpertmeshError, match=address):
        connect(address)
