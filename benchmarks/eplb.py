"""EPLB, DeepSeek's expert placement (github.com/deepseek-ai/EPLB, `rebalance_experts`): the planner's baseline.

Written anew in NumPy: same inputs, same results, in float32 as the original (which leaves equal loads in the order its
sort happens to give; here the lower index goes first). Every GPU gets the same number of slots in every layer. Where
the groups divide over the nodes it works hierarchically:

1. pack the groups onto the nodes, the same number on each;
2. within each node, give the remaining slots one by one to the expert with the largest load per replica;
3. within each node, pack the replicas onto the GPUs, the same number on each.

Otherwise, and with one node, all GPUs count as one node and all experts as one group ("global"). The replicas of an
expert share its load evenly; two of them may land on the same GPU. Nothing is known of the placement before.

Shapes: L layers, E experts, P slots in total ("physical experts"), C most replicas of an expert, X rows worked on at
once (layers, or layers x nodes), N items of a row, R slots of a row.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]


class Rebalanced(NamedTuple):
    """What `rebalance_experts` returns; slot p of a layer is on GPU p // (P / num_gpus)."""

    physical_to_logical_LP: Ints  # the expert in each slot
    logical_to_physical_LEC: Ints  # the slots of each expert, -1 beyond its count
    expert_count_LE: Ints


def rebalance_experts(
    weight_LE: npt.ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Rebalanced:
    """The placement for a load.

    Args:
        weight_LE: load of every expert, in any unit.
        num_replicas: slots per layer over all GPUs.
        num_groups: groups of consecutive experts that should stay on one node (group-limited routing).
        num_nodes: nodes the GPUs are in, the same number in each.
        num_gpus: in total.

    Raises:
        ValueError: something does not divide, or there are fewer slots than experts.
    """
    weight_LE = np.asarray(weight_LE, dtype=np.float32)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    num_layers, num_experts = weight_LE.shape
    _need_division("experts", num_experts, "groups", num_groups)
    _need_division("GPUs", num_gpus, "nodes", num_nodes)
    _need_division("slots", num_replicas, "GPUs", num_gpus)

    expert_XN = _experts_by_node(weight_LE, num_groups, num_nodes).reshape(num_layers * num_nodes, -1)
    weight_XN = np.take_along_axis(weight_LE.repeat(num_nodes, axis=0), expert_XN, axis=1)
    item_XR, rank_XR, count_XN = replicate_experts(weight_XN, num_replicas // num_nodes)
    load_XR = np.take_along_axis(weight_XN / count_XN.astype(np.float32), item_XR, axis=1)
    gpu_XR, place_XR = balanced_packing(load_XR, num_gpus // num_nodes)
    slot_XR = gpu_XR * (num_replicas // num_gpus) + place_XR

    expert_XR = np.empty_like(item_XR)
    np.put_along_axis(expert_XR, slot_XR, np.take_along_axis(expert_XN, item_XR, axis=1), axis=1)
    replica_XR = np.empty_like(rank_XR)
    np.put_along_axis(replica_XR, slot_XR, rank_XR, axis=1)
    count_LE = np.empty((num_layers, num_experts), dtype=np.int64)
    np.put_along_axis(count_LE, expert_XN.reshape(num_layers, -1), count_XN.reshape(num_layers, -1), axis=1)

    expert_LP = expert_XR.reshape(num_layers, num_replicas)
    slots_LEC = np.full((num_layers, num_experts, int(count_LE.max())), -1, dtype=np.int64)
    layer_L1 = np.arange(num_layers)[:, None]
    slots_LEC[layer_L1, expert_LP, replica_XR.reshape(num_layers, num_replicas)] = np.arange(num_replicas)
    return Rebalanced(expert_LP, slots_LEC, count_LE)


def replicate_experts(weight_XN: Floats, num_slots: int) -> tuple[Ints, Ints, Ints]:
    """Replicas for every row, the next one always for the largest load per replica.

    Returns:
        item_XR: the item in each slot; the first N slots hold one replica of each in order.
        rank_XR: which replica of its item a slot holds.
        count_XN: replicas of each item.

    Raises:
        ValueError: there are fewer slots than items.
    """
    num_rows, num_items = weight_XN.shape
    if num_slots < num_items:
        raise ValueError(f"{num_slots} slots cannot hold {num_items} experts")
    item_XR = np.tile(np.arange(num_slots, dtype=np.int64), (num_rows, 1))
    rank_XR = np.zeros_like(item_XR)
    count_XN = np.ones((num_rows, num_items), dtype=np.int64)
    row_X = np.arange(num_rows)
    per_replica_XN = weight_XN.copy()
    for slot in range(num_items, num_slots):
        hottest_X = per_replica_XN.argmax(axis=1)
        item_XR[:, slot] = hottest_X
        rank_XR[:, slot] = count_XN[row_X, hottest_X]
        count_XN[row_X, hottest_X] += 1
        per_replica_XN[row_X, hottest_X] = weight_XN[row_X, hottest_X] / count_XN[row_X, hottest_X]
    return item_XR, rank_XR, count_XN


def balanced_packing(weight_XN: Floats, num_packs: int) -> tuple[Ints, Ints]:
    """Items into packs of N / num_packs items each: the heaviest first, into the lightest pack with a place.

    With one item per pack, item i goes into pack i.

    Returns:
        pack_XN: the pack of each item.
        rank_XN: how many items were in that pack before it.

    Raises:
        ValueError: the items do not divide over the packs.
    """
    num_rows, num_items = weight_XN.shape
    _need_division("items", num_items, "packs", num_packs)
    if num_items == num_packs:
        pack_XN = np.tile(np.arange(num_items, dtype=np.int64), (num_rows, 1))
        return pack_XN, np.zeros_like(pack_XN)
    pack_XN = np.empty((num_rows, num_items), dtype=np.int64)
    rank_XN = np.empty_like(pack_XN)
    load_XP = np.zeros((num_rows, num_packs), dtype=weight_XN.dtype)
    filled_XP = np.zeros((num_rows, num_packs), dtype=np.int64)
    row_X = np.arange(num_rows)
    for item_X in np.argsort(-weight_XN, axis=1, kind="stable").T:
        pack_X = np.where(filled_XP < num_items // num_packs, load_XP, np.inf).argmin(axis=1)
        pack_XN[row_X, item_X] = pack_X
        rank_XN[row_X, item_X] = filled_XP[row_X, pack_X]
        load_XP[row_X, pack_X] += weight_XN[row_X, item_X]
        filled_XP[row_X, pack_X] += 1
    return pack_XN, rank_XN


def _experts_by_node(weight_LE: Floats, num_groups: int, num_nodes: int) -> Ints:
    """Step 1: for each layer the experts in the order of nodes, then of the groups packed onto them."""
    num_layers, num_experts = weight_LE.shape
    expert_GM = np.arange(num_experts, dtype=np.int64).reshape(num_groups, -1)  # M members of a group
    weight_LG = weight_LE.reshape(num_layers, num_groups, -1).sum(axis=2)
    node_LG, rank_LG = balanced_packing(weight_LG, num_nodes)
    position_LG = node_LG * (num_groups // num_nodes) + rank_LG
    group_LG = np.argsort(position_LG, axis=1)
    return expert_GM[group_LG].reshape(num_layers, num_experts)


def _need_division(what: str, count: int, over: str, parts: int) -> None:
    if count % parts:
        raise ValueError(f"{count} {what} do not divide over {parts} {over}")
