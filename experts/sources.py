"""Where a new copy comes from: the fastest source that has it, and the next one if that fails.

The order follows what was measured (docs/adr/0013-where-copies-come-from.md): this node's page cache, a peer, storage.
Copies that are packed in memory come from a peer before the page cache: packing takes longer than their transfer.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import uvloop

from experts.fetching import PeerClient
from experts.pagecache import resident_share
from experts.weights import CopyKey, ExpertCopy, ExpertShard
from protos.errors import ExpertmeshError, Overloaded, StalePlacement

log = logging.getLogger("expertmesh.experts")

Source = Literal["page_cache", "peer", "storage"]
SOURCES: tuple[Source, ...] = ("page_cache", "peer", "storage")

CACHED_SHARE = 0.95  # of an expert's bytes from which reading them counts as reading memory
MAX_PEERS = 3  # asked for one copy before storage is
AVOID_S = 10.0  # how long a peer that failed is not asked again


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTotals:
    """What came from one source since the server started. Failures: attempts after which another source was taken."""

    copies: int = 0
    bytes: int = 0  # as they lie in the source
    seconds: float = 0.0  # of successful attempts, with what had to be converted and checked
    failures: int = 0

    def plus(self, num_bytes: int, seconds: float) -> "SourceTotals":
        return SourceTotals(
            copies=self.copies + 1, bytes=self.bytes + num_bytes, seconds=self.seconds + seconds, failures=self.failures
        )

    def failed(self) -> "SourceTotals":
        return SourceTotals(copies=self.copies, bytes=self.bytes, seconds=self.seconds, failures=self.failures + 1)


class CopySources:
    """Reads copies for one server. For one thread at a time; `totals` may be read from any."""

    def __init__(self, shard: ExpertShard, is_busy: Callable[[], bool]) -> None:
        self.totals: Mapping[Source, SourceTotals] = {source: SourceTotals() for source in SOURCES}
        self._shard = shard
        self._peers = PeerClient(shard, is_busy)
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._avoid_until_s: dict[str, float] = {}

    def read(self, key: CopyKey, peers: Sequence[str]) -> ExpertCopy:
        """A copy, the same bytes from whichever source.

        Args:
            peers: gRPC addresses of servers that may hold it, best first.

        Raises:
            CorruptWeights: no peer has it, and storage cannot be read.
        """
        is_cached = self._is_cached(key)
        if not is_cached or self._shard.weight_dtype is not None:
            for address in self._worth_asking(peers):
                copy = self._fetch(address, key)
                if copy is not None:
                    return copy
        start_s = time.monotonic()
        copy = self._shard.read(key)
        self._count(
            "page_cache" if is_cached else "storage",
            self._shard.checkpoint.expert_bytes(*key),
            time.monotonic() - start_s,
        )
        return copy

    def close(self) -> None:
        """Close the connections to peers. Idempotent."""
        self._runner.run(self._peers.close())
        self._runner.close()

    def _is_cached(self, key: CopyKey) -> bool:
        extents = self._shard.checkpoint.expert_extents(*key)
        resident = (resident_share(extent.file.path, extent.begin, extent.nbytes) for extent in extents)
        return all(share >= CACHED_SHARE for share in resident)

    def _worth_asking(self, peers: Iterable[str]) -> list[str]:
        now_s = time.monotonic()
        return [address for address in peers if self._avoid_until_s.get(address, now_s) <= now_s][:MAX_PEERS]

    def _fetch(self, address: str, key: CopyKey) -> ExpertCopy | None:
        """A peer's copy; None if it did not come, for whatever reason."""
        start_s = time.monotonic()
        try:
            copy = self._runner.run(self._peers.fetch(address, key))
        except Exception as err:
            reason = str(err) if isinstance(err, ExpertmeshError) else f"{type(err).__name__}: {err}"
            log.warning("copy %s does not come from peer %s, next source: %s", key, address, reason)
            self.totals = {**self.totals, "peer": self.totals["peer"].failed()}
            if not isinstance(err, StalePlacement | Overloaded):  # which say nothing about other copies
                self._avoid_until_s[address] = time.monotonic() + AVOID_S
                self._runner.run(self._peers.forget(address))
            return None
        self._count("peer", self._shard.copy_bytes, time.monotonic() - start_s)
        return copy

    def _count(self, source: Source, num_bytes: int, seconds: float) -> None:
        self.totals = {**self.totals, source: self.totals[source].plus(num_bytes, seconds)}
