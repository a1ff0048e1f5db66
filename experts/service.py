"""One expert server: its gRPC data path on its own thread and loop, its copies, its report.

The shell around `batching.py` (what runs next) and `compute.py` (how): it decodes and checks messages, hands launches
to the compute thread and writes partial sums back. Whoever embeds it (a Serve replica, a test, `python -m experts`)
calls it from any thread.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import grpc.aio
import numpy as np
import torch
from torch import Tensor

from experts.batching import Batcher, Call
from experts.compute import Float32Array, Int32Array, choose_compute_dtype, partial_sums
from experts.config import ExpertServerConfig
from experts.loading import CopyLoader
from experts.meters import BusyMeter, LaunchCost, Pacer
from experts.report import ServerReport, status_response
from experts.sending import CopySender
from experts.stream import ComputeStream
from experts.weights import CopyKey, ExpertCopy, ExpertShard
from protos import expert_pb2
from protos.checkpoint import Checkpoint
from protos.codec import TORCH_DTYPES, WIRE_DTYPES, decode, encode, matrix_bytes, read_floats, read_ints, read_tensor
from protos.errors import DeadlineExceeded, ExpertmeshError, InvalidRequest, to_proto
from protos.loops import LoopThread, compute_executor, keep_freed_memory, limit_torch_threads
from protos.model import ModelSpec
from protos.services import EXPERT_SERVICE, expert_handlers, start_server

log = logging.getLogger("expertmesh.experts")


@dataclass(slots=True, kw_only=True, eq=False)
class _Work:
    """A checked ComputeRequest."""

    x_RD: Tensor
    pair_row_P: Int32Array
    pair_expert_P: Int32Array
    pair_weight_P: Float32Array
    copies: Mapping[int, ExpertCopy]
    partial_dtype: torch.dtype


class ExpertServer:
    """Serves copies of experts of one model.

    Args:
        spec: the model.
        config: budgets and compute settings.
        server_id: unique per process.
        checkpoint: of that model, where it is open already.
    """

    def __init__(
        self, spec: ModelSpec, config: ExpertServerConfig, *, server_id: str, checkpoint: Checkpoint | None = None
    ) -> None:
        keep_freed_memory()
        limit_torch_threads(config.compute_threads)
        device = torch.device(config.device if config.device != "auto" else _best_device())
        self.spec = spec
        self.config = config
        self.server_id = server_id
        self.address = ""
        self._dtype = choose_compute_dtype(
            config.compute_dtype,
            getattr(torch, spec.dtype),
            device=device,
            dim=spec.expert_dim,
            hidden_dim=spec.hidden_dim,
            packed=config.weight_dtype != "compute",
        )
        packed = None if config.weight_dtype == "compute" else config.weight_dtype
        checkpoint = checkpoint or Checkpoint(spec)
        self._shard = ExpertShard(spec, checkpoint, device, self._dtype, config.budget_bytes, packed)
        self._batcher: Batcher[_Work] = Batcher(config.max_queue_tokens, config.max_launch_tokens)
        self._loader = CopyLoader(self._shard, self._is_busy)
        self._sender = CopySender(self._shard, self._is_busy)
        self._pacer = Pacer(config.emulated_tokens_per_s)
        self._busy = BusyMeter()
        self._launch_cost = LaunchCost()
        self._draining = False
        self._running = False
        self._compute_thread = compute_executor("expertmesh-compute", config.compute_threads)
        self._loop = LoopThread(f"expertmesh-experts-{server_id}")
        self._server: grpc.aio.Server | None = None
        if config.emulated_tokens_per_s is not None:
            log.warning("server %s EMULATES a device of %g routed pairs/s", server_id, config.emulated_tokens_per_s)

    # ------------------------------------------------------------------ for whoever embeds the server, any thread

    def start(self, host: str, port: int = 0) -> str:
        """Serve on host:port (0: any free port). Returns "host:port".

        Raises:
            InvalidRequest: the port cannot be bound.
        """
        self._loop.start()
        self.address = self._loop.call(self._start(host, port))
        return self.address

    def load(
        self,
        copies: Sequence[CopyKey],
        sources: Mapping[CopyKey, Sequence[str]] | None = None,
        *,
        urgent: bool = False,
    ) -> None:
        """Load copies and run each once, so that the first request meets warm weights. Blocks.

        Args:
            sources: gRPC addresses of servers that may hold a copy, best first. Each copy comes from the fastest source
                that has it (experts/sources.py), in the end from storage.
            urgent: requests wait for these copies: loading does not step back behind what serves others.

        Raises:
            InvalidRequest: a layer or expert the model does not have.
            Overloaded: budget_bytes would be exceeded; nothing is loaded.
            CorruptWeights: the checkpoint cannot be read; copies loaded before stay.
        """
        for layer, expert in copies:
            self._check_key(layer, expert)
        self._loader.load(copies, sources or {}, urgent=urgent)

    def unload(self, copies: Sequence[CopyKey]) -> None:
        """Forget copies. Calls accepted for them complete; later ones get StalePlacement."""
        self._shard.unload(copies)

    @property
    def copy_bytes(self) -> int:
        """Memory of one expert copy on this server."""
        return self._shard.copy_bytes

    def report(self) -> ServerReport:
        """A snapshot, cheap enough for every heartbeat."""
        held = self._shard.held
        return ServerReport(
            server_id=self.server_id,
            address=self.address,
            pid=os.getpid(),
            state="draining" if self._draining else "serving",
            copies=frozenset(held),
            bytes=self._shard.num_bytes,
            budget_bytes=self.config.budget_bytes,
            queue_tokens=self._batcher.queue_tokens,
            busy_share=self._busy.share(time.monotonic()),
            tokens={key: copy.tokens for key, copy in held.items()},
            loaded=self._loader.totals,
            compute_dtype=str(self._dtype).removeprefix("torch."),
            emulated_tokens_per_s=self.config.emulated_tokens_per_s,
        )

    def drain(self) -> None:
        """Report "draining". What still arrives is served: the placement takes this server out of the table first."""
        self._draining = True

    def stop(self, grace_s: float) -> None:
        """Stop serving after at most `grace_s` seconds for open calls. Idempotent."""
        if self._loop.running:
            self._loop.call(self._stop(grace_s))
            self._loop.stop()
        self._compute_thread.shutdown(wait=False, cancel_futures=True)
        self._loader.stop()
        self._sender.stop()

    # ------------------------------------------------------------------ gRPC methods, on our loop

    async def _start(self, host: str, port: int) -> str:
        self._sender.start()
        limit_torch_threads(self.config.compute_threads)  # of the loop's thread: short launches run on it
        handlers = expert_handlers(compute=self._compute, status=self._status, fetch=self._sender.fetch)
        self._server, address, _ = await start_server(EXPERT_SERVICE, handlers, host=host, port=port)
        return address

    async def _stop(self, grace_s: float) -> None:
        end_s = time.monotonic() + grace_s
        while self._batcher.queue_tokens and time.monotonic() < end_s:
            await asyncio.sleep(0.01)
        if self._server is not None:
            await self._server.stop(0.05)

    async def _compute(self, _: object, context: grpc.aio.ServicerContext) -> None:
        stream = ComputeStream(context)
        writer = asyncio.create_task(stream.write())
        try:
            while (buffer := await context.read()) is not grpc.aio.EOF:
                self._receive(buffer, stream)
            while stream.open_calls or stream.out:  # half-closed: answer what was asked
                await asyncio.sleep(0.005)
        finally:
            writer.cancel()
            stream.open_calls = 0
            self._batcher.cancel(stream)

    async def _status(
        self, request: expert_pb2.StatusRequest, context: grpc.aio.ServicerContext
    ) -> expert_pb2.StatusResponse:
        return status_response(self.report())

    # ------------------------------------------------------------------ requests

    def _receive(self, buffer: bytes, stream: ComputeStream) -> None:
        """Queue one message, or answer it with its error."""
        call_id = 0
        try:
            head, payload = decode(expert_pb2.ComputeRequest, buffer)
            call_id = head.call_id
            if head.cancel:
                stream.open_calls -= len(self._batcher.cancel(stream, frozenset(head.cancel)))
            if not call_id:
                return
            now_s = time.monotonic()
            work = self._check(head, payload)
            self._batcher.admit(
                Call(
                    call_id=call_id,
                    stream=stream,
                    layer=head.layer,
                    num_rows=head.num_rows,
                    num_tokens=len(work.pair_row_P),
                    arrived_s=now_s,
                    deadline_s=now_s + head.timeout_s if head.timeout_s > 0 else float("inf"),
                    work=work,
                )
            )
            stream.call_opened()
            self._pump()
        except Exception as err:
            self._refuse(stream, call_id, err)

    def _is_busy(self) -> bool:
        return self._batcher.queue_tokens > 0

    def _check(self, head: expert_pb2.ComputeRequest, payload: memoryview) -> _Work:
        """Decode the arrays of a request and check every one of its fields."""
        if head.layer not in self.spec.layers:
            raise InvalidRequest(f"layer {head.layer!r} is not a MoE layer of this model {list(self.spec.layers)}")
        if head.num_rows == 0:
            raise InvalidRequest("num_rows is 0, at least 1 is needed")
        partial_dtype = TORCH_DTYPES.get(head.partial_dtype)
        if partial_dtype is None:
            raise InvalidRequest(f"partial_dtype is {head.partial_dtype} (supported: 1, 2, 3)")
        x_RD = read_tensor(payload, head.dtype, (head.num_rows, self.spec.expert_dim), name="x")
        pair_row_P = read_ints(head.pair_row, name="pair_row")
        pair_expert_P = read_ints(head.pair_expert, name="pair_expert", count=len(pair_row_P))
        pair_weight_P = read_floats(head.pair_weight, name="pair_weight", count=len(pair_row_P))
        if len(pair_row_P) == 0:
            raise InvalidRequest("pair_row is empty, at least 1 pair is needed")
        first, last = int(pair_row_P.min()), int(pair_row_P.max())
        if first < 0 or last >= head.num_rows:
            raise InvalidRequest(f"pair_row has {first}..{last}, limit is 0..{head.num_rows - 1}")
        experts = set(pair_expert_P.tolist())
        for expert in experts:
            self._check_key(head.layer, expert)
        return _Work(
            x_RD=x_RD,
            pair_row_P=pair_row_P,
            pair_expert_P=pair_expert_P,
            pair_weight_P=pair_weight_P,
            copies=self._shard.find(head.layer, experts),
            partial_dtype=partial_dtype,
        )

    def _check_key(self, layer: str, expert: int) -> None:
        if layer not in self.spec.layers:
            raise InvalidRequest(f"layer {layer!r} is not a MoE layer of this model {list(self.spec.layers)}")
        if not 0 <= expert < self.spec.num_experts:
            raise InvalidRequest(f"expert {expert} of layer {layer} is outside 0..{self.spec.num_experts - 1}")

    def _refuse(self, stream: ComputeStream, call_id: int, error: Exception) -> None:
        if not isinstance(error, ExpertmeshError):
            log.error("call %d failed", call_id, exc_info=error)
        response = expert_pb2.ComputeResponse(
            call_id=call_id, error=to_proto(error), queue_tokens=self._batcher.queue_tokens
        )
        stream.send(response.SerializeToString())

    # ------------------------------------------------------------------ launches

    def _pump(self) -> None:
        """Start the next launch if none is running: at once, since the next message takes another turn to arrive."""
        if self._running:
            return
        now_s = time.monotonic()
        for call in self._batcher.expire(now_s):
            self._answer_failure(
                call, DeadlineExceeded(f"queued for {now_s - call.arrived_s:.3f} s, past its deadline")
            )
        batch = self._batcher.take()
        if not batch:
            return
        self._running = True
        self._busy.begin(now_s)
        tokens = sum(call.num_tokens for call in batch)
        if self._launch_cost.expected_s(tokens) <= self.config.inline_launch_s:
            self._launched(batch, now_s, _guarded(_launch, batch))
        else:
            future = asyncio.get_running_loop().run_in_executor(self._compute_thread, _guarded, _launch, batch)
            future.add_done_callback(lambda done: self._launched(batch, now_s, done.result()))

    def _launched(self, batch: list[Call[_Work]], start_s: float, result: "list[Float32Array] | Exception") -> None:
        """A launch computed: pace it if the server emulates a slower device, then answer."""
        now_s = time.monotonic()
        tokens = sum(call.num_tokens for call in batch)
        self._launch_cost.learn(tokens, now_s - start_s)
        done_s = self._pacer.done_s(start_s, now_s, tokens)
        if done_s > now_s:
            asyncio.get_running_loop().call_at(
                asyncio.get_running_loop().time() + done_s - now_s, self._answer, batch, start_s, result
            )
        else:
            self._answer(batch, start_s, result)

    def _answer(self, batch: list[Call[_Work]], start_s: float, result: "list[Float32Array] | Exception") -> None:
        now_s = time.monotonic()
        self._busy.end(now_s)
        self._batcher.finish(batch, took_s=now_s - start_s)
        self._running = False
        if isinstance(result, Exception):
            for call in batch:
                self._answer_failure(call, result)
        else:
            rows = sum(call.num_rows for call in batch)
            for call, partial_RD in zip(batch, result, strict=True):
                dtype = call.work.partial_dtype
                head = expert_pb2.ComputeResponse(
                    call_id=call.call_id,
                    dtype=WIRE_DTYPES[dtype],
                    queue_s=start_s - call.arrived_s,
                    compute_s=now_s - start_s,
                    launch_rows=rows,
                    queue_tokens=self._batcher.queue_tokens,
                    emulated=self.config.emulated_tokens_per_s is not None,
                )
                stream = call.stream
                assert isinstance(stream, ComputeStream)
                stream.open_calls -= 1
                stream.send(encode(head, matrix_bytes(partial_RD, dtype)))
        if self._batcher.queue_tokens:
            asyncio.get_running_loop().call_soon(self._pump)  # not from within: launches would nest

    def _answer_failure(self, call: Call[_Work], error: Exception) -> None:
        stream = call.stream
        assert isinstance(stream, ComputeStream)
        stream.open_calls -= 1
        self._refuse(stream, call.call_id, error)


def _launch(batch: list[Call[_Work]]) -> list[Float32Array]:
    """Merge the calls of one layer, compute, and split the partial sums again."""
    works = [call.work for call in batch]
    if len(works) == 1:
        work = works[0]
        return [partial_sums(work.x_RD, work.pair_row_P, work.pair_expert_P, work.pair_weight_P, work.copies)]
    offsets = np.cumsum([0, *(call.num_rows for call in batch)]).astype(np.int32)
    copies: dict[int, ExpertCopy] = {}
    for work in works:
        copies.update(work.copies)
    partial_RD = partial_sums(
        torch.cat([work.x_RD for work in works]),
        np.concatenate([work.pair_row_P + offset for work, offset in zip(works, offsets, strict=False)]),
        np.concatenate([work.pair_expert_P for work in works]),
        np.concatenate([work.pair_weight_P for work in works]),
        copies,
    )
    return [partial_RD[start:end] for start, end in pairwise(offsets.tolist())]


def _guarded(
    launch: "Callable[[list[Call[_Work]]], list[Float32Array]]", batch: list[Call[_Work]]
) -> "list[Float32Array] | Exception":
    try:
        return launch(batch)
    except Exception as err:
        return err


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
