"""New weights for tokens that have terms on the way already.

When a server's refusal replaces or drops an expert, the gate gives the token's other terms new weights, but what was
sent carries the old ones. The new weights differ from the old by one common factor (a renormalisation), so that factor
is applied to the row's sum at the end, and what is sent from now on is divided by it.

Shapes: T tokens, K experts per token, P pairs. A pair's flat index is t * K + k.
"""

import numpy as np
import numpy.typing as npt

from router.capacity import CapacityDecision
from router.overflow import PairState

FloatArray = npt.NDArray[np.float32]


def reweigh(
    sent_TK: FloatArray, scale_T: FloatArray | None, decision: CapacityDecision, walked_P: npt.NDArray[np.int64]
) -> tuple[FloatArray, FloatArray]:
    """Weights to send and factors to scale with, so that weight * factor is what `decision` says.

    Args:
        sent_TK: weights as sent so far.
        scale_T: factors so far; None for all 1.
        decision: the new one.
        walked_P: the pairs it decided about; none of them has a term on the way.

    Returns:
        (weight_TK, scale_T), new arrays.
    """
    weight_TK = sent_TK.copy()
    scale_T = np.ones(len(sent_TK), dtype=np.float32) if scale_T is None else scale_T.copy()
    walked_TK = np.zeros(sent_TK.shape, dtype=np.bool_)
    walked_TK.ravel()[walked_P] = True
    on_the_way_TK = np.where(walked_TK | (decision.state_TK >= PairState.DROPPED), np.float32(0), sent_TK)
    for token in np.unique(walked_P // sent_TK.shape[1]).tolist():
        k = int(np.abs(on_the_way_TK[token]).argmax())
        if on_the_way_TK[token, k] == 0:
            scale_T[token], weight_TK[token] = 1, decision.weight_TK[token]
        else:
            scale_T[token] = decision.weight_TK[token, k] / on_the_way_TK[token, k]
            walked_K = walked_TK[token]
            weight_TK[token, walked_K] = decision.weight_TK[token, walked_K] / scale_T[token]
    return weight_TK, scale_T
