"""Capacity and overflow: one total order, no room spent twice, lossless where the operator asked for it.

`reference` is the policy written down naively, pair by pair; the decision must equal it.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos.checkpoint import GateWeights
from protos.model import GateSpec
from router.capacity import CapacityDecision, PairState, apply_capacity, capacity_per_copy, overflow_refused, tally
from router.config import OverflowConfig
from router.gate import Gate, Routing
from router.replicas import choose_copies
from router.table import LayerPlacement
from tests.strategies import Routed, generators, placements, policies, routed

LOSSLESS = st.sampled_from([("copy", "wait"), ("wait",), ("copy", "wait", "fail"), ("wait", "drop")])


@dataclass
class Reference:
    """The decision as a naive implementation makes it."""

    states: list[PairState]
    experts: list[int]
    waves: list[int]
    used: dict[tuple[int, int], int] = field(default_factory=dict)  # (wave, expert) -> pairs

    def take(self, pair: int, state: PairState, expert: int, wave: int = 0) -> None:
        self.states[pair], self.experts[pair], self.waves[pair] = state, expert, wave
        self.used[wave, expert] = self.used.get((wave, expert), 0) + 1


def total_order(routing: Routing, policy: OverflowConfig, seed: int) -> list[int]:
    weights = routing.weight_TK.ravel().tolist()
    if policy.keep == "score":
        return sorted(range(len(weights)), key=lambda pair: (-weights[pair], pair))
    if policy.keep == "random":
        draw = np.random.default_rng(seed).permutation(len(weights)).tolist()
        return sorted(range(len(weights)), key=lambda pair: int(draw[pair]))
    return list(range(len(weights)))


def substitute(batch: Routed, policy: OverflowConfig, result: Reference, room: list[float], pair: int) -> int:
    routing, top_k = batch.routing, batch.top_k
    assert routing.score_TE is not None
    assert routing.choice_TE is not None
    token = pair // top_k
    routed_to = routing.expert_TK[token].tolist()
    taken = {*routed_to, *result.experts[token * top_k : (token + 1) * top_k]}
    own = routing.score_TE[token, routed_to[pair % top_k]]
    choice_E = routing.choice_TE[token]
    for expert in sorted(range(batch.num_experts), key=lambda e: (-choice_E[e], e)):
        free = expert not in taken and result.used.get((0, expert), 0) < room[expert]
        near = policy.max_score_gap is None or own - routing.score_TE[token, expert] <= policy.max_score_gap
        if free and near and choice_E[expert] > -np.inf:
            return expert
    return -1


def reference(batch: Routed, placement: LayerPlacement, policy: OverflowConfig, seed: int) -> Reference:
    experts = batch.routing.expert_TK.ravel().tolist()
    live = placement.num_copies_E.tolist()
    factor = policy.capacity_factor
    limit = math.inf
    if factor is not None:
        limit = max(policy.min_capacity, math.ceil(factor * batch.num_tokens * batch.top_k / batch.num_experts))
    room: list[float] = [limit * (copies if "copy" in policy.chain else 1) if copies else 0 for copies in live]
    result = Reference([PairState.FAILED] * len(experts), list(experts), [0] * len(experts))
    rest = []
    for pair in total_order(batch.routing, policy, seed):
        if result.used.get((0, experts[pair]), 0) < (limit if live[experts[pair]] else 0):
            result.take(pair, PairState.KEPT, experts[pair])
        else:
            rest.append(pair)
    for pair in rest:
        expert = experts[pair]
        for step in policy.chain if live[expert] else policy.unavailable_chain:
            if step == "copy" and result.used.get((0, expert), 0) < room[expert]:
                result.take(pair, PairState.COPIED, expert)
                break
            if step == "next_expert":
                other = substitute(batch, policy, result, room, pair)
                if other >= 0:
                    result.take(pair, PairState.REROUTED, other)
                    break
            if step == "wait":
                wave = 1
                while live[expert] and result.used.get((wave, expert), 0) >= room[expert]:
                    wave += 1
                result.take(pair, *((PairState.WAITED, expert, wave) if live[expert] else (PairState.ABSENT, expert)))
                break
            if step == "drop":
                result.states[pair], result.experts[pair] = PairState.DROPPED, -1
                break
            if step == "fail":
                break
    return result


def decide(batch: Routed, placement: LayerPlacement, policy: OverflowConfig, seed: int = 0) -> CapacityDecision:
    return apply_capacity(batch.routing, placement, policy, gate=batch.gate, rng=np.random.default_rng(seed))


def check_weights(batch: Routed, policy: OverflowConfig, decision: CapacityDecision) -> None:
    """Kept terms keep their weight; rerouted tokens are weighed anew; dropped ones count, and scale if asked."""
    routing = batch.routing
    assert routing.score_TE is not None
    for t in range(batch.num_tokens):
        routed_to, effective = routing.expert_TK[t], decision.expert_TK[t]
        dropped = effective < 0
        weight = routing.weight_TK[t]
        if (effective[~dropped] != routed_to[~dropped]).any():
            weight = batch.gate.weigh(routing.score_TE[t : t + 1], np.where(dropped, routed_to, effective)[None])[0]
        weight = np.where(dropped, 0, weight)
        if policy.renormalize and dropped.any() and weight.sum() > 0:
            weight = weight * (routing.weight_TK[t].sum() / weight.sum())
            np.testing.assert_allclose(decision.weight_TK[t], weight, rtol=1e-5)
            assert decision.weight_TK[t].sum() == pytest.approx(routing.weight_TK[t].sum(), rel=1e-5)
        else:
            np.testing.assert_array_equal(decision.weight_TK[t], weight)
        assert decision.dropped_mass_T[t] == pytest.approx(routing.weight_TK[t][dropped].sum(), rel=1e-6)


# --------------------------------------------------------------------------- apply_capacity


@given(routed(), st.data(), policies(), st.integers(0, 2**32 - 1))
def test_the_decision_is_that_of_pairs_walking_one_by_one(
    batch: Routed, data: st.DataObject, policy: OverflowConfig, seed: int
) -> None:
    placement = data.draw(placements(batch.num_experts))
    decision, wanted = decide(batch, placement, policy, seed), reference(batch, placement, policy, seed)
    assert [PairState(state) for state in decision.state_TK.ravel().tolist()] == wanted.states
    assert decision.expert_TK.ravel().tolist() == wanted.experts
    assert decision.wave_TK.ravel().tolist() == wanted.waves
    assert decision.num_waves == max(wanted.waves) + 1
    check_weights(batch, policy, decision)


@pytest.mark.parametrize("max_gap", [None, 0.2])
def test_a_large_batch_is_decided_the_same_way(max_gap: float | None) -> None:
    """Large enough for several blocks of candidates."""
    num_experts, copies_E = 12, [1, 3, 0, 1, 1, 2, 1, 1, 1, 1, 1, 1]
    spec = GateSpec(num_experts=num_experts, top_k=3, score="softmax", renorm="sum")
    generator = torch.Generator().manual_seed(0)
    weight_ED = torch.randn(num_experts, 8, generator=generator) * torch.linspace(0.2, 1, num_experts)[:, None]
    gate = Gate(spec, GateWeights(weight_ED=weight_ED, bias_E=None))
    x_TD = torch.randn(800, 8, generator=generator) + 0.5
    batch = Routed(gate=gate, routing=gate(x_TD, with_scores=True), num_experts=num_experts)
    server_EC = np.array([[c if c < copies else -1 for c in range(3)] for copies in copies_E], dtype=np.int32)
    placement = LayerPlacement(
        num_copies_E=np.array(copies_E, dtype=np.int32), server_EC=server_EC, share_EC=(server_EC >= 0) / 3
    )
    policy = OverflowConfig(
        chain=("copy", "next_expert", "drop"),
        unavailable_chain=("next_expert", "wait"),
        capacity_factor=0.8,
        max_score_gap=max_gap,
    )
    decision, wanted = decide(batch, placement, policy), reference(batch, placement, policy, 0)
    assert sum(state is not PairState.KEPT for state in wanted.states) > 600
    assert decision.state_TK.ravel().tolist() == wanted.states
    assert decision.expert_TK.ravel().tolist() == wanted.experts


@given(routed(max_tokens=40), st.data(), policies(dropless=False), generators())
def test_no_copy_gets_more_than_its_capacity_in_any_wave(
    batch: Routed, data: st.DataObject, policy: OverflowConfig, rng: np.random.Generator
) -> None:
    placement = data.draw(placements(batch.num_experts))
    decision = decide(batch, placement, policy)
    assert decision.capacity is not None
    sent_TK = decision.state_TK < PairState.DROPPED
    for wave in range(decision.num_waves):
        expert_P = decision.expert_TK[sent_TK & (decision.wave_TK == wave)]
        if "copy" not in policy.chain and len(expert_P):
            assert np.bincount(expert_P).max() <= decision.capacity
        server_P = choose_copies(expert_P, placement, load_S=np.zeros(5), capacity=decision.capacity, rng=rng)
        assert (server_P >= 0).all()
        for copy in set(zip(expert_P.tolist(), server_P.tolist(), strict=True)):
            assert ((expert_P == copy[0]) & (server_P == copy[1])).sum() <= decision.capacity


@given(routed(), st.data(), policies())
def test_every_pair_ends_in_one_state_and_the_counts_add_up(
    batch: Routed, data: st.DataObject, policy: OverflowConfig
) -> None:
    decision = decide(batch, data.draw(placements(batch.num_experts)), policy)
    cut = data.draw(st.integers(0, batch.num_tokens))
    whole = tally(decision, batch.routing)
    parts = [tally(decision, batch.routing, rows) for rows in (slice(0, cut), slice(cut, None))]
    for name in ("pairs", "computed", "copied", "waited", "rerouted", "dropped"):
        assert getattr(whole, name) == sum(getattr(part, name) for part in parts)
    assert whole.dropped_gate_mass == pytest.approx(sum(part.dropped_gate_mass for part in parts))
    states = [PairState(state) for state in decision.state_TK.ravel().tolist()]
    assert whole.pairs == batch.num_tokens * batch.top_k == whole.computed + whole.dropped
    assert (whole.copied, whole.waited) == (states.count(PairState.COPIED), states.count(PairState.WAITED))
    assert (whole.rerouted, whole.dropped) == (states.count(PairState.REROUTED), states.count(PairState.DROPPED))
    assert ((decision.expert_TK < 0) == (decision.state_TK == PairState.DROPPED)).all()


@given(routed(), st.data(), policies(chain=LOSSLESS))
def test_lossless_chains_change_neither_experts_nor_weights(
    batch: Routed, data: st.DataObject, policy: OverflowConfig
) -> None:
    policy = replace_chain(policy, unavailable_chain=("wait",))
    decision = decide(batch, data.draw(placements(batch.num_experts)), policy)
    np.testing.assert_array_equal(decision.expert_TK, batch.routing.expert_TK)
    np.testing.assert_array_equal(decision.weight_TK, batch.routing.weight_TK)
    assert set(decision.state_TK.ravel().tolist()) <= {
        PairState.KEPT,
        PairState.COPIED,
        PairState.WAITED,
        PairState.ABSENT,
    }


@given(routed(), st.data(), policies())
def test_capacity_for_all_changes_nothing(batch: Routed, data: st.DataObject, policy: OverflowConfig) -> None:
    policy = replace_chain(policy, capacity_factor=data.draw(st.sampled_from([None, float(batch.num_experts)])))
    decision = decide(batch, data.draw(placements(batch.num_experts, min_copies=1)), policy)
    assert decision.expert_TK is batch.routing.expert_TK
    assert decision.weight_TK is batch.routing.weight_TK
    assert not decision.state_TK.any()
    assert decision.num_waves == 1


@given(routed(), st.data(), policies())
def test_a_token_never_uses_an_expert_twice(batch: Routed, data: st.DataObject, policy: OverflowConfig) -> None:
    decision = decide(batch, data.draw(placements(batch.num_experts)), policy)
    for expert_K in decision.expert_TK.tolist():
        used = [expert for expert in expert_K if expert >= 0]
        assert len(set(used)) == len(used)


@given(routed(), st.data(), policies(dropless=False))
def test_no_kept_pair_ranks_below_an_overflowing_one_of_its_expert(
    batch: Routed, data: st.DataObject, policy: OverflowConfig
) -> None:
    placement = data.draw(placements(batch.num_experts, min_copies=1))
    decision = decide(batch, placement, policy)
    order = total_order(batch.routing, policy, 0)
    states, experts = decision.state_TK.ravel()[order], batch.routing.expert_TK.ravel()[order]
    for expert in range(batch.num_experts):
        kept = states[experts == expert] == PairState.KEPT
        assert (np.diff(kept.astype(int)) <= 0).all()


@given(routed(), st.data(), policies(), st.integers(0, 2**32 - 1))
def test_the_same_draws_give_the_same_decision(
    batch: Routed, data: st.DataObject, policy: OverflowConfig, seed: int
) -> None:
    placement = data.draw(placements(batch.num_experts))
    first, second = decide(batch, placement, policy, seed), decide(batch, placement, policy, seed)
    for name in ("expert_TK", "weight_TK", "state_TK", "wave_TK", "dropped_mass_T"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@given(routed(), st.data(), policies())
def test_a_routing_without_scores_is_never_rerouted(batch: Routed, data: st.DataObject, policy: OverflowConfig) -> None:
    own = Routing(expert_TK=batch.routing.expert_TK, weight_TK=batch.routing.weight_TK)
    placement = data.draw(placements(batch.num_experts))
    decision = apply_capacity(own, placement, policy, gate=batch.gate, rng=np.random.default_rng(0))
    assert not (decision.state_TK == PairState.REROUTED).any()


@pytest.mark.parametrize(
    ("factor", "minimum", "num_tokens", "capacity"),
    [(None, 4, 100, None), (1.0, 4, 64, 16), (1.25, 4, 64, 20), (1.0, 4, 65, 17), (0.1, 4, 64, 4), (0.1, 1, 64, 2)],
)
def test_capacity_is_the_factor_times_the_mean_load_rounded_up(
    factor: float | None, minimum: int, num_tokens: int, capacity: int | None
) -> None:
    policy = OverflowConfig(capacity_factor=factor, min_capacity=minimum)
    assert capacity_per_copy(policy, num_tokens=num_tokens, top_k=2, num_experts=8) == capacity


# --------------------------------------------------------------------------- overflow_refused


@st.composite
def refusals(draw: st.DrawFn) -> tuple[Routed, LayerPlacement, OverflowConfig, CapacityDecision, np.ndarray]:
    """A decided batch, and some of its sent pairs, refused."""
    batch = draw(routed())
    placement, policy = draw(placements(batch.num_experts)), draw(policies())
    decision = decide(batch, placement, policy)
    sent = np.flatnonzero(decision.state_TK < PairState.DROPPED).tolist()
    refused = draw(st.lists(st.sampled_from(sent), unique=True)) if sent else []
    return batch, placement, policy, decision, np.array(sorted(refused), dtype=np.int64)


def without_experts(placement: LayerPlacement, expert_P: np.ndarray) -> LayerPlacement:
    """The placement with no usable copy of some experts."""
    num_copies_E, server_EC = placement.num_copies_E.copy(), placement.server_EC.copy()
    num_copies_E[expert_P], server_EC[expert_P] = 0, -1
    return replace(placement, num_copies_E=num_copies_E, server_EC=server_EC)


@given(refusals(), st.booleans(), st.booleans())
def test_refused_pairs_walk_the_rest_of_their_chain_and_the_others_stay(
    refusal: tuple[Routed, LayerPlacement, OverflowConfig, CapacityDecision, np.ndarray],
    unavailable: bool,
    may_wait: bool,
) -> None:
    batch, placement, policy, before, pairs_P = refusal
    usable = without_experts(placement, before.expert_TK.ravel()[pairs_P])
    after = overflow_refused(
        before, pairs_P, batch.routing, usable, policy, gate=batch.gate, unavailable=unavailable, may_wait=may_wait
    )
    others = np.setdiff1d(np.arange(before.expert_TK.size), pairs_P)
    for name in ("expert_TK", "state_TK"):
        np.testing.assert_array_equal(getattr(after, name).ravel()[others], getattr(before, name).ravel()[others])
    np.testing.assert_array_equal(after.wave_TK, before.wave_TK)
    assert (after.capacity, after.num_waves) == (before.capacity, before.num_waves)
    check_weights(batch, policy, after)
    chain = policy.unavailable_chain if unavailable else policy.chain
    waiting = PairState.ABSENT if unavailable else PairState.WAITED
    allowed = {"next_expert": PairState.REROUTED, "drop": PairState.DROPPED, "wait": waiting}
    steps = [step for step in chain if step in allowed and (may_wait or step != "wait")]
    outcomes = {allowed[step] for step in steps}
    if not {"wait", "drop"} & set(steps):
        outcomes.add(PairState.FAILED)
    ends = {"wait": waiting, "drop": PairState.DROPPED}
    certain = next((ends[step] for step in steps if step in ends), PairState.FAILED)
    for pair in pairs_P.tolist():
        state, expert = PairState(after.state_TK.ravel()[pair]), int(after.expert_TK.ravel()[pair])
        assert state in outcomes
        assert state in (certain, PairState.REROUTED)
        if state is PairState.REROUTED:
            assert usable.num_copies_E[expert] > 0
        elif state is PairState.DROPPED:
            assert expert == -1
        else:
            assert expert == before.expert_TK.ravel()[pair]


@given(refusals())
def test_substitutes_for_refused_pairs_respect_capacity_and_are_new_to_their_token(
    refusal: tuple[Routed, LayerPlacement, OverflowConfig, CapacityDecision, np.ndarray],
) -> None:
    batch, placement, policy, before, pairs_P = refusal
    policy = replace_chain(policy, chain=("copy", "next_expert", "drop"))
    usable = without_experts(placement, before.expert_TK.ravel()[pairs_P])
    after = overflow_refused(before, pairs_P, batch.routing, usable, policy, gate=batch.gate, unavailable=False)
    for expert_K in after.expert_TK.tolist():
        used = [expert for expert in expert_K if expert >= 0]
        assert len(set(used)) == len(used)
    changed_N = after.expert_TK.ravel() != before.expert_TK.ravel()
    for pair in np.flatnonzero(changed_N & (after.expert_TK.ravel() >= 0)).tolist():
        expert = after.expert_TK.ravel()[pair]
        assert expert not in batch.routing.expert_TK[pair // batch.top_k]
        if after.capacity is not None:
            together = (after.expert_TK == expert) & (after.state_TK < PairState.DROPPED)
            together &= after.wave_TK == after.wave_TK.ravel()[pair]
            assert together.sum() <= after.capacity * usable.num_copies_E[expert]


@given(refusals())
def test_a_rerouted_pair_that_has_to_wait_still_counts_as_rerouted(
    refusal: tuple[Routed, LayerPlacement, OverflowConfig, CapacityDecision, np.ndarray],
) -> None:
    batch, placement, policy, before, _ = refusal
    pairs_P = np.flatnonzero(before.state_TK == PairState.REROUTED)
    policy = replace_chain(policy, chain=("wait",))
    after = overflow_refused(before, pairs_P, batch.routing, placement, policy, gate=batch.gate, unavailable=False)
    assert (after.state_TK.ravel()[pairs_P] == PairState.WAITED).all()
    assert tally(after, batch.routing) == tally(before, batch.routing)


def replace_chain(policy: OverflowConfig, **fields: object) -> OverflowConfig:
    return OverflowConfig.model_validate(policy.model_dump() | fields)
