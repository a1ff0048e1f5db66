"""What a Ray user would write first: the same dispatch to plain actors, and to Serve deployment handles."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import serve
from torch import Tensor

from cluster.local import connect, local_ray
from experts.compute import partial_sums
from experts.weights import load_expert
from protos.checkpoint import Checkpoint, read_model
from router.dispatch import plan_dispatch
from router.gate import Gate
from router.table import PlacementTable

RayCall = Callable[[Gate, Tensor], Awaitable[Tensor]]


class Experts:
    """Holds some experts and computes partial sums for the rows it is sent."""

    def __init__(self, model: str, experts: list[int]) -> None:
        torch.set_num_threads(1)
        spec = read_model(Path(model))
        checkpoint = Checkpoint(spec)
        cpu, fp32 = torch.device("cpu"), torch.float32
        self._copies = {
            expert: load_expert(checkpoint, spec.layers[0], expert, device=cpu, dtype=fp32) for expert in experts
        }

    def compute(self, x_RD: Any, pair_row: Any, pair_expert: Any, pair_weight: Any) -> Any:
        """Partial sums as a numpy array [R, D]."""
        return partial_sums(torch.from_numpy(x_RD), pair_row, pair_expert, pair_weight, self._copies)


def start_ray_arms(
    stack: ExitStack, model: Path, experts: list[list[int]], table: PlacementTable
) -> dict[str, RayCall]:
    """Start a local Ray with both variants; returns {"actors": call, "serve": call}."""
    connect(stack.enter_context(local_ray(num_cpus=8)).address)
    stack.callback(ray.shutdown)
    serve.start(proxy_location="Disabled")
    actors: list[Any] = [ray.remote(num_cpus=0)(Experts).remote(str(model), held) for held in experts]
    deployment: Any = serve.deployment(Experts, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
    handles: list[Any] = [
        serve.run(deployment.options(name=f"Experts{i}").bind(str(model), held), name=f"app{i}", route_prefix=None)
        for i, held in enumerate(experts)
    ]
    stack.callback(serve.shutdown)
    layer = table.layer("0")

    def caller(send: Callable[..., Awaitable[Any]]) -> RayCall:
        async def call(gate: Gate, x_TD: Tensor) -> Tensor:
            routing = gate(x_TD)
            plan = plan_dispatch(
                routing.expert_TK,
                routing.weight_TK,
                layer,
                load_S=np.zeros(len(experts)),
                rng=np.random.default_rng(0),
            )
            replies = [
                send(d.server, x_TD.numpy()[d.row_R], d.pair_row_P, d.pair_expert_P, d.pair_weight_P)
                for d in plan.dispatches
            ]
            y_TD = torch.zeros(x_TD.shape)
            for dispatch, partial_RD in zip(plan.dispatches, await asyncio.gather(*replies), strict=True):
                y_TD.index_add_(0, torch.from_numpy(dispatch.row_R.astype(np.int64)), torch.tensor(partial_RD))
            return y_TD

        return call

    async def to_actor(server: int, *args: Any) -> Any:
        return await actors[server].compute.remote(*args)

    async def to_handle(server: int, *args: Any) -> Any:
        return await handles[server].compute.remote(*args)

    return {"actors": caller(to_actor), "serve": caller(to_handle)}
