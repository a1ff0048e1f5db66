"""Capacity and overflow: which routed pairs keep their expert, and what happens to those that do not.

Every copy of an expert computes at most C = max(min_capacity, ceil(capacity_factor * T * K / E)) pairs of a batch
(capacity factor: arXiv:2006.16668, 2101.03961; there what exceeds C is dropped, here an ordered chain decides). All
pairs stand in one total order; the first C of each expert are kept, and the others walk the chain one by one in that
order, so that no room is given away twice. `overflow_refused` lets pairs walk on that were refused later, by servers.

Shapes: T tokens, K experts per token, N = T*K routed pairs, E experts, P pairs that walk. A pair's flat index is
t * K + k.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.config import OverflowConfig
from router.gate import Gate, Routing
from router.overflow import PairState, Walk
from router.replicas import stable_order
from router.table import LayerPlacement

__all__ = ["CapacityDecision", "PairState", "Tally", "apply_capacity", "capacity_per_copy", "overflow_refused", "tally"]

IndexArray = npt.NDArray[np.int64]
_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CapacityDecision:
    """The effective routing after overflow. Arrays may be shared with the routing: do not write to them."""

    capacity: int | None  # C, pairs per copy and wave; None: dropless
    num_waves: int
    expert_TK: npt.NDArray[np.int32]  # -1 where dropped
    weight_TK: npt.NDArray[np.float32]  # 0 where dropped
    state_TK: npt.NDArray[np.uint8]
    wave_TK: npt.NDArray[np.int32]  # 0 first; a wave is sent when the one before it is done
    dropped_mass_T: npt.NDArray[np.float64]  # sum of the gate's weights of the dropped pairs, before renormalisation


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Counts of some tokens' pairs. pairs = computed + dropped; copied, waited, rerouted are disjoint, all computed.

    Pairs that need no server (identity experts, choices that the model's own capacity leaves out) are not counted.
    """

    pairs: int
    computed: int
    copied: int
    waited: int
    rerouted: int
    dropped: int
    dropped_gate_mass: float


def capacity_per_copy(overflow: OverflowConfig, *, num_tokens: int, top_k: int, num_experts: int) -> int | None:
    """C: routed pairs per copy and wave, None for no limit."""
    if overflow.capacity_factor is None:
        return None
    return max(overflow.min_capacity, math.ceil(overflow.capacity_factor * num_tokens * top_k / num_experts))


def apply_capacity(
    routing: Routing, placement: LayerPlacement, overflow: OverflowConfig, *, gate: Gate, rng: np.random.Generator
) -> CapacityDecision:
    """Decide for every routed pair of a batch.

    Args:
        routing: the gate's choice, or a request's own; without scores `next_expert` is skipped.
        placement: the layer's live copies.
        overflow: the policy.
        gate: weighs the experts of rerouted tokens.
        rng: draws who keeps the capacity, for keep = "random".
    """
    num_tokens, top_k = routing.expert_TK.shape
    num_copies_E = placement.num_copies_E
    capacity = capacity_per_copy(overflow, num_tokens=num_tokens, top_k=top_k, num_experts=len(num_copies_E))
    # A request's own routing (which comes without scores) may leave choices out, too.
    may_leave_gaps = gate.spec.leaves_gaps or routing.score_TE is None
    local_N = _local(routing, len(num_copies_E)) if may_leave_gaps else None
    if capacity is None and num_copies_E.all():
        return _unchanged(routing, None, local_N)
    expert_N = routing.expert_TK.ravel()
    count_E = np.bincount(expert_N if local_N is None else expert_N[~local_N], minlength=len(num_copies_E))
    keep_E = np.where(num_copies_E > 0, _UNLIMITED if capacity is None else capacity, 0)
    if (count_E <= keep_E).all():
        return _unchanged(routing, capacity, local_N)
    pairs_P = _overflowing(routing, count_E, keep_E, overflow, rng, local_N)
    room_E = _room(placement, overflow, capacity)
    walk = Walk(routing, routing.expert_TK, overflow, room_E=room_E, used_E=np.minimum(count_E, keep_E))
    chains = [overflow.chain if live else overflow.unavailable_chain for live in (num_copies_E > 0).tolist()]
    walk.run(pairs_P, [chains[expert] for expert in expert_N[pairs_P].tolist()])
    state_N, wave_N = np.zeros(len(expert_N), dtype=np.uint8), np.zeros(len(expert_N), dtype=np.int32)
    state_N[pairs_P] = walk.states
    if local_N is not None:
        state_N[local_N] = PairState.LOCAL
    waiting_P = pairs_P[state_N[pairs_P] == PairState.WAITED]
    absent_P = num_copies_E[expert_N[waiting_P]] == 0
    state_N[waiting_P[absent_P]] = PairState.ABSENT
    waiting_P = waiting_P[~absent_P]
    wave_N[waiting_P] = 1 + _rank(expert_N[waiting_P]) // room_E[expert_N[waiting_P]]
    effective_N = expert_N.copy()
    effective_N[pairs_P] = walk.experts
    return _decide(routing, effective_N, state_N, wave_N, overflow, gate, capacity)


