"""The router endpoint: RouterService over gRPC, on its own thread and loop.

A shell around `Router` (core.py): it decodes requests, encodes answers and ends what a vanished client asked for.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import grpc.aio
import torch

from protos import router_pb2
from protos.codec import WIRE_DTYPES, decode, encode, read_longs, read_tensor, tensor_bytes
from protos.errors import Draining, ExpertmeshError, InvalidRequest, to_proto
from protos.loops import LoopThread
from protos.model import ModelSpec
from protos.services import (
    ROUTER_SERVICE,
    HealthServicer,
    abort,
    require_free_port,
    router_handlers,
    set_serving,
    start_server,
)
from router.client import routing_from_proto, routing_to_proto
from router.config import OverflowConfig, RouterConfig
from router.core import Router, RouterReport
from router.merging import Request, Result
from router.table import PlacementTable

log = logging.getLogger("expertmesh.router")

Outcome = Result | ExpertmeshError


@dataclass(slots=True, eq=False)
class _ClientStream:
    """The sending side of one client's stream."""

    context: grpc.aio.ServicerContext
    out: deque[bytes] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    open: dict[int, Request] = field(default_factory=dict)

    def send(self, message: bytes) -> None:
        self.out.append(message)
        self.wake.set()

    async def write(self) -> None:
        while True:
            await self.wake.wait()
            self.wake.clear()
            while self.out:
                await self.context.write(self.out[0])
                self.out.popleft()


