"""One batch's conversation with simulated servers: `router.exchange` in simulated time, without tensors.

The decisions are the real ones: which copy, what an error means, what happens to pairs nobody takes, when to try again.
This module only carries them out, as the real exchange does, and keeps the account of every request.

Shapes: T tokens of the batch, K experts per token, P pairs of one call. A pair's flat index is t * K + k.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cluster.sim_events import Clock
from cluster.sim_servers import Machine, SimServer, Work
from experts.batching import Call
from protos.errors import ExpertmeshError, NoCopy, Overloaded, ServerLost
from router.capacity import CapacityDecision, PairState, overflow_refused, tally
from router.config import OverflowConfig
from router.dispatch import Dispatch, plan_dispatch, split_rows
from router.gate import Gate, Routing
from router.ledger import RequestLedger
from router.replicas import message_worth
from router.retry import Move, next_move, retry_pause_s
from router.snapshot import PlacementSnapshot

IndexArray = npt.NDArray[np.int64]
_NEVER = -(1 << 62)  # pairs left of a request that has its answer
_NO_PAIRS: IndexArray = np.empty(0, dtype=np.int64)
_COUNTS = ("pairs", "computed", "copied", "waited", "rerouted", "dropped", "dropped_gate_mass")

Reply = Callable[[ExpertmeshError | None], None]


@dataclass(slots=True, kw_only=True, eq=False)
class SimRequest:
    """One request; `row` is the layer it is in, `visits_left` counts that one."""

    due_s: float
    row: int
    visits_left: int
    num_tokens: int
    deadline_s: float
    finished: "Callable[[SimRequest], None]"
    ledger: RequestLedger = field(default_factory=RequestLedger)
    error: ExpertmeshError | None = None
    done: bool = False
    on_abandoned: Callable[[], None] = lambda: None

    def finish(self, error: ExpertmeshError | None = None) -> None:
        """Answered, or failed; the first time counts."""
        if not self.done:
            self.done, self.error = True, error
            self.finished(self)


class ExchangeContext(Protocol):
    """What the exchanges of one router share."""

    clock: Clock
    machine: Machine
    snapshot: PlacementSnapshot
    gate: Gate
    overflow: OverflowConfig
    servers: Mapping[str, SimServer]
    rng: np.random.Generator
    scale: int
    max_rows: int
    router_id: str
    pairs_in_flight: dict[str, int]
    open_calls: dict[str, dict[int, Reply]]

    def next_call(self) -> int: ...
    def thread(self, cost_s: float, action: Callable[..., None], *args: object) -> None: ...
    def released(self) -> None: ...
    def visited(self, request: SimRequest) -> None: ...
    def fail(self, request: SimRequest, error: ExpertmeshError) -> None: ...


class SimExchange:
    """See the module docstring. Every pair is in flight, in a later wave, refused, absent or settled.

    Args:
        layer: its name.
        requests: of the batch, in the order of its tokens.
        on_end: called once, when all is settled or nobody waits any more.
    """

    def __init__(
        self,
        context: ExchangeContext,
        layer: str,
        requests: list[SimRequest],
        routing: Routing,
        decision: CapacityDecision,
        *,
        on_end: Callable[[], None],
    ) -> None:
        self._context, self._layer, self._requests = context, layer, requests
        self._routing, self._decision, self._on_end = routing, decision, on_end
        self._top_k = routing.expert_TK.shape[1]
        self._offsets = [0, *accumulate(request.num_tokens for request in requests)]
        self._in_flight: dict[int, tuple[str, int]] = {}  # call -> (server, epoch)
        self._refused: list[tuple[float, IndexArray]] = []
        self._refusals = 0
        self._retry_after_s = 0.0
        self._absent: IndexArray = _NO_PAIRS
        self._excluded: set[str] = set()
        self._full: set[str] = set()
        self._wave = 0
        self._ended = False
        self._retried_T: IndexArray | None = None
        self._left = [request.num_tokens * self._top_k for request in requests]
        done_TK = np.isin(decision.state_TK, (PairState.DROPPED, PairState.LOCAL))
        if done_TK.any():
            for i, done in enumerate(np.add.reduceat(done_TK.sum(axis=1), self._offsets[:-1]).tolist()):
                self._left[i] -= done

    def start(self) -> None:
        """Send the first wave."""
        for request in self._requests:
            request.on_abandoned = self._look
        self._context.snapshot.listen(self._on_change)
        limit = f"capacity of {self._decision.capacity} pairs per copy is full"
        self._fail(self._pairs_in(PairState.FAILED), Overloaded(f"layer {self._layer}: {limit}"))
        self._absent = self._pairs_in(PairState.ABSENT)
        self._answer_finished()
        self._send(self._wave_pairs(0))
        self._look()

    # ------------------------------------------------------------------ sending

    def _send(self, pairs_P: IndexArray) -> None:
        if not len(pairs_P):
            return
        context, table = self._context, self._context.snapshot.current
        ids = [server.server_id for server in table.servers]
        plan = plan_dispatch(
            self._decision.expert_TK,
            self._decision.weight_TK,
            table.layer(self._layer),
            load_S=np.array([context.pairs_in_flight.get(server_id, 0) for server_id in ids], dtype=np.float64),
            rng=context.rng,
            pairs_P=pairs_P,
            excluded_S=self._mask(self._excluded | self._full) if self._excluded or self._full else None,
            capacity=self._decision.capacity,
            prefer_pairs=message_worth(context.machine.pairs_per_s) / context.scale,
        )
        for dispatch in plan.dispatches:
            for block in split_rows(dispatch, context.max_rows):
                call_id = context.next_call()
                self._in_flight[call_id] = (ids[dispatch.server], table.epoch)
                context.snapshot.hold(table.epoch)
                self._call(call_id, ids[dispatch.server], block)
        if len(plan.unplaced_P):
            self._place_nowhere(plan.unplaced_P)

    def _call(self, call_id: int, server_id: str, dispatch: Dispatch) -> None:
        context, pairs = self._context, len(dispatch.pair_index_P)
        context.pairs_in_flight[server_id] = context.pairs_in_flight.get(server_id, 0) + pairs
        calls = context.open_calls.setdefault(server_id, {})
        answered: list[bool] = []

        def reply(error: ExpertmeshError | None) -> None:
            """The link has an answer, or is lost: whichever is first counts."""
            if answered:
                return
            answered.append(True)
            calls.pop(call_id, None)
            context.pairs_in_flight[server_id] -= pairs
            context.thread(context.machine.message_s, self._receive, call_id, server_id, dispatch, error)

        calls[call_id] = reply
        call = Call(
            call_id=call_id,
            stream=context.router_id,
            layer=self._layer,
            num_rows=len(dispatch.row_R) * context.scale,
            num_tokens=pairs * context.scale,
            arrived_s=0.0,
            deadline_s=math.inf,
            work=Work(experts=frozenset(dispatch.pair_expert_P.tolist()), reply=reply),
        )
        context.thread(context.machine.message_s, self._sent, server_id, call)

    def _sent(self, server_id: str, call: Call[Work]) -> None:
        context = self._context
        call.arrived_s = context.clock.now_s + context.machine.hop_s
        call.deadline_s = self._deadline_s()
        context.clock.at(call.arrived_s, context.servers[server_id].receive, call)

    # ------------------------------------------------------------------ receiving

    def _receive(self, call_id: int, server_id: str, dispatch: Dispatch, error: ExpertmeshError | None) -> None:
        if self._ended or call_id not in self._in_flight:
            return
        self._release_call(call_id)
        pairs_P = dispatch.pair_index_P
        if error is None:
            self._settle(pairs_P)
        else:
            move = next_move(error)
            if move is Move.FAIL:
                self._fail(pairs_P, error)
            elif move is Move.ELSEWHERE:
                self._excluded.add(server_id)
                self._retry(pairs_P)
            else:
                self._full.add(server_id)
                self._retry_after_s = max(self._retry_after_s, error.retry_after_s)
                if "copy" in self._context.overflow.chain:
                    self._retry(pairs_P)
                else:
                    self._overflow(pairs_P)
        self._look()

    def _release_call(self, call_id: int) -> None:
        _, epoch = self._in_flight.pop(call_id)
        self._context.snapshot.release(epoch)
        self._context.released()

    def _retry(self, pairs_P: IndexArray) -> None:
        if self._retried_T is None:
            self._retried_T = np.zeros(self._offsets[-1], dtype=np.int64)
        np.add.at(self._retried_T, pairs_P // self._top_k, 1)
        self._send(pairs_P)

    def _place_nowhere(self, pairs_P: IndexArray) -> None:
        """Pairs whose every copy is gone or refused."""
        layer = self._context.snapshot.current.layer(self._layer)
        expert_P = self._decision.expert_TK.ravel()[pairs_P]
        alive = layer.without(self._mask(self._excluded)) if self._excluded else layer
        full = alive.num_copies_E[expert_P] > 0
        if full.any():
            self._overflow(pairs_P[full])
        if not full.all():
            self._walk(pairs_P[~full], unavailable=True)

    def _overflow(self, pairs_P: IndexArray) -> None:
        self._refusals += 1
        now_s = self._context.clock.now_s
        jitter = float(self._context.rng.random())
        pause_s = retry_pause_s(self._retry_after_s, attempt=self._refusals, jitter=jitter)
        waiting = self._walk(pairs_P, unavailable=False, may_wait=now_s + pause_s < self._deadline_s())
        if len(waiting):
            self._refused.append((now_s + pause_s, waiting))
            self._context.clock.after(pause_s, self._look)

    def _walk(self, pairs_P: IndexArray, *, unavailable: bool, may_wait: bool = True) -> IndexArray:
        blocked = self._excluded | self._full
        layer = self._context.snapshot.current.layer(self._layer)
        self._decision = after = overflow_refused(
            self._decision,
            pairs_P,
            self._routing,
            layer.without(self._mask(blocked)) if blocked else layer,
            self._context.overflow,
            gate=self._context.gate,
            unavailable=unavailable,
            may_wait=may_wait,
        )
        state_P = after.state_TK.ravel()[pairs_P]
        self._settle(pairs_P[state_P == PairState.DROPPED])
        what = "has no live copy" if unavailable else "is full on every copy"
        error: ExpertmeshError = (NoCopy if unavailable else Overloaded)(f"an expert of layer {self._layer} {what}")
        self._fail(pairs_P[state_P == PairState.FAILED], error)
        self._send(pairs_P[state_P == PairState.REROUTED])
        if unavailable:
            self._absent = np.union1d(self._absent, pairs_P[state_P == PairState.ABSENT])
        waiting_P: IndexArray = pairs_P[state_P == PairState.WAITED]
        return waiting_P

    # ------------------------------------------------------------------ progress

    def _look(self) -> None:
        """Send what may go now; end when there is nothing left to do."""
        if self._ended:
            return
        now_s = self._context.clock.now_s
        ready = [pairs_P for when_s, pairs_P in self._refused if when_s <= now_s + 1e-12]
        if ready:
            self._refused = [entry for entry in self._refused if entry[0] > now_s + 1e-12]
            self._full.clear()
            self._retry_after_s = 0.0
            self._retry(np.sort(np.concatenate(ready)))
        while not self._in_flight and self._wave < self._decision.num_waves - 1:
            self._wave += 1
            self._send(self._wave_pairs(self._wave))
        waiting = len(self._absent) or self._refused or self._wave < self._decision.num_waves - 1
        if all(request.done for request in self._requests) or not (self._in_flight or waiting):
            self._end()

    def _end(self) -> None:
        self._ended = True
        context = self._context
        context.snapshot.forget(self._on_change)
        for call_id, (server_id, _) in list(self._in_flight.items()):
            reply = context.open_calls[server_id].get(call_id)
            if reply is not None:
                context.clock.after(
                    context.machine.hop_s, context.servers[server_id].cancel, context.router_id, frozenset((call_id,))
                )
                reply(ServerLost("nobody waits"))
            self._release_call(call_id)
        self._on_end()

    def _on_change(self) -> None:
        """The placement changed: servers that failed may be tried again, absent experts may be back."""
        self._context.clock.after(0.0, self._changed)

    def _changed(self) -> None:
        if self._ended:
            return
        self._excluded.clear()
        if len(self._absent):
            pairs_P, self._absent = self._absent, _NO_PAIRS
            self._send(pairs_P)
        self._look()

    def _settle(self, pairs_P: IndexArray) -> None:
        if len(pairs_P):
            for i, settled in enumerate(np.bincount(self._requests_of(pairs_P)).tolist()):
                self._left[i] -= settled
            self._answer_finished()

    def _answer_finished(self) -> None:
        for i, left in enumerate(self._left):
            if left == 0:
                self._left[i] = _NEVER
                request = self._requests[i]
                if not request.done:
                    self._account(request, slice(self._offsets[i], self._offsets[i + 1]))
                    self._context.visited(request)

    def _account(self, request: SimRequest, rows: slice) -> None:
        counts, ledger, scale = tally(self._decision, self._routing, rows), request.ledger, self._context.scale
        for name in _COUNTS:
            setattr(ledger, name, getattr(ledger, name) + scale * getattr(counts, name))
        if self._retried_T is not None:
            ledger.retried += scale * int(self._retried_T[rows].sum())

    def _fail(self, pairs_P: IndexArray, error: ExpertmeshError) -> None:
        for i in np.unique(self._requests_of(pairs_P)).tolist() if len(pairs_P) else ():
            self._left[i] = _NEVER
            self._context.fail(self._requests[i], error)

    def _requests_of(self, pairs_P: IndexArray) -> IndexArray:
        request_P: IndexArray = np.searchsorted(self._offsets, pairs_P // self._top_k, side="right") - 1
        return request_P

    def _deadline_s(self) -> float:
        return max(request.deadline_s for request in self._requests)

    def _mask(self, server_ids: set[str]) -> npt.NDArray[np.bool_]:
        servers = self._context.snapshot.current.servers
        return np.array([server.server_id in server_ids for server in servers], dtype=np.bool_)

    def _pairs_in(self, state: PairState) -> IndexArray:
        pairs_P: IndexArray = np.flatnonzero(self._decision.state_TK == state)
        return pairs_P

    def _wave_pairs(self, wave: int) -> IndexArray:
        chosen_TK = (self._decision.wave_TK == wave) & (self._decision.state_TK < PairState.DROPPED)
        pairs_P: IndexArray = np.flatnonzero(chosen_TK)
        return pairs_P
