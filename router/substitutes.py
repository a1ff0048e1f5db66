"""The overflow step `next_expert`: the best other expert for a routed pair whose own one cannot take it.

Shapes: T tokens, K experts per token, E experts, P pairs, B pairs of one block.
"""

import numpy as np
import numpy.typing as npt

from router.gate import Routing

_BLOCK = 512  # candidates are prepared for that many pairs at once: few numpy calls, bounded memory


class Substitutes:
    """Candidates of pairs in one batch, by the gate's selection score; ties go to the lower expert id.

    A token never uses an expert twice: neither one it was routed to nor one it was given instead.

    Args:
        routing: of the batch, with scores.
        expert_TK: experts in effect so far, -1 where dropped.
        pairs_P: flat indices (t * K + k) of the pairs; asked for by their position in this array, ascending.
        open_E: experts with a usable copy and room left.
        max_gap: most score a token may lose against the expert it was routed to, None for no limit.
    """

    def __init__(
        self,
        routing: Routing,
        expert_TK: npt.NDArray[np.int32],
        pairs_P: npt.NDArray[np.int64],
        *,
        open_E: npt.NDArray[np.bool_],
        max_gap: float | None,
    ) -> None:
        assert routing.score_TE is not None, "the caller skips next_expert without scores"
        assert routing.choice_TE is not None, "scores come together"
        self._score_TE, self._choice_TE = routing.score_TE, routing.choice_TE
        self._routed_TK, self._expert_TK = routing.expert_TK, expert_TK
        self._pairs_P = pairs_P
        self._tokens: list[int] = (pairs_P // expert_TK.shape[1]).tolist()
        self._num_experts = len(open_E)
        self._max_gap = max_gap
        self._closed = set(np.flatnonzero(~open_E).tolist())
        self._given: dict[int, list[int]] = {}  # token -> substitutes it got in this walk
        self._block = -1
        self._choice_BE = self._choice_TE[:0]
        self._best_B: list[int] = []

    def best(self, position: int) -> int:
        """The substitute for one pair, -1 if there is none."""
        block, row = divmod(position, _BLOCK)
        if block != self._block:
            self._open(block)
        expert = self._best_B[row]
        given = self._given.get(self._tokens[position], ())
        if expert in self._closed or expert in given:
            choice_E = self._choice_BE[row]
            for used in given:
                choice_E[used] = -np.inf
            expert = int(choice_E.argmax())
            if choice_E[expert] == -np.inf:
                expert = -1
        return expert

    def give(self, position: int, expert: int) -> None:
        """The pair's token uses `expert` from now on."""
        self._given.setdefault(self._tokens[position], []).append(expert)

    def close(self, expert: int) -> None:
        """The expert has no room left."""
        self._closed.add(expert)
        self._choice_BE[:, expert] = -np.inf

    def _open(self, block: int) -> None:
        """Selection scores of a block's pairs, -inf for what must not be taken; and the best of each."""
        pairs_B = self._pairs_P[block * _BLOCK : (block + 1) * _BLOCK]
        tokens_B = pairs_B // self._routed_TK.shape[1]
        own_B = self._routed_TK.ravel()[pairs_B]
        routed_BK, expert_BK = (
            np.where((chosen_BK >= 0) & (chosen_BK < self._num_experts), chosen_BK, own_B[:, None])
            for chosen_BK in (self._routed_TK[tokens_B], self._expert_TK[tokens_B])
        )  # choices that need no server are no candidates anyway
        choice_BE = self._choice_TE[tokens_B, : self._num_experts]
        np.put_along_axis(choice_BE, routed_BK, -np.inf, axis=1)
        np.put_along_axis(choice_BE, expert_BK, -np.inf, axis=1)
        if self._max_gap is not None:
            score_BE = self._score_TE[tokens_B, : self._num_experts]
            score_B1 = self._score_TE[tokens_B, own_B][:, None]
            choice_BE[score_B1 - score_BE > self._max_gap] = -np.inf
        choice_BE[:, list(self._closed)] = -np.inf
        best_B = choice_BE.argmax(axis=1)
        none_B = choice_BE[np.arange(len(best_B)), best_B] == -np.inf
        self._block, self._choice_BE, self._best_B = block, choice_BE, np.where(none_B, -1, best_B).tolist()
