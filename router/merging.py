"""Which waiting requests travel together: everything queued for a layer goes into one batch, without artificial wait.

Merging is the largest gain there is: expert GEMMs of a few rows cost almost as much as those of many. A layer has a
small number of batches in flight; while they are away, newcomers gather, and leave together as soon as one returns.
A batch that takes unusually long gives up its place early, so that one slow server does not stop the layer.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protos.errors import ExpertmeshError, InternalError, Overloaded, Unavailable
from router.config import OverflowConfig
from router.gate import Routing
from router.ledger import RequestLedger

log = logging.getLogger("expertmesh.router")


@dataclass(slots=True, kw_only=True)
class Result:
    """The answer to one request: y_TD in the request's dtype, its ledger, and the routing if it asked for it."""

    y_TD: Tensor
    ledger: RequestLedger
    routing: Routing | None


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request on its way. `answer` is called exactly once, with the result or the error.

    Times are those of time.monotonic (an event loop's own clock may tick in milliseconds).
    """

    layer: str
    x_TD: Tensor
    overflow: OverflowConfig
    routing: Routing | None
    token_ids_T: npt.NDArray[np.int64] | None
    return_routing: bool
    arrived_s: float
    deadline_s: float
    answer: Callable[[Result | ExpertmeshError], None]
    done: bool = False
    timer: asyncio.TimerHandle | None = None
    batch: "Batch | None" = None
    on_done: Callable[[], None] = lambda: None

    @property
    def num_tokens(self) -> int:
        return int(self.x_TD.shape[0])

    def finish(self, outcome: Result | ExpertmeshError) -> None:
        """Answer, unless that has happened."""
        if not self.done:
            self._end()
            self.answer(outcome)

    def abandon(self) -> None:
        """Nobody waits for the answer any more."""
        if not self.done:
            self._end()
        if self.batch is not None:
            self.batch.on_abandoned()

    def _end(self) -> None:
        self.done = True
        if self.timer is not None:
            self.timer.cancel()
        self.on_done()

    @property
    def merge_key(self) -> tuple[object, ...]:
        """Requests with equal keys may share a batch."""
        return (self.x_TD.dtype, self.overflow, 0 if self.routing is None else self.routing.top_k)


@dataclass(slots=True, kw_only=True, eq=False)
class Batch:
    """Requests of one layer that travel together; rows of request i are offsets[i]..offsets[i+1]."""

    layer: str
    requests: list[Request]
    x_TD: Tensor
    offsets: list[int]
    started_s: float
    on_abandoned: Callable[[], None] = lambda: None

    @property
    def alive(self) -> bool:
        """Whether any request still waits for its answer."""
        return not all(request.done for request in self.requests)


def take_batch(waiting: deque[Request], *, max_tokens: int, now_s: float) -> Batch:
    """Remove from `waiting` the oldest request and all later ones that may share its batch and fit into it.

    Args:
        waiting: requests of one layer in order of arrival, not empty.
        max_tokens: limit of the batch (a single larger request travels alone).
    """
    first = waiting[0]
    key, tokens = first.merge_key, 0
    taken: list[Request] = []
    left: list[Request] = []
    for request in waiting:
        fits = not taken or tokens + request.num_tokens <= max_tokens
        if fits and request.merge_key == key:
            taken.append(request)
            tokens += request.num_tokens
        else:
            left.append(request)
    waiting.clear()
    waiting.extend(left)
    offsets = [0]
    for request in taken:
        offsets.append(offsets[-1] + request.num_tokens)
    x_TD = first.x_TD if len(taken) == 1 else torch.cat([request.x_TD for request in taken])
    batch = Batch(layer=first.layer, requests=taken, x_TD=x_TD, offsets=offsets, started_s=now_s)
    for request in taken:
        request.batch = batch
    return batch


@dataclass(slots=True, eq=False)
class _Lane:
    waiting: deque[Request] = field(default_factory=deque)
    in_flight: int = 0
    scheduled: bool = False
    typical_s: float = 0.0


class Merger:
    """Queues requests per layer and runs them as batches.

    Args:
        run: computes a batch and finishes its requests; it must not raise.
        max_batch_tokens: tokens per batch.
        max_batches_in_flight: per layer.
        max_queued_tokens: tokens accepted and not yet answered, beyond which `submit` raises Overloaded.
    """

    def __init__(
        self,
        run: Callable[[Batch], Coroutine[Any, Any, None]],
        *,
        layers: Iterable[str],
        max_batch_tokens: int,
        max_batches_in_flight: int,
        max_queued_tokens: int,
    ) -> None:
        self._run = run
        self._lanes = {layer: _Lane() for layer in layers}
        self._max_batch_tokens = max_batch_tokens
        self._max_batches_in_flight = max_batches_in_flight
        self._max_queued_tokens = max_queued_tokens
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.queued_tokens = 0

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            Overloaded: too many tokens are open; the hint is the time of a typical batch.
            Unavailable: the router stops.
        """
        lane = self._lanes[request.layer]
        if self._closed:
            raise Unavailable("the router stops")
        if self.queued_tokens + request.num_tokens > self._max_queued_tokens:
            raise Overloaded(
                f"{request.num_tokens} tokens on top of {self.queued_tokens} open exceed "
                f"max_queued_tokens ({self._max_queued_tokens})",
                retry_after_s=max(0.01, lane.typical_s),
            )
        tokens = request.num_tokens
        self.queued_tokens += tokens

        def release() -> None:
            self.queued_tokens -= tokens

        request.on_done = release
        lane.waiting.append(request)
        self._schedule(lane)

    async def close(self) -> None:
        """Refuse new requests, fail the waiting ones and cancel what runs."""
        self._closed = True
        for lane in self._lanes.values():
            while lane.waiting:
                lane.waiting.popleft().finish(Unavailable("the router stops"))
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _schedule(self, lane: _Lane) -> None:
        # One turn of the loop later, so that requests the loop has already received join the batch.
        if not lane.scheduled and lane.in_flight < self._max_batches_in_flight:
            lane.scheduled = True
            asyncio.get_running_loop().call_soon(self._pump, lane)

    def _pump(self, lane: _Lane) -> None:
        lane.scheduled = False
        while lane.waiting and lane.in_flight < self._max_batches_in_flight:
            self._drop_done(lane)
            if lane.waiting:
                self._launch(lane)

    def _drop_done(self, lane: _Lane) -> None:
        """Forget waiting requests that were abandoned or whose deadline passed."""
        if any(request.done for request in lane.waiting):
            lane.waiting = deque(request for request in lane.waiting if not request.done)

    def _launch(self, lane: _Lane) -> None:
        loop = asyncio.get_running_loop()
        batch = take_batch(lane.waiting, max_tokens=self._max_batch_tokens, now_s=time.monotonic())
        lane.in_flight += 1
        free_place = _Once(lambda: self._free_place(lane))
        patience = loop.call_later(max(0.05, 3 * lane.typical_s), free_place)
        task = loop.create_task(self._guarded(batch))
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            patience.cancel()
            took_s = time.monotonic() - batch.started_s
            lane.typical_s += (took_s - lane.typical_s) * 0.1
            free_place()

        task.add_done_callback(ended)

    def _free_place(self, lane: _Lane) -> None:
        lane.in_flight -= 1
        if lane.waiting:
            self._schedule(lane)

    async def _guarded(self, batch: Batch) -> None:
        try:
            await self._run(batch)
        except asyncio.CancelledError:
            for request in batch.requests:
                request.finish(Unavailable("the router stops"))
            raise
        except Exception:
            log.exception("a batch of layer %s failed", batch.layer)
        finally:  # whatever happens, every request gets an answer
            for request in batch.requests:
                request.finish(InternalError(f"layer {batch.layer}: the batch ended without an answer"))


class _Once:
    """A callback that runs at its first call only."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def __call__(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()
