"""One router without its endpoint: gates, placement snapshot, streams, merging, counters.

Everything runs on one event loop. `RouterServer` (service.py) puts a gRPC endpoint in front of it; a program that has
the hidden states in its own process can call `forward` directly and save that hop.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protos.checkpoint import Checkpoint
from protos.codec import WIRE_DTYPES
from protos.errors import DeadlineExceeded, ExpertmeshError, InvalidRequest
from protos.loops import compute_executor, keep_freed_memory, limit_torch_threads
from protos.model import ModelSpec
from router.around import Around
from router.config import OverflowConfig, RouterConfig
from router.context import LayerContext
from router.gate import Gate, Routing
from router.layer import run_batch
from router.ledger import LedgerTotals
from router.merging import Batch, Merger, Request, Result
from router.shared import SharedExpert
from router.snapshot import PlacementSnapshot
from router.table import PlacementTable, empty_table
from router.transport import Transport

if TYPE_CHECKING:
    from router.recorder import Recorder

_CANNOT_RENORMALIZE = (
    "overflow.renormalize is true (supported for {family}: false; its gate weights multiply the experts' inputs, where "
    "they cannot be scaled after the fact)"
)
LATENCY_WINDOW_S = 10.0
RATE_WINDOW_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport:
    """What one router did and sees. `demand` counts routed pairs the gate asked for, since the router started."""

    address: str
    epoch: int
    oldest_epoch: int  # the lowest epoch a batch in flight still uses
    demand: Mapping[tuple[str, int], int]
    totals: LedgerTotals
    p50_s: float  # of the last 10 s
    p99_s: float
    tokens_per_s: float  # of the last second
    queued_tokens: int
    traced_tokens: int = 0  # in finished trace files
    trace_dropped_tokens: int = 0  # sampled for the trace, but could not be kept


class Router:
    """Computes every MoE layer of one model through the expert servers of the newest placement table.

    Args:
        spec: the model; its gates and shared experts are read here.
        config: see RouterConfig.
        on_server_lost: called on the loop with (server_id, reason) when a server stops answering.
        on_absent: called on the loop when a batch has to wait for experts without a live copy.

    Raises:
        CorruptWeights: gates or shared experts cannot be read.
        InvalidRequest: an overflow option that the model's family cannot have.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: RouterConfig,
        *,
        on_server_lost: Callable[[str, str], None] | None = None,
        on_absent: Callable[[], None] | None = None,
    ) -> None:
        self.spec = spec
        self.config = config
        self.snapshot = PlacementSnapshot(empty_table(spec.num_experts))
        checkpoint = Checkpoint(spec)
        self._gates: dict[str, Gate] = {}
        self._shared: dict[str, SharedExpert] = {}
        self._around: dict[str, Around] = {}
        for layer, block in spec.blocks.items():
            self._gates[layer] = Gate(block.gate, checkpoint.gate(layer))
            self._around[layer] = Around(block, checkpoint.around(layer))
            weights = checkpoint.shared(layer)
            if block.shared is not None and weights is not None:
                self._shared[layer] = SharedExpert(block.shared, weights)
        if config.overflow.renormalize and any(block.form.weighs_input for block in spec.blocks.values()):
            raise InvalidRequest(_CANNOT_RENORMALIZE.format(family=spec.family))
        self._on_server_lost = on_server_lost or (lambda server_id, reason: None)
        self._on_absent = on_absent or (lambda: None)
        self._demand = {layer: np.zeros(spec.num_experts, dtype=np.int64) for layer in spec.layers}
        self._totals = LedgerTotals()
        self._recent: deque[tuple[float, float, int]] = deque(maxlen=16384)  # (answered at, took, tokens)
        self._lock = threading.Lock()  # _totals and _recent are read by report() from other threads
        self._compute_thread: ThreadPoolExecutor
        self._transport: Transport
        self._merger: Merger
        self._recorder: Recorder | None = None

    async def start(self) -> None:
        """Bind to the running loop. Once only, before anything else."""
        keep_freed_memory()
        limit_torch_threads(self.config.compute_threads)
        self._compute_thread = compute_executor("expertmesh-gate", self.config.compute_threads)
        self._transport = Transport(
            hop_timeout_s=self.config.hop_timeout_s, on_lost=self._on_server_lost, on_change=self._links_changed
        )
        if self.config.trace_dir is not None:
            from router.recorder import start_recorder  # pyarrow takes its time to import

            self._recorder = start_recorder(self.spec, self.config)
        context = LayerContext(
            spec=self.spec,
            config=self.config,
            gates=self._gates,
            shared=self._shared,
            around=self._around,
            snapshot=self.snapshot,
            transport=self._transport,
            rng=np.random.default_rng(),
            count_demand=self._count_demand,
            on_absent=self._on_absent,
            compute_thread=self._compute_thread,
            record=None if self._recorder is None else self._recorder.record,
        )

        async def run(batch: Batch) -> None:
            await run_batch(batch, context)

        self._merger = Merger(
            run,
            layers=self.spec.layers,
            max_batch_tokens=self.config.max_batch_tokens,
            max_batches_in_flight=self.config.max_batches_in_flight,
            max_queued_tokens=self.config.max_queued_tokens,
        )

    async def close(self) -> None:
        """Cancel what runs (its requests fail) and close the streams."""
        await self._merger.close()
        await self._transport.close()
        self._compute_thread.shutdown(wait=False, cancel_futures=True)
        if self._recorder is not None:
            await asyncio.to_thread(self._recorder.close)

    def adopt(self, table: PlacementTable) -> None:
        """Take a placement table if it is newer. Batches in flight keep theirs."""
        if table.epoch > self.snapshot.table.epoch:
            self._transport.update(table.servers)  # first the links, so that a batch never meets a server without one
            self.snapshot.adopt(table)
            self._links_changed()

    async def forward(
        self,
        layer: str,
        x_TD: Tensor,
        *,
        timeout_s: float | None = None,
        routing: Routing | None = None,
        token_ids_T: npt.NDArray[np.int64] | None = None,
        overflow: OverflowConfig | None = None,
        return_routing: bool = False,
    ) -> Result:
        """Run one MoE layer on hidden states [T, D]; the arguments are those of `RouterClient.forward`.

        Raises:
            ExpertmeshError: see protos/errors.py.
        """
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

        def answer(outcome: Result | ExpertmeshError) -> None:
            if done.done():
                return
            if isinstance(outcome, ExpertmeshError):
                done.set_exception(outcome)
            else:
                done.set_result(outcome)

        request = self.submit(
            layer,
            x_TD,
            timeout_s=timeout_s or 0.0,
            routing=routing,
            token_ids_T=token_ids_T,
            overflow=overflow or self.config.overflow,
            return_routing=return_routing,
            answer=answer,
        )
        try:
            return await done
        finally:
            if not request.done:
                request.abandon()

    def submit(
        self,
        layer: str,
        x_TD: Tensor,
        *,
        timeout_s: float,
        routing: Routing | None,
        token_ids_T: npt.NDArray[np.int64] | None,
        overflow: OverflowConfig,
        return_routing: bool,
        answer: Callable[[Result | ExpertmeshError], None],
    ) -> Request:
        """Check and queue one request; `answer` is called once, on the loop, with its outcome. 0: default timeout.

        Raises:
            InvalidRequest: naming field, value and limit.
            Overloaded: too many tokens are queued.
        """
        if layer not in self._gates:
            raise InvalidRequest(f"layer {layer!r} is not a MoE layer of this model {list(self.spec.layers)}")
        self._check_states(x_TD)
        block = self.spec.blocks[layer]
        if routing is not None:
            self._check_routing(routing, num_tokens=x_TD.shape[0], num_choices=block.gate.num_choices)
        elif block.gate.needs_token_ids:
            self._gates[layer].check_token_ids(token_ids_T, x_TD.shape[0])
        if overflow.renormalize and block.form.weighs_input:
            raise InvalidRequest(_CANNOT_RENORMALIZE.format(family=self.spec.family))
        if not 0 <= timeout_s < float("inf"):
            raise InvalidRequest(f"timeout_s is {timeout_s}, it must be a finite number of seconds >= 0")
        loop = asyncio.get_running_loop()
        now_s = time.monotonic()

        def finish(outcome: Result | ExpertmeshError) -> None:
            self._count(outcome, took_s=time.monotonic() - now_s, num_tokens=x_TD.shape[0])
            answer(outcome)

        request = Request(
            layer=layer,
            x_TD=x_TD,
            overflow=overflow,
            routing=routing,
            token_ids_T=token_ids_T if block.gate.needs_token_ids else None,
            return_routing=return_routing,
            arrived_s=now_s,
            deadline_s=now_s + (timeout_s or self.config.default_timeout_s),
            answer=finish,
        )
        self._merger.submit(request)
        request.timer = loop.call_later(request.deadline_s - now_s, _expire, request)
        return request

    def report(self) -> RouterReport:
        """A snapshot of counters and latencies, from any thread. `address` is for the endpoint to fill in."""
        now_s = time.monotonic()
        with self._lock:
            recent = [entry for entry in self._recent if entry[0] > now_s - LATENCY_WINDOW_S]
            totals = replace(self._totals)
        took = np.array([entry[1] for entry in recent]) if recent else np.zeros(1)
        p50_s, p99_s = np.percentile(took, (50, 99)).tolist()
        tokens = sum(entry[2] for entry in recent if entry[0] > now_s - RATE_WINDOW_S)
        return RouterReport(
            address="",
            epoch=self.snapshot.table.epoch,
            oldest_epoch=self.snapshot.oldest_epoch,
            demand={
                (layer, expert): count
                for layer, counts_E in self._demand.items()
                for expert, count in enumerate(counts_E.tolist())
                if count
            },
            totals=totals,
            p50_s=p50_s,
            p99_s=p99_s,
            tokens_per_s=tokens / RATE_WINDOW_S,
            queued_tokens=self._merger.queued_tokens,
            traced_tokens=0 if self._recorder is None else self._recorder.recorded_tokens,
            trace_dropped_tokens=0 if self._recorder is None else self._recorder.dropped_tokens,
        )

    def _check_states(self, x_TD: Tensor) -> None:
        dim, limit = self.spec.dim, self.config.max_request_tokens
        if x_TD.dtype not in WIRE_DTYPES:
            raise InvalidRequest(f"x has dtype {x_TD.dtype} (supported: float32, bfloat16, float16)")
        if x_TD.dim() != 2 or x_TD.shape[1] != dim:
            raise InvalidRequest(f"x has shape {list(x_TD.shape)}, expected [T, {dim}]")
        if not 1 <= x_TD.shape[0] <= limit:
            raise InvalidRequest(f"num_tokens is {x_TD.shape[0]}, limit is 1..max_request_tokens ({limit})")
        # One sum finds any NaN or inf; only if it is not finite (which large finite values may cause too) look closer.
        total = np.add.reduce(x_TD.numpy(), axis=None) if x_TD.dtype is torch.float32 else x_TD.sum()
        if not math.isfinite(total) and not torch.isfinite(x_TD).all():
            row = int((~torch.isfinite(x_TD).all(dim=1)).nonzero()[0])
            raise InvalidRequest(f"x has a NaN or inf in row {row} (of 0..{x_TD.shape[0] - 1})")

    def _check_routing(self, routing: Routing, *, num_tokens: int, num_choices: int) -> None:
        expert_TK, weight_TK, limit = routing.expert_TK, routing.weight_TK, num_choices
        if expert_TK.shape != weight_TK.shape or len(expert_TK) != num_tokens or not 1 <= expert_TK.shape[1] <= limit:
            raise InvalidRequest(
                f"routing has expert_ids {list(expert_TK.shape)} and gate_weights {list(weight_TK.shape)}, "
                f"expected [{num_tokens}, K] with K in 1..{limit}"
            )
        bad = (expert_TK < -1) | (expert_TK >= limit) | ((expert_TK == -1) & (weight_TK != 0))
        if bad.any():
            row, k = np.argwhere(bad)[0].tolist()
            raise InvalidRequest(
                f"routing.expert_ids[{row}, {k}] is {expert_TK[row, k]} with weight {weight_TK[row, k]}, "
                f"limit is 0..{limit - 1}, or -1 with weight 0 for no expert"
            )
        sorted_TK = np.sort(expert_TK, axis=1)
        twice = ((sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] >= 0)).any(axis=1)
        if twice.any():
            row = int(np.argmax(twice))
            raise InvalidRequest(f"routing.expert_ids[{row}] is {expert_TK[row].tolist()}, each expert at most once")
        if not np.isfinite(weight_TK).all():
            row = int(np.argwhere(~np.isfinite(weight_TK))[0][0])
            raise InvalidRequest(f"routing.gate_weights has a NaN or inf in row {row}")

    def _links_changed(self) -> None:
        links = self._transport.links.items()
        self.snapshot.set_unreachable(frozenset(server_id for server_id, link in links if not link.usable))

    def _count_demand(self, layer: str, counts_E: npt.NDArray[np.int64]) -> None:
        self._demand[layer] += counts_E

    def _count(self, outcome: Result | ExpertmeshError, *, took_s: float, num_tokens: int) -> None:
        with self._lock:
            if isinstance(outcome, ExpertmeshError):
                self._totals.requests += 1
                self._totals.failed_requests += 1
            else:
                outcome.ledger.total_s = took_s
                self._totals.add(outcome.ledger, num_tokens=num_tokens)
                self._recent.append((time.monotonic(), took_s, num_tokens))


def _expire(request: Request) -> None:
    limit_s = request.deadline_s - request.arrived_s
    request.finish(DeadlineExceeded(f"no answer within timeout_s ({limit_s:.3g})"))
    request.abandon()
