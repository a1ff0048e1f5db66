"""The stories of the elasticity benchmark, each told on one deployed cluster: what happens, and what was measured.

A story gets a `Stage` and returns plain values. The latency bound of the SLO is an argument: it is fixed before.
"""

import math
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.elasticity_slo import (
    Outcome,
    clairvoyant_server_s,
    due_between,
    goodput,
    percentile_s,
    recovery_s,
    server_seconds,
    violations,
)
from benchmarks.elasticity_stage import EMULATED_PAIRS_PER_S, Stage

# Of the cheapest clairvoyant that keeps the SLO, in `benchmarks.simulator --only day`.
CHEAPEST_BUSY = 0.85

Facts = dict[str, Any]
Story = Callable[[Stage], Awaitable[Facts]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long everything takes, in seconds, and how often. The defaults are those of the published results."""

    unloaded_s: float = 8.0
    warm_up_s: float = 20.0
    move_every_s: float = 15.0
    moves: int = 5  # of the hot spot, in each arm of part a
    onsets_copy: int = 11
    onset_s: float = 13.0
    onsets_server: int = 5
    before_server_s: float = 20.0
    after_server_s: float = 18.0
    steady_s: float = 40.0
    replacements: int = 90
    replacement_s: float = 3.0
    period_s: float = 100.0
    periods: int = 2


SHORT = Lengths(
    unloaded_s=4.0,
    warm_up_s=4.0,
    move_every_s=10.0,
    moves=2,
    onsets_copy=3,
    onset_s=10.0,
    onsets_server=1,
    steady_s=8.0,
    replacements=5,
    replacement_s=2.5,
    period_s=60.0,
    periods=1,
)


async def unloaded(stage: Stage, lengths: Lengths, *, pairs_per_s: float) -> Facts:
    """Latencies of a cluster with next to nothing to do: what the SLO is a multiple of."""
    stage.offer(pairs_per_s)
    await stage.hold(2.0)  # connections and learnt launch costs
    began_s, ended_s = await stage.hold(lengths.unloaded_s)
    await stage.drain()
    return latencies(due_between(stage.seen.outcomes, began_s, ended_s))


async def moving_hot_spot(stage: Stage, lengths: Lengths, *, pairs_per_s: float, slo_s: float) -> Facts:
    """Part a: a steady load whose hot spot is somewhere else every `move_every_s`."""
    stage.offer(pairs_per_s)
    await stage.hold(lengths.warm_up_s)
    began_s = stage.now_s()
    for _ in range(lengths.moves):
        stage.move()
        await stage.hold(lengths.move_every_s)
    ended_s = stage.now_s()
    await stage.drain()
    found = due_between(stage.seen.outcomes, began_s, ended_s)
    spans = violations(found, begin_s=began_s, end_s=ended_s, slo_s=slo_s)
    return {
        **latencies(found),
        "offered_pairs_per_s": pairs_per_s,
        "goodput": goodput(found, slo_s),
        "outside_slo_s": sum(end - begin for begin, end in spans),
        "copies_mean": _copies_mean(stage, began_s, ended_s),
        "servers_mean": server_seconds(stage.seen.servers, begin_s=began_s, end_s=ended_s) / (ended_s - began_s),
        "plans": len(stage.seen.events_between(began_s, ended_s, "plan")),
    }


async def onsets_for_a_copy(stage: Stage, lengths: Lengths, *, pairs_per_s: float, slo_s: float) -> Facts:
    """Part b, first half: the load stays, its hot spot moves; the servers there are suffice."""
    stage.offer(pairs_per_s)
    await stage.hold(lengths.warm_up_s)
    onsets: list[tuple[float, float]] = []
    for _ in range(lengths.onsets_copy):
        stage.move()
        onsets.append(await stage.hold(lengths.onset_s))
    await stage.drain()
    return _recoveries(stage, onsets, slo_s)


async def onsets_for_a_server(
    stage: Stage, lengths: Lengths, *, low_pairs_per_s: float, high_pairs_per_s: float, slo_s: float
) -> Facts:
    """Part b, second half: the hot spot moves and brings more load than the servers there are can take."""
    least = stage.config.experts.min_servers
    onsets: list[tuple[float, float]] = []
    shrunk = True
    for _ in range(lengths.onsets_server):
        stage.offer(low_pairs_per_s)
        shrunk &= await stage.until(lambda: stage.num_servers == least, timeout_s=60)
        await stage.hold(lengths.before_server_s)
        stage.move()
        stage.offer(high_pairs_per_s)
        onsets.append(await stage.hold(lengths.after_server_s))
    await stage.drain()
    grown = [max((len(b) for at_s, b in stage.seen.busy if begin <= at_s < end), default=0) for begin, end in onsets]
    return {
        **_recoveries(stage, onsets, slo_s),
        "servers_before": least,
        "servers_after": grown,
        "shrunk_between": shrunk,
    }


async def replacements(stage: Stage, lengths: Lengths, *, pairs_per_s: float) -> Facts:
    """Part c: re-placements, loaded to their last copy, one after another, at a load that needs none of them.

    `during` are the requests that were open while copies were on their way, of which there are the more the longer they
    take; `arriving` those due meanwhile, whatever they took; `moving` all while the hot spot moved.
    """
    stage.offer(pairs_per_s)
    await stage.hold(lengths.warm_up_s)
    steady = await stage.hold(lengths.steady_s)

    def done() -> int:
        return len(stage.seen.events_between(steady[1], math.inf, "placed"))

    moves = 0
    while done() < lengths.replacements and moves < 3 * lengths.replacements:
        stage.move()
        moves += 1
        await stage.hold(lengths.replacement_s)
    ended_s = stage.now_s()
    await stage.drain()
    placed = stage.seen.events_between(steady[1], ended_s, "placed")
    spans = [(event["at_s"] - event["took_s"], event["at_s"]) for event in placed]
    moving = due_between(stage.seen.outcomes, steady[1], ended_s)
    before, during = (
        latencies(due_between(stage.seen.outcomes, *steady)),
        latencies([o for o in moving if _overlaps(o, spans)]),
    )
    return {
        "offered_pairs_per_s": pairs_per_s,
        "replacements": done(),
        "copies_loaded": sum(map(_loads, placed)),
        "replacements_s": sum(end - begin for begin, end in spans),
        "hot_spot_moves": moves,
        "before": before,
        "during": during,
        "arriving": latencies([o for o in moving if any(begin <= o.due_s < end for begin, end in spans)]),
        "moving": latencies(moving),
        "p99_ratio": during["p99_s"] / before["p99_s"] if during["p99_s"] and before["p99_s"] else None,
    }


async def hot_spot_alone(stage: Stage, lengths: Lengths, *, moves: int, pairs_per_s: float) -> Facts:
    """What part c's requests would meet without any re-placement: to be told on a static placement."""
    stage.offer(pairs_per_s)
    await stage.hold(lengths.warm_up_s)
    began_s = stage.now_s()
    for _ in range(moves):
        stage.move()
        await stage.hold(lengths.replacement_s)
    ended_s = stage.now_s()
    await stage.drain()
    return {"moving": latencies(due_between(stage.seen.outcomes, began_s, ended_s))}


async def diurnal(
    stage: Stage, lengths: Lengths, *, low_pairs_per_s: float, high_pairs_per_s: float, slo_s: float
) -> Facts:
    """Part d: days of `period_s`; server-seconds beside those of a planner that knows the load."""

    def load_at(at_s: float) -> float:
        middle, swing = (high_pairs_per_s + low_pairs_per_s) / 2, (high_pairs_per_s - low_pairs_per_s) / 2
        return middle - swing * math.cos(2 * math.pi * at_s / lengths.period_s)

    stage.offer(load_at(0))
    await stage.hold(lengths.warm_up_s)
    began_s = stage.now_s()
    while (at_s := stage.now_s() - began_s) < lengths.periods * lengths.period_s:
        stage.offer(load_at(at_s))
        await stage.hold(0.05)
    ended_s = stage.now_s()
    await stage.drain()
    experts, scaling = stage.config.experts, stage.config.scaling
    used = server_seconds(stage.seen.servers, begin_s=began_s, end_s=ended_s)

    def known(busy: float) -> float:
        return clairvoyant_server_s(
            load_at,
            duration_s=ended_s - began_s,
            server_pairs_per_s=EMULATED_PAIRS_PER_S,
            busy=busy,
            least=experts.min_servers,
            most=experts.max_servers,
        )

    found = due_between(stage.seen.outcomes, began_s, ended_s)
    spans = violations(found, begin_s=began_s, end_s=ended_s, slo_s=slo_s)
    return {
        **latencies(found),
        "period_s": lengths.period_s,
        "periods": lengths.periods,
        "offered_pairs_per_s": [low_pairs_per_s, high_pairs_per_s],
        "goodput": goodput(found, slo_s),
        "server_s": used,
        "clairvoyant_server_s": {f"{busy:g} busy": known(busy) for busy in (scaling.target_busy, CHEAPEST_BUSY)},
        "server_s_ratio": used / known(scaling.target_busy),
        "server_s_ratio_to_cheapest": used / known(CHEAPEST_BUSY),
        "violations": [[round(begin - began_s, 2), round(end - begin, 2)] for begin, end in spans],
        "longest_violation_s": max((end - begin for begin, end in spans), default=0.0),
        "servers": _changes(stage.seen.servers, began_s),
        "scaling": [
            (round(event["at_s"] - began_s, 2), event["detail"])
            for event in stage.seen.events_between(began_s, ended_s, "scaling")
        ],
        "seconds": _seconds(stage, began_s, ended_s, load_at, slo_s),
    }


def latencies(found: Sequence[Outcome]) -> Facts:
    """Latency percentiles and counts of some outcomes."""
    return {
        "requests": len(found),
        "failed": sum(math.isinf(o.took_s) for o in found),
        **{f"p{percent}_s": percentile_s(found, percent) for percent in (50, 90, 99)},
    }


def _copies_mean(stage: Stage, begin_s: float, end_s: float) -> float | None:
    """Copies that all servers held, on average over the looks; None if the cluster was never seen."""
    held = [copies for at_s, copies in stage.seen.copies if begin_s <= at_s < end_s]
    return statistics.mean(held) if held else None


def _overlaps(outcome: Outcome, spans: Sequence[tuple[float, float]]) -> bool:
    """Whether a request was open while copies were being placed."""
    return any(begin <= outcome.due_s + outcome.took_s and outcome.due_s <= end for begin, end in spans)


def _recoveries(stage: Stage, onsets: list[tuple[float, float]], slo_s: float) -> Facts:
    rows = [_onset(stage, begin_s, end_s, slo_s) for begin_s, end_s in onsets]
    times = [math.inf if row["recovered_s"] is None else row["recovered_s"] for row in rows]
    median = statistics.median(times)
    return {
        "onsets": rows,
        "never_outside": sum(found == 0 for found in times),
        "not_recovered": sum(math.isinf(found) for found in times),
        "median_s": median if math.isfinite(median) else None,
    }


def _onset(stage: Stage, begin_s: float, end_s: float, slo_s: float) -> Facts:
    """What happened after one onset, in seconds from it; None: it did not happen."""
    found = due_between(stage.seen.outcomes, begin_s, end_s)
    plans = [event for event in stage.seen.events_between(begin_s, end_s, "plan") if _loads(event)]
    scaled = stage.seen.events_between(begin_s, end_s, "scaling")
    joined = stage.seen.events_between(begin_s, end_s, "server_joined")
    epoch = max((o.epoch for o in due_between(stage.seen.outcomes, begin_s - 1, begin_s)), default=0)
    newer = [o.due_s + o.took_s for o in found if o.epoch > epoch]
    spans = violations(found, begin_s=begin_s, end_s=end_s, slo_s=slo_s)
    return {
        "recovered_s": recovery_s(found, onset_s=begin_s, end_s=end_s, slo_s=slo_s),
        "first_late_s": spans[0][0] - begin_s if spans else None,
        "outside_s": sum(end - begin for begin, end in spans),
        "first_plan_s": plans[0]["at_s"] - begin_s if plans else None,
        "last_plan_s": plans[-1]["at_s"] - begin_s if plans else None,
        "plans": len(plans),
        "copies_loaded": sum(map(_loads, plans)),
        "first_new_table_s": min(newer) - begin_s if newer else None,
        "first_scaling_s": scaled[0]["at_s"] - begin_s if scaled else None,
        "first_server_s": joined[0]["at_s"] - begin_s if joined else None,
        "last_server_s": joined[-1]["at_s"] - begin_s if joined else None,
        "worst_s": percentile_s(found, 100),
    }


def _loads(event: Facts) -> int:
    """Copies that a plan loads."""
    return sum(event["reasons"].values())


def _seconds(
    stage: Stage, begin_s: float, end_s: float, load_at: Callable[[float], float], slo_s: float
) -> list[Facts]:
    """What could be seen in every second of a day."""
    rows = []
    for second in range(int(end_s - begin_s)):
        at_s = begin_s + second
        busy = [shares for seen_s, shares in stage.seen.busy if at_s <= seen_s < at_s + 1 and shares]
        rows.append(
            {
                "offered_pairs_per_s": round(load_at(second + 0.5)),
                "serving": max(map(len, busy), default=None),
                "mean_busy": round(statistics.mean(sum(b) / len(b) for b in busy), 2) if busy else None,
                "most_busy": round(max(map(max, busy)), 2) if busy else None,
                "goodput": round(goodput(due_between(stage.seen.outcomes, at_s, at_s + 1), slo_s), 2),
            }
        )
    return rows


def _changes(counts: list[tuple[float, int]], zero_s: float) -> list[tuple[float, int]]:
    """(seconds since zero, count) where the count changed."""
    return [
        (round(at_s - zero_s, 2), count)
        for (at_s, count), (_, before) in zip(counts, [(0.0, -1), *counts], strict=False)
        if count != before
    ]