def overflow_refused(
    decision: CapacityDecision,
    pairs_P: IndexArray,
    routing: Routing,
    placement: LayerPlacement,
    overflow: OverflowConfig,
    *,
    gate: Gate,
    unavailable: bool,
    may_wait: bool = True,
) -> CapacityDecision:
    """Decide again for pairs that no server took.

    They end up REROUTED (send them now), WAITED (offer them again after the retry hint), ABSENT (wait for a new
    placement), DROPPED or FAILED; a pair that waits keeps its expert and its wave. The step `copy` is passed over:
    the caller has tried every copy before.

    Args:
        decision: what was decided before.
        pairs_P: flat indices of the pairs, in the order in which they take what room there is.
        routing: of the batch, as for `apply_capacity`.
        placement: live copies that may be used as substitutes: without servers that refused or were lost.
        overflow: the policy.
        gate: weighs the experts of rerouted tokens.
        unavailable: their experts have no live copy (unavailable_chain), else every copy refused (chain).
        may_wait: False when too little time is left to wait: `wait` is passed over, what follows it decides.
    """
    steps = overflow.unavailable_chain if unavailable else overflow.chain
    chain = tuple(step for step in steps if step != "copy" and (may_wait or step != "wait"))
    room_E = _room(placement, overflow, decision.capacity)
    expert_N, state_N = decision.expert_TK.ravel().copy(), decision.state_TK.ravel().copy()
    wave_N = decision.wave_TK.ravel()
    sent_N = state_N < PairState.DROPPED
    waves_P = wave_N[pairs_P]
    for wave in np.unique(waves_P).tolist():
        walking_P = pairs_P[waves_P == wave]
        used_E = np.bincount(expert_N[sent_N & (wave_N == wave)], minlength=len(room_E))
        walk = Walk(routing, expert_N.reshape(decision.expert_TK.shape), overflow, room_E=room_E, used_E=used_E)
        walk.run(walking_P, [chain] * len(walking_P))
        expert_N[walking_P], state_N[walking_P] = walk.experts, walk.states
    if unavailable:
        waiting_P = pairs_P[state_N[pairs_P] == PairState.WAITED]
        state_N[waiting_P] = PairState.ABSENT
    return _decide(routing, expert_N, state_N, wave_N, overflow, gate, decision.capacity)


def tally(decision: CapacityDecision, routing: Routing, rows: slice = slice(None)) -> Tally:
    """Count what became of the pairs of some tokens (those of one request, say), once none of them has FAILED.

    A pair whose expert was replaced counts as rerouted, whatever else it did; an ABSENT one as computed, since its
    request is only answered when it was.
    """
    state_TK = decision.state_TK[rows]
    count = np.bincount(state_TK.ravel(), minlength=len(PairState)).tolist()
    dropped, pairs = count[PairState.DROPPED], state_TK.size - count[PairState.LOCAL]
    waited = rerouted = 0
    if count[PairState.KEPT] < pairs:
        own_TK = decision.expert_TK[rows] == routing.expert_TK[rows]
        rerouted = state_TK.size - int(own_TK.sum()) - dropped
        waited = int(((state_TK == PairState.WAITED) & own_TK).sum())
    return Tally(
        pairs=pairs,
        computed=pairs - dropped,
        copied=count[PairState.COPIED],
        waited=waited,
        rerouted=rerouted,
        dropped=dropped,
        dropped_gate_mass=float(decision.dropped_mass_T[rows].sum()) if dropped else 0.0,
    )


def _local(routing: Routing, num_experts: int) -> npt.NDArray[np.bool_] | None:
    """Pairs that need no server, None if there are none."""
    expert_N = routing.expert_TK.ravel()
    local_N = (expert_N < 0) | (expert_N >= num_experts)
    return local_N if local_N.any() else None


