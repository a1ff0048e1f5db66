"""Selections beyond a top-k, against slow versions written from their papers one token at a time.

Shapes: T tokens, D model dim, E experts, K top-k, R tokens of one request, V vocabulary.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protos.checkpoint import GateWeights
from protos.errors import InvalidRequest
from protos.model import GateSpec, GroupLimit, OwnCapacity
from router.gate import Gate
from router.selection import limit_capacity, mask_groups, sparsemixer

DIM = 4
SEEDS = st.integers(0, 2**32 - 1)
SWITCH = st.builds(OwnCapacity, kind=st.just("sequence"), capacity=st.integers(1, 4))
NLLB = st.builds(
    OwnCapacity,
    kind=st.just("batch"),
    capacity=st.none() | st.integers(1, 4),
    token_fraction=st.sampled_from([0.0, 0.1, 0.25, 1.0]),
    by_priority=st.booleans(),
    normalise_before=st.booleans(),
)


def probabilities(num_tokens: int, num_experts: int, seed: int) -> Tensor:
    """Softmax of random logits: no two of a token's are equal."""
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)


# ---------------------------------------------------------------- groups


@given(seed=SEEDS, num_groups=st.integers(1, 5), per_group=st.integers(2, 4), data=st.data())
def test_only_experts_of_the_best_groups_may_be_chosen(
    seed: int, num_groups: int, per_group: int, data: st.DataObject
) -> None:
    groups = GroupLimit(
        num_groups=num_groups,
        top_groups=data.draw(st.integers(1, num_groups)),
        score=data.draw(st.sampled_from(["top2_sum", "max"])),
        excluded=data.draw(st.sampled_from(["-inf", "zero"])),
    )
    choice_TE = torch.randn(5, num_groups * per_group, generator=torch.Generator().manual_seed(seed))
    masked_TE = mask_groups(choice_TE, groups)
    for choice_E, masked_E in zip(choice_TE.tolist(), masked_TE.tolist(), strict=True):
        members = [choice_E[g * per_group : (g + 1) * per_group] for g in range(num_groups)]
        best_of = 2 if groups.score == "top2_sum" else 1
        scores = [sum(sorted(values)[-best_of:]) for values in members]
        best = sorted(range(num_groups), key=lambda g: -scores[g])[: groups.top_groups]
        nothing = -math.inf if groups.excluded == "-inf" else 0.0
        assert masked_E == [choice if e // per_group in best else nothing for e, choice in enumerate(choice_E)]


# ---------------------------------------------------------------- sparsemixer


def literal_sparsemixer(logits_E: list[float], top_k: int, jitter: float) -> tuple[list[int], list[float]]:
    """SparseMixer-v2 without noise (arXiv:2409.12136 and its reference code), for one token."""
    left = dict(enumerate(logits_E))
    chosen, weights = [], []
    for _ in range(top_k):
        best = max(left, key=lambda e: left[e])
        near = []
        for expert, logit in left.items():
            factor = max(abs(logit), left[best])
            if factor == 0 or (left[best] - logit) / factor <= 2 * jitter:
                near.append(expert)
        weights.append(1 / sum(math.exp(left[expert] - left[best]) for expert in near))
        chosen.append(best)
        del left[best]
    return chosen, weights


@given(
    logits=st.lists(st.lists(st.integers(-12, 12), min_size=6, max_size=6), min_size=1, max_size=8),
    top_k=st.integers(1, 3),
    jitter=st.sampled_from([0.01, 0.123, 0.37]),  # no quotient of two quarters falls on twice one of them
)
def test_sparsemixer_takes_one_expert_after_another(logits: list[list[int]], top_k: int, jitter: float) -> None:
    logits_TE = torch.tensor(logits) / 4
    weight_TK, index_TK = sparsemixer(logits_TE, top_k, jitter)
    for t, logits_E in enumerate(logits_TE.tolist()):
        experts, weights = literal_sparsemixer(logits_E, top_k, jitter)
        assert index_TK[t].tolist() == experts
        assert weight_TK[t].tolist() == pytest.approx(weights, rel=1e-6)


# ---------------------------------------------------------------- capacities of the model's own


@given(seed=SEEDS, num_tokens=st.integers(0, 20), num_experts=st.integers(1, 5), capacity=SWITCH)
def test_switch_keeps_the_first_tokens_of_every_expert(
    seed: int, num_tokens: int, num_experts: int, capacity: OwnCapacity
) -> None:
    probability_TE = probabilities(num_tokens, num_experts, seed)
    index_T1 = probability_TE.argmax(dim=-1, keepdim=True)
    weight_T1, expert_T1 = limit_capacity(probability_TE, index_T1, capacity, [0, num_tokens])
    used = [0] * num_experts
    for t, (expert,) in enumerate(index_T1.tolist()):
        used[expert] += 1
        kept = used[expert] <= (capacity.capacity or 0)
        assert expert_T1[t].item() == (expert if kept else -1)
        assert weight_T1[t].item() == (probability_TE[t, expert].item() if kept else 0)


def literal_nllb(probability_RE: Tensor, capacity: OwnCapacity) -> tuple[list[list[int]], list[list[float]]]:
    """Experts (-1: no place) and weights of one request: all first choices queue before any second one."""
    num_tokens, num_experts = probability_RE.shape
    places = math.ceil(capacity.token_fraction * num_tokens)
    if capacity.token_fraction == 0:
        places = 2 * math.ceil(num_tokens / num_experts) if capacity.capacity is None else capacity.capacity
    asked = probability_RE.topk(2, dim=-1).indices.tolist()
    queue = list(range(num_tokens))
    if capacity.by_priority:
        queue.sort(key=lambda t: -float(probability_RE[t].max()))
    used, experts = [0] * num_experts, [[-1, -1] for _ in asked]
    for k in (0, 1):
        for t in queue:
            if used[asked[t][k]] < places:
                experts[t][k] = asked[t][k]
            used[asked[t][k]] += 1  # those without a place count too: nobody after them finds one either
    weights = []
    for t in range(num_tokens):
        p = [float(probability_RE[t, expert]) for expert in asked[t]]
        kept = [p[k] if experts[t][k] >= 0 else 0.0 for k in (0, 1)]
        mass = sum(p if capacity.normalise_before else kept) or 1.0
        weights.append([value / mass for value in kept])
    return experts, weights


@given(seed=SEEDS, cuts=st.lists(st.integers(0, 20), min_size=1, max_size=3), capacity=NLLB)
def test_nllb_queues_second_choices_behind_all_first_ones_of_their_request(
    seed: int, cuts: list[int], capacity: OwnCapacity
) -> None:
    offsets = [0, *sorted(cuts)]
    probability_TE = probabilities(offsets[-1], 5, seed)
    index_TK = probability_TE.topk(2, dim=-1).indices
    weight_TK, expert_TK = limit_capacity(probability_TE, index_TK, capacity, offsets)
    for first, end in pairwise(offsets):
        experts, weights = literal_nllb(probability_TE[first:end], capacity)
        assert expert_TK[first:end].tolist() == experts
        np.testing.assert_allclose(weight_TK[first:end], np.reshape(weights, (-1, 2)), rtol=1e-5)


# ---------------------------------------------------------------- gates that select so


def gate_inputs(num_tokens: int, num_experts: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x_TD and weight_ED of few distinct values: their products are exact in any dtype and order, and often tie."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randint(-2, 3, (num_tokens, DIM), generator=generator) / 2
    weight_ED = torch.randint(-3, 4, (num_experts, DIM), generator=generator) / 4
    return x_TD.to(dtype), weight_ED.to(dtype)


@given(
    seed=SEEDS,
    cuts=st.lists(st.integers(0, 24), min_size=1, max_size=4),
    capacity=SWITCH | NLLB,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_merged_requests_are_gated_each_by_itself(
    seed: int, cuts: list[int], capacity: OwnCapacity, dtype: torch.dtype
) -> None:
    offsets = [0, *sorted(cuts)]
    x_TD, weight_ED = gate_inputs(offsets[-1], 5, seed, dtype)
    top_k = 1 if capacity.kind == "sequence" else 2
    spec = GateSpec(num_experts=5, top_k=top_k, score="softmax", logits_dtype="float32", capacity=capacity)
    gate = Gate(spec, GateWeights(weight_ED=weight_ED))
    merged = gate(x_TD, offsets=offsets)
    for first, end in pairwise(offsets):
        alone = gate(x_TD[first:end])
        np.testing.assert_array_equal(merged.expert_TK[first:end], alone.expert_TK)
        np.testing.assert_array_equal(merged.weight_TK[first:end], alone.weight_TK)


def test_a_tie_that_only_bf16_sees_goes_to_the_first_expert() -> None:
    """The probabilities differ by less than bf16 can tell; Switch and NLLB choose after rounding."""
    weight_ED = torch.tensor([[1.0, 0, 0, 0], [1.0, 2**-9, 0, 0], [0, 0, 1.0, 0]]).bfloat16()
    x_TD = torch.ones(1, DIM).bfloat16()
    capacities = (
        OwnCapacity(kind="sequence", capacity=1),
        OwnCapacity(kind="batch", token_fraction=1.0),
    )
    for capacity, wanted in zip(capacities, ([[0]], [[0, 1]]), strict=True):
        spec = GateSpec(num_experts=3, top_k=len(wanted[0]), score="softmax", logits_dtype="float32", capacity=capacity)
        assert Gate(spec, GateWeights(weight_ED=weight_ED))(x_TD).expert_TK.tolist() == wanted


def hash_gate() -> Gate:
    spec = GateSpec(num_experts=4, top_k=2, score="sigmoid", selection="hash")
    _, weight_ED = gate_inputs(0, 4, 0, torch.float32)
    return Gate(spec, GateWeights(weight_ED=weight_ED, table_VK=torch.tensor([[0, 1], [2, 3], [3, 0]])))


def test_a_hash_gate_looks_experts_up_by_token_id() -> None:
    x_TD, _ = gate_inputs(3, 4, 1, torch.float32)
    routing = hash_gate()(x_TD, token_ids_T=np.array([2, 0, 1]), with_scores=True)
    assert routing.expert_TK.tolist() == [[3, 0], [0, 1], [2, 3]]
    assert routing.score_TE is not None
    np.testing.assert_array_equal(routing.weight_TK, np.take_along_axis(routing.score_TE, routing.expert_TK, axis=1))
    assert hash_gate()(x_TD[:0], token_ids_T=np.array([], dtype=np.int64)).expert_TK.shape == (0, 2)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "token_ids: none for 2 tokens; this layer looks its experts up by them"),
        ([], "token_ids: 0 for 2 tokens"),
        ([1], "token_ids: 1 for 2 tokens"),
        ([0, 1, 2], "token_ids: 3 for 2 tokens"),
        ([0, 3], r"token_ids are 0\.\.3, limit is 0\.\.2"),
        ([-1, 2], r"token_ids are -1\.\.2, limit is 0\.\.2"),
    ],
)
def test_a_hash_gate_refuses_ids_it_cannot_look_up(ids: list[int] | None, message: str) -> None:
    x_TD, _ = gate_inputs(2, 4, 1, torch.float32)
    with pytest.raises(InvalidRequest, match=message):
        hash_gate()(x_TD, token_ids_T=None if ids is None else np.array(ids, dtype=np.int64))


