"""What the demo saw: frames over time, events, measured figures and the verdict on every promise. Values only.

Times are seconds since the first request. Shares are of routed pairs.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from cluster.checking import Checks
from cluster.loadgen import Sample, Tally

Key = tuple[str, int]  # (layer, expert)

RATE_WINDOW_S = 1.0
LATENCY_WINDOW_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLine:
    """One expert server as the placement sees it."""

    server_id: str
    node: str
    pid: int
    state: str
    copies: int
    queue_tokens: int
    busy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The system at one moment."""

    at_s: float
    phase: str
    wanted_tokens_per_s: float
    tokens_per_s: float
    p50_s: float | None
    p99_s: float | None
    nodes: int
    servers: tuple[ServerLine, ...]
    copies: Mapping[Key, int]  # live copies of the experts we watch
    rerouted_share: float
    dropped_share: float
    failed: int  # so far
    checked: int
    wrong: int

    @property
    def num_serving(self) -> int:
        return sum(server.state == "serving" for server in self.servers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something worth a line in the timeline."""

    at_s: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the demo."""

    name: str
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One promise: kept, missed (a time target, which a slow machine may miss) or failed."""

    promise: str
    outcome: Literal["OK", "SLOW", "FAILED"]
    detail: str


@dataclass(slots=True, kw_only=True)
class Measured:
    """Figures of the run. Times are seconds after their cause; None: it did not happen."""

    new_copy_s: float | None = None  # load step until another copy of the hottest expert computes
    new_server_s: float | None = None  # load step until a new server computes
    copies_target_s: float | None = None
    servers_target_s: float | None = None
    moved_s: float | None = None  # switch of domain until its hottest expert has the copies
    replaced_s: float | None = None  # kill until another server takes its place and computes
    calm_s: float | None = None  # load stopped until the pool is back at its minimum
    peak_servers: int = 0
    peak_nodes: int = 0
    overflow: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Timeline:
    """Everything recorded, in order of time."""

    frames: list[Frame] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)

    def of_phase(self, name: str) -> list[Frame]:
        """The frames of one phase."""
        return [frame for frame in self.frames if frame.phase == name]

    def most_copies(self, key: Key, phase: str) -> int:
        """Most live copies an expert had in a phase."""
        return max((frame.copies.get(key, 0) for frame in self.of_phase(phase)), default=0)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "phases": [asdict(phase) for phase in self.phases],
            "events": [asdict(event) for event in self.events],
            "frames": [
                {
                    **{name: getattr(frame, name) for name in _FRAME_FIELDS},
                    "servers": frame.num_serving,
                    "copies": {f"{layer}/{expert}": copies for (layer, expert), copies in frame.copies.items()},
                }
                for frame in self.frames
            ],
        }


_FRAME_FIELDS = tuple(name for name in Frame.__dataclass_fields__ if name not in ("servers", "copies"))


class RecentSamples:
    """The last seconds of finished requests: rates, latencies and overflow shares."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def add(self, sample: Sample) -> None:
        self._samples.append(sample)

    def summary(self, now_s: float) -> tuple[float, float | None, float | None, float, float]:
        """tokens_per_s, p50_s, p99_s, rerouted share and dropped share, up to `now_s`."""
        while self._samples and self._samples[0].ended_s < now_s - LATENCY_WINDOW_S:
            self._samples.popleft()
        answered = [sample for sample in self._samples if sample.ledger is not None]
        first = bisect_left([sample.ended_s for sample in answered], now_s - RATE_WINDOW_S)
        newest = answered[first:]
        ledgers = [sample.ledger for sample in newest if sample.ledger is not None]
        pairs = sum(ledger.pairs for ledger in ledgers)
        p50_s, p99_s = (
            np.percentile([sample.took_s for sample in answered], (50, 99)).tolist() if answered else (None, None)
        )
        return (
            sum(sample.num_tokens for sample in newest) / RATE_WINDOW_S,
            p50_s,
            p99_s,
            sum(ledger.rerouted for ledger in ledgers) / pairs if pairs else 0.0,
            sum(ledger.dropped for ledger in ledgers) / pairs if pairs else 0.0,
        )


def judge(promise: str, kept: bool, detail: str) -> Verdict:
    """A promise that is kept or broken."""
    return Verdict(promise=promise, outcome="OK" if kept else "FAILED", detail=detail)


def judge_time(promise: str, took_s: float | None, *, target_s: float) -> Verdict:
    """A time target: missing it is SLOW, what should happen not happening at all is FAILED."""
    if took_s is None:
        return Verdict(promise=promise, outcome="FAILED", detail="never")
    outcome: Literal["OK", "SLOW"] = "OK" if took_s < target_s else "SLOW"
    return Verdict(promise=promise, outcome=outcome, detail=f"{took_s:.2f} s (target {target_s:g} s)")


def judge_answers(tally: Tally, checks: Checks) -> Verdict:
    """No request failed, and no answer that was computed again was wrong."""
    totals = tally.totals
    detail = (
        f"{totals.requests:,} requests, {totals.failed_requests} failed; {checks.checked:,} recomputed, "
        f"{checks.wrong} wrong, largest relative error {checks.largest_error:.1e}"
    )
    problem = tally.first_error or checks.first_wrong
    kept = totals.failed_requests == 0 and checks.wrong == 0 and checks.checked > 0
    return judge("no request fails and no answer is wrong", kept, f"{detail}; {problem}" if problem else detail)


def ledgers_agree(ours: Mapping[str, float], theirs: Mapping[str, float]) -> list[str]:
    """Fields in which the client's sums differ from the router's totals: counts to the unit, masses to rounding."""
    return [
        f"{name}: {ours[name]:g} here, {theirs[name]:g} at the router"
        for name in ours
        if abs(ours[name] - theirs[name]) > (1e-4 * max(1.0, abs(ours[name])) if name == "dropped_gate_mass" else 0)
    ]


def table_rows(timeline: Timeline) -> Sequence[tuple[str, str]]:
    """The timeline for people: (seconds, what), phases and events in order of time."""
    began = [Event(at_s=phase.began_s, text=f"── {phase.name}") for phase in timeline.phases]
    return [(f"{event.at_s:6.1f} s", event.text) for event in sorted([*began, *timeline.events], key=lambda e: e.at_s)]
