"""The planners that are measured: ours, EPLB and a linear placement, all behind one function type.

Shapes: L layers, E experts, S servers, C copies, P slots of a layer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from benchmarks.eplb import rebalance_experts
from benchmarks.load_matrices import Load
from benchmarks.placements import Copies, Servers
from cluster.planner import PlannerInput, PlannerServer, plan
from router.table import CopyShare

GROUPS, GPUS_PER_NODE = 8, 8  # DeepSeek-V3's groups; for hierarchical EPLB


class PlanFunction(Protocol):
    """From load [L, E], servers with their budgets, the placement before (None at first) and how many lost servers
    every expert should survive, to a placement."""

    def __call__(self, load_LE: Load, servers: Servers, current: Copies | None, *, survive: int) -> Copies: ...


def expertmesh(load_LE: Load, servers: Servers, current: Copies | None, *, survive: int) -> Copies:
    """cluster/planner.py, one plan without a limit on moves."""
    before: dict[tuple[str, int], tuple[CopyShare, ...]] = {}
    if current is not None:
        columns = (current.layer_C, current.expert_C, current.server_C, current.share_C)
        for layer, expert, server, share in zip(*(column.tolist() for column in columns), strict=True):
            copy = CopyShare(server_id=servers[server].server_id, share=share)
            before[(str(layer), expert)] = (*before.get((str(layer), expert), ()), copy)
    inputs = PlannerInput(
        layers=tuple(str(layer) for layer in range(len(load_LE))),
        load_LE=load_LE,
        servers=servers,
        current=before,
        survive=survive,
        max_moves=load_LE.size * len(servers),
    )
    started_s = time.process_time()
    found = plan(inputs)
    plan_s = time.process_time() - started_s
    index = {server.server_id: s for s, server in enumerate(servers)}
    rows = [
        (int(layer), expert, index[copy.server_id], copy.share)
        for (layer, expert), held in found.copies.items()
        for copy in held
    ]
    layers, experts, where, shares = zip(*rows, strict=True)
    return Copies(
        layer_C=np.array(layers),
        expert_C=np.array(experts),
        server_C=np.array(where),
        share_C=np.array(shares),
        plan_s=plan_s,
    )


def linear(load_LE: Load, servers: Servers, current: Copies | None, *, survive: int) -> Copies:
    """Expert e of E on server e * S // E, whatever the load: what expert parallelism does without a balancer."""
    layer_C, expert_C = (index.ravel() for index in np.indices(load_LE.shape))
    server_C = expert_C * len(servers) // load_LE.shape[1]
    return Copies(layer_C=layer_C, expert_C=expert_C, server_C=server_C, share_C=np.ones(load_LE.size), plan_s=0.0)


def eplb(slots: int, *, num_nodes: int = 1) -> PlanFunction:
    """EPLB with that many slots per layer; global with one node. It knows no placement before and no survival."""

    def place(load_LE: Load, servers: Servers, current: Copies | None, *, survive: int) -> Copies:
        started_s = time.process_time()
        found = rebalance_experts(load_LE, slots, GROUPS, num_nodes, len(servers))
        plan_s = time.process_time() - started_s
        expert_LP = found.physical_to_logical_LP
        layer_LP, slot_LP = np.indices(expert_LP.shape)
        return Copies(
            layer_C=layer_LP.ravel(),
            expert_C=expert_LP.ravel(),
            server_C=slot_LP.ravel() // (slots // len(servers)),
            share_C=1 / found.expert_count_LE[layer_LP, expert_LP].ravel(),
            plan_s=plan_s,
        )

    return place


# A new planner joins every comparison with one line here.
PLANNERS: dict[str, PlanFunction] = {"expertmesh": expertmesh}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    name: str
    plan: PlanFunction
    extra: float  # bytes beyond one copy of every expert, as a share of that


def arms(num_servers: int, slots: Sequence[int], extras: Sequence[float]) -> list[Arm]:
    """Linear, EPLB with these slots, and every planner with these bytes and with EPLB's."""
    found = [Arm(name="linear", plan=linear, extra=0.0)]
    for count in slots:
        nodes = num_servers // GPUS_PER_NODE
        found.append(Arm(name=f"EPLB global, {count} slots", plan=eplb(count), extra=count / 256 - 1))
        if GROUPS % nodes == 0:
            place = eplb(count, num_nodes=nodes)
            found.append(Arm(name=f"EPLB hierarchical, {count} slots", plan=place, extra=count / 256 - 1))
    for name, function in PLANNERS.items():
        for extra in (*extras, *(count / 256 - 1 for count in slots)):
            found.append(Arm(name=f"{name}, {extra:.1%} extra bytes", plan=function, extra=extra))
    return found


def make_servers(load_LE: Load, num_servers: int, extra: float) -> Servers:
    """Equal servers that hold one copy of every expert and `extra` (a share of that) more."""
    most = int(load_LE.size * (1 + extra) / num_servers + 1e-9)
    return tuple(PlannerServer(server_id=f"s{s:04}", max_copies=most) for s in range(num_servers))


def unequal_servers(load_LE: Load, extra: float) -> Servers:
    """8 servers of each kind: speed 1 or 2, bytes 1 or 2."""
    unit = load_LE.size * (1 + extra) / 48
    return tuple(
        PlannerServer(server_id=f"s{s:04}", max_copies=int(unit * (1 + s % 2)), speed=1.0 + s // 2 % 2)
        for s in range(32)
    )
