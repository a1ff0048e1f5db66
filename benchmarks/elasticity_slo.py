"""What the elasticity benchmark counts: goodput within the SLO, recovery, violations, server-seconds. Pure functions.

A request belongs to the moment at which it was due to leave, not to that of its answer: a stalled cluster must not
look good for the time in which nothing comes back. A request that failed is outside of every SLO.

A moment is inside the SLO if p99 is: of the requests due within the next INSIDE_WINDOW_S seconds, at least
INSIDE_SHARE were answered in time.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.loadgen import Sample
from cluster.sim_report import Record

INSIDE_SHARE = 0.99
INSIDE_WINDOW_S = 6.0


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Outcome:
    """One request. Times are seconds of one clock; `took_s` is infinite for a failed one."""

    due_s: float
    took_s: float
    epoch: int = 0  # of the placement table that answered it; 0 for a failed one


def outcome(sample: Sample) -> Outcome:
    """What the load generator saw of one request."""
    return Outcome(
        due_s=sample.ended_s - sample.took_s,
        took_s=sample.took_s if sample.ledger is not None else math.inf,
        epoch=sample.ledger.epoch if sample.ledger is not None else 0,
    )


def simulated_outcomes(record: Record) -> list[Outcome]:
    """All requests of a simulation, sorted."""
    return sorted(
        Outcome(due_s=due_s, took_s=took_s) for due_s, took_s in zip(record.due_s, record.took_s, strict=True)
    )


def due_between(outcomes: Sequence[Outcome], begin_s: float, end_s: float) -> Sequence[Outcome]:
    """The part of `outcomes`, which are sorted, that was due in [begin_s, end_s)."""
    first, last = (bisect_left(outcomes, at_s, key=lambda found: found.due_s) for at_s in (begin_s, end_s))
    return outcomes[first:last]


def goodput(outcomes: Sequence[Outcome], slo_s: float) -> float:
    """Share of the requests answered within the SLO; 0 if there are none."""
    return sum(found.took_s <= slo_s for found in outcomes) / len(outcomes) if outcomes else 0.0


def percentile_s(outcomes: Sequence[Outcome], percent: float) -> float | None:
    """Latency, failed requests counting as infinite; None if it is, or without requests."""
    if not outcomes:
        return None
    found = float(np.percentile([o.took_s for o in outcomes], percent, method="higher"))
    return found if math.isfinite(found) else None


def violations(outcomes: Sequence[Outcome], *, begin_s: float, end_s: float, slo_s: float) -> list[tuple[float, float]]:
    """Spans of [begin_s, end_s) outside the SLO, as (from, to), in order.

    A span begins with the first late request that takes a window outside, and ends after the last one: requests that
    are late one by one, few enough for p99, are no violation.
    """
    found = due_between(outcomes, begin_s, end_s)
    late = [o.due_s for o in found if o.took_s > slo_s]
    spans: list[tuple[float, float]] = []
    for at_s in late:
        window = due_between(found, at_s, at_s + INSIDE_WINDOW_S)
        in_window = [o.due_s for o in window if o.took_s > slo_s]
        if len(in_window) <= (1 - INSIDE_SHARE) * len(window) + 1e-9:
            continue
        last_s = in_window[-1]
        if spans and at_s <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], last_s))
        else:
            spans.append((at_s, last_s))
    return spans


def recovery_s(outcomes: Sequence[Outcome], *, onset_s: float, end_s: float, slo_s: float) -> float | None:
    """Seconds from an onset until the cluster is inside the SLO and stays there until `end_s`.

    0 if it never left; None if it was still outside in the last window before `end_s`.
    """
    spans = violations(outcomes, begin_s=onset_s, end_s=end_s, slo_s=slo_s)
    if not spans:
        return 0.0
    return None if spans[-1][1] > end_s - INSIDE_WINDOW_S else spans[-1][1] - onset_s


def servers_needed(pairs_per_s: float, *, server_pairs_per_s: float, busy: float, least: int, most: int) -> int:
    """The least number of servers that keeps their mean busy share at `busy`."""
    return max(least, min(most, math.ceil(pairs_per_s / (server_pairs_per_s * busy) - 1e-9)))


def clairvoyant_server_s(
    pairs_per_s: Callable[[float], float],
    *,
    duration_s: float,
    server_pairs_per_s: float,
    busy: float,
    least: int,
    most: int,
    step_s: float = 0.01,
) -> float:
    """Server-seconds of a planner that knows the load and starts and stops servers in no time."""
    steps = round(duration_s / step_s)
    return step_s * sum(
        servers_needed(
            pairs_per_s((step + 0.5) * step_s),
            server_pairs_per_s=server_pairs_per_s,
            busy=busy,
            least=least,
            most=most,
        )
        for step in range(steps)
    )


def server_seconds(counts: Sequence[tuple[float, int]], *, begin_s: float, end_s: float) -> float:
    """The integral of counts (when seen, servers) over [begin_s, end_s]; each holds until the next."""
    total = 0.0
    for (at_s, count), until_s in zip(counts, [*(at_s for at_s, _ in counts[1:]), end_s], strict=True):
        total += count * max(0.0, min(until_s, end_s) - max(at_s, begin_s))
    return total
