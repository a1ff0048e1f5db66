"""A simulation's document in lines for people."""

from collections.abc import Iterator
from typing import Any

MAX_ROWS = 24  # of the timeline; longer ones are thinned out


def simulation_lines(document: dict[str, Any]) -> Iterator[str]:
    """The totals, what was lost or moved, and the cluster over time."""
    slo, servers, requests = document["slo"], document["servers"], document["requests"]
    took = {name: "-" if value is None else f"{value * 1e3:.4g} ms" for name, value in document["latency_s"].items()}
    coarse = f", every simulated request stands for {document['scale']}" if document["scale"] > 1 else ""
    yield f"SIMULATED {document['seconds']:g} s of {document['model']}{coarse}"
    yield f"{document['tokens_per_s']:,.0f} tokens/s, {document['requests_per_s']:,.1f} requests/s"
    yield f"latency  p50 {took['p50']}, p90 {took['p90']}, p99 {took['p99']}, max {took['max']}"
    yield (
        f"SLO      {slo['limit_s'] * 1e3:g} ms: goodput {slo['goodput_tokens_per_s']:,.0f} tokens/s "
        f"({slo['goodput_share']:.1%}), outside {slo['outside_s']:g} s, at longest {slo['longest_outside_s']:g} s"
    )
    for onset in slo["onsets"]:
        back_s = onset["back_within_slo_s"]
        yield f"         after {onset['onset_s']:g} s: " + ("not back" if back_s is None else f"back in {back_s:g} s")
    yield f"requests {requests['sent']}, failed {requests['failed']}" + "".join(
        f", {name} {count}" for name, count in document["errors"].items()
    )
    yield "pairs    " + ", ".join(f"{name} {value}" for name, value in document["ledger"].items() if value)
    yield f"servers  {servers['least']} to {servers['most']}, {servers['seconds']:,.0f} server-seconds"
    balance = document["balancedness"]
    yield f"balance  mean {balance['mean']:.3f}, worst layer and moment {balance['least']:.3f}"
    for phase in document["placement"]["phases"]:
        yield (
            f"copies   {phase['from_s']:g}-{phase['to_s']:g} s: {phase['copies_loaded']} loaded "
            f"({phase['bytes_loaded'] / 1e6:,.1f} MB), {phase['planned_unloads']} dropped, {phase['epochs']} epochs"
        )
    for event in document["events"]:
        yield f"event    {event['at_s']:8.2f} s  {event['what']}"
    timeline = document["timeline"]
    if timeline:
        yield "    time  offered/s answered/s    p99 ms  servers  copies  balance"
    for row in timeline[:: max(1, -(-len(timeline) // MAX_ROWS))]:
        p99 = "-" if row["p99_s"] is None else f"{row['p99_s'] * 1e3:.4g}"
        yield (
            f"{row['at_s']:8.1f} {row['offered_tokens_per_s']:10,.0f} {row['tokens_per_s']:10,.0f} {p99:>9} "
            f"{row['servers']:8d} {row['copies']:7d} {row['balancedness_mean']:8.3f}"
        )
