"""The conversation of one batch with the expert servers: send, add up what returns, re-plan what failed.

The decisions are made elsewhere: which copy in `replicas.py`, the next move after an error in `retry.py`, what happens
to pairs nobody takes in `capacity.py`.

Shapes: T tokens of the merged batch, D model dim, K experts per token, P pairs of one message, R its rows.
A pair's flat index is t * K + k.
"""

import asyncio
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protos import expert_pb2
from protos.codec import WIRE_DTYPES, words_of
from protos.errors import ExpertmeshError, NoCopy, Overloaded
from router.capacity import CapacityDecision, PairState, overflow_refused, tally
from router.combine import RoutedSum
from router.context import OFFLOAD_FLOPS, LayerContext
from router.dispatch import Dispatch, plan_dispatch, split_rows
from router.gate import Routing
from router.ledger import RequestLedger
from router.merging import Batch, Result
from router.retry import Move, next_move, retry_pause_s
from router.reweigh import reweigh
from router.table import PlacementTable
from router.transport import Inbox, Reply, ServerLink, row_bytes

IndexArray = npt.NDArray[np.int64]
_NEVER = -(1 << 62)  # pairs left of a request that has its answer: no settling reaches 0
_NO_PAIRS: IndexArray = np.empty(0, dtype=np.int64)


@dataclass(slots=True, kw_only=True, eq=False)
class _Sent:
    """One call in flight."""

    dispatch: Dispatch
    link: ServerLink
    epoch: int
    call_id: int


