"""The streams to the expert servers: one long-lived Compute stream per server, many calls in flight on each.

A `ServerLink` connects, sends calls, matches answers by call_id, notices a dead or silent server, fails its open calls
with `ServerLost` and reconnects. `Transport` keeps one link per server of the placement table. Nothing here decides
where pairs go next: answers, good or bad, land in the `Inbox` of the batch that asked.

Liveness is silence: a server with open calls sends something at least every 0.2 s (a pulse if nothing is ready), so a
server that says nothing for `hop_timeout_s` is hung, however long its queue is.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import grpc.aio
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protos import expert_pb2
from protos.codec import decode, encode, read_matrix
from protos.errors import ExpertmeshError, InternalError, ServerLost, from_proto
from protos.services import CHANNEL_OPTIONS, compute_stream, status_method
from router.pace import ServerPace, relative_speeds
from router.replicas import message_worth
from router.table import ServerAddress

log = logging.getLogger("expertmesh.router")

RECONNECT_FIRST_S = 0.05
RECONNECT_MOST_S = 2.0
WATCH_S = 0.1
JUDGE_S = 0.1  # paces move slowly, and comparing those of many servers takes longer than a small dispatch


@dataclass(slots=True, kw_only=True, eq=False)
class Reply:
    """The end of one call: the partial sum, or the error. `tag` is what the sender attached to the call."""

    tag: object
    server_id: str
    partial_RD: npt.NDArray[np.float32] | None = None
    error: ExpertmeshError | None = None


@dataclass(slots=True, eq=False)
class Inbox:
    """Where the replies of one batch arrive, in completion order."""

    _replies: deque[Reply] = field(default_factory=deque)
    _waiter: "asyncio.Future[None] | None" = None

    def put(self, reply: Reply) -> None:
        self._replies.append(reply)
        self.wake()

    def wake(self) -> None:
        """Let `next` return without a reply."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self, timeout_s: float | None) -> Reply | None:
        """The next reply; None after `timeout_s` seconds (None: any time) or after `wake`."""
        if not self._replies and timeout_s != 0:
            loop = asyncio.get_running_loop()
            self._waiter = waiter = loop.create_future()
            timer = loop.call_later(timeout_s, self.wake) if timeout_s is not None else None
            try:
                await waiter
            finally:
                if timer is not None:
                    timer.cancel()
                self._waiter = None
        return self._replies.popleft() if self._replies else None


@dataclass(slots=True, kw_only=True, eq=False)
class _OpenCall:
    inbox: Inbox
    tag: object
    shape: tuple[int, int]
    tokens: int


