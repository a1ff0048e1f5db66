"""The request path: a batch becomes its answers by gate, capacity, dispatch and combine.

Each step is decided in a module of its own: `gate.py` who goes where, `capacity.py` who keeps its place, `exchange.py`
(with `dispatch.py`, `replicas.py` and `combine.py`) what travels, what returns and what happens on a failure.
"""

import time

import numpy as np
import numpy.typing as npt

from router.capacity import apply_capacity
from router.context import LayerContext
from router.exchange import Exchange
from router.gate import Routing
from router.merging import Batch


async def run_batch(batch: Batch, context: LayerContext) -> None:
    """Compute one batch and answer its requests. Never raises for what a request or a server did wrong."""
    began_s = time.monotonic()
    routing = await _route(batch, context)
    context.count_demand(batch.layer, _demand(routing, context.spec.num_experts))
    if context.record is not None:
        context.record(batch.layer, routing)
    overflow, gate, table = batch.requests[0].overflow, context.gates[batch.layer], context.snapshot.current
    decision = apply_capacity(routing, table.layer(batch.layer), overflow, gate=gate, rng=context.rng)
    around = context.around[batch.layer]
    x_TL = await context.compute(lambda: around.enter(batch.x_TD), flops=around.projection_flops(len(batch.x_TD)))
    await Exchange(batch, x_TL, context, table, routing, decision, gate_s=time.monotonic() - began_s).run()


async def _route(batch: Batch, context: LayerContext) -> Routing:
    """The routing that requests of this batch brought, or the gate's."""
    given = [request.routing for request in batch.requests if request.routing is not None]
    if given:
        if len(given) == 1:
            return given[0]
        return Routing(
            expert_TK=np.concatenate([routing.expert_TK for routing in given]),
            weight_TK=np.concatenate([routing.weight_TK for routing in given]),
        )
    gate = context.gates[batch.layer]
    with_scores = batch.requests[0].overflow.needs_scores
    flops = batch.x_TD.numel() * context.spec.num_experts
    ids = [request.token_ids_T for request in batch.requests if request.token_ids_T is not None]
    token_ids_T = None if len(ids) < len(batch.requests) else ids[0] if len(ids) == 1 else np.concatenate(ids)
    return await context.compute(
        lambda: gate(batch.x_TD, with_scores=with_scores, token_ids_T=token_ids_T, offsets=batch.offsets), flops=flops
    )


def _demand(routing: Routing, num_experts: int) -> npt.NDArray[np.int64]:
    """Routed pairs per expert; choices that need no server are no demand."""
    expert_N = routing.expert_TK.ravel()
    counts_E: npt.NDArray[np.int64] = np.bincount(expert_N[expert_N >= 0], minlength=num_experts)[:num_experts]
    return counts_E
