"""A simulated router: the real decisions of the request path, with nothing travelling.

What is exact: which requests merge (as `router.merging` does it), capacity and overflow (`router.capacity`), copies
(`router.replicas` through `router.dispatch`), moves after an error (`router.retry`), epochs in use (`router.snapshot`).
What is modelled: the router's one thread, which takes `batch_s` and some jitter for a batch and `message_s` for a
message.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from cluster.messages import Key
from cluster.sim_events import Clock
from cluster.sim_exchange import Reply, SimExchange, SimRequest
from cluster.sim_servers import Machine, SimServer
from cluster.workloads import Workload
from protos.checkpoint import GateWeights
from protos.errors import ExpertmeshError, Overloaded, ServerLost
from protos.model import GateSpec
from router.capacity import apply_capacity
from router.config import RouterConfig
from router.gate import Gate, Routing
from router.snapshot import PlacementSnapshot
from router.table import PlacementTable, empty_table


@dataclass(slots=True, eq=False)
class _Lane:
    waiting: deque[SimRequest] = field(default_factory=deque)
    in_flight: int = 0
    scheduled: bool = False
    typical_s: float = 0.0


class SimRouter:
    """See the module docstring.

    Args:
        servers: all that ever were, by id; the caller adds to it.
        on_lost: called with the id of a server that stopped answering.
        on_table: called when an epoch can be acknowledged.
        row_bytes: of a token's hidden state on the wire; messages are cut as the real router cuts them.
        scale: real pairs that one simulated pair stands for; limits in tokens and pairs are divided by it.
    """

    def __init__(
        self,
        clock: Clock,
        router_id: str,
        config: RouterConfig,
        machine: Machine,
        workload: Workload,
        *,
        servers: Mapping[str, SimServer],
        rng: np.random.Generator,
        on_lost: Callable[[str], None],
        on_table: Callable[[], None],
        row_bytes: int = 0,
        scale: int = 1,
    ) -> None:
        self.router_id, self.clock, self.machine, self.workload = router_id, clock, machine, workload
        self.servers, self.rng, self.scale = servers, rng, scale
        self.snapshot = PlacementSnapshot(empty_table(workload.num_experts))
        self.gate = make_gate(workload)
        self.overflow = config.overflow.model_copy(
            update={"min_capacity": max(1, config.overflow.min_capacity // scale)}
        )
        self.pairs_in_flight: dict[str, int] = {}
        self.open_calls: dict[str, dict[int, Reply]] = {}
        self.unusable: set[str] = set()
        self.demand_LE = np.zeros((len(workload.layers), workload.num_experts), dtype=np.int64)
        self.queued_tokens = 0
        self.max_rows = max(1, config.chunk_bytes // row_bytes // scale) if row_bytes else config.max_batch_tokens
        self._config = config
        self._on_lost, self._on_table = on_lost, on_table
        self._acknowledged = 0
        self._lanes = [_Lane() for _ in workload.layers]
        self._free_s = 0.0  # when the router's thread has nothing to do
        self._calls = 0

    # ------------------------------------------------------------------ requests

    def submit(self, request: SimRequest) -> None:
        """A request arrives, or comes to its next layer."""
        if request.done:
            return
        limit = self._config.max_queued_tokens // self.scale
        if self.queued_tokens + request.num_tokens > limit:
            request.finish(Overloaded(f"{self.queued_tokens} tokens are open, max_queued_tokens is {limit}"))
            return
        self.queued_tokens += request.num_tokens
        lane = self._lanes[request.row]
        lane.waiting.append(request)
        self._schedule(lane)

    def visited(self, request: SimRequest) -> None:
        """The request has all its pairs of one layer: on to the next, or done."""
        self.queued_tokens -= request.num_tokens
        request.on_abandoned = _nothing
        request.visits_left -= 1
        if request.visits_left:
            request.row = (request.row + 1) % len(self.workload.layers)
            self.submit(request)
        else:
            request.finish()

    def fail(self, request: SimRequest, error: ExpertmeshError) -> None:
        """The request gets an error; it may be waiting or in an exchange."""
        if not request.done:
            self.queued_tokens -= request.num_tokens
            request.finish(error)
            self.clock.after(0.0, request.on_abandoned)

    def thread(self, cost_s: float, action: Callable[..., None], *args: object) -> None:
        """Run an action when the router's thread has got to it and spent `cost_s` on it."""
        self._free_s = max(self._free_s, self.clock.now_s) + cost_s
        self.clock.at(self._free_s, action, *args)

    def route(self, row: int, num_tokens: int) -> Routing:
        """The gate's choice for the next tokens of a layer."""
        now_s = self.clock.now_s
        routing = self.workload.heat.routing(row, num_tokens, now_s, self.rng)
        num_experts = self.workload.num_experts
        if self.overflow.needs_scores and ((routing.expert_TK >= 0) & (routing.expert_TK < num_experts)).all():
            routing = with_scores(routing, self.workload.heat.shares(now_s)[row], self.rng)
        return routing

    def _schedule(self, lane: _Lane) -> None:
        if not lane.scheduled and lane.in_flight < self._config.max_batches_in_flight:
            lane.scheduled = True
            jitter_s = self.rng.exponential(self.machine.jitter_s) if self.machine.jitter_s else 0.0
            self.thread(self.machine.batch_s + jitter_s, self._pump, lane)

    def _pump(self, lane: _Lane) -> None:
        lane.scheduled = False
        lane.waiting = deque(request for request in lane.waiting if not request.done)
        if not lane.waiting or lane.in_flight >= self._config.max_batches_in_flight:
            return
        limit, requests, tokens = self._config.max_batch_tokens // self.scale, [lane.waiting.popleft()], 0
        tokens = requests[0].num_tokens
        while lane.waiting and tokens + lane.waiting[0].num_tokens <= limit:
            tokens += lane.waiting[0].num_tokens
            requests.append(lane.waiting.popleft())
        lane.in_flight += 1
        row, began_s, holding = requests[0].row, self.clock.now_s, [True]

        def free_place() -> None:
            if holding:
                holding.clear()
                lane.in_flight -= 1
                if lane.waiting:
                    self._schedule(lane)

        def ended() -> None:
            lane.typical_s += (self.clock.now_s - began_s - lane.typical_s) * 0.1
            free_place()

        self.clock.after(max(0.05, 3 * lane.typical_s), free_place)
        routing = self.route(row, tokens)
        self._count(row, routing)
        table = self.snapshot.current
        layer = self.workload.layers[row]
        decision = apply_capacity(routing, table.layer(layer), self.overflow, gate=self.gate, rng=self.rng)
        SimExchange(self, layer, requests, routing, decision, on_end=ended).start()
        if lane.waiting:
            self._schedule(lane)

    def _count(self, row: int, routing: Routing) -> None:
        expert_N = routing.expert_TK.ravel()
        num_experts = self.workload.num_experts
        counts_E = np.bincount(expert_N[expert_N >= 0], minlength=num_experts)[:num_experts]
        self.demand_LE[row] += self.scale * counts_E

    def demand(self) -> dict[Key, int]:
        """Routed pairs its gate asked for since it began, by key."""
        rows, experts = np.nonzero(self.demand_LE)
        layers = self.workload.layers
        counts = self.demand_LE[rows, experts].tolist()
        return {
            (layers[row], expert): count
            for row, expert, count in zip(rows.tolist(), experts.tolist(), counts, strict=True)
        }

    # ------------------------------------------------------------------ servers

    def next_call(self) -> int:
        self._calls += 1
        return self._calls

    def lose(self, server_id: str, reason: str) -> None:
        """The link to a server broke: what is open on it fails, and new batches leave it out."""
        if server_id in self.unusable or server_id not in self.servers:
            return
        self.unusable.add(server_id)
        self._refresh()
        error = ServerLost(f"server {server_id} is lost: {reason}")
        for reply in list(self.open_calls.get(server_id, {}).values()):
            reply(error)
        self._on_lost(server_id)

    def adopt(self, table: PlacementTable) -> None:
        """A table arrives."""
        if self.snapshot.adopt(table):
            self._refresh()
            self.released()

    def released(self) -> None:
        """A call in flight ended: perhaps the last one of an old epoch."""
        epoch = self.snapshot.table.epoch
        if self._acknowledged < epoch and self.snapshot.oldest_epoch >= epoch:
            self._acknowledged = epoch
            self._on_table()

    def _refresh(self) -> None:
        known = {server.server_id for server in self.snapshot.table.servers}
        self.unusable &= known
        self.snapshot.set_unreachable(frozenset(self.unusable))