class ServerLink:
    """The stream to one expert server.

    Args:
        server: its id and address.
        hop_timeout_s: silence, while calls are open, after which the server counts as lost.
        on_change: called with (link, reason) when it is lost (reason set) or usable again (reason empty).
    """

    def __init__(
        self, server: ServerAddress, *, hop_timeout_s: float, on_change: "Callable[[ServerLink, str], None]"
    ) -> None:
        self.server = server
        self.usable = True  # until proved otherwise: the first call need not wait for a connection
        self.tokens_in_flight = 0
        self.pace = ServerPace()
        self._hop_timeout_s = hop_timeout_s
        self._on_change = on_change
        self._open: dict[int, _OpenCall] = {}
        self._next_id = 1
        self._out: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._heard_s = 0.0
        self._broken: asyncio.Future[str] | None = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    def send(self, head: expert_pb2.ComputeRequest, x: memoryview, *, dim: int, inbox: Inbox, tag: object) -> int:
        """Send one call; exactly one Reply with `tag` will reach `inbox`, unless it is cancelled. Returns its id.

        `head` is complete but for call_id; `x` are the bytes of its rows.
        """
        if not self.usable:
            inbox.put(Reply(tag=tag, server_id=self.server.server_id, error=self._lost("not connected")))
            return 0
        call_id = self._next_id
        self._next_id += 1
        head.call_id = call_id
        tokens = len(head.pair_row) // 4
        if not self._open:
            self._heard_s = asyncio.get_running_loop().time()
        self._open[call_id] = _OpenCall(inbox=inbox, tag=tag, shape=(head.num_rows, dim), tokens=tokens)
        self.tokens_in_flight += tokens
        self._out.append(encode(head, x))
        self._wake.set()
        return call_id

    def cancel(self, call_ids: Iterable[int]) -> None:
        """Forget calls nobody waits for; the server discards those it has not started."""
        known = [call_id for call_id in call_ids if self._close(call_id) is not None]
        if known and self.usable:
            self._out.append(expert_pb2.ComputeRequest(cancel=known).SerializeToString())
            self._wake.set()

    def check_silence(self, now_s: float) -> None:
        """Break the stream if calls are open and the server has said nothing for hop_timeout_s."""
        if self._open and now_s - self._heard_s > self._hop_timeout_s and self._broken is not None:
            self._break(f"silent for {now_s - self._heard_s:.2f} s with {len(self._open)} calls open")

    async def close(self) -> None:
        """Let open calls end, then close the stream."""
        while self._open:
            await asyncio.sleep(0.01)
        self._task.cancel()
        await asyncio.wait([self._task])

    def abandon(self, reason: str) -> "asyncio.Task[None]":
        """Close at once, failing open calls. Returns the task that ends."""
        self.usable = False
        self._task.cancel()
        self._fail_open(reason)
        return self._task

    # ------------------------------------------------------------------ connection

    async def _run(self) -> None:
        pause_s = RECONNECT_FIRST_S
        probing = False
        while True:
            async with grpc.aio.insecure_channel(self.server.address, options=CHANNEL_OPTIONS) as channel:
                try:
                    if probing:  # half-open: prove it answers before any call is risked on it
                        await status_method(channel)(expert_pb2.StatusRequest(), timeout=self._hop_timeout_s)
                        self.usable = True
                        self._on_change(self, "")
                        pause_s = RECONNECT_FIRST_S
                    reason = await self._serve(compute_stream(channel))
                except grpc.RpcError as err:
                    reason = f"{getattr(err, 'code', lambda: '')()}: {getattr(err, 'details', lambda: '')()}"
            was_usable, self.usable, probing = self.usable, False, True
            self._out.clear()
            self._fail_open(reason)
            if was_usable:
                self._on_change(self, reason)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RECONNECT_MOST_S)

    async def _serve(self, stream: grpc.aio.StreamStreamCall) -> str:
        """Write and read until the stream breaks; returns why it did."""
        loop = asyncio.get_running_loop()
        self._broken = loop.create_future()
        writer, reader = loop.create_task(self._write(stream)), loop.create_task(self._read(stream))
        try:
            return await self._broken
        finally:
            self._broken = None
            writer.cancel()
            reader.cancel()
            stream.cancel()
            await asyncio.wait([writer, reader])

    async def _write(self, stream: grpc.aio.StreamStreamCall) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._out:
                    await stream.write(self._out.popleft())
        except (grpc.RpcError, asyncio.InvalidStateError) as err:
            self._break(f"write failed: {_describe(err)}")

    async def _read(self, stream: grpc.aio.StreamStreamCall) -> None:
        loop = asyncio.get_running_loop()
        try:
            while (buffer := await stream.read()) is not grpc.aio.EOF:
                self._heard_s = loop.time()
                self._receive(buffer)
            self._break("the server closed the stream")
        except (grpc.RpcError, ExpertmeshError) as err:
            self._break(f"read failed: {_describe(err)}")

    def _receive(self, buffer: bytes) -> None:
        head, payload = decode(expert_pb2.ComputeResponse, buffer)
        call = self._close(head.call_id)
        if call is None:  # a pulse, or an answer that came after its call was given up: never summed twice
            return
        reply = Reply(tag=call.tag, server_id=self.server.server_id)
        if head.HasField("error"):
            reply.error = from_proto(head.error)
        else:
            if head.compute_s > 0:  # of the whole launch, which may have computed others' rows as well
                self.pace.learn(call.tokens * max(1.0, head.launch_rows / call.shape[0]), head.compute_s)
            try:
                reply.partial_RD = read_matrix(payload, head.dtype, call.shape, name="partial")
            except ExpertmeshError as err:
                reply.error = InternalError(f"server {self.server.server_id} answered nonsense: {err.message}")
        call.inbox.put(reply)

    def _close(self, call_id: int) -> _OpenCall | None:
        call = self._open.pop(call_id, None)
        if call is not None:
            self.tokens_in_flight -= call.tokens
        return call

    def _fail_open(self, reason: str) -> None:
        error = self._lost(reason)
        for call_id in list(self._open):
            call = self._close(call_id)
            assert call is not None
            call.inbox.put(Reply(tag=call.tag, server_id=self.server.server_id, error=error))

    def _lost(self, reason: str) -> ServerLost:
        return ServerLost(f"server {self.server.server_id} at {self.server.address} is lost: {reason}")

    def _break(self, reason: str) -> None:
        if self._broken is not None and not self._broken.done():
            self._broken.set_result(reason)


