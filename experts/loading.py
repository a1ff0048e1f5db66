"""Loading, on a thread that steps back behind those that serve: a copy is read, run once, and only then visible."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from experts.compute import partial_sums
from experts.sources import CopySources, Source, SourceTotals
from experts.weights import CopyKey, ExpertCopy, ExpertShard
from protos.loops import background_executor


class CopyLoader:
    """Fills a shard with copies.

    Args:
        shard: where they go.
        is_busy: whether requests wait or run on this server: what comes from peers lets them go first.
    """

    def __init__(self, shard: ExpertShard, is_busy: Callable[[], bool]) -> None:
        self._shard = shard
        self._sources = CopySources(shard, is_busy)
        self._thread = background_executor("expertmesh-loading")
        self._stopped = False

    @property
    def totals(self) -> Mapping[Source, SourceTotals]:
        """What came from where so far."""
        return self._sources.totals

    def load(self, keys: Sequence[CopyKey], sources: Mapping[CopyKey, Sequence[str]]) -> None:
        """Load copies, each from the fastest source. Blocks the caller; the work is done on the loading thread.

        Args:
            sources: gRPC addresses of servers that may hold a key, best first.

        Raises:
            Overloaded, CorruptWeights: as `ExpertShard.load` does.
        """

        def read(key: CopyKey) -> ExpertCopy:
            copy = self._sources.read(key, sources.get(key, ()))
            self._warm(key, copy)
            return copy

        self._thread.submit(self._shard.load, keys, read).result()

    def stop(self) -> None:
        """End the thread after the load that runs, if one does. Idempotent."""
        if not self._stopped:
            self._stopped = True
            self._thread.submit(self._sources.close)
            self._thread.shutdown(wait=False)

    def _warm(self, key: CopyKey, copy: ExpertCopy) -> None:
        """Run the copy once, so that the first request meets warm weights."""
        zero, weight = np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.float32)
        partial_sums(torch.zeros(1, self._shard.spec.expert_dim), zero, zero, weight, {0: copy})
        copy.tokens = 0  # the warm-up counts as no traffic
