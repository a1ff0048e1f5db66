"""What a simulation saw, and the document it becomes: throughput, latency, the SLO, servers, copies, balance.

A second is inside the service level objective (SLO) while at most 1 % of the requests that were due in it were late or
failed; it is judged in slices of SLICE_S.

Shapes: L layers, E experts, S servers.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.loadgen import percentiles
from cluster.sim_exchange import SimRequest
from router.ledger import LedgerTotals
from router.table import PlacementTable

SLICE_S = 0.25
LATE_SHARE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The cluster once a second."""

    at_s: float
    offered_tokens_per_s: float
    tokens_per_s: float  # answered in the second before
    p99_s: float | None
    servers: int
    paid_servers: int  # those that start or leave included
    copies: int
    balancedness_mean: float
    balancedness_min: float
    pairs_in_flight: int


@dataclass(slots=True)
class Record:
    """Every request and every second of one simulation.

    Args:
        slo_s: latency a request may have.
    """

    slo_s: float
    scale: int
    totals: LedgerTotals = field(default_factory=LedgerTotals)
    errors: Counter[str] = field(default_factory=Counter)
    offered: int = 0  # requests
    failed_pairs: int = 0
    due_s: list[float] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)  # inf: failed
    ended_s: list[float] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)

    def finished(self, request: SimRequest, took_s: float, now_s: float, *, pairs: int) -> None:
        """A request was answered or failed."""
        self.due_s.append(request.due_s)
        self.ended_s.append(now_s)
        if request.error is None:
            self.totals.add(request.ledger, num_tokens=request.num_tokens * self.scale)
            self.took_s.append(took_s)
        else:
            self.totals.requests += 1
            self.totals.failed_requests += 1
            self.failed_pairs += pairs
            self.errors[type(request.error).__name__] += 1
            self.took_s.append(float("inf"))

    def late_slices(self, until_s: float) -> npt.NDArray[np.bool_]:
        """Slices of SLICE_S outside the SLO; one without requests is inside."""
        count = max(1, int(np.ceil(until_s / SLICE_S - 1e-9)))
        slice_N = np.minimum((np.array(self.due_s) / SLICE_S).astype(np.int64), count - 1)
        late_N = np.array(self.took_s) > self.slo_s
        all_S, late_S = np.bincount(slice_N, minlength=count), np.bincount(slice_N, weights=late_N, minlength=count)
        outside_S: npt.NDArray[np.bool_] = late_S > LATE_SHARE * all_S
        return outside_S


def balancedness(
    table: PlacementTable, layers: Sequence[str], load_LE: npt.NDArray[np.float64], ids: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Mean over maximum load of the servers in `ids`, layer by layer [L], if every copy takes its share."""
    place = {server_id: s for s, server_id in enumerate(ids)}
    index = np.array([place.get(server.server_id, len(ids)) for server in table.servers] + [len(ids)])
    found = np.ones(len(layers))
    for row, layer in enumerate(layers):
        placed = table.layer(layer)
        carried_EC = placed.share_EC * load_LE[row][:, None]
        load_S = np.bincount(index[placed.server_EC].ravel(), carried_EC.ravel(), minlength=len(ids) + 1)[: len(ids)]
        if load_S.sum() > 0:
            found[row] = load_S.mean() / load_S.max()
    return found


def recoveries(outside_S: npt.NDArray[np.bool_], onsets_s: Sequence[float]) -> list[dict[str, float | None]]:
    """For every onset, seconds until the last slice outside the SLO before the next onset has ended; 0: none was.

    Onsets come in order, each once. None: it still was outside when the next onset came, or the simulation ended.
    """
    found: list[dict[str, float | None]] = []
    end_s = len(outside_S) * SLICE_S
    for onset_s, next_s in pairwise([*onsets_s, end_s]):
        first, last = int(onset_s / SLICE_S + 1e-9), int(next_s / SLICE_S - 1e-9)
        late = np.flatnonzero(outside_S[first : last + 1])
        back_s: float | None = 0.0 if not len(late) else float((late[-1] + 1) * SLICE_S)
        if len(late) and late[-1] == last - first:
            back_s = None
        found.append({"onset_s": onset_s, "back_within_slo_s": back_s})
    return found


def document(
    record: Record,
    *,
    seconds: float,
    warm_up_s: float,
    onsets_s: Sequence[float],
    server_seconds: float,
    placement: dict[str, Any],
) -> dict[str, Any]:
    """The result as plain values; latency, throughput and goodput are of requests due after the warm-up.

    Throughput is of those that were answered by the end, so that a backlog does not count as if it were none.

    Args:
        onsets_s: moments to recover from, in order, each once.
    """
    due_N, took_N, ended_N = (np.array(values) for values in (record.due_s, record.took_s, record.ended_s))
    counted_N = due_N >= warm_up_s
    answered_N = counted_N & np.isfinite(took_N)
    took_s = took_N[answered_N].tolist()
    in_time = int((answered_N & (ended_N <= seconds)).sum())
    totals = asdict(record.totals)
    requests, failed, tokens = (totals.pop(name) for name in ("requests", "failed_requests", "tokens"))
    per_request = tokens / (requests - failed) if requests > failed else 0.0
    span_s = max(seconds - warm_up_s, 1e-9)
    good = int((took_N[counted_N] <= record.slo_s).sum())
    offered = int(counted_N.sum())
    outside_S = record.late_slices(seconds)
    runs = [sum(1 for _ in run) for late, run in groupby(outside_S[int(warm_up_s / SLICE_S) :].tolist()) if late]
    moments = [moment for moment in record.moments if moment.at_s > warm_up_s]
    return {
        "seconds": seconds,
        "warm_up_s": warm_up_s,
        "scale": record.scale,
        "requests": {
            "sent": record.offered * record.scale,
            "answered": (requests - failed) * record.scale,
            "failed": failed * record.scale,
        },
        "tokens_per_s": in_time * per_request / span_s,
        "requests_per_s": in_time * record.scale / span_s,
        "latency_s": percentiles(took_s),
        "slo": {
            "limit_s": record.slo_s,
            "goodput_tokens_per_s": good * per_request / span_s,
            "goodput_share": good / offered if offered else 1.0,
            "outside_s": sum(runs) * SLICE_S,
            "longest_outside_s": max(runs, default=0) * SLICE_S,
            "onsets": recoveries(outside_S, onsets_s),
        },
        "ledger": {**totals, "failed": record.failed_pairs},
        "errors": dict(record.errors),
        "servers": {
            "seconds": server_seconds,
            "least": min((moment.servers for moment in moments), default=0),
            "most": max((moment.servers for moment in moments), default=0),
        },
        "placement": placement,
        "balancedness": {
            "mean": float(np.mean([moment.balancedness_mean for moment in moments])) if moments else 1.0,
            "least": min((moment.balancedness_min for moment in moments), default=1.0),
        },
        "events": [{"at_s": at_s, "what": what} for at_s, what in record.events],
        "timeline": [asdict(moment) for moment in record.moments],
    }
