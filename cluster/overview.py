"""The placement's view of its cluster as one document of plain values: what `expertmesh status` shows.

Shapes: L layers, E experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.fleet import Fleet
from cluster.load import Forecast
from cluster.messages import RouterBeat, ServerBeat, ServerHello
from protos.model import ModelSpec
from router.table import PlacementTable

MAX_HOT = 24


def layer_balance(
    table: PlacementTable, layers: Sequence[str], load_LE: npt.NDArray[np.float64], speeds: Mapping[str, float]
) -> dict[str, float]:
    """Mean over maximum server load (per speed) of every layer that has load, each copy carrying its share."""
    index = {server_id: s for s, server_id in enumerate(speeds)}
    rows = {layer: row for row, layer in enumerate(layers)}
    carried_LS = np.zeros((len(layers), len(index)))
    for (layer, expert), copies in table.copies.items():
        row = rows[layer]
        for copy in copies:
            if copy.server_id in index:
                carried_LS[row, index[copy.server_id]] += copy.share * load_LE[row, expert]
    speed_S = np.array(list(speeds.values()))
    busy_L = carried_LS.sum(axis=1) > 0
    if not busy_L.any():
        return {}
    most_L = (carried_LS[busy_L] / speed_S).max(axis=1)
    even_L = carried_LS[busy_L].sum(axis=1) / speed_S.sum() / most_L
    return {layers[row]: float(even) for row, even in zip(np.flatnonzero(busy_L).tolist(), even_L, strict=True)}


def mass_at_risk(
    table: PlacementTable, layers: Sequence[str], load_LE: npt.NDArray[np.float64], *, losses: int
) -> float:
    """The share of the load that would be without a live copy after the worst `losses` servers are lost.

    Exact for one; an upper bound for more: an expert with n copies counts 1/n of its load at each of their servers.
    """
    rows = {layer: row for row, layer in enumerate(layers)}
    risk: dict[str, float] = {}
    for (layer, expert), copies in table.copies.items():
        if len(copies) <= losses:
            part = float(load_LE[rows[layer], expert]) / len(copies)
            for copy in copies:
                risk[copy.server_id] = risk.get(copy.server_id, 0.0) + part
    return sum(sorted(risk.values())[-losses:]) / max(float(load_LE.sum()), 1e-9)


def hottest(spec: ModelSpec, table: PlacementTable, load_LE: npt.NDArray[np.float64]) -> list[dict[str, Any]]:
    """The experts with most load, hottest first: their load, and where their copies are."""
    order = load_LE.argsort(axis=None)[::-1][:MAX_HOT]
    found = []
    for i in order.tolist():
        row, expert = divmod(i, spec.num_experts)
        copies = table.copies.get((spec.layers[row], expert), ())
        found.append(
            {
                "layer": spec.layers[row],
                "expert": expert,
                "copies": len(copies),
                "pairs_per_s": float(load_LE[row, expert]),
                "servers": {copy.server_id: round(copy.share, 4) for copy in copies},
            }
        )
    return found


def server_line(
    hello: ServerHello, beat: ServerBeat | None, *, draining: bool, loading: int, speed: float
) -> dict[str, Any]:
    """One server. `loading`: copies it was asked for and has not reported; `speed`: what the planner counts with."""
    return {
        "id": hello.server_id,
        "pool": hello.pool,
        "node": hello.node,
        "pid": hello.pid,
        "grpc": hello.address,
        "state": "draining" if draining else "serving",
        "speed": speed,
        "copies": len(beat.held) if beat else 0,
        "loading": loading,
        "bytes": beat.bytes if beat else 0,
        "budget_bytes": beat.budget_bytes if beat else 0,
        "queue_tokens": beat.queue_tokens if beat else 0,
        "busy": beat.busy_share if beat else 0.0,
        "pairs_per_s": beat.pairs_per_s if beat else 0.0,
        "loaded": {source: dict(totals) for source, totals in beat.loaded.items()} if beat else {},
    }


def copies_by_count(spec: ModelSpec, fleet: Fleet, count: int) -> list[list[Any]]:
    """The experts with exactly so many live copies, as [layer, expert]."""
    table = fleet.table.copies
    return [
        [layer, expert]
        for layer in spec.layers
        for expert in range(spec.num_experts)
        if len(table.get((layer, expert), ())) == count
    ]


def demand_line(
    routers: Sequence[RouterBeat], load_LE: npt.NDArray[np.float64], forecast: Forecast | None
) -> dict[str, Any]:
    """What is asked of the cluster, how long answers take, and how well the load was foreseen."""
    return {
        "pairs_per_s": float(load_LE.sum()),
        "tokens_per_s": sum(beat.tokens_per_s for beat in routers),
        "p50_s": max((beat.p50_s for beat in routers), default=0.0),
        "p99_s": max((beat.p99_s for beat in routers), default=0.0),
        "totals": {name: sum(beat.totals[name] for beat in routers) for name in (routers[0].totals if routers else ())},
        "forecast": None if forecast is None else asdict(forecast),
    }


def router_lines(routers: Iterable[RouterBeat]) -> list[dict[str, Any]]:
    """The routers, the epoch each uses, and the tokens it has accepted and not answered yet."""
    return [
        {
            "id": beat.router_id,
            "node": beat.node,
            "pid": beat.pid,
            "grpc": beat.address,
            "epoch": beat.epoch,
            "queued_tokens": beat.queued_tokens,
        }
        for beat in routers
    ]
