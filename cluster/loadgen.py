"""The load generator: streams requests to a router, open or closed loop, and accounts for every answer.

Open loop (`rate`): requests leave on a clock, whatever the answers do, and latency counts from the planned departure,
so that a stalled router is not flattered by requests that were never sent. Closed loop (`concurrency`): so many
requests are open at any time. A failed request is counted by its class and never stops the load.
"""

import asyncio
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cluster.checking import Checker, Checks
from cluster.rates import Departures, Rate
from cluster.traffic import Traffic, Work
from protos import router_pb2
from protos.errors import ExpertmeshError
from router.client import Answer, RouterClient
from router.ledger import LedgerTotals, RequestLedger

MAX_OPEN = 1024  # requests of an open loop; a router that no longer answers must not fill our memory
_FAILED_PAUSE_S = 0.02  # a closed loop must not spin on an error that comes at once
NOT_SENT = "NotSent"  # the open loop's own error class: max_open requests were open


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One finished request. `error` is the class of its failure, "" if it was answered; then there is a ledger."""

    ended_s: float  # the event loop's clock
    took_s: float
    num_tokens: int
    ledger: RequestLedger | None = None
    error: str = ""

    @property
    def due_s(self) -> float:
        """When it was to leave (event loop's clock): the departure planned by an open loop, else the real one."""
        return self.ended_s - self.took_s


@dataclass(slots=True, kw_only=True)
class Tally:
    """Sums over all requests of a load."""

    totals: LedgerTotals = field(default_factory=LedgerTotals)
    errors: Counter[str] = field(default_factory=Counter)
    first_error: str = ""
    took_s: "array[float]" = field(default_factory=lambda: array("d"))

    @property
    def answered(self) -> int:
        return self.totals.requests - self.totals.failed_requests


class LoadGenerator:
    """Sends `traffic` through `client`. `traffic`, `rate` and `overflow` may be changed while it runs.

    Args:
        rate: requests per second (open loop), or a function of the seconds since `run` began; None: closed loop.
        concurrency: open requests of the closed loop, where `rate` is None.
        max_open: open requests of the open loop.
        postpone: at max_open, send later what is due; otherwise it is not sent and counts as failed (NotSent).
        overflow: the requests' overflow policy; None leaves the operator's.
        timeout_s: of each request.
        checker: checks a share of the answers; None for none.
        on_sample: called with every finished request, on the loop.
        on_answer: called with every answered request, its answer (then with its routing) and seconds taken; or None.
    """

    def __init__(
        self,
        client: RouterClient,
        traffic: Traffic,
        *,
        rate: Rate | None = None,
        concurrency: int = 4,
        max_open: int = MAX_OPEN,
        postpone: bool = False,
        overflow: router_pb2.OverflowPolicy | None = None,
        timeout_s: float = 30.0,
        checker: Checker | None = None,
        on_sample: Callable[[Sample], None] = lambda sample: None,
        on_answer: Callable[[Work, Answer, float], None] | None = None,
    ) -> None:
        self.traffic = traffic
        self.rate = rate
        self.overflow = overflow
        self.tally = Tally()
        self._client = client
        self._concurrency = concurrency
        self._max_open = max_open
        self._postpone = postpone
        self._timeout_s = timeout_s
        self._checker = checker
        self._on_sample = on_sample
        self._on_answer = on_answer
        self._open: set[asyncio.Task[None]] = set()
        self._began_s = 0.0

    @property
    def num_open(self) -> int:
        """Requests sent and not answered yet."""
        return len(self._open)

    def rate_at(self, when_s: float) -> float:
        """Requests per second of the open loop at a moment of the event loop's clock; 0 for a closed one."""
        return (self.rate(when_s - self._began_s) if callable(self.rate) else self.rate) or 0.0

    async def run(self, stop: asyncio.Event) -> None:
        """Send until `stop` is set, then wait for what is open."""
        self._began_s = asyncio.get_running_loop().time()
        if self.rate is not None:
            await self._open_loop(stop)
        else:
            await asyncio.gather(*(self._closed_loop(stop) for _ in range(self._concurrency)))
        while self._open:
            await asyncio.wait(self._open)

    async def run_for(self, duration_s: float) -> float:
        """`run` for so many seconds; returns the seconds until the last answer."""
        loop = asyncio.get_running_loop()
        stop, began_s = asyncio.Event(), loop.time()
        timer = loop.call_later(duration_s, stop.set)
        try:
            await self.run(stop)
        finally:
            timer.cancel()
        return loop.time() - began_s

    async def _closed_loop(self, stop: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        while not stop.is_set():
            if not await self._one(self.traffic.next(), began_s=loop.time()):
                await asyncio.sleep(_FAILED_PAUSE_S)

    async def _open_loop(self, stop: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        departures = Departures(loop.time())
        while not stop.is_set():
            full = len(self._open) >= self._max_open
            if full and self._postpone:
                await asyncio.wait(self._open, return_when=asyncio.FIRST_COMPLETED)
                departures.postpone(loop.time())
            elif (due_s := departures.next(self.rate_at, now_s=loop.time())) is None:
                await _wait(stop, departures.patience_s(self.rate_at(loop.time())))
            elif full:
                error = f"{self._max_open} requests are open"
                self._count(Sample(ended_s=loop.time(), took_s=0.0, num_tokens=0, error=NOT_SENT), error)
                await asyncio.sleep(0)
            else:
                task = loop.create_task(self._one_open(self.traffic.next(), due_s))
                self._open.add(task)
                task.add_done_callback(self._open.discard)
                await asyncio.sleep(0)  # behind schedule, the answers still have to be read

    async def _one_open(self, work: Work, began_s: float) -> None:
        await self._one(work, began_s=began_s)

    async def _one(self, work: Work, *, began_s: float) -> bool:
        """Send one request and count its outcome; False if it failed."""
        loop = asyncio.get_running_loop()
        checked = self._checker is not None and self._checker.choose()
        answer: Answer | None = None
        error, message = "", ""
        try:
            answer = await self._client.forward(
                work.layer,
                work.x_TD,
                timeout_s=self._timeout_s,
                routing=work.routing,
                overflow=self.overflow,
                return_routing=checked or self._on_answer is not None,
            )
        except ExpertmeshError as err:
            error, message = type(err).__name__, err.message
        now_s = loop.time()
        ledger = answer.ledger if answer is not None else None
        sample = Sample(ended_s=now_s, took_s=now_s - began_s, num_tokens=len(work.x_TD), ledger=ledger, error=error)
        self._count(sample, message)
        if answer is not None and self._on_answer is not None:
            self._on_answer(work, answer, sample.took_s)
        if checked and answer is not None and self._checker is not None:
            self._checker.submit(work, answer)
        return not error

    def _count(self, sample: Sample, message: str) -> None:
        tally = self.tally
        if sample.ledger is None:
            tally.totals.requests += 1
            tally.totals.failed_requests += 1
            tally.errors[sample.error] += 1
            tally.first_error = tally.first_error or f"{sample.error}: {message}"
        else:
            tally.totals.add(sample.ledger, num_tokens=sample.num_tokens)
            tally.took_s.append(sample.took_s)
        self._on_sample(sample)


async def _wait(stop: asyncio.Event, timeout_s: float) -> None:
    """Until `stop` is set, at most `timeout_s` seconds."""
    try:
        await asyncio.wait_for(stop.wait(), timeout_s)
    except TimeoutError:
        return


def percentiles(took_s: "array[float] | list[float]") -> dict[str, float | None]:
    """p50, p90, p99 and the maximum, in seconds; None where nothing was answered."""
    if not len(took_s):
        return dict.fromkeys(("p50", "p90", "p99", "max"))
    values = np.percentile(np.asarray(took_s, dtype=np.float64), (50, 90, 99, 100)).tolist()
    return dict(zip(("p50", "p90", "p99", "max"), values, strict=True))


def report(tally: Tally, checks: Checks | None, *, seconds: float) -> dict[str, Any]:
    """The document of `expertmesh load`: throughput, latency, ledger totals, errors by class, checked answers.

    Args:
        checks: None where no answer could be checked.
        seconds: from the first request to the last answer.
    """
    totals = asdict(tally.totals)
    requests, failed, tokens = (totals.pop(name) for name in ("requests", "failed_requests", "tokens"))
    return {
        "seconds": seconds,
        "requests": {"sent": requests, "answered": requests - failed, "failed": failed},
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "requests_per_s": (requests - failed) / seconds,
        "latency_s": percentiles(tally.took_s),
        "ledger": totals,
        "errors": dict(tally.errors),
        "first_error": tally.first_error,
        "checks": asdict(checks or Checks()),
    }
