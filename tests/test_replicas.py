"""Replica choice: only live copies, shares and loads respected, capacity never exceeded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.replicas import SPLIT_TOKENS, choose_copies, fill, stable_order
from router.table import CopyShare, LayerPlacement, PlacementTable, ServerAddress
from tests.strategies import generators, placements, tables

NUM_EXPERTS = 6


def layer(copies: dict[int, dict[int, float]], num_servers: int) -> LayerPlacement:
    """A layer from expert -> {server index: share}."""
    return PlacementTable(
        epoch=1,
        servers=tuple(ServerAddress(server_id=str(s), address="") for s in range(num_servers)),
        copies={
            ("0", expert): tuple(CopyShare(server_id=str(s), share=share) for s, share in held.items())
            for expert, held in copies.items()
        },
        num_experts=max(copies) + 1,
    ).layer("0")


def experts(*groups: tuple[int, int]) -> np.ndarray:
    """expert_P with groups of (expert, count), shuffled."""
    expert_P = np.repeat([expert for expert, _ in groups], [count for _, count in groups]).astype(np.int32)
    return np.random.default_rng(0).permutation(expert_P)


@given(
    placement=placements(NUM_EXPERTS),
    expert_P=st.lists(st.integers(0, NUM_EXPERTS - 1), max_size=300).map(lambda ids: np.array(ids, dtype=np.int32)),
    loads=st.lists(st.integers(0, 200), min_size=5, max_size=5),
    capacity=st.none() | st.integers(1, 40),
    rng=generators(),
)
def test_every_pair_goes_to_a_live_copy_within_capacity_or_is_reported(
    placement: LayerPlacement,
    expert_P: np.ndarray,
    loads: list[int],
    capacity: int | None,
    rng: np.random.Generator,
) -> None:
    load_S = np.array(loads, dtype=np.float64)
    before_S = load_S.copy()
    server_P = choose_copies(expert_P, placement, load_S=load_S, capacity=capacity, rng=rng)
    assert server_P.dtype == np.int32
    np.testing.assert_array_equal(load_S, before_S)
    for expert in range(NUM_EXPERTS):
        servers, _ = placement.copies(expert)
        chosen = server_P[expert_P == expert]
        assert set(chosen.tolist()) <= {*servers, -1}
        room = len(chosen) if capacity is None else capacity
        assert all((chosen == server).sum() <= room for server in servers)
        assert (chosen >= 0).sum() == min(len(chosen), room * len(servers))


@given(placement=placements(NUM_EXPERTS), excluded=st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_placement_without_some_servers_keeps_exactly_the_other_copies(
    placement: LayerPlacement, excluded: list[bool]
) -> None:
    rest = placement.without(np.array(excluded))
    for expert in range(NUM_EXPERTS):
        wanted = [copy for copy in zip(*placement.copies(expert), strict=True) if not excluded[copy[0]]]
        assert list(zip(*rest.copies(expert), strict=True)) == wanted
        assert rest.num_copies_E[expert] == len(wanted)
        assert (rest.server_EC[expert, len(wanted) :] == -1).all()
        assert (rest.share_EC[expert, len(wanted) :] == 0).all()


@given(table=tables(NUM_EXPERTS), dead=st.sets(st.integers(0, 4)))
def test_a_table_without_dead_servers_has_the_layers_without_them(table: PlacementTable, dead: set[int]) -> None:
    ids = frozenset(server.server_id for i, server in enumerate(table.servers) if i in dead)
    mask_S = np.array([i in dead for i in range(len(table.servers))])
    rest, wanted = table.without(ids).layer("0"), table.layer("0").without(mask_S)
    assert [rest.copies(expert) for expert in range(NUM_EXPERTS)] == [
        wanted.copies(expert) for expert in range(NUM_EXPERTS)
    ]


@given(seed=st.integers(0, 2**32 - 1), placement=placements(NUM_EXPERTS))
def test_the_same_draws_give_the_same_choice(seed: int, placement: LayerPlacement) -> None:
    expert_P = np.random.default_rng(seed).integers(0, NUM_EXPERTS, 120).astype(np.int32)
    first, second = (
        choose_copies(expert_P, placement, load_S=np.zeros(5), rng=np.random.default_rng(seed)) for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("others", [0, 100])
def test_a_small_group_goes_whole_to_one_copy(others: int) -> None:
    placement = layer({0: {0: 1.0, 1: 1.0, 2: 1.0}, 1: {3: 1.0}}, num_servers=4)
    expert_P = experts((0, SPLIT_TOKENS), (1, others))
    server_P = choose_copies(expert_P, placement, load_S=np.zeros(4), rng=np.random.default_rng(3))
    assert len(set(server_P[expert_P == 0].tolist())) == 1


def test_small_groups_follow_the_shares_when_servers_are_idle() -> None:
    placement = layer({0: {0: 0.9, 1: 0.1}}, num_servers=2)
    rng = np.random.default_rng(0)
    chosen = [int(choose_copies(experts((0, 1)), placement, load_S=np.zeros(2), rng=rng)[0]) for _ in range(2000)]
    assert 0.87 < chosen.count(0) / 2000 < 0.93


def test_the_less_loaded_of_two_drawn_copies_wins() -> None:
    placement = layer({0: {0: 0.5, 1: 0.5}}, num_servers=2)
    rng = np.random.default_rng(0)
    load_S = np.array([100.0, 10.0])
    chosen = [int(choose_copies(experts((0, 1)), placement, load_S=load_S, rng=rng)[0]) for _ in range(2000)]
    assert 0.22 < chosen.count(0) / 2000 < 0.28  # only when both draws hit the loaded one


@pytest.mark.parametrize(("load", "wanted"), [(0.0, {2}), (1000.0, {0, 1, 2})])
def test_a_server_contacted_anyway_is_preferred_while_its_load_allows(load: float, wanted: set[int]) -> None:
    placement = layer({0: {2: 1.0}, 1: {0: 1.0, 1: 1.0, 2: 1.0}}, num_servers=3)
    rng = np.random.default_rng(0)
    load_S = np.array([0.0, 0.0, load])
    chosen = {
        int(choose_copies(np.array([0, 1], dtype=np.int32), placement, load_S=load_S, rng=rng)[1]) for _ in range(200)
    }
    assert chosen == wanted


def test_a_large_group_evens_out_what_other_experts_and_earlier_batches_put_on_its_servers() -> None:
    placement = layer({0: {0: 1.0}, 1: {0: 0.5, 1: 0.5, 2: 0.5}}, num_servers=3)
    expert_P = experts((0, 60), (1, 300))
    load_S = np.array([0.0, 100.0, 0.0])
    server_P = choose_copies(expert_P, placement, load_S=load_S, rng=np.random.default_rng(0))
    total_S = load_S + np.bincount(server_P, minlength=3)
    assert total_S.max() - total_S.min() <= 1


def test_a_plan_that_is_even_over_all_experts_is_followed_however_uneven_its_shares() -> None:
    # Server 0 has 120 pairs of others, server 1 has 20: the shares of expert 2 make up for it.
    placement = layer({0: {0: 1.0}, 1: {1: 1.0}, 2: {0: 0.1, 1: 0.9}}, num_servers=2)
    expert_P = experts((0, 120), (1, 20), (2, 125))
    server_P = choose_copies(expert_P, placement, load_S=np.zeros(2), rng=np.random.default_rng(0))
    assert abs(int((server_P == 0).sum()) - int((server_P == 1).sum())) <= 4


def test_large_groups_leave_room_for_each_other_as_the_plan_has_it() -> None:
    placement = layer({0: {0: 0.9, 1: 0.1}, 1: {1: 0.9, 2: 0.1}, 2: {2: 0.9, 0: 0.1}}, num_servers=3)
    expert_P = experts((0, 200), (1, 200), (2, 200))
    server_P = choose_copies(expert_P, placement, load_S=np.zeros(3), rng=np.random.default_rng(0))
    for expert in range(3):
        assert int(((expert_P == expert) & (server_P == expert)).sum()) == 180


def test_faster_servers_take_more_of_what_is_too_much() -> None:
    placement = layer({0: {0: 0.5, 1: 0.5}}, num_servers=2)
    speed_S = np.array([1.0, 4.0])
    server_P = choose_copies(
        experts((0, 500)), placement, load_S=np.zeros(2), speed_S=speed_S, rng=np.random.default_rng(0)
    )
    assert np.bincount(server_P).tolist() == [100, 400]


def test_a_large_group_is_cut_into_runs_in_token_order() -> None:
    placement = layer({0: {1: 1.0, 0: 1.0}, 1: {0: 1.0, 1: 1.0}}, num_servers=2)
    expert_P = np.tile(np.array([0, 1], dtype=np.int32), 100)
    server_P = choose_copies(expert_P, placement, load_S=np.zeros(2), rng=np.random.default_rng(0))
    assert (server_P[0::2] == server_P[1::2]).mean() > 0.95  # tokens meet one server for both of their experts
    assert (np.diff(server_P[0::2]) >= 0).all()


@given(
    size=st.integers(0, 500),
    copies=st.lists(st.tuples(st.integers(0, 300), st.sampled_from([0.1, 0.5, 1.0])), min_size=1, max_size=5),
    limit=st.none() | st.integers(1, 200),
)
def test_filling_places_everything_that_fits_and_never_more_than_the_limit(
    size: int, copies: list[tuple[int, float]], limit: int | None
) -> None:
    counts = fill(size, [load for load, _ in copies], [share for _, share in copies], limit=limit)
    assert sum(counts) == (size if limit is None else min(size, limit * len(copies)))
    assert all(count >= 0 and (limit is None or count <= limit) for count in counts)


@given(
    size=st.integers(0, 500),
    copies=st.lists(st.tuples(st.integers(0, 300), st.sampled_from([0.25, 0.5, 1.0])), min_size=1, max_size=5),
    limit=st.none() | st.integers(1, 200),
)
def test_filling_evens_out_load_over_share(size: int, copies: list[tuple[int, float]], limit: int | None) -> None:
    """No pair could move from a copy to a lower one with room: the definition of a water level."""
    lowest = min(load for load, _ in copies)
    counts = fill(size, [load for load, _ in copies], [share for _, share in copies], limit=limit)
    level = [(load - lowest + count) / share for (load, share), count in zip(copies, counts, strict=True)]
    for i, taken in enumerate(counts):
        for j, count in enumerate(counts):
            if taken > 0 and (limit is None or count < limit):
                assert level[i] - 1 / copies[i][1] <= level[j] + 1 / copies[j][1] + 1e-6


@given(st.lists(st.integers(-1, 70000)))
def test_stable_order_sorts_also_what_16_bits_cannot_hold(values: list[int]) -> None:
    values_P = np.array(values, dtype=np.int32)
    np.testing.assert_array_equal(stable_order(values_P), np.argsort(values_P, kind="stable"))


def test_a_small_group_goes_where_its_pairs_are_done_first_not_where_fewest_are_in_flight() -> None:
    placement = layer({0: {0: 0.8, 1: 0.2}}, 2)
    few = np.zeros(8, dtype=np.int32)
    slow = sum(
        int(choose_copies(few, placement, load_S=load_S, prefer_pairs=0.0, speed_S=speed_S, rng=rng)[0])
        for rng in map(np.random.default_rng, range(300))
        for load_S, speed_S in [(np.array([400.0, 100.1]), np.array([4.0, 1.0]))]
    )
    assert slow < 0.1 * 300, "both are equally late, and of the two draws only both name the slow one 4 times in 100"