class Exchange:
    """The conversation of one batch with the expert servers.

    Every pair is in one place at a time: in flight (a `_Sent`), in a later wave, refused and waiting for its retry
    time, absent (its expert has no live copy) or settled (computed, dropped or failed). The exchange ends when all are
    settled or nobody waits for the answers any more.
    """

    def __init__(
        self,
        batch: Batch,
        x_TL: Tensor,
        context: LayerContext,
        table: PlacementTable,
        routing: Routing,
        decision: CapacityDecision,
        *,
        gate_s: float,
    ) -> None:
        self._gate_s = gate_s
        self._epoch = table.epoch
        self._batch = batch
        self._context = context
        self._table = table
        self._routing = routing
        self._decision = decision
        self._top_k = routing.expert_TK.shape[1]
        self._around = context.around[batch.layer]
        self._x_TL = x_TL  # the rows that travel
        self._sum = RoutedSum(*self._x_TL.shape)
        self._words_TL: Any = words_of(self._x_TL)
        self._shared_TD: Tensor | None = None
        self._inbox = Inbox()
        self._in_flight: dict[int, _Sent] = {}  # by id(sent)
        self._refused: list[tuple[float, IndexArray]] = []  # (not before, pairs)
        self._refusals = 0
        self._retry_after_s = 0.0  # the longest hint of the servers in _full
        self._absent: IndexArray = _NO_PAIRS
        self._excluded: set[str] = set()  # servers this batch gave up on, until the placement changes
        self._full: set[str] = set()  # servers that refused, until the refused pairs are offered again
        self._changed = False  # the placement, since we last looked
        self._wave = 0
        self._retried_T: IndexArray | None = None
        self._servers: set[str] = set()
        self._answers: set[asyncio.Task[None]] = set()  # answers that are computed on the other thread
        # Weights as they are sent. A later change of a token's weights scales its row at the end (reweigh.py).
        self._weight_TK = decision.weight_TK
        self._scale_T: npt.NDArray[np.float32] | None = None
        # Pairs a request still waits for, plus 1 for its share of the shared expert's output.
        self._plain = decision.num_waves == 1 and not decision.state_TK.any()
        offsets = batch.offsets
        self._left = [(end - start) * self._top_k + 1 for start, end in pairwise(offsets)]
        if not self._plain:
            done_T = np.isin(decision.state_TK, (PairState.DROPPED, PairState.LOCAL)).sum(axis=1)
            for i, done in enumerate(np.add.reduceat(done_T, offsets[:-1]).tolist()):
                self._left[i] -= done
        self._sent_s = time.monotonic()

    async def run(self) -> None:
        """Send, receive, re-plan, until every request has its answer."""
        batch, snapshot = self._batch, self._context.snapshot
        batch.on_abandoned = self._inbox.wake
        snapshot.listen(self._on_change)
        try:
            if self._plain:
                self._send(None)
            else:
                full = self._pairs_in(PairState.FAILED)
                limit = f"capacity of {self._decision.capacity} pairs per copy is full"
                self._fail(full, Overloaded(f"layer {batch.layer}: {limit}"))
                self._absent = self._pairs_in(PairState.ABSENT)
                self._send(self._wave_pairs(0))
            await self._compute_shared()
            while batch.alive and (self._in_flight or self._waiting()):
                self._release()
                reply = await self._inbox.next(self._patience_s())
                if reply is not None:
                    self._receive(reply)
            if self._answers:
                await asyncio.wait(self._answers)
        finally:
            snapshot.forget(self._on_change)
            for sent in self._in_flight.values():
                sent.link.cancel([sent.call_id])
                snapshot.release(sent.epoch)

    def _send(self, pairs_P: IndexArray | None) -> None:
        """Plan and send pairs (None: all); those no server may take go to the overflow or unavailability policy."""
        if pairs_P is not None and not len(pairs_P):
            return
        self._table = table = self._context.snapshot.current  # always the newest: only calls in flight hold an epoch
        transport = self._context.transport
        worth_pairs, speed_S = transport.judge(table.servers)
        plan = plan_dispatch(
            self._decision.expert_TK,
            self._weight_TK,
            table.layer(self._batch.layer),
            load_S=transport.loads(table.servers),
            rng=self._context.rng,
            pairs_P=pairs_P,
            excluded_S=self._excluded_mask(),
            capacity=self._decision.capacity,
            prefer_pairs=worth_pairs,
            speed_S=speed_S,
        )
        max_rows = max(1, self._context.config.chunk_bytes // row_bytes(self._x_TL))
        for dispatch in plan.dispatches:
            link = transport.links[table.servers[dispatch.server].server_id]
            for block in split_rows(dispatch, max_rows):
                self._send_block(block, link, self._deadline_s() - time.monotonic())
        if len(plan.unplaced_P):
            self._place_nowhere(plan.unplaced_P)

    def _send_block(self, block: Dispatch, link: ServerLink, timeout_s: float) -> None:
        x_TL, dtype = self._x_TL, WIRE_DTYPES[self._x_TL.dtype]
        partial_dtype = dtype if self._context.config.partial_dtype == "model" else WIRE_DTYPES[torch.float32]
        head = expert_pb2.ComputeRequest(
            layer=self._batch.layer,
            epoch=self._table.epoch,
            num_rows=len(block.row_R),
            dtype=dtype,
            partial_dtype=partial_dtype,
            timeout_s=max(timeout_s, 1e-3),
            pair_row=block.pair_row_P.tobytes(),
            pair_expert=block.pair_expert_P.tobytes(),
            pair_weight=block.pair_weight_P.tobytes(),
        )
        words_RL = self._words_TL if len(block.row_R) == len(x_TL) else self._words_TL[block.row_R]
        sent = _Sent(dispatch=block, link=link, epoch=head.epoch, call_id=0)
        self._in_flight[id(sent)] = sent
        self._context.snapshot.hold(sent.epoch)
        sent.call_id = link.send(head, memoryview(words_RL).cast("B"), dim=x_TL.shape[1], inbox=self._inbox, tag=sent)

    async def _compute_shared(self) -> None:
        """The shared expert, while the routed rows are away; then every request waits for its pairs only."""
        shared = self._context.shared.get(self._batch.layer)
        if shared is not None:
            x_TD, flops = self._batch.x_TD, self._batch.x_TD.numel() * shared.spec.hidden_dim * 3
            self._shared_TD = await self._context.compute(lambda: shared(x_TD), flops=flops)
        self._left = [left - 1 for left in self._left]
        self._answer_finished()

    def _receive(self, reply: Reply) -> None:
        sent = reply.tag
        assert isinstance(sent, _Sent), "the tag of every call of this inbox"
        del self._in_flight[id(sent)]
        self._context.snapshot.release(sent.epoch)
        pairs_P = sent.dispatch.pair_index_P
        if reply.partial_RD is not None:
            self._servers.add(reply.server_id)
            self._sum.add(reply.partial_RD, sent.dispatch.row_R)
            self._settle(pairs_P)
            return
        assert reply.error is not None, "a reply is a partial sum or an error"
        move = next_move(reply.error)
        if move is Move.FAIL:
            self._fail(pairs_P, reply.error)
        elif move is Move.ELSEWHERE:
            self._excluded.add(reply.server_id)
            self._retry(pairs_P)
        else:
            self._full.add(reply.server_id)
            self._retry_after_s = max(self._retry_after_s, reply.error.retry_after_s)
            if "copy" in self._batch.requests[0].overflow.chain:
                self._retry(pairs_P)
            else:
                self._overflow(pairs_P)

    def _retry(self, pairs_P: IndexArray) -> None:
        """Send pairs again, to servers this batch has not given up on."""
        if self._retried_T is None:
            self._retried_T = np.zeros(len(self._batch.x_TD), dtype=np.int64)
        np.add.at(self._retried_T, pairs_P // self._top_k, 1)
        self._send(pairs_P)

    def _place_nowhere(self, pairs_P: IndexArray) -> None:
        """Pairs whose every copy is gone or refused."""
        layer = self._table.layer(self._batch.layer)
        expert_P = self._decision.expert_TK.ravel()[pairs_P]
        alive = layer.without(self._mask(self._excluded)) if self._excluded else layer
        full = alive.num_copies_E[expert_P] > 0
        if full.any():
            self._overflow(pairs_P[full])
        if not full.all():
            self._walk(pairs_P[~full], unavailable=True)

    def _overflow(self, pairs_P: IndexArray) -> None:
        """Pairs that every copy refused walk the overflow chain; those that wait are offered again after a pause."""
        self._refusals += 1
        now_s = time.monotonic()
        pause_s = retry_pause_s(self._retry_after_s, attempt=self._refusals, jitter=float(self._context.rng.random()))
        waiting = self._walk(pairs_P, unavailable=False, may_wait=now_s + pause_s < self._deadline_s())
        if len(waiting):
            self._refused.append((now_s + pause_s, waiting))

    def _walk(self, pairs_P: IndexArray, *, unavailable: bool, may_wait: bool = True) -> IndexArray:
        """Let pairs walk the rest of their chain; returns those that wait for room."""
        self._plain = False
        blocked = self._excluded | self._full
        layer = self._table.layer(self._batch.layer)
        usable = layer.without(self._mask(blocked)) if blocked else layer
        before = self._decision
        self._decision = after = overflow_refused(
            before,
            pairs_P,
            self._routing,
            usable,
            self._batch.requests[0].overflow,
            gate=self._context.gates[self._batch.layer],
            unavailable=unavailable,
            may_wait=may_wait,
        )
        self._weight_TK, self._scale_T = reweigh(self._weight_TK, self._scale_T, after, pairs_P)
        state_P = after.state_TK.ravel()[pairs_P]
        self._settle(pairs_P[state_P == PairState.DROPPED])
        failed = pairs_P[state_P == PairState.FAILED]
        if len(failed):
            expert = int(before.expert_TK.ravel()[failed[0]])
            where = f"expert {expert} of layer {self._batch.layer}"
            error: ExpertmeshError = (
                NoCopy(f"{where} has no live copy at epoch {self._table.epoch}")
                if unavailable
                else Overloaded(f"{where}: every copy is full and the overflow chain ends in fail")
            )
            self._fail(failed, error)
        self._send(pairs_P[state_P == PairState.REROUTED])
        if unavailable:
            self._absent = np.union1d(self._absent, pairs_P[state_P == PairState.ABSENT])
            if len(self._absent):
                self._context.on_absent()
        waiting_P: IndexArray = pairs_P[state_P == PairState.WAITED]
        return waiting_P

    def _deadline_s(self) -> float:
        return max(request.deadline_s for request in self._batch.requests)

    def _waiting(self) -> bool:
        return bool(len(self._absent) or self._refused or self._wave < self._decision.num_waves - 1)

    def _release(self) -> None:
        """Send what may go now: the next wave, refused pairs whose time has come, pairs whose expert came back."""
        if self._changed:
            self._changed = False
            self._excluded.clear()
            if len(self._absent):
                pairs_P, self._absent = self._absent, self._absent[:0]
                self._send(pairs_P)
        if self._refused:
            now_s = time.monotonic()
            ready = [pairs_P for when_s, pairs_P in self._refused if when_s <= now_s]
            self._refused = [entry for entry in self._refused if entry[0] > now_s]
            if ready:
                self._full.clear()
                self._retry_after_s = 0.0
                self._retry(np.sort(np.concatenate(ready)))
        while not self._in_flight and self._wave < self._decision.num_waves - 1:
            self._wave += 1
            self._send(self._wave_pairs(self._wave))

    def _patience_s(self) -> float | None:
        """Seconds until there is something to do without a reply; None: nothing before a reply or a wake-up."""
        if not self._refused:
            return None
        return max(0.0, min(when_s for when_s, _ in self._refused) - time.monotonic())

    def _on_change(self) -> None:
        self._changed = True
        self._inbox.wake()

    def _excluded_mask(self) -> npt.NDArray[np.bool_] | None:
        blocked = self._excluded | self._full
        return self._mask(blocked) if blocked else None

    def _mask(self, server_ids: set[str]) -> npt.NDArray[np.bool_]:
        return np.array([server.server_id in server_ids for server in self._table.servers], dtype=np.bool_)

    def _pairs_in(self, state: PairState) -> IndexArray:
        pairs_P: IndexArray = np.flatnonzero(self._decision.state_TK == state)
        return pairs_P

    def _wave_pairs(self, wave: int) -> IndexArray:
        chosen_TK = (self._decision.wave_TK == wave) & (self._decision.state_TK < PairState.DROPPED)
        pairs_P: IndexArray = np.flatnonzero(chosen_TK)
        return pairs_P

    def _settle(self, pairs_P: IndexArray) -> None:
        """Pairs are done; requests that waited for nothing else get their answer."""
        if not len(pairs_P):
            return
        if len(self._left) == 1:
            self._left[0] -= len(pairs_P)
        else:
            for i, settled in enumerate(np.bincount(self._requests_of(pairs_P)).tolist()):
                self._left[i] -= settled
        self._answer_finished()

    def _answer_finished(self) -> None:
        for i, left in enumerate(self._left):
            if left == 0:
                self._left[i] = _NEVER
                request = self._batch.requests[i]
                if not request.done and self._around.projection_flops(request.num_tokens) >= OFFLOAD_FLOPS:
                    task = asyncio.get_running_loop().create_task(self._answer_later(i))
                    self._answers.add(task)
                elif not request.done:
                    request.finish(self._result(i))

    async def _answer_later(self, i: int) -> None:
        result = await self._context.compute(lambda: self._result(i), flops=OFFLOAD_FLOPS)
        self._batch.requests[i].finish(result)

    def _requests_of(self, pairs_P: IndexArray) -> IndexArray:
        """The request each pair belongs to."""
        request_P: IndexArray = np.searchsorted(self._batch.offsets, pairs_P // self._top_k, side="right") - 1
        return request_P

    def _result(self, i: int) -> Result:
        request, (first, end) = self._batch.requests[i], self._batch.offsets[i : i + 2]
        rows = slice(first, end)
        decision = self._decision
        num_pairs = request.num_tokens * self._top_k
        ledger = RequestLedger(
            pairs=num_pairs,
            computed=num_pairs,
            retried=0 if self._retried_T is None else int(self._retried_T[rows].sum()),
            epoch=self._epoch,
            batch_tokens=len(self._batch.x_TD),
            num_servers=len(self._servers),
            queue_s=self._batch.started_s - request.arrived_s,
            gate_s=self._gate_s,
            experts_s=time.monotonic() - self._sent_s,
        )
        if not self._plain:
            ledger.take(tally(decision, self._routing, rows))
        y_TL, expert_TK, weight_TK = self._sum.rows(first, end), decision.expert_TK[rows], self._weight_TK[rows]
        if self._scale_T is not None:
            scale_T1 = self._scale_T[rows, None]
            y_TL, weight_TK = y_TL * scale_T1, weight_TK * scale_T1
        shared_TD = None if self._shared_TD is None else self._shared_TD[rows]
        return Result(
            y_TD=self._around.leave(y_TL, request.x_TD, shared_TD, expert_TK=expert_TK, weight_TK=weight_TK),
            ledger=ledger,
            routing=Routing(expert_TK=expert_TK, weight_TK=weight_TK) if request.return_routing else None,
        )

    def _fail(self, pairs_P: IndexArray, error: ExpertmeshError) -> None:
        """Fail the requests these pairs belong to; the others of the batch go on."""
        for i in np.unique(self._requests_of(pairs_P)).tolist():
            self._left[i] = _NEVER
            self._batch.requests[i].finish(error)
