"""The EPLB baseline: its README's example, and what each of its steps promises."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.eplb import balanced_packing, rebalance_experts, replicate_experts

# The example of the README of github.com/deepseek-ai/EPLB: 2 layers of 12 experts, 16 slots on 8 GPUs.
WEIGHT_LE = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def test_the_readme_example_gives_the_placement_the_readme_prints() -> None:
    found = rebalance_experts(WEIGHT_LE, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    assert found.physical_to_logical_LP.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_the_same_load_without_groups_gives_what_the_original_code_gives() -> None:
    found = rebalance_experts(WEIGHT_LE, num_replicas=16, num_groups=3, num_nodes=2, num_gpus=8)
    assert found.physical_to_logical_LP.tolist() == [  # recorded from DeepSeek's code
        [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
        [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7],
    ]
    one_node = rebalance_experts(WEIGHT_LE, num_replicas=16, num_groups=1, num_nodes=1, num_gpus=8)
    assert found.physical_to_logical_LP.tolist() == one_node.physical_to_logical_LP.tolist()


def test_with_three_slots_per_pack_two_replicas_may_meet_on_a_gpu_as_in_the_original() -> None:
    found = rebalance_experts(WEIGHT_LE[1:], num_replicas=24, num_groups=1, num_nodes=1, num_gpus=4)
    assert found.physical_to_logical_LP.tolist() == [  # recorded from DeepSeek's code
        [3, 1, 1, 2, 9, 11, 6, 8, 7, 2, 9, 0, 6, 8, 7, 5, 5, 4, 6, 8, 7, 5, 5, 10]
    ]
    assert found.expert_count_LE.tolist() == [[1, 2, 2, 1, 1, 4, 3, 3, 3, 2, 1, 1]]


@st.composite
def clusters(draw: st.DrawFn) -> tuple[npt.NDArray[np.float64], int, int, int, int]:
    """(load, slots, groups, nodes, GPUs) where everything divides, hierarchical or not."""
    num_nodes, gpus_per_node, slots_per_gpu = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    slots_per_node = gpus_per_node * slots_per_gpu
    groups_per_node = draw(st.integers(1, slots_per_node))
    experts_per_group = draw(st.integers(1, slots_per_node // groups_per_node))
    num_groups = groups_per_node * num_nodes
    num_experts = num_groups * experts_per_group
    if num_nodes > 1 and draw(st.booleans()):
        num_groups = num_nodes + 1  # does not divide: global
    seed = draw(st.integers(0, 2**32))
    load_LE = np.random.default_rng(seed).lognormal(0, draw(st.floats(0, 2)), (draw(st.integers(1, 3)), num_experts))
    return load_LE, slots_per_node * num_nodes, num_groups, num_nodes, num_nodes * gpus_per_node


@settings(max_examples=100, deadline=None)
@given(clusters())
def test_every_expert_has_a_slot_and_the_three_maps_agree(
    cluster: tuple[npt.NDArray[np.float64], int, int, int, int],
) -> None:
    load_LE, num_slots, num_groups, num_nodes, _ = cluster
    found = rebalance_experts(*cluster)
    assert found.physical_to_logical_LP.shape == (len(load_LE), num_slots)
    assert (found.expert_count_LE >= 1).all()
    assert (found.expert_count_LE.sum(axis=1) == num_slots).all()
    for expert_P, slots_EC, count_E in zip(*found, strict=True):
        assert np.bincount(expert_P, minlength=len(count_E)).tolist() == count_E.tolist()
        for expert, slots_C in enumerate(slots_EC):
            held = slots_C[: count_E[expert]]
            assert (slots_C[count_E[expert] :] == -1).all()
            assert (expert_P[held] == expert).all()
            assert len(set(held.tolist())) == len(held)
    if num_groups % num_nodes == 0:
        node_LP = np.broadcast_to(np.arange(num_slots) // (num_slots // num_nodes), (len(load_LE), num_slots))
        group_LP = found.physical_to_logical_LP // (load_LE.shape[1] // num_groups)
        for node_P, group_P in zip(node_LP, group_LP, strict=True):
            assert len(set(zip(group_P.tolist(), node_P.tolist(), strict=True))) == num_groups, "a group left its node"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(0, 20))
def test_each_further_replica_goes_to_the_largest_load_per_replica(seed: int, num_items: int, extra: int) -> None:
    weight_N = np.random.default_rng(seed).integers(1, 50, num_items).astype(np.float32)
    item_XR, rank_XR, count_XN = replicate_experts(weight_N[None], num_items + extra)
    count_N = np.ones(num_items)
    for slot in range(num_items, num_items + extra):
        item = item_XR[0, slot]
        assert weight_N[item] / count_N[item] == pytest.approx((weight_N / count_N).max())
        assert rank_XR[0, slot] == count_N[item]
        count_N[item] += 1
    assert count_XN[0].tolist() == count_N.tolist()
    # No other distribution of the replicas has a smaller largest load: taking one from any expert makes it the largest.
    largest = (weight_N / count_N).max()
    taken_N = weight_N[count_N > 1] / (count_N[count_N > 1] - 1)
    assert (taken_N >= largest * (1 - 1e-6)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 6))
def test_packs_are_equally_full_and_the_heaviest_goes_to_the_lightest_with_a_place(
    seed: int, num_packs: int, per_pack: int
) -> None:
    weight_XN = np.random.default_rng(seed).lognormal(0, 1, (2, num_packs * per_pack))
    pack_XN, rank_XN = balanced_packing(weight_XN, num_packs)
    for weight_N, pack_N, rank_N in zip(weight_XN, pack_XN, rank_XN, strict=True):
        assert np.bincount(pack_N, minlength=num_packs).tolist() == [per_pack] * num_packs
        assert sorted(zip(pack_N.tolist(), rank_N.tolist(), strict=True)) == [
            (pack, rank) for pack in range(num_packs) for rank in range(per_pack)
        ]
        load_P, filled_P = np.zeros(num_packs), np.zeros(num_packs)
        for item in np.argsort(-weight_N, kind="stable") if per_pack > 1 else ():
            assert load_P[pack_N[item]] == load_P[filled_P < per_pack].min()
            load_P[pack_N[item]] += weight_N[item]
            filled_P[pack_N[item]] += 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((16, 5, 5, 8), "12 experts do not divide over 5 groups"),
        ((16, 4, 2, 7), "7 GPUs do not divide over 2 nodes"),
        ((18, 4, 2, 8), "18 slots do not divide over 8 GPUs"),
        ((8, 4, 2, 8), "4 slots cannot hold 6 experts"),
    ],
)
def test_what_does_not_divide_is_refused(arguments: tuple[int, int, int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rebalance_experts(WEIGHT_LE, *arguments)
