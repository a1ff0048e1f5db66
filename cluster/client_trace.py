"""What a load generator's answers say was routed, as one trace file.

Shapes: T tokens of a request, K experts per token.
"""

import asyncio
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cluster.traffic import Work
from protos.router_pb2 import DescribeResponse
from protos.tracefile import ROW_GROUP_TOKENS, RoutedTokens, TraceInfo, TraceWriter
from router.client import Answer


class ClientRecorder:
    """Records the effective routing of every answered request, at the time it left. Identity experts count as none.

    The event loop only appends; row groups are written on a thread. A file that can no longer be written costs the
    trace, not the load: `close` says so.

    Raises:
        OSError: the file cannot be begun.
    """

    def __init__(self, path: Path, model: DescribeResponse) -> None:
        info = TraceInfo(
            model=model.model,
            layers=tuple(model.layers),
            num_experts=model.num_experts,
            num_choices=model.num_experts,
            top_k=model.top_k,
            stage="effective",
        )
        self._writer = TraceWriter(path, info)
        self._num_experts = model.num_experts
        self._blocks: list[RoutedTokens] = []
        self._waiting = 0
        self._next: defaultdict[str, int] = defaultdict(int)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="expertmesh-record")
        self._writes: list[asyncio.Future[None]] = []

    def add(self, work: Work, answer: Answer, took_s: float) -> None:
        """Keep the routing of an answer, on the loop."""
        assert answer.routing is not None, "a recorded request asks for its routing"
        num_tokens, first = len(work.x_TD), self._next[work.layer]
        self._next[work.layer] = first + num_tokens
        served_TK = answer.routing.expert_TK < self._num_experts
        self._blocks.append(
            RoutedTokens(
                time_s=time.time() - took_s,
                layer=work.layer,
                token_T=np.arange(first, first + num_tokens),
                expert_TK=np.where(served_TK, answer.routing.expert_TK, np.int32(-1)),
                weight_TK=np.where(served_TK, answer.routing.weight_TK, np.float32(0)),
            )
        )
        self._waiting += num_tokens
        if self._waiting >= ROW_GROUP_TOKENS:
            self._flush()

    def _flush(self) -> None:
        blocks, self._blocks, self._waiting = self._blocks, [], 0
        loop = asyncio.get_running_loop()
        self._writes.append(loop.run_in_executor(self._thread, self._writer.write, blocks))

    async def close(self) -> dict[str, object]:
        """Finish the file; how many tokens are in it and how many were beyond its size limit.

        Raises:
            OSError: it could not be written.
        """
        self._flush()
        try:
            outcomes = await asyncio.gather(*self._writes, return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
            await asyncio.get_running_loop().run_in_executor(self._thread, self._writer.close)
        finally:
            self._thread.shutdown()
        return {
            "file": str(self._writer.path),
            "tokens": self._writer.num_tokens,
            "left_out": self._writer.num_left_out,
        }