# ---------------------------------------------------------------- weighing a set of experts again

_FUNCTIONS: list[tuple[Any, Any, Any]] = [
    (score, "score", renorm)
    for score in ("softmax", "sigmoid", "sqrt_softplus")
    for renorm in ("none", "sum", "clamp", "norm")
] + [("logits", chosen, renorm) for chosen in ("softmax", "sigmoid") for renorm in ("none", "sum")]


@st.composite
def gates(draw: st.DrawFn) -> Gate:
    """A gate of any combination of options."""
    num_experts, seed = 8, draw(SEEDS)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    selection: Any
    score, chosen, renorm = draw(st.sampled_from(_FUNCTIONS))
    selection = draw(st.sampled_from(["top_k", "top_k", "sparsemixer", "hash"]))
    capacity = draw(st.none() | SWITCH | NLLB) if selection == "top_k" else None
    if capacity is not None:
        score, chosen, renorm = "softmax", "score", "none"
    if selection == "sparsemixer":
        score, chosen, renorm = "logits", "score", "none"
    plain = selection == "top_k" and capacity is None
    top_k = draw(st.integers(1, 3)) if capacity is None else 1 if capacity.kind == "sequence" else 2
    spec = GateSpec(
        num_experts=num_experts,
        top_k=top_k,
        score=score,
        num_identity=draw(st.sampled_from([0, 4])) if plain else 0,
        logits_dtype=draw(st.sampled_from(["model", "float32"])),
        logit_bias=draw(st.booleans()),
        logit_softcap=draw(st.sampled_from([None, 2.0])),
        input_norm_eps=draw(st.sampled_from([None, 1e-6])),
        score_dtype=draw(st.sampled_from(["model", "float32"])),
        selection=selection,
        selection_bias=plain and draw(st.booleans()),
        groups=GroupLimit(num_groups=4, top_groups=2) if plain and draw(st.booleans()) else None,
        jitter=0.2,
        chosen=chosen,
        renorm=renorm,
        renorm_eps=draw(st.sampled_from([0.0, 1e-20, 0.7])) if renorm != "none" else 0.0,
        renorm_p=draw(st.sampled_from([1.0, 2.0])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        per_expert_scale=plain and draw(st.booleans()),
        weight_dtype=draw(st.sampled_from(["model", "float32"])),
        capacity=capacity,
    )
    choices = spec.num_choices
    _, weight_ED = gate_inputs(0, choices, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    table_VK = torch.rand(16, choices, generator=generator).argsort(dim=-1)[:, :top_k]
    return Gate(
        spec,
        GateWeights(
            weight_ED=weight_ED,
            bias_E=torch.randn(choices, generator=generator) / 4 if spec.selection_bias else None,
            logit_bias_E=torch.randn(choices, generator=generator).to(dtype) if spec.logit_bias else None,
            input_scale_D=torch.rand(DIM, generator=generator).to(dtype) if spec.input_norm_eps else None,
            expert_scale_E=torch.rand(choices, generator=generator).to(dtype) if spec.per_expert_scale else None,
            table_VK=table_VK if spec.needs_token_ids else None,
        ),
    )


@given(gate=gates(), seed=SEEDS, num_tokens=st.integers(1, 12))
@settings(max_examples=300)
def test_weighing_the_gates_own_choice_gives_its_own_weights_whatever_its_options(
    gate: Gate, seed: int, num_tokens: int
) -> None:
    x_TD, _ = gate_inputs(num_tokens, 1, seed, torch.float32)
    ids_T: npt.NDArray[np.int64] = np.arange(num_tokens, dtype=np.int64)
    routing = gate(x_TD, with_scores=True, token_ids_T=ids_T)
    assert routing.score_TE is not None
    np.testing.assert_array_equal(gate.weigh(routing.score_TE, routing.expert_TK), routing.weight_TK)


@given(seed=SEEDS, normalise_before=st.booleans())
def test_a_replaced_expert_of_nllb_is_normalised_with_the_other(seed: int, normalise_before: bool) -> None:
    x_TD, weight_ED = gate_inputs(6, 5, seed, torch.float32)
    capacity = OwnCapacity(kind="batch", token_fraction=1.0, normalise_before=normalise_before)
    spec = GateSpec(num_experts=5, top_k=2, score="softmax", logits_dtype="float32", capacity=capacity)
    gate = Gate(spec, GateWeights(weight_ED=weight_ED))
    routing = gate(x_TD, with_scores=True)
    assert routing.score_TE is not None
    third_T = routing.score_TE.argsort(axis=1)[:, -3].astype(np.int32)
    pair_TK = np.stack((routing.expert_TK[:, 0], third_T), axis=1)
    pair_TK[pair_TK[:, 0] == third_T, 1] = routing.expert_TK[pair_TK[:, 0] == third_T, 1]
    score_TK = np.take_along_axis(routing.score_TE, pair_TK, axis=1)
    weight_TK = gate.weigh(routing.score_TE, pair_TK)
    np.testing.assert_allclose(weight_TK, score_TK / score_TK.sum(axis=1, keepdims=True), rtol=1e-6)
