"""What the planner is asked and what it answers: plain values.

Shapes: L layers, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.messages import Key
from cluster.steps import Step
from router.table import CopyShare

Copies = Mapping[Key, tuple[CopyShare, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerServer:
    """A server that copies may live on. `max_copies` is what fits into its byte budget; `speed` is relative."""

    server_id: str
    max_copies: int
    speed: float = 1.0
    draining: bool = False  # keeps its copies until others hold them, gets no new ones


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannerInput:
    """Everything a plan depends on.

    Args:
        layers: names, in the order of load_LE's rows.
        load_LE: routed pairs per second that the gate demands of each expert.
        servers: the live ones.
        current: copies that exist or are being loaded; servers not in `servers` are ignored.
        blocked: copies that must not be placed there (they failed to load).
        min_copies: live copies every expert should have; 0: an expert without demand may have none.
        max_copies: most copies of one expert; None: one per server.
        max_moves: loads for balance and survival in one plan; placing what is missing or drained is never limited.
        survive: servers that may be lost at once without an expert going with them, as far as spare bytes allow.
        goal: balancedness (mean over most loaded server, per speed) that a touched layer is brought to.
        rebalance_below: a layer above this balancedness is left alone.
        swaps: whether two experts on full servers may change places. Made before broken, that takes room for one copy
            more than max_copies on one of the servers.
        min_pairs_per_s: layers with less load carry no information about heat: their copies stay as they are.
    """

    layers: tuple[str, ...]
    load_LE: npt.NDArray[np.float64]
    servers: tuple[PlannerServer, ...]
    current: Copies
    blocked: frozenset[tuple[Key, str]] = frozenset()
    min_copies: int = 1
    max_copies: int | None = None
    max_moves: int = 16
    survive: int = 0
    goal: float = 0.95
    rebalance_below: float = 0.9
    swaps: bool = True
    min_pairs_per_s: float = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The target copies with their shares (the shares of one expert sum to 1), and how to get there.

    Args:
        copies: every expert that has a place; copies on draining servers are not in it.
        steps: loads most urgent first, then unloads, then reshares.
        missing: experts without a place for lack of memory, most loaded first.
        wanted_copies: copies that balance was denied for lack of memory.
        needed_copies: what has to fit wherever it lives: one copy of every placed expert, and what balance has added.
        single_copies: experts with exactly one copy.
        mass_at_risk: an upper bound of the gate mass (share of all load) that loses its last copy when
            max(1, survive) servers are lost, the worst ones; exact for one server.
    """

    copies: Copies
    steps: tuple[Step, ...]
    missing: tuple[Key, ...] = ()
    wanted_copies: int = 0
    needed_copies: int = 0
    single_copies: int = 0
    mass_at_risk: float = 0.0
