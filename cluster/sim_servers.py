"""Simulated expert servers: the real batching rules and meters, and service times instead of compute.

What is exact: admission, the order of launches and what they merge (`experts.batching`), the pace of an emulated device
and the busy share (`experts.meters`), unloading before loading, reports slice by slice as `cluster.expert_replica`
makes them. What is modelled: the time of a launch and of a load, and a network of constant delay.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from cluster.messages import Assignment, Key, ServerBeat, ServerHello
from cluster.sim_events import Clock
from experts.batching import Batcher, Call
from experts.config import ExpertServerConfig
from experts.meters import BusyMeter, Pacer
from protos.errors import DeadlineExceeded, ExpertmeshError, StalePlacement

LOAD_SLICE_S = 0.1  # as in cluster/expert_replica.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Constants of the machines; they do not depend on what is simulated.

    Args:
        pairs_per_s: routed pairs a server computes.
        emulated: it is paced as `experts.meters.Pacer` does it: a launch lasts launch_s or its pairs' time, whichever
            is longer; else both add up.
        launch_s: fixed time of a launch.
        hop_s: a message between router and server, one way, with packing and unpacking.
        client_s: the way from a client to the router and back.
        batch_s, message_s: time of the router's one thread for a batch, and for each message sent or received.
        jitter_s: what a batch takes that thread beyond it because something else had the core; the mean of an
            exponential distribution.
        control_s: a call between placement and others, one way.
        start_s: from asking for a server until it registers: node and process.
        notice_s: from a server's death until routers know: its memory is freed before its connections are closed.
        replace_s: from a server's death until its replacement is asked for.
        load_s: what loading takes beside the bytes, however many copies: files and peers are opened, the copies
            checked, and those who wait for them woken.
        load_bytes_per_s: at which a server loads copies.
        plan_s: from a planner's input to its plan.
    """

    pairs_per_s: float
    emulated: bool = False
    launch_s: float = 0.0002
    hop_s: float = 0.0004
    client_s: float = 0.001
    batch_s: float = 0.001
    message_s: float = 0.0001
    jitter_s: float = 0.0
    control_s: float = 0.003
    start_s: float = 3.0
    notice_s: float = 0.1
    replace_s: float = 1.0
    load_s: float = 0.0
    load_bytes_per_s: float = 1e9
    plan_s: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """What the answer to a call needs: the experts it names, and whom to tell (None: computed)."""

    experts: Collection[int]
    reply: Callable[[ExpertmeshError | None], None]


