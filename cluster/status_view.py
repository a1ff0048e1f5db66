"""The status of a cluster in lines for people."""

import time
from collections.abc import Iterator
from typing import Any

MAX_EXPERTS, MAX_EVENTS = 5, 6


def status_lines(found: dict[str, Any]) -> list[str]:
    """What `expertmesh status` prints without --json."""
    return [
        f"model   {found['model']}",
        f"router  grpc {found['router']['grpc']}, http {found['router']['http']}, epoch {found['epoch']}",
        *map(_server_line, found["servers"]),
        *_expert_lines(found),
        *map(_event_line, found["events"][-MAX_EVENTS:]),
    ]


def _server_line(server: dict[str, Any]) -> str:
    loading = f" and {server['loading']} loading" if server["loading"] else ""
    return (
        f"server  {server['id']}  {server['grpc']}  pool {server['pool']}  node {server['node']}  pid {server['pid']}  "
        f"{server['state']}, {server['copies']} copies{loading}, {server['bytes'] / 2**20:,.0f} of "
        f"{server['budget_bytes'] / 2**20:,.0f} MiB, queue {server['queue_tokens']}, busy {server['busy']:.0%}"
    )


def _expert_lines(found: dict[str, Any]) -> Iterator[str]:
    risk = f"; a loss would take up to {found['mass_at_risk']:.1%} of the load" if found["mass_at_risk"] else ""
    yield (
        f"experts {len(found['single_copy_experts'])} with a single live copy, {len(found['missing_experts'])} without"
        + (f", {found['outstanding_copies']} copies under way" if found["outstanding_copies"] else "")
        + risk
    )
    demand, balance = found["demand"], found["balancedness"]
    if demand["pairs_per_s"] >= 1 and balance:
        worst = min(balance, key=lambda layer: balance[layer])
        forecast = demand["forecast"]
        wrong = f", forecast {forecast['error']:.0%} off (noise alone {forecast['noise']:.0%})" if forecast else ""
        yield (
            f"load    {demand['pairs_per_s']:,.0f} pairs/s{wrong}; mean over fullest server "
            f"{sum(balance.values()) / len(balance):.2f}, in layer {worst} {balance[worst]:.2f}"
        )
        yield from map(_hot_line, found["experts"][:MAX_EXPERTS])


def _hot_line(expert: dict[str, Any]) -> str:
    where = ", ".join(f"{server_id} {share:.0%}" for server_id, share in expert["servers"].items())
    load = f"layer {expert['layer']} expert {expert['expert']}: {expert['pairs_per_s']:,.0f} pairs/s"
    return f"hot     {load} on {where or 'no server'}"


def _event_line(event: dict[str, Any]) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(event["at_s"]))
    return f"event   {at}  {event['kind']}: {event['detail']}"
