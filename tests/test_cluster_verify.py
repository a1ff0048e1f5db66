"""`verify` through a real cluster: every layer, on different numbers of servers and copies.

Of every family without Ray: tests/test_family_mesh.py.
"""

import asyncio
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from torch import Tensor

from cluster.reference import load_reference
from cluster.verify import TOLERANCE, LayerError, verify_layers
from router.client import RouterClient
from tests.cluster_fixtures import Cluster, deployed
from tests.tiny_models import tiny_model

DEMO_MODEL = Path(__file__).parent.parent / "examples/demo_model"
SHAPES = {"mixtral": (1, 1), "qwen2_moe": (2, 1), "olmoe": (3, 2), "deepseek_v3": (2, 2), "demo": (2, 2)}


@pytest.mark.parametrize("name", SHAPES)
def test_every_layer_equals_transformers_through_the_cluster(name: str, ray_cluster: str, tmp_path: Path) -> None:
    num_servers, num_copies = SHAPES[name]
    with deployed(
        DEMO_MODEL if name == "demo" else tiny_model(name, tmp_path),
        name=f"verify-{name}",
        router={"http_port": 8265, "route_prefix": f"/verify-{name}", "settings": {"compute_threads": 1}},
        experts={
            "min_servers": num_servers,
            "max_servers": num_servers,
            "num_cpus": 0.1,
            "settings": {"compute_threads": 1},
        },
        placement={"min_copies": num_copies},
    ) as cluster:
        errors = asyncio.run(verify(cluster, num_servers, num_copies))
    assert [error.layer for error in errors] == list(cluster.spec.layers)
    assert max(error.error for error in errors) <= TOLERANCE["float32"]


async def verify(cluster: Cluster, num_servers: int, num_copies: int) -> list[LayerError]:
    """Once every expert has its copies on that many servers."""
    status, _ = await cluster.until(
        lambda status: (
            len(status["servers"]) == num_servers
            and not status["missing_experts"]
            and (num_copies == 1 or not status["single_copy_experts"])
        ),
        f"{num_servers} servers hold {num_copies} copies of every expert",
    )
    async with RouterClient(status["router"]["grpc"]) as client:

        async def compute(layer: str, x_TD: Tensor, token_ids_T: npt.NDArray[np.int64]) -> Tensor:
            return (await client.forward(layer, x_TD, token_ids_T=token_ids_T)).y_TD

        return await verify_layers(cluster.spec, load_reference(cluster.spec), compute, on_layer=lambda _: None)
