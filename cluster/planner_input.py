"""What the planner is asked, out of the fleet's state: for the placement and for the simulator."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cluster.config import PlacementConfig
from cluster.fleet import Fleet
from cluster.messages import ServerHello
from cluster.planner import PlannerInput, PlannerServer


def planner_input(
    knobs: PlacementConfig,
    fleet: Fleet,
    *,
    layers: tuple[str, ...],
    load_LE: npt.NDArray[np.float64],
    speed: Callable[[ServerHello], float],
) -> PlannerInput:
    """The next plan's input.

    Args:
        load_LE: routed pairs per second that the gates demand, [layers, experts].
        speed: of a server, relative to the others.
    """
    # Copies change places through a free slot: without one, two full servers would wait for each other.
    needed = load_LE.size * max(knobs.min_copies, 1)
    draining = fleet.draining
    staying = [hello for hello in fleet.servers if hello.server_id not in draining]
    slot = int(sum(hello.max_copies - 1 for hello in staying) >= needed)
    return PlannerInput(
        layers=layers,
        load_LE=load_LE,
        servers=tuple(
            PlannerServer(
                server_id=hello.server_id,
                max_copies=hello.max_copies - slot,
                speed=speed(hello),
                draining=hello.server_id in draining,
            )
            for hello in fleet.servers
        ),
        current=fleet.current,
        blocked=fleet.blocked,
        min_copies=knobs.min_copies,
        max_copies=knobs.max_copies,
        max_moves=knobs.max_moves,
        survive=knobs.survive,
        goal=knobs.goal,
        rebalance_below=knobs.rebalance_below,
        swaps=bool(slot),
        min_pairs_per_s=knobs.min_pairs_per_s,
    )
