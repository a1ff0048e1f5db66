"""What the gates decide, sampled and kept as Parquet files: a trace to plan from, to simulate with and to replay.

Requests only append to a bounded ring; a thread of its own writes it away. Whatever goes wrong there (a full disk, a
directory that is gone) costs trace, never a request: what cannot be kept is counted and said once.

Shapes: T tokens, K experts per token.
"""

import logging
import os
import secrets
import threading
import time
from collections import defaultdict, deque
from pathlib import Path

import numpy as np
import pyarrow as pa

from protos.model import ModelSpec
from protos.tracefile import RoutedTokens, TraceInfo, TraceWriter
from router.config import RouterConfig
from router.gate import Routing

log = logging.getLogger("expertmesh.router")

RING_TOKENS = 65536  # in memory, at most: some MB
RETRY_S = 5.0  # after a failure to write
_BLOCK_TOKENS = 8  # what a block of tokens costs in memory beside its tokens, in tokens
_ROW_BYTES, _PAIR_BYTES, _FILE_BYTES = 32, 9, 16384  # upper bounds of what a trace takes on disk


def start_recorder(spec: ModelSpec, config: RouterConfig) -> "Recorder":
    """The recorder that a router's settings ask for."""
    assert config.trace_dir is not None, "only called where a trace is wanted"
    info = TraceInfo(
        model=str(spec.path),
        layers=spec.layers,
        num_experts=spec.num_experts,
        num_choices=max(block.gate.num_choices for block in spec.blocks.values()),
        top_k=spec.top_k,
        sampled_share=config.trace_share,
        stage="gate",
    )
    return Recorder(info, Path(config.trace_dir), max_bytes=config.trace_max_bytes, file_s=config.trace_file_s)


class Recorder:
    """Records the routing of one router.

    Args:
        directory: where the files go; routers may share it.
        max_bytes: of all trace files in the directory; the oldest go.
        file_s: seconds after which a file is finished; a crash loses what came since.
    """

    def __init__(self, info: TraceInfo, directory: Path, *, max_bytes: int, file_s: float) -> None:
        self.recorded_tokens = 0  # in finished files, those that have been removed included
        self.dropped_tokens = 0  # sampled, but could not be kept
        self._info, self._directory = info, directory
        self._max_bytes, self._file_s = max_bytes, file_s
        self._row_bytes = _ROW_BYTES + _PAIR_BYTES * info.top_k
        self._ring_tokens = min(RING_TOKENS, max(1, max_bytes // 4 // self._row_bytes))
        self._ring: deque[RoutedTokens] = deque()
        self._in_ring = 0
        self._next: defaultdict[str, int] = defaultdict(int)
        self._rng = np.random.default_rng()
        self._lock = threading.Lock()  # _ring and _in_ring
        self._wake = threading.Event()
        self._stopped = False
        self._warned = False
        self._name = f"{os.getpid()}-{secrets.token_hex(3)}"
        self._num_files = 0
        self._thread = threading.Thread(target=self._run, name="expertmesh-trace", daemon=True)
        self._thread.start()

    def record(self, layer: str, routing: Routing) -> None:
        """Keep a sample of these tokens. Quick, and never raises for what happens to the files."""
        num_tokens, first = len(routing.expert_TK), self._next[layer]
        self._next[layer] = first + num_tokens
        row_S = np.arange(num_tokens)
        if self._info.sampled_share < 1:
            row_S = np.flatnonzero(self._rng.random(num_tokens) < self._info.sampled_share)
            if not len(row_S):
                return
        block = RoutedTokens(
            time_s=time.time(),
            layer=layer,
            token_T=first + row_S,
            expert_TK=routing.expert_TK[row_S],  # a copy: a request's own routing may belong to a large message
            weight_TK=routing.weight_TK[row_S],
        )
        with self._lock:
            self._ring.append(block)
            self._in_ring += _cost(block)
            while self._in_ring > self._ring_tokens and len(self._ring) > 1:
                self._drop(self._ring.popleft())
            full = self._in_ring > self._ring_tokens // 2
        if full:
            self._wake.set()

    def close(self) -> None:
        """Write what is left and stop."""
        self._stopped = True
        self._wake.set()
        self._thread.join(RETRY_S)

    def _drop(self, block: RoutedTokens) -> None:
        self._in_ring -= _cost(block)
        self.dropped_tokens += len(block.token_T)

    def _run(self) -> None:
        failed = False
        while not self._stopped:
            if failed:
                self._pause(RETRY_S)
            else:
                self._wake.wait(self._file_s)
            self._wake.clear()
            failed = not self._flush()
        self._flush()

    def _pause(self, seconds: float) -> None:
        """Wait, though the ring may be full: only `close` ends it early."""
        until_s = time.monotonic() + seconds
        while not self._stopped and (left_s := until_s - time.monotonic()) > 0:
            self._wake.clear()
            self._wake.wait(left_s)

    def _flush(self) -> bool:
        """Write the ring as one file; False if that failed."""
        with self._lock:
            blocks, self._ring, self._in_ring = list(self._ring), deque(), 0
        num_tokens = sum(len(block.token_T) for block in blocks)
        if not num_tokens:
            return True
        self._num_files += 1
        name = f"routing-{time.time_ns() // 1_000_000:013d}-{self._name}-{self._num_files:06d}.parquet"
        pairs = sum(block.expert_TK.size for block in blocks)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._remove_oldest(self._max_bytes - num_tokens * _ROW_BYTES - pairs * _PAIR_BYTES - _FILE_BYTES)
            with TraceWriter(self._directory / name, self._info) as writer:
                writer.write(blocks)
        except (OSError, pa.ArrowException) as err:
            with self._lock:
                self.dropped_tokens += num_tokens
            if not self._warned:
                log.warning("trace: %d tokens not recorded, serving goes on: %s", num_tokens, err)
            self._warned = True
            return False
        self.recorded_tokens += num_tokens
        return True

    def _remove_oldest(self, max_bytes: int) -> None:
        """Make the trace files of the directory take at most so many bytes; unfinished ones of dead routers count."""
        sizes: dict[Path, int] = {}
        for pattern in ("routing-*.parquet", ".routing-*.partial"):
            for path in self._directory.glob(pattern):
                try:
                    sizes[path] = path.stat().st_size
                except FileNotFoundError:
                    continue  # another router of this directory was faster
        total = sum(sizes.values())
        for path in sorted(sizes, key=lambda path: path.name.lstrip(".")):
            if total <= max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= sizes[path]


def _cost(block: RoutedTokens) -> int:
    return len(block.token_T) + _BLOCK_TOKENS
