"""A placement as arrays, and what it is worth: balance, bytes, moves, survival.

Shapes: C copies, L layers, E experts, S servers; H distinct (layer, expert, server) triples.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.load_matrices import Load
from cluster.planner import PlannerServer

Ints = npt.NDArray[np.int64]
Row = dict[str, Any]
Servers = tuple[PlannerServer, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Copies:
    """A placement as columns, one row per copy (per slot for EPLB). Servers and layers are indices.

    `plan_s` is the CPU time the planner took for it, without putting it into this form.
    """

    layer_C: Ints
    expert_C: Ints
    server_C: Ints
    share_C: npt.NDArray[np.float64]
    plan_s: float


def balancedness(copies: Copies, load_LE: Load, servers: Servers) -> npt.NDArray[np.float64]:
    """Mean over maximum server load of each layer [L], per speed, every copy carrying its share; 1 at best."""
    speed_S = np.array([server.speed for server in servers])
    shape = (len(load_LE), len(servers))
    carried_C = copies.share_C * load_LE[copies.layer_C, copies.expert_C]
    where_C = copies.layer_C * len(servers) + copies.server_C
    load_LS = np.bincount(where_C, weights=carried_C, minlength=shape[0] * shape[1]).reshape(shape)
    even_L: npt.NDArray[np.float64] = load_LE.sum(axis=1) / speed_S.sum() / (load_LS / speed_S).max(axis=1)
    return even_L


def held(copies: Copies, num_experts: int, num_servers: int) -> Ints:
    """The distinct (layer, expert, server) triples, each as one number."""
    expert_C = copies.layer_C * num_experts + copies.expert_C
    found: Ints = np.unique(expert_C * num_servers + copies.server_C)
    return found


def balance(copies: Copies, load_LE: Load, servers: Servers) -> Row:
    """Balancedness over the layers, and the bytes it costs."""
    even_L = balancedness(copies, load_LE, servers)
    return {
        "balancedness_min": float(even_L.min()),
        "balancedness_mean": float(even_L.mean()),
        "extra_percent": 100 * (len(copies.layer_C) / load_LE.size - 1),
    }


def moved_percent(old: Copies, new: Copies, num_experts: int, num_servers: int) -> float:
    """Copies that a server has to load, in percent of the copies before; what it already holds costs nothing."""
    old_H, new_H = (held(copies, num_experts, num_servers) for copies in (old, new))
    return 100 * len(np.setdiff1d(new_H, old_H)) / len(old_H)


def relabelled(old: Copies, new: Copies, num_experts: int, num_servers: int) -> Copies:
    """The new placement with the servers of each layer renamed so that they keep more of what they hold.

    EPLB's GPUs have no memory of the placement before: renaming them costs nothing and saves moves. Greedy: the pair of
    servers, old and new, with most experts in common first. Ours need not be renamed.
    """
    server_C = new.server_C.copy()
    for layer in np.unique(new.layer_C).tolist():
        sides = []
        for copies in (old, new):
            here_C = copies.layer_C == layer
            holds_SE = np.zeros((num_servers, num_experts), dtype=np.int64)
            holds_SE[copies.server_C[here_C], copies.expert_C[here_C]] = 1
            sides.append(holds_SE)
        common_SS = sides[0] @ sides[1].T
        name_S, taken_S = np.full(num_servers, -1), np.zeros(num_servers, dtype=np.bool_)
        for cell in np.argsort(-common_SS, axis=None, kind="stable").tolist():
            before, after = divmod(cell, num_servers)
            if name_S[after] < 0 and not taken_S[before]:
                name_S[after], taken_S[before] = before, True
        here_C = new.layer_C == layer
        server_C[here_C] = name_S[new.server_C[here_C]]
    return replace(new, server_C=server_C)


def least_lost_percent(load_LE: Load, num_servers: int, extra: float) -> float:
    """A bound: with the extra bytes spent on the hottest experts and their rest spread evenly, what a loss costs."""
    falling = np.sort(load_LE.ravel())[::-1]
    return float(100 * falling[int(extra * load_LE.size) :].sum() / load_LE.sum() / num_servers)


def survival(copies: Copies, load_LE: Load, servers: Servers) -> Row:
    """The gate mass (share of all load) and the experts without a live copy after the loss of one server."""
    expert_H, server_H = np.divmod(held(copies, load_LE.shape[1], len(servers)), len(servers))
    single_H = np.bincount(expert_H, minlength=load_LE.size)[expert_H] == 1
    mass_H = (load_LE / load_LE.sum()).ravel()[expert_H] * single_H
    mass_S = 100 * np.bincount(server_H, weights=mass_H, minlength=len(servers))
    lost_S = np.bincount(server_H, weights=single_H, minlength=len(servers))
    return {
        "lost_mass_percent_worst_server": float(mass_S.max()),
        "lost_mass_percent_mean": float(mass_S.mean()),
        "lost_experts_worst_server": int(lost_S.max()),
        "single_copy_experts": int(lost_S.sum()),
    }