def _unchanged(routing: Routing, capacity: int | None, local_N: npt.NDArray[np.bool_] | None) -> CapacityDecision:
    state_TK = np.zeros(routing.expert_TK.shape, dtype=np.uint8)
    if local_N is not None:
        state_TK.ravel()[local_N] = PairState.LOCAL
    return CapacityDecision(
        capacity=capacity,
        num_waves=1,
        expert_TK=routing.expert_TK,
        weight_TK=routing.weight_TK,
        state_TK=state_TK,
        wave_TK=np.zeros(routing.expert_TK.shape, dtype=np.int32),
        dropped_mass_T=np.zeros(len(routing.expert_TK)),
    )


def _room(placement: LayerPlacement, overflow: OverflowConfig, capacity: int | None) -> IndexArray:
    """Pairs each expert may take in one wave: `copy` is what opens the room of its further copies."""
    copies_E = placement.num_copies_E.astype(np.int64)
    if capacity is None:
        return np.where(copies_E > 0, _UNLIMITED, 0)
    return capacity * (copies_E if "copy" in overflow.chain else np.minimum(copies_E, 1))


def _overflowing(
    routing: Routing,
    count_E: IndexArray,
    keep_E: IndexArray,
    overflow: OverflowConfig,
    rng: np.random.Generator,
    local_N: npt.NDArray[np.bool_] | None,
) -> IndexArray:
    """Flat indices of the pairs beyond the first keep_E of their expert, in the total order."""
    expert_N = routing.expert_TK.ravel()
    if local_N is None:
        pairs_P = np.flatnonzero((count_E > keep_E)[expert_N])  # token, then slot
    else:
        pairs_P = np.flatnonzero(~local_N)
        pairs_P = pairs_P[(count_E > keep_E)[expert_N[pairs_P]]]
    if overflow.keep == "score":
        pairs_P = pairs_P[np.argsort(-routing.weight_TK.ravel()[pairs_P], kind="stable")]
    elif overflow.keep == "random":
        pairs_P = pairs_P[np.argsort(rng.permutation(len(expert_N))[pairs_P])]
    expert_P = expert_N[pairs_P]
    return pairs_P[_rank(expert_P) >= keep_E[expert_P]]


def _rank(expert_P: npt.NDArray[np.int32]) -> IndexArray:
    """How many earlier entries have the same expert."""
    order_P = stable_order(expert_P)
    sorted_P = expert_P[order_P]
    rank_P = np.empty(len(expert_P), dtype=np.int64)
    rank_P[order_P] = np.arange(len(expert_P)) - np.searchsorted(sorted_P, sorted_P)
    return rank_P


def _decide(
    routing: Routing,
    expert_N: npt.NDArray[np.int32],
    state_N: npt.NDArray[np.uint8],
    wave_N: npt.NDArray[np.int32],
    overflow: OverflowConfig,
    gate: Gate,
    capacity: int | None,
) -> CapacityDecision:
    """The decision with the weights that follow from the effective experts.

    A rerouted token gets the weights its gate would give the new set, where a dropped pair still counts with the
    expert it was routed to: dropping a term must not change the others unless the operator asks for `renormalize`.
    """
    shape = routing.expert_TK.shape
    expert_TK = expert_N.reshape(shape)
    weight_TK, mass_T = routing.weight_TK, np.zeros(shape[0])
    dropped_TK = (expert_TK < 0) & (state_N.reshape(shape) != PairState.LOCAL)
    rows = np.flatnonzero(((expert_TK != routing.expert_TK) & ~dropped_TK).any(axis=1))
    if len(rows):
        assert routing.score_TE is not None, "only next_expert replaces experts"
        full = np.where(dropped_TK, routing.expert_TK, expert_TK)[rows]
        weight_TK = weight_TK.copy()
        weight_TK[rows] = gate.weigh(routing.score_TE[rows], full)
    if dropped_TK.any():
        mass_T = np.where(dropped_TK, routing.weight_TK, 0).sum(axis=1, dtype=np.float64)
        weight_TK = np.where(dropped_TK, np.float32(0), weight_TK)
        if overflow.renormalize:
            left_T = weight_TK.sum(axis=1, dtype=np.float64)
            lost = np.flatnonzero(dropped_TK.any(axis=1) & (left_T > 0))
            scale = routing.weight_TK[lost].sum(axis=1, dtype=np.float64) / left_T[lost]
            weight_TK[lost] = (weight_TK[lost] * scale[:, None]).astype(np.float32)
    return CapacityDecision(
        capacity=capacity,
        num_waves=int(wave_N.max()) + 1,
        expert_TK=expert_TK,
        weight_TK=weight_TK,
        state_TK=state_N.reshape(shape),
        wave_TK=wave_N.reshape(shape),
        dropped_mass_T=mass_T,
    )
