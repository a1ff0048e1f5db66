"""What lives where: from load, servers and the current copies to target copies and steps. A pure function.

A layer is as slow as its most loaded server, and the layers of a model run one after the other: so every layer is
balanced by itself, and all layers share the servers' bytes. Servers are independent processes, hence, unlike EPLB's
GPUs (deepseek-ai/EPLB), they may hold unequal numbers of experts of a layer. That makes few copies do:

1. every expert without a copy gets one (`planner_missing`; whole new layers: `planner_fill`);
2. copies that no longer pay go (`planner_surplus`);
3. layers below `rebalance_below` are brought to `goal` with few loads: shares, moves, copies (`planner_balance`);
4. spare bytes go to second copies where a loss would cost the most (`planner_survival`);
5. what differs from the current copies becomes steps (`planner_steps`).

The gap between `rebalance_below` and `goal`, and similar gaps wherever one expert gives way to another, make the plan
steady: noise moves nothing, and a plan for what the last one asked for changes nothing.

Shapes: L layers, E experts, S servers.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cluster.planner_balance import rebalance, spread_idle
from cluster.planner_draft import Draft
from cluster.planner_missing import place_missing
from cluster.planner_steps import finish
from cluster.planner_surplus import drop_surplus
from cluster.planner_survival import survive
from cluster.planner_types import Plan, PlannerInput, PlannerServer
from router.table import CopyShare

__all__ = ["Plan", "PlannerInput", "PlannerServer", "balancedness", "plan"]

_ROUNDS = 8  # bytes that one rule gives free may serve another; more than two are rare


def plan(inputs: PlannerInput) -> Plan:
    """The next plan."""
    draft = Draft(inputs)
    lost = place_missing(draft)
    short = 0
    for attempt in range(_ROUNDS):
        mark = draft.mark()
        drop_surplus(draft)
        short = rebalance(draft, new=draft.filled if attempt == 0 else frozenset())
        spread_idle(draft)
        survive(draft)
        if draft.mark() == mark:
            break
    return finish(draft, lost, short)


def balancedness(
    load_E: npt.NDArray[np.float64], copies: Mapping[int, tuple[CopyShare, ...]], num_servers: int
) -> float:
    """Mean over maximum server load of one layer, 1 at best; 1 for a layer without load."""
    loads: dict[str, float] = {}
    for expert, held in copies.items():
        for copy in held:
            loads[copy.server_id] = loads.get(copy.server_id, 0.0) + copy.share * float(load_E[expert])
    most = max(loads.values(), default=0.0)
    return sum(loads.values()) / num_servers / most if most else 1.0