class SimServer:
    """One expert server. Messages reach it, and leave it, `hop_s` (routers) or `control_s` (placement) later.

    Args:
        config: of a real server.
        copy_bytes: memory of one copy.
        report: called with every heartbeat, before its way to the placement.
    """

    def __init__(
        self,
        clock: Clock,
        hello: ServerHello,
        machine: Machine,
        config: ExpertServerConfig,
        *,
        copy_bytes: int,
        report: Callable[[ServerBeat], None],
    ) -> None:
        self.hello = hello
        self.alive = True
        self.released = False
        self.warm: frozenset[Key] = frozenset()
        self.pairs_computed = 0
        self.loaded_copies = 0
        self._clock, self._machine = clock, machine
        self._budget_bytes, self._copy_bytes = config.budget_bytes, copy_bytes
        self._report = report
        self.batcher: Batcher[Work] = Batcher(config.max_queue_tokens, config.max_launch_tokens)
        self.pairs_per_s = machine.pairs_per_s
        self._pacer = Pacer(self.pairs_per_s) if machine.emulated else None
        self._busy = BusyMeter()
        self._running = False
        self._assignment: Assignment | None = None
        self._applied = 0
        self._loading = False
        self._seq = 0

    # ------------------------------------------------------------------ data path

    def receive(self, call: Call[Work]) -> None:
        """A call arrives. One that finds the server dead is never answered: its router notices the silence."""
        if not self.alive:
            return
        missing = next((expert for expert in call.work.experts if (call.layer, expert) not in self.warm), None)
        try:
            if missing is not None:
                raise StalePlacement(f"server {self.hello.server_id} does not hold expert {missing} of {call.layer}")
            self.batcher.admit(call)
        except ExpertmeshError as error:
            self._answer(call, error)
            return
        self._pump()

    def cancel(self, stream: str, call_ids: Collection[int]) -> None:
        """Nobody waits for these calls any more."""
        self.batcher.cancel(stream, call_ids)

    def busy_share(self) -> float:
        """Of the last second."""
        return self._busy.share(self._clock.now_s)

    def _pump(self) -> None:
        if self._running or not self.alive:
            return
        now_s = self._clock.now_s
        for call in self.batcher.expire(now_s):
            self._answer(call, DeadlineExceeded(f"queued for {now_s - call.arrived_s:.3f} s, past its deadline"))
        batch = self.batcher.take()
        if not batch:
            return
        self._running = True
        self._busy.begin(now_s)
        pairs, overhead_s = sum(call.num_tokens for call in batch), self._machine.launch_s
        if self._pacer is not None:
            done_s = self._pacer.done_s(now_s, now_s + overhead_s, pairs)
        else:
            done_s = now_s + overhead_s + pairs / self.pairs_per_s
        self._clock.at(done_s, self._launched, batch, now_s)

    def _launched(self, batch: list[Call[Work]], start_s: float) -> None:
        if not self.alive:
            return
        now_s = self._clock.now_s
        self._busy.end(now_s)
        self.batcher.finish(batch, took_s=now_s - start_s)
        self._running = False
        for call in batch:
            self.pairs_computed += call.num_tokens
            self._answer(call, None)
        self._pump()

    def _answer(self, call: Call[Work], error: ExpertmeshError | None) -> None:
        self._clock.after(self._machine.hop_s, call.work.reply, error)

    # ------------------------------------------------------------------ control

    def beat(self) -> None:
        """Tell the placement what is held."""
        self._seq += 1
        self._report(
            ServerBeat(
                server_id=self.hello.server_id,
                held=self.warm,
                applied_version=self._applied,
                seq=self._seq,
                failed={},
                bytes=len(self.warm) * self._copy_bytes,
                budget_bytes=self._budget_bytes,
                queue_tokens=self.batcher.queue_tokens,
                busy_share=self.busy_share(),
                pairs_per_s=self.pairs_per_s,
                capacity_pairs_per_s=self.pairs_per_s,
            )
        )

    def take(self, assignment: Assignment) -> None:
        """A newer assignment arrives: unload what is surplus at once, load what is missing slice by slice."""
        if not self.alive or (self._assignment is not None and assignment.version <= self._assignment.version):
            return
        self._assignment = assignment
        self.released = self.released or assignment.released
        if not self._loading:
            self._apply(self._machine.load_s)

    def _apply(self, first_s: float = 0.0) -> None:
        wanted = self._assignment
        if wanted is None or not self.alive:
            return
        surplus = self.warm - set(wanted.copies)
        self.warm -= surplus
        self._applied = wanted.version
        missing = [key for key in wanted.copies if key not in self.warm]
        if missing:
            setup = self._clock.now_s < 0
            one_s = 0.0 if setup else self._copy_bytes / self._machine.load_bytes_per_s
            now = missing[: max(1, int(LOAD_SLICE_S / one_s) if one_s else len(missing))]
            self._loading = True
            self._clock.after(len(now) * one_s + (0.0 if setup else first_s), self._loaded, now)
        if surplus:
            self.beat()

    def _loaded(self, keys: list[Key]) -> None:
        if not self.alive:
            return
        self._loading = False
        self.warm |= frozenset(keys)
        self.loaded_copies += len(keys)
        self._apply()  # first what changed meanwhile: a copy no longer wanted must not be reported
        self.beat()
