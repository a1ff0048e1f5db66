"""What changed in a cluster, why, and what it moved: events for the status, lines for the log, numbers for metrics.

A re-placement is told twice: as a plan (how many copies come and go, for which reasons) and, when the last of its
copies is observed, as done (how long it took). A plan that is overtaken by a newer one ends with it.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from cluster.metrics import Metrics
from cluster.planner import Plan
from cluster.steps import Load, Unload

log = logging.getLogger("expertmesh.placement")

MAX_EVENTS = 300
MAX_LISTED = 16  # copies named in one event
_WHY = {
    "missing": "without a live copy",
    "drain": "on leaving servers",
    "load": "for load",
    "survival": "to survive losses",
    "surplus": "no longer needed",
    "memory": "for their memory",
}


class Journal:
    """See the module docstring.

    Args:
        metrics: where counts go.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._metrics = metrics
        self._began_s: float | None = None  # monotonic, of the re-placement under way
        self._moving: Counter[str] = Counter()  # its loads by reason
        self._bytes = 0
        self._overtaken = 0  # of its loads

    def note(self, kind: str, detail: str, epoch: int, **facts: Any) -> None:
        """One event: a log line, and an entry of `events` with further facts (plain values)."""
        log.info("%s: %s", kind, detail)
        self.events.append({"at_s": time.time(), "epoch": epoch, "kind": kind, "detail": detail, **facts})

    def planned(self, found: Plan, copy_bytes: int, epoch: int, now_s: float) -> None:
        """A plan was adopted: say which copies come and go, and why."""
        loads = [step for step in found.steps if isinstance(step, Load)]
        unloads = [step for step in found.steps if isinstance(step, Unload)]
        if not loads and not unloads:
            return
        why: Counter[str] = Counter(load.reason for load in loads)
        gone: Counter[str] = Counter(unload.reason for unload in unloads)
        for reason, count in why.items():
            self._metrics.loads.inc(count, tags={"reason": reason})
        for reason, count in gone.items():
            self._metrics.unloads.inc(count, tags={"reason": reason})
        shown = [f"{load.key[0]}/{load.key[1]} to {load.server_id}" for load in loads[:4]]
        more = ", ..." if len(loads) > len(shown) else ""
        parts = [f"{_count(count, 'load')} {_WHY[reason]}" for reason, count in why.items()]
        parts += [f"{_count(count, 'unload')} {_WHY[reason]}" for reason, count in gone.items()]
        self.note(
            "plan",
            ", ".join(parts) + (f" ({', '.join(shown)}{more})" if shown else ""),
            epoch,
            reasons=dict(why),
            unloads=dict(gone),
            bytes=len(loads) * copy_bytes,
            copies=[[*load.key, load.server_id, load.reason, load.gain] for load in loads[:MAX_LISTED]],
        )
        if loads:
            if self._began_s is None:
                self._began_s, self._overtaken = now_s, 0
            self._moving += why
            self._bytes += len(loads) * copy_bytes

    def progress(self, outstanding: int, overtaken: int, epoch: int, now_s: float) -> None:
        """Tell when the copies of the re-placement under way are all there.

        Args:
            outstanding: copies that are planned and not observed.
            overtaken: loads that newer plans made needless, since the last call.
        """
        if overtaken:
            self._metrics.overtaken.inc(overtaken)
            self._overtaken += overtaken
        if self._began_s is None or outstanding:
            return
        took_s, count = now_s - self._began_s, sum(self._moving.values())
        reasons: Mapping[str, int] = dict(self._moving)
        parts = ", ".join(f"{count} {_WHY[reason]}" for reason, count in reasons.items())
        gone = min(self._overtaken, count)
        moved = self._bytes * (count - gone) // count
        less = f", {gone} of them overtaken" if gone else ""
        self._metrics.replacement_s.observe(max(took_s, 1e-3))
        self.note(
            "placed",
            f"{_count(count, 'copy', 'copies')} ({parts}){less}, {moved / 2**20:,.1f} MiB in {took_s:.2f} s",
            epoch,
            reasons=reasons,
            overtaken=gone,
            bytes=moved,
            took_s=took_s,
        )
        self._began_s, self._moving, self._bytes, self._overtaken = None, Counter(), 0, 0


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
