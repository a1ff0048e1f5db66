"""Loading: a copy is read, run once, and only then visible.

It steps back behind those that serve, unless requests wait for the copy: one thread each, because a thread cannot raise
its own priority again.
"""

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from experts.compute import partial_sums
from experts.sources import CopySources, Source, SourceTotals
from experts.weights import CopyKey, ExpertCopy, ExpertShard
from protos.loops import background_executor, compute_executor


class CopyLoader:
    """Fills a shard with copies.

    Args:
        shard: where they go.
        is_busy: whether requests wait or run on this server: what comes from peers lets them go first.
    """

    def __init__(self, shard: ExpertShard, is_busy: Callable[[], bool]) -> None:
        self._shard = shard
        self._sources = CopySources(shard, is_busy)
        self._one = threading.Lock()  # sources are used by one thread at a time
        self._background = background_executor("expertmesh-loading")
        self._urgent = compute_executor("expertmesh-urgent", 1)
        self._stopped = False

    @property
    def totals(self) -> Mapping[Source, SourceTotals]:
        """What came from where so far."""
        return self._sources.totals

    def load(self, keys: Sequence[CopyKey], sources: Mapping[CopyKey, Sequence[str]], *, urgent: bool) -> None:
        """Load copies, each from the fastest source. Blocks the caller; the work is done on a loading thread.

        Args:
            sources: gRPC addresses of servers that may hold a key, best first.
            urgent: at the priority of the threads that serve.

        Raises:
            Overloaded, CorruptWeights: as `ExpertShard.load` does.
        """

        def read(key: CopyKey) -> ExpertCopy:
            copy = self._sources.read(key, sources.get(key, ()))
            self._warm(key, copy)
            return copy

        def work() -> None:
            with self._one:
                self._shard.load(keys, read)

        (self._urgent if urgent else self._background).submit(work).result()

    def stop(self) -> None:
        """End the threads after the load that runs, if one does. Idempotent."""
        if not self._stopped:
            self._stopped = True
            self._urgent.shutdown(wait=False)
            self._background.submit(self._close)
            self._background.shutdown(wait=False)

    def _close(self) -> None:
        with self._one:
            self._sources.close()

    def _warm(self, key: CopyKey, copy: ExpertCopy) -> None:
        """Run the copy once, so that the first request meets warm weights."""
        zero, weight = np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.float32)
        partial_sums(torch.zeros(1, self._shard.spec.expert_dim), zero, zero, weight, {0: copy})
        copy.tokens = 0  # the warm-up counts as no traffic
