"""Pools on a real Ray: servers of two kinds, from none to an answer, up under demand, and back to none."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.config import parse_config
from protos.checkpoint import read_model
from router.client import RouterClient
from tests.cluster_fixtures import Cluster, deployed, load, make_batches, serving
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def cluster(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = tiny_model("mixtral", tmp_path_factory.mktemp("models") / "mixtral")
    spec = read_model(model)
    everything = len(spec.layers) * spec.num_experts
    copy_bytes = spec.expert_params * 4
    common = {"compute_dtype": "float32", "compute_threads": 1}
    few, many = {"budget_bytes": (everything + 2) * copy_bytes}, {"budget_bytes": 4 * everything * copy_bytes}
    with deployed(
        model,
        name="pools",
        router={"http_port": 8266, "num_cpus": 0.1, "settings": {"compute_threads": 1}},
        pools=[
            {
                "name": "fast",
                "min": 0,
                "max": 3,
                "num_gpus": 1,
                "num_cpus": 0.1,
                "settings": common | few | {"emulated_tokens_per_s": 600},
            },
            {
                "name": "roomy",
                "min": 0,
                "max": 2,
                "num_cpus": 0.1,
                "settings": common | many | {"emulated_tokens_per_s": 150},
            },
        ],
        placement={"min_copies": 0, "load_fall_s": 1.0},
        scaling={"downscale_delay_s": 4.0},
    ) as found:
        yield found


def scalings(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in status["events"] if event["kind"] == "scaling"]


def sizes(status: dict[str, Any]) -> dict[str, int]:
    return {pool["name"]: pool["servers"] for pool in status["pools"]}


async def test_from_none_to_an_answer_to_what_demand_needs_and_back_to_none(cluster: Cluster) -> None:
    found, _ = await cluster.until(lambda status: status["routers"], "a router")
    assert sizes(found) == {"fast": 0, "roomy": 0}, "nobody asks, nobody runs"
    batches = make_batches(cluster.spec)
    layer, x_TD, y_TD = batches.items[0]

    started_s = time.monotonic()
    async with RouterClient(found["router"]["grpc"]) as client:
        answer = await client.forward(layer, x_TD, timeout_s=60)
    print(f"from no server to an answer in {time.monotonic() - started_s:.2f} s")
    assert float((answer.y_TD - y_TD).abs().max()) <= 1e-5 * float(y_TD.abs().max())
    woken = scalings(await cluster.status())[0]
    assert (woken["pool"], woken["before"]) == ("fast", 0)
    assert woken["reason"] in ("demand", "backlog")

    asked_s = time.time()
    async with load(found["router"]["grpc"], batches, concurrency=24) as account:
        grown, took_s = await cluster.until(
            lambda status: sizes(status)["fast"] == 3, "the fast pool is full", timeout_s=120
        )
        await cluster.until(
            lambda status: len(serving(status)) >= 3 and account.answered > 60, "all of it serves", timeout_s=120
        )
        told = [event for event in scalings(grown) if event["at_s"] > asked_s and event["pool"] == "fast"]
    account.assert_clean()
    assert sum(event["servers"] > event["before"] for event in told) <= 2, "not one by one"
    assert {server["pool"]: server["speed"] for server in grown["servers"]}["fast"] == 1.0
    steps = [f"{event['servers']} ({event['reason']}) at {event['at_s'] - asked_s:.2f} s" for event in told]
    print(f"decided {', '.join(steps)} after the load came; three servers after {took_s:.2f} s")

    gone, took_s = await cluster.until(lambda status: not status["servers"], "no server is left", timeout_s=120)
    assert scalings(gone)[-1]["reason"] == "idle"
    assert sum(sizes(gone).values()) == 0
    print(f"back to none {took_s:.2f} s after the load")


def test_the_config_of_these_tests_is_an_ordinary_one(cluster: Cluster) -> None:
    assert parse_config(cluster.config.model_dump(mode="json")) == cluster.config
