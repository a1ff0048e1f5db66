"""Dispatch: every pair exactly once, every token row once per server, blocks that stand for themselves."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router.combine import combine
from router.dispatch import Dispatch, plan_dispatch, split_rows
from router.table import LayerPlacement
from tests.strategies import Routed, generators, placements, routed


def check(dispatch: Dispatch, batch: Routed) -> None:
    """What the server relies on: sorted unique rows, pairs in row order, ids and weights of the pairs they claim."""
    expert_TK, weight_TK = batch.routing.expert_TK, batch.routing.weight_TK
    assert (np.diff(dispatch.row_R) > 0).all()
    assert (np.diff(dispatch.pair_index_P) > 0).all()
    np.testing.assert_array_equal(np.unique(dispatch.pair_row_P), np.arange(len(dispatch.row_R)))
    np.testing.assert_array_equal(dispatch.row_R[dispatch.pair_row_P], dispatch.pair_index_P // batch.top_k)
    np.testing.assert_array_equal(dispatch.pair_expert_P, expert_TK.ravel()[dispatch.pair_index_P])
    np.testing.assert_array_equal(dispatch.pair_weight_P, weight_TK.ravel()[dispatch.pair_index_P])
    for array in (dispatch.row_R, dispatch.pair_row_P, dispatch.pair_expert_P):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous
    assert dispatch.pair_weight_P.dtype == np.float32


def plans(batch: Routed) -> st.SearchStrategy[LayerPlacement]:
    return placements(batch.num_experts)


@given(routed(max_tokens=60), st.data(), generators())
def test_every_pair_is_sent_once_to_a_live_copy_or_reported(
    batch: Routed, data: st.DataObject, rng: np.random.Generator
) -> None:
    placement = data.draw(plans(batch))
    wanted_N = data.draw(st.lists(st.booleans(), min_size=batch.routing.expert_TK.size, max_size=10**4) | st.none())
    pairs_P = None if wanted_N is None else np.flatnonzero(wanted_N[: batch.routing.expert_TK.size])
    excluded_S = data.draw(st.none() | st.lists(st.booleans(), min_size=5, max_size=5).map(np.array))
    plan = plan_dispatch(
        batch.routing.expert_TK,
        batch.routing.weight_TK,
        placement,
        load_S=np.zeros(5),
        rng=rng,
        pairs_P=pairs_P,
        excluded_S=excluded_S,
    )
    servers = [dispatch.server for dispatch in plan.dispatches]
    assert len(set(servers)) == len(servers)
    for dispatch in plan.dispatches:
        check(dispatch, batch)
        assert excluded_S is None or not excluded_S[dispatch.server]
        for expert in dispatch.pair_expert_P.tolist():
            assert dispatch.server in placement.copies(expert)[0]
    sent = [dispatch.pair_index_P for dispatch in plan.dispatches]
    all_P = np.arange(batch.routing.expert_TK.size) if pairs_P is None else pairs_P
    np.testing.assert_array_equal(np.sort(np.concatenate([*sent, plan.unplaced_P])), all_P)
    rest = placement if excluded_S is None else placement.without(excluded_S)
    assert (rest.num_copies_E[batch.routing.expert_TK.ravel()[plan.unplaced_P]] == 0).all()


def test_a_token_that_ends_one_message_and_begins_the_next_travels_in_both() -> None:
    placement = LayerPlacement(
        num_copies_E=np.ones(2, dtype=np.int32),
        server_EC=np.array([[0], [1]], dtype=np.int32),
        share_EC=np.ones((2, 1)),
    )
    expert_TK = np.array([[0, 1], [0, 1], [0, 1]], dtype=np.int32)
    weight_TK = np.full((3, 2), 0.5, dtype=np.float32)
    plan = plan_dispatch(
        expert_TK,
        weight_TK,
        placement,
        load_S=np.zeros(2),
        rng=np.random.default_rng(0),
        pairs_P=np.array([0, 2, 3, 5]),
    )
    sent = {dispatch.server: dispatch for dispatch in plan.dispatches}
    assert {server: dispatch.row_R.tolist() for server, dispatch in sent.items()} == {0: [0, 1], 1: [1, 2]}
    assert {server: dispatch.pair_row_P.tolist() for server, dispatch in sent.items()} == {0: [0, 1], 1: [0, 1]}


@given(routed(max_tokens=60), st.data(), generators(), st.integers(1, 7))
def test_blocks_of_rows_are_dispatches_of_their_own(
    batch: Routed, data: st.DataObject, rng: np.random.Generator, max_rows: int
) -> None:
    plan = plan_dispatch(
        batch.routing.expert_TK, batch.routing.weight_TK, data.draw(plans(batch)), load_S=np.zeros(5), rng=rng
    )
    for dispatch in plan.dispatches:
        blocks = split_rows(dispatch, max_rows)
        for block in blocks:
            check(block, batch)
            assert block.server == dispatch.server
            assert len(block.row_R) <= max_rows
        assert len(blocks) == -(-len(dispatch.row_R) // max_rows)
        np.testing.assert_array_equal(np.concatenate([block.row_R for block in blocks]), dispatch.row_R)
        np.testing.assert_array_equal(np.concatenate([block.pair_index_P for block in blocks]), dispatch.pair_index_P)


@given(routed(max_tokens=60), st.data(), generators(), st.integers(1, 9))
def test_dispatch_then_combine_over_identity_experts_is_the_weighted_input(
    batch: Routed, data: st.DataObject, rng: np.random.Generator, max_rows: int
) -> None:
    placement = data.draw(placements(batch.num_experts, min_copies=1))
    x_TD = np.random.default_rng(0).standard_normal((batch.num_tokens, 3), dtype=np.float32)
    y_TD = np.zeros_like(x_TD)
    plan = plan_dispatch(batch.routing.expert_TK, batch.routing.weight_TK, placement, load_S=np.zeros(5), rng=rng)
    assert len(plan.unplaced_P) == 0
    for dispatch in plan.dispatches:
        for block in split_rows(dispatch, max_rows):
            weight_R = np.bincount(block.pair_row_P, weights=block.pair_weight_P).astype(np.float32)
            combine(y_TD, weight_R[:, None] * x_TD[block.row_R], block.row_R)
    weight_T1 = batch.routing.weight_TK.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(y_TD, weight_T1 * x_TD, rtol=1e-5, atol=1e-6)


@given(routed(max_tokens=60), st.data(), generators(), st.integers(1, 30))
def test_no_copy_gets_more_pairs_than_its_capacity(
    batch: Routed, data: st.DataObject, rng: np.random.Generator, capacity: int
) -> None:
    placement = data.draw(plans(batch))
    plan = plan_dispatch(
        batch.routing.expert_TK,
        batch.routing.weight_TK,
        placement,
        load_S=np.zeros(5),
        rng=rng,
        capacity=capacity,
    )
    for dispatch in plan.dispatches:
        assert np.bincount(dispatch.pair_expert_P).max() <= capacity
    count_E = np.bincount(batch.routing.expert_TK.ravel(), minlength=batch.num_experts)
    fitting = np.minimum(count_E, capacity * placement.num_copies_E).sum()
    assert batch.routing.expert_TK.size - len(plan.unplaced_P) == fitting