def _nothing() -> None:
    """What a request that is in no exchange does when it is abandoned."""


def make_gate(workload: Workload) -> Gate:
    """The gate that weighs substitutes: softmax scores over the chosen experts, renormalised."""
    spec = GateSpec(num_experts=workload.num_experts, top_k=workload.top_k, score="softmax", renorm="sum")
    weight_ED = torch.zeros(workload.num_experts, 1)
    return Gate(spec, GateWeights(weight_ED=weight_ED))


def with_scores(routing: Routing, share_E: npt.NDArray[np.float64], rng: np.random.Generator) -> Routing:
    """Scores that explain a drawn routing, for the overflow step `next_expert`: the chosen experts keep their weights,
    the others get less than the least of them, more likely the hotter they are.

    Drawn, not recorded: how good a substitute is cannot be simulated, only that there is one with room.
    """
    expert_TK, weight_TK = routing.expert_TK, routing.weight_TK
    num_tokens, num_experts = len(expert_TK), len(share_E)
    least_T1 = np.where(expert_TK >= 0, weight_TK, np.inf).min(axis=1, keepdims=True)
    likely_E = share_E / max(float(share_E.max()), 1e-300)
    score_TE = (rng.random((num_tokens, num_experts)) * likely_E * least_T1 * 0.999).astype(np.float32)
    rows_T1 = np.arange(num_tokens)[:, None]
    there_TK = expert_TK >= 0
    score_TE[np.broadcast_to(rows_T1, expert_TK.shape)[there_TK], expert_TK[there_TK]] = weight_TK[there_TK]
    return Routing(expert_TK=expert_TK, weight_TK=weight_TK, score_TE=score_TE, choice_TE=score_TE.copy())
