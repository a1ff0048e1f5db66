"""The overflow chain: one routed pair after another tries the operator's steps until one takes it.

Shapes: T tokens, K experts per token, E experts, P pairs that walk. A pair's flat index is t * K + k.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from router.config import OverflowConfig
from router.gate import Routing
from router.substitutes import Substitutes


class PairState(IntEnum):
    """What became of one routed pair; those below DROPPED are sent to a server."""

    KEPT = 0
    COPIED = 1  # another copy of its expert takes it: lossless
    WAITED = 2  # in a later wave, or offered again after a refusal: lossless unless its expert was replaced before
    REROUTED = 3  # another expert takes it
    DROPPED = 4  # left out
    FAILED = 5  # its request fails
    ABSENT = 6  # its expert has no live copy: waits for a new placement
    LOCAL = 7  # needs no server: an identity expert, or a choice that the model's own capacity left out


class Walk:
    """Pairs walk their chains one after another; `states` and `experts` are what each ended with.

    Args:
        routing: the batch's routing.
        expert_TK: experts in effect so far.
        overflow: the policy.
        room_E: pairs each expert may take in this wave, 0 without a usable copy.
        used_E: pairs each expert has taken already.
    """

    def __init__(
        self,
        routing: Routing,
        expert_TK: npt.NDArray[np.int32],
        overflow: OverflowConfig,
        *,
        room_E: npt.NDArray[np.int64],
        used_E: npt.NDArray[np.int64],
    ) -> None:
        self.states: list[PairState] = []
        self.experts: list[int] = []
        self._routing, self._expert_TK, self._overflow = routing, expert_TK, overflow
        self._left_E = room_E - used_E
        self._left: list[int] = self._left_E.tolist()
        self._substitutes: Substitutes | None = None

    def run(self, pairs_P: npt.NDArray[np.int64], chains: Sequence[Sequence[str]]) -> None:
        """Walk: `chains` holds one chain per pair; a chain that ends without a decision fails the pair."""
        if self._overflow.needs_scores and self._routing.score_TE is not None:
            self._substitutes = Substitutes(
                self._routing,
                self._expert_TK,
                pairs_P,
                open_E=self._left_E > 0,
                max_gap=self._overflow.max_score_gap,
            )
        for position, expert in enumerate(self._expert_TK.ravel()[pairs_P].tolist()):
            state, taken = self._walk(position, expert, chains[position])
            self.states.append(state)
            self.experts.append(taken)

    def _walk(self, position: int, expert: int, chain: Sequence[str]) -> tuple[PairState, int]:
        for step in chain:
            if step == "copy" and self._left[expert] > 0:
                self._take(expert)
                return PairState.COPIED, expert
            if step == "next_expert" and self._substitutes is not None:
                substitute = self._substitutes.best(position)
                if substitute >= 0:
                    self._take(substitute)
                    self._substitutes.give(position, substitute)
                    return PairState.REROUTED, substitute
            if step == "wait":
                return PairState.WAITED, expert
            if step == "drop":
                return PairState.DROPPED, -1
        return PairState.FAILED, expert

    def _take(self, expert: int) -> None:
        self._left[expert] -= 1
        if self._left[expert] <= 0 and self._substitutes is not None:
            self._substitutes.close(expert)
