"""Dispatch: which rows and pairs travel to which server, one message per server, each token row once.

Every array is in token order, so a block of rows is a slice, and what a server returns can be added row by row.

Shapes: T tokens, K experts per token, P pairs of one message, R token rows of one message, E experts, S servers.
A pair's flat index is t * K + k.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from router.replicas import PREFER_PAIRS, choose_copies, stable_order
from router.table import LayerPlacement

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dispatch:
    """What one server gets of one batch."""

    server: int  # index into the table's servers
    row_R: IntArray  # token rows to send, ascending, each once
    pair_row_P: IntArray  # position of the pair's token in row_R, ascending
    pair_expert_P: IntArray
    pair_weight_P: FloatArray
    pair_index_P: npt.NDArray[np.int64]  # flat index of the pair, ascending


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchPlan:
    """The messages of one batch, and the flat indices of pairs that no server may take."""

    dispatches: list[Dispatch]
    unplaced_P: npt.NDArray[np.int64]


def plan_dispatch(
    expert_TK: IntArray,
    weight_TK: FloatArray,
    placement: LayerPlacement,
    *,
    load_S: npt.NDArray[np.float64],
    rng: np.random.Generator,
    pairs_P: npt.NDArray[np.int64] | None = None,
    excluded_S: npt.NDArray[np.bool_] | None = None,
    capacity: int | None = None,
    prefer_pairs: float = PREFER_PAIRS,
    speed_S: npt.NDArray[np.float64] | None = None,
) -> DispatchPlan:
    """Choose a copy for every pair and group the pairs by server.

    Args:
        expert_TK: effective experts, after overflow.
        weight_TK: their gate weights.
        placement: the layer's live copies.
        load_S: routed pairs in flight per server; not changed.
        rng: draws of the replica choice.
        pairs_P: flat indices of the pairs to send, ascending; None for all T*K. None of them may have expert -1.
        excluded_S: servers to leave out of this plan.
        capacity: most pairs per copy, None for no limit.
        prefer_pairs: how many pairs a message is worth.
        speed_S: speeds of the servers, relative to each other; None: all alike.
    """
    if excluded_S is not None:
        placement = placement.without(excluded_S)
    num_tokens, top_k = expert_TK.shape
    expert_P, weight_P = expert_TK.ravel(), weight_TK.ravel()
    if pairs_P is None:
        pairs_P = np.arange(num_tokens * top_k)
    else:
        expert_P, weight_P = expert_P[pairs_P], weight_P[pairs_P]
    server_P = choose_copies(
        expert_P,
        placement,
        load_S=load_S,
        capacity=capacity,
        prefer_pairs=prefer_pairs,
        speed_S=speed_S,
        rng=rng,
    )
    if num_tokens == 1:
        return _plan_one_token(server_P, expert_P, weight_P, pairs_P)
    order_P = stable_order(server_P)
    server_P, expert_P, weight_P, pairs_P = server_P[order_P], expert_P[order_P], weight_P[order_P], pairs_P[order_P]
    token_P = pairs_P.astype(np.int32) // np.int32(top_k)
    new_server_P = _changes(server_P)
    new_row_P = _changes(token_P) | new_server_P
    row_P = np.cumsum(new_row_P, dtype=np.int32) - 1  # rows of all messages, one after another
    token_R = token_P[np.flatnonzero(new_row_P)]
    dispatches = []
    unplaced_P = pairs_P[:0]
    for start, end in pairwise([*np.flatnonzero(new_server_P).tolist(), len(server_P)]):
        server = int(server_P[start])
        if server < 0:
            unplaced_P = pairs_P[start:end]
            continue
        first_row = row_P[start]
        dispatches.append(
            Dispatch(
                server=server,
                row_R=token_R[first_row : row_P[end - 1] + 1],
                pair_row_P=row_P[start:end] - first_row,
                pair_expert_P=expert_P[start:end],
                pair_weight_P=weight_P[start:end],
                pair_index_P=pairs_P[start:end],
            )
        )
    return DispatchPlan(dispatches=dispatches, unplaced_P=unplaced_P)


def split_rows(dispatch: Dispatch, max_rows: int) -> list[Dispatch]:
    """Cut a dispatch into blocks of at most `max_rows` token rows; each can be sent and computed by itself."""
    num_rows = len(dispatch.row_R)
    if num_rows <= max_rows:
        return [dispatch]
    firsts = range(0, num_rows, max_rows)
    ends = np.searchsorted(dispatch.pair_row_P, [*firsts[1:], num_rows]).tolist()
    blocks = []
    start = 0
    for first, end in zip(firsts, ends, strict=True):
        blocks.append(
            Dispatch(
                server=dispatch.server,
                row_R=dispatch.row_R[first : first + max_rows],
                pair_row_P=dispatch.pair_row_P[start:end] - np.int32(first),
                pair_expert_P=dispatch.pair_expert_P[start:end],
                pair_weight_P=dispatch.pair_weight_P[start:end],
                pair_index_P=dispatch.pair_index_P[start:end],
            )
        )
        start = end
    return blocks


def _plan_one_token(
    server_P: IntArray, expert_P: IntArray, weight_P: FloatArray, pairs_P: npt.NDArray[np.int64]
) -> DispatchPlan:
    """The plan of a batch of one token, where latency counts: every server gets row 0, without any sorting."""
    positions: dict[int, list[int]] = {}
    for position, server in enumerate(server_P.tolist()):
        positions.setdefault(server, []).append(position)
    unplaced_P = pairs_P[positions.pop(-1, [])]
    dispatches = []
    for server, held in positions.items():
        whole = len(held) == len(server_P)
        dispatches.append(
            Dispatch(
                server=server,
                row_R=np.zeros(1, dtype=np.int32),
                pair_row_P=np.zeros(len(held), dtype=np.int32),
                pair_expert_P=expert_P if whole else expert_P[held],
                pair_weight_P=weight_P if whole else weight_P[held],
                pair_index_P=pairs_P if whole else pairs_P[held],
            )
        )
    return DispatchPlan(dispatches=dispatches, unplaced_P=unplaced_P)


def _changes(values_P: IntArray) -> npt.NDArray[np.bool_]:
    """True where an entry differs from the one before, and at the first."""
    changed_P = np.ones(len(values_P), dtype=np.bool_)
    np.not_equal(values_P[1:], values_P[:-1], out=changed_P[1:])
    return changed_P
