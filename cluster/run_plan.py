"""What `expertmesh plan` does: a load matrix and some servers become a plan, and what it is worth, layer by layer.

Servers are numbered, layers are rows of the matrix; neither torch nor Ray is needed.

Shapes: L layers, E experts, S servers.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.loadfile import LoadFile
from cluster.planfile import MAX_SERVERS, Copies, describe_plan, server_index, server_name, some
from cluster.planner import Plan, PlannerInput, PlannerServer, plan
from protos.errors import InvalidRequest

_SCALE = 1e6  # the busiest layer is planned as so many pairs/s: the plan does not depend on the matrix's unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the command was asked for.

    Args:
        servers: how many.
        budget_copies: live copies in all; None: one of each expert, or all that `server_copies` hold.
        max_moves: loads that only improve balance or survival; None: as many as it takes.
        survive: servers that may be lost at once without an expert going with them, as far as the budget allows.
        speeds: of the servers, relative; empty: all the same.
        server_copies: what each server has room for; empty: what the whole budget needs there.
    """

    servers: int
    budget_copies: int | None = None
    max_moves: int | None = None
    survive: int = 0
    speeds: tuple[float, ...] = ()
    server_copies: tuple[int, ...] = ()


def run_plan(load: LoadFile, wanted: Wanted, *, before: Copies | None) -> dict[str, Any]:
    """Plan, and describe the plan; see `describe_plan`.

    Args:
        before: the copies that are there, on numbered servers; those on servers from `wanted.servers` on are gone.

    Raises:
        InvalidRequest: a value of `wanted` is out of its range, or the budget cannot hold the experts.
    """
    budget = _check(load, wanted)
    limits = list(wanted.server_copies) or [budget] * wanted.servers
    found = _plan(load, wanted, before or {}, limits, budget)
    num_copies = sum(map(len, found.copies.values()))
    if num_copies > budget:
        limits = _shrink(found.copies, limits, budget)
        found = _plan(load, wanted, before or {}, limits, budget)
    if found.missing or sum(map(len, found.copies.values())) > budget:
        raise InvalidRequest(
            f"--budget-copies is {budget}: no plan found that has every expert within it and within what servers hold"
        )
    return {
        "budget_copies": budget,
        "survive": wanted.survive,
    } | describe_plan(
        load, found.copies, before, speeds=wanted.speeds or (1.0,) * wanted.servers, survive=wanted.survive
    )


def _check(load: LoadFile, wanted: Wanted) -> int:
    """The budget in copies, after every value has been checked."""
    (num_layers, num_experts), num_servers = load.load_LE.shape, wanted.servers
    least: int = num_layers * num_experts
    if not 1 <= num_servers <= MAX_SERVERS:
        raise InvalidRequest(f"--servers is {num_servers}, limit is 1..{MAX_SERVERS}")
    for name, values in (("server-speeds", wanted.speeds), ("server-copies", wanted.server_copies)):
        if values and len(values) != num_servers:
            raise InvalidRequest(f"--{name} has {len(values)} values, --servers is {num_servers}")
    if not all(0 < speed < math.inf for speed in wanted.speeds):
        raise InvalidRequest(f"--server-speeds is {some(wanted.speeds)}, every one must be above 0")
    if not all(0 <= room <= sys.maxsize for room in wanted.server_copies):
        raise InvalidRequest(f"--server-copies is {some(wanted.server_copies)}, every one must be 0 or more")
    if wanted.survive < 0:
        raise InvalidRequest(f"--survive is {wanted.survive}, it must be 0 or more")
    if wanted.survive >= wanted.servers:
        raise InvalidRequest(f"--survive is {wanted.survive}, limit is one less than --servers ({wanted.servers})")
    if wanted.max_moves is not None and wanted.max_moves < 0:
        raise InvalidRequest(f"--max-moves is {wanted.max_moves}, it must be 0 or more")
    room = sum(wanted.server_copies) if wanted.server_copies else None
    if room is not None and room < least:
        raise InvalidRequest(f"--server-copies is {room} in all, {num_layers} x {num_experts} experts need {least}")
    budget: int = wanted.budget_copies if wanted.budget_copies is not None else room or least
    if budget < least:
        raise InvalidRequest(f"--budget-copies is {budget}, {num_layers} x {num_experts} experts need at least {least}")
    return min(budget, least * num_servers)


def _plan(load: LoadFile, wanted: Wanted, before: Copies, limits: Sequence[int], budget: int) -> Plan:
    num_experts = load.load_LE.size
    busiest = load.load_LE.sum(axis=1).max()
    load_LE = load.load_LE * (_SCALE / busiest) if busiest else load.load_LE
    # Without copies before, each expert's first is no move: what remains of the budget bounds the others.
    free_moves = num_experts * wanted.servers if before else budget - num_experts
    return plan(
        PlannerInput(
            layers=load.layers,
            load_LE=load_LE,
            servers=tuple(
                PlannerServer(
                    server_id=server_name(s), max_copies=limit, speed=wanted.speeds[s] if wanted.speeds else 1.0
                )
                for s, limit in enumerate(limits)
            ),
            current=before,
            survive=wanted.survive,
            max_moves=free_moves if wanted.max_moves is None else min(wanted.max_moves, free_moves),
            min_pairs_per_s=sys.float_info.min,
        )
    )


def _shrink(copies: Copies, limits: Sequence[int], budget: int) -> list[int]:
    """Limits that add up to the budget, in proportion to the copies of a plan that exceeds it."""
    used_S = np.zeros(len(limits))
    for held in copies.values():
        for copy in held:
            used_S[server_index(copy.server_id)] += 1
    exact_S = np.minimum(used_S * (budget / used_S.sum()), limits)
    limit_S: list[int] = np.floor(exact_S).astype(int).tolist()
    order = np.argsort(np.floor(exact_S) - exact_S, kind="stable").tolist()
    while (rest := budget - sum(limit_S)) and (open_S := [s for s in order if limit_S[s] < limits[s]]):
        for s in open_S[:rest]:
            limit_S[s] += 1
    return limit_S