class Transport:
    """One link per server of the current table.

    Args:
        hop_timeout_s: see ServerLink.
        on_lost: called with (server_id, reason) when a server is lost.
        on_change: called after any link was lost or became usable again.
    """

    def __init__(
        self, *, hop_timeout_s: float, on_lost: Callable[[str, str], None], on_change: Callable[[], None]
    ) -> None:
        self.links: dict[str, ServerLink] = {}
        self._hop_timeout_s = hop_timeout_s
        self._on_lost = on_lost
        self._changed = on_change
        self._leaving: dict[ServerLink, asyncio.Task[None]] = {}  # no longer in the table, calls still open
        self._judged: tuple[ServerAddress, ...] | None = None  # whose paces the verdict is of
        self._judge_again_s = 0.0
        self._verdict: tuple[float, npt.NDArray[np.float64] | None] = (message_worth(math.inf), None)
        self._watch = asyncio.get_running_loop().create_task(self._watch_silence())

    def update(self, servers: Iterable[ServerAddress]) -> None:
        """Connect to new servers; links to servers that are no longer named end when their calls have."""
        wanted = {server.server_id: server for server in servers}
        for server_id in self.links.keys() - wanted.keys():
            link = self.links.pop(server_id)
            if not link.usable:
                link.abandon("left the placement")
                continue
            task = asyncio.get_running_loop().create_task(link.close())
            self._leaving[link] = task
            task.add_done_callback(partial(self._left, link))
        for server_id in wanted.keys() - self.links.keys():
            self.links[server_id] = ServerLink(
                wanted[server_id], hop_timeout_s=self._hop_timeout_s, on_change=self._on_link_change
            )

    def loads(self, servers: Iterable[ServerAddress]) -> npt.NDArray[np.float64]:
        """Routed pairs in flight at the servers of a table; links are made before it is used."""
        return np.array([self.links[server.server_id].tokens_in_flight for server in servers], dtype=np.float64)

    def judge(self, servers: tuple[ServerAddress, ...]) -> tuple[float, npt.NDArray[np.float64] | None]:
        """What the paces of a table's servers say, lately: how many routed pairs a message less is worth to the slowest
        one, and their relative speeds (None: all alike)."""
        now_s = asyncio.get_running_loop().time()
        if servers is not self._judged or now_s >= self._judge_again_s:
            self._judged, self._judge_again_s = servers, now_s + JUDGE_S
            pace_S = np.array([self.links[server.server_id].pace.pairs_per_s for server in servers])
            self._verdict = (message_worth(float(pace_S.min(initial=math.inf))), relative_speeds(pace_S))
        return self._verdict

    async def close(self) -> None:
        """Close every link at once; open calls fail."""
        self._watch.cancel()
        links = [*self.links.values(), *self._leaving]
        tasks = [self._watch, *self._leaving.values()]
        for task in tasks:
            task.cancel()
        self.links.clear()
        tasks += [link.abandon("the router stops") for link in links]
        await asyncio.wait(tasks)

    def _left(self, link: ServerLink, task: "asyncio.Task[None]") -> None:
        self._leaving.pop(link, None)

    def _on_link_change(self, link: ServerLink, reason: str) -> None:
        if reason:
            log.warning("server %s lost: %s", link.server.server_id, reason)
            if self.links.get(link.server.server_id) is link:
                self._on_lost(link.server.server_id, reason)
        else:
            log.info("server %s usable again", link.server.server_id)
        self._changed()

    async def _watch_silence(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            looked_s = loop.time()
            await asyncio.sleep(WATCH_S)
            if loop.time() - looked_s > WATCH_S + self._hop_timeout_s / 2:
                continue  # it was this process that stood still: what the servers said waits to be read
            for link in [*self.links.values(), *self._leaving]:
                link.check_silence(loop.time())


def row_bytes(x_RD: Tensor) -> int:
    """Bytes of one row on the wire."""
    return x_RD.shape[1] * torch.finfo(x_RD.dtype).bits // 8


def _describe(err: BaseException) -> str:
    if isinstance(err, grpc.aio.AioRpcError):
        return f"{err.code().name}: {err.details()}"
    return f"{type(err).__name__}: {err}"
