"""The client of a router endpoint: pipelined requests over one stream, numpy-free for callers: tensors in and out."""

import asyncio
from collections import deque
from dataclasses import dataclass
from types import TracebackType

import grpc.aio
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protos import common_pb2, router_pb2
from protos.codec import WIRE_DTYPES, decode, encode, read_floats, read_ints, read_tensor, tensor_bytes
from protos.errors import DeadlineExceeded, ExpertmeshError, InvalidRequest, Unavailable, from_proto, from_rpc
from protos.services import CHANNEL_OPTIONS, describe_method, router_stream
from router.gate import Routing
from router.ledger import RequestLedger

UNANSWERED_S = 2.0  # how long after its deadline a request waits for the router to say so


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """y_TD is the output of the whole MoE block; `routing` the effective one, if it was asked for."""

    y_TD: Tensor
    ledger: RequestLedger
    routing: Routing | None


class RouterClient:
    """Talks to one router. Use as an async context manager, or call `close`.

    A broken stream fails its open requests with Unavailable; the next request opens a new one.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stream: grpc.aio.StreamStreamCall | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._open: dict[int, tuple[asyncio.Future[Answer], int]] = {}
        self._next_id = 1
        self._out: deque[bytes] = deque()
        self._wake = asyncio.Event()

    async def __aenter__(self) -> "RouterClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def describe(self, *, timeout_s: float = 10.0) -> router_pb2.DescribeResponse:
        """The model behind the router.

        Raises:
            Unavailable: nothing answers at the address.
        """
        try:
            return await describe_method(self._channel)(
                router_pb2.DescribeRequest(), timeout=timeout_s, wait_for_ready=False
            )
        except grpc.aio.AioRpcError as err:
            raise from_rpc(err) from err

    async def forward(
        self,
        layer: str,
        x_TD: Tensor,
        *,
        timeout_s: float | None = None,
        routing: Routing | None = None,
        token_ids_T: npt.NDArray[np.int64] | None = None,
        overflow: router_pb2.OverflowPolicy | None = None,
        return_routing: bool = False,
    ) -> Answer:
        """Run one MoE layer on hidden states.

        Args:
            layer: MoE layer name.
            x_TD: [T, D] float32, bfloat16 or float16.
            timeout_s: seconds the answer may take; None for the router's default.
            routing: experts and weights to use instead of the model's gate.
            token_ids_T: of the tokens, for layers whose gate looks experts up by them (`describe` names them).
            overflow: fields that replace the operator's overflow policy for this request.
            return_routing: also return the effective routing.

        Raises:
            ExpertmeshError: whatever the router answered; Unavailable if the stream broke; DeadlineExceeded if a router
                that was given timeout_s said nothing.
        """
        head = router_pb2.ForwardRequest(
            layer=layer,
            num_tokens=x_TD.shape[0] if x_TD.dim() == 2 else 0,
            dtype=WIRE_DTYPES.get(x_TD.dtype, common_pb2.DTYPE_UNSPECIFIED),
            timeout_s=timeout_s or 0.0,
            overflow=overflow,
            return_routing=return_routing,
            token_ids=b"" if token_ids_T is None else np.ascontiguousarray(token_ids_T, dtype=np.int64).tobytes(),
        )
        if token_ids_T is not None and (token_ids_T.ndim != 1 or token_ids_T.dtype.kind not in "iu"):
            raise InvalidRequest(
                f"token_ids has shape {list(token_ids_T.shape)} and dtype {token_ids_T.dtype}, expected integers [T]"
            )
        if routing is not None:
            head.routing.CopyFrom(routing_to_proto(routing))
        head.request_id = request_id = self._next_id
        self._next_id += 1
        message = encode(head, tensor_bytes(x_TD))
        self._connect()
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._open[request_id] = (future, x_TD.shape[-1])
        self._out.append(message)
        self._wake.set()
        try:
            # The router keeps the deadline; if nothing comes from it either, it hangs or the network does.
            async with asyncio.timeout(None if timeout_s is None else timeout_s + UNANSWERED_S):
                return await future
        except TimeoutError:
            raise DeadlineExceeded(f"router {self.address} did not answer within timeout_s ({timeout_s:.3g})") from None
        finally:
            self._open.pop(request_id, None)

    async def close(self) -> None:
        """Close the stream and the channel; open requests fail with Unavailable."""
        self._fail("the client was closed")
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._channel.close()

    def _connect(self) -> None:
        if self._stream is None:
            self._stream = stream = router_stream(self._channel)
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(self._write(stream)), loop.create_task(self._read(stream))]

    async def _write(self, stream: grpc.aio.StreamStreamCall) -> None:
        try:
            while self._stream is stream:
                await self._wake.wait()
                self._wake.clear()
                message: bytes
                while self._out and self._stream is stream:
                    message = self._out.popleft()
                    await stream.write(message)
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # the reader learns why

    async def _read(self, stream: grpc.aio.StreamStreamCall) -> None:
        reason = "the router closed the stream"
        try:
            while (buffer := await stream.read()) is not grpc.aio.EOF:
                self._receive(buffer)
        except grpc.aio.AioRpcError as err:
            reason = f"{err.code().name}: {err.details()}"
        finally:
            if self._stream is stream:
                self._stream = None
                self._wake.set()
                self._fail(reason)

    def _receive(self, buffer: bytes) -> None:
        head, payload = decode(router_pb2.ForwardResponse, buffer)
        future, dim = self._open.get(head.request_id, (None, 0))
        if future is None or future.done():
            return
        if head.HasField("error"):
            future.set_exception(from_proto(head.error))
            return
        try:
            y_TD = read_tensor(payload, head.dtype, (head.num_tokens, dim), name="y")
            routing = routing_from_proto(head.routing, head.num_tokens) if head.HasField("routing") else None
        except ExpertmeshError as err:
            future.set_exception(err)
            return
        future.set_result(Answer(y_TD=y_TD, ledger=RequestLedger.from_proto(head.ledger), routing=routing))

    def _fail(self, reason: str) -> None:
        self._out.clear()
        open_calls, self._open = self._open, {}
        for future, _ in open_calls.values():
            if not future.done():
                future.set_exception(Unavailable(f"router {self.address}: {reason}"))


def routing_to_proto(routing: Routing) -> router_pb2.Routing:
    """The wire form of expert ids [T, K] and gate weights [T, K]."""
    return router_pb2.Routing(
        top_k=routing.expert_TK.shape[1],
        expert_ids=np.ascontiguousarray(routing.expert_TK, dtype=np.int32).tobytes(),
        gate_weights=np.ascontiguousarray(routing.weight_TK, dtype=np.float32).tobytes(),
    )


def routing_from_proto(proto: router_pb2.Routing, num_tokens: int) -> Routing:
    """The routing of a message.

    Raises:
        InvalidRequest: the arrays do not have num_tokens * top_k elements.
    """
    count = num_tokens * proto.top_k
    return Routing(
        expert_TK=read_ints(proto.expert_ids, name="routing.expert_ids", count=count).reshape(num_tokens, -1),
        weight_TK=read_floats(proto.gate_weights, name="routing.gate_weights", count=count).reshape(num_tokens, -1),
    )


def as_tensors(routing: Routing) -> tuple[Tensor, Tensor]:
    """expert_TK (int64) and weight_TK (float32) as torch tensors of their own memory."""
    return torch.tensor(routing.expert_TK, dtype=torch.int64), torch.tensor(routing.weight_TK)