class RouterServer:
    """One router process: the endpoint applications talk to. The arguments are those of `Router`."""

    def __init__(
        self,
        spec: ModelSpec,
        config: RouterConfig,
        *,
        on_server_lost: Callable[[str, str], None] | None = None,
        on_absent: Callable[[], None] | None = None,
        weight_dtype: str = "compute",
    ) -> None:
        self.address = ""
        self._weight_dtype = weight_dtype
        self._router = Router(spec, config, on_server_lost=on_server_lost, on_absent=on_absent)
        self._loop = LoopThread("expertmesh-router")
        self._server: grpc.aio.Server | None = None
        self._checks: HealthServicer | None = None
        self._stopping = False

    # ------------------------------------------------------------------ for whoever embeds the router, any thread

    def start(self, host: str, port: int = 0) -> str:
        """Serve on host:port (0: any free port; a fixed port can be shared by several routers). Returns "host:port".

        Raises:
            InvalidRequest: the port cannot be bound.
        """
        if port:
            require_free_port(host, port)
        self._loop.start()
        self.address = self._loop.call(self._start(host, port))
        return self.address

    def update(self, table: PlacementTable) -> None:
        """Adopt a placement table if it is newer. Batches in flight keep theirs."""
        self._loop.submit(self._adopt(table))

    @property
    def oldest_epoch(self) -> int:
        """The lowest epoch a batch in flight still uses; cheap enough to wait on."""
        return self._router.snapshot.oldest_epoch

    def report(self) -> RouterReport:
        """A snapshot of counters and latencies."""
        return replace(self._router.report(), address=self.address)

    def stop(self, grace_s: float) -> None:
        """Refuse new requests, wait up to `grace_s` seconds for open ones, stop. Idempotent."""
        if self._loop.running:
            self._loop.call(self._stop(grace_s))
            self._loop.stop()

    # ------------------------------------------------------------------ gRPC methods, on our loop

    async def _start(self, host: str, port: int) -> str:
        await self._router.start()
        handlers = router_handlers(stream=self._stream, forward=self._forward, describe=self._describe)
        self._server, address, self._checks = await start_server(ROUTER_SERVICE, handlers, host=host, port=port)
        await set_serving(self._checks, ROUTER_SERVICE, serving=False)  # until a placement has come
        return address

    async def _stop(self, grace_s: float) -> None:
        self._stopping = True
        end_s = time.monotonic() + grace_s
        if self._checks is not None:
            await set_serving(self._checks, ROUTER_SERVICE, serving=False)
        while self._router.report().queued_tokens and time.monotonic() < end_s:
            await asyncio.sleep(0.01)
        await self._router.close()
        if self._server is not None:
            await self._server.stop(0.05)

    async def _adopt(self, table: PlacementTable) -> None:
        self._router.adopt(table)
        if self._checks is not None and not self._stopping:
            await set_serving(self._checks, ROUTER_SERVICE, serving=True)

    async def _stream(self, _: object, context: grpc.aio.ServicerContext) -> None:
        stream = _ClientStream(context)
        writer = asyncio.create_task(stream.write())
        try:
            while (buffer := await context.read()) is not grpc.aio.EOF:
                self._receive(buffer, stream)
            while stream.open or stream.out:  # half-closed: answer what was asked
                await asyncio.sleep(0.005)
        finally:
            writer.cancel()
            for request in list(stream.open.values()):
                request.abandon()

    async def _forward(self, buffer: bytes, context: grpc.aio.ServicerContext) -> bytes:
        done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        def answer(outcome: Outcome) -> None:
            if not done.done():
                done.set_result(outcome)

        request: Request | None = None
        try:
            head, payload = decode(router_pb2.ForwardRequest, buffer)
            request = self._submit(head, payload, answer)
            outcome = await done
            if isinstance(outcome, ExpertmeshError):
                raise outcome
            return _encode_result(head.request_id, outcome)
        except Exception as err:
            if not isinstance(err, ExpertmeshError):
                log.exception("Forward failed")
            await abort(context, err)
            raise
        finally:
            if request is not None and not request.done:
                request.abandon()

    async def _describe(
        self, request: router_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.DescribeResponse:
        spec, config = self._router.spec, self._router.config
        return router_pb2.DescribeResponse(
            model=str(spec.path),
            family=spec.family,
            dtype=WIRE_DTYPES[getattr(torch, spec.dtype)],
            dim=spec.dim,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            layers=spec.layers,
            weight_dtype=self._weight_dtype,
            token_id_layers=[layer for layer, block in spec.blocks.items() if block.gate.needs_token_ids],
            max_request_tokens=config.max_request_tokens,
            epoch=self._router.snapshot.table.epoch,
            overflow=router_pb2.OverflowPolicy(
                chain=config.overflow.chain,
                capacity_factor=config.overflow.capacity_factor,
                max_score_gap=config.overflow.max_score_gap,
                renormalize=config.overflow.renormalize,
                keep=config.overflow.keep,
            ),
        )

    # ------------------------------------------------------------------ requests

    def _receive(self, buffer: bytes, stream: _ClientStream) -> None:
        """Start one streamed request, or answer it with its error."""
        request_id = 0
        try:
            head, payload = decode(router_pb2.ForwardRequest, buffer)
            request_id = head.request_id
            if request_id in stream.open:
                raise InvalidRequest(f"request_id {request_id} is open already on this stream")

            def answer(outcome: Outcome) -> None:
                stream.open.pop(request_id, None)
                if isinstance(outcome, ExpertmeshError):
                    stream.send(_encode_error(request_id, outcome))
                else:
                    stream.send(_encode_result(request_id, outcome))

            stream.open[request_id] = self._submit(head, payload, answer)
        except Exception as err:
            if not isinstance(err, ExpertmeshError):
                log.exception("request %d failed", request_id)
            stream.send(_encode_error(request_id, err))

    def _submit(
        self, head: router_pb2.ForwardRequest, payload: memoryview, answer: Callable[[Outcome], None]
    ) -> Request:
        if self._stopping:
            raise Draining(f"router {self.address} stops")
        x_TD = read_tensor(payload, head.dtype, (head.num_tokens, self._router.spec.dim), name="x")
        return self._router.submit(
            head.layer,
            x_TD,
            timeout_s=head.timeout_s,
            routing=routing_from_proto(head.routing, head.num_tokens) if head.HasField("routing") else None,
            token_ids_T=read_longs(head.token_ids, name="token_ids", count=head.num_tokens) if head.token_ids else None,
            overflow=self._overflow(head),
            return_routing=head.return_routing,
            answer=answer,
        )

    def _overflow(self, head: router_pb2.ForwardRequest) -> OverflowConfig:
        policy = self._router.config.overflow
        if not head.HasField("overflow"):
            return policy
        given = head.overflow
        return policy.override(
            chain=tuple(given.chain),
            capacity_factor=given.capacity_factor if given.HasField("capacity_factor") else None,
            max_score_gap=given.max_score_gap if given.HasField("max_score_gap") else None,
            renormalize=given.renormalize if given.HasField("renormalize") else None,
            keep=given.keep if given.HasField("keep") else None,
        )


def _encode_result(request_id: int, result: Result) -> bytes:
    head = router_pb2.ForwardResponse(
        request_id=request_id,
        num_tokens=result.y_TD.shape[0],
        dtype=WIRE_DTYPES[result.y_TD.dtype],
        ledger=result.ledger.to_proto(),
        routing=routing_to_proto(result.routing) if result.routing is not None else None,
    )
    return encode(head, tensor_bytes(result.y_TD))


def _encode_error(request_id: int, error: BaseException) -> bytes:
    return router_pb2.ForwardResponse(request_id=request_id, error=to_proto(error)).SerializeToString()
