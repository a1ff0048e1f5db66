"""Combine: the partial sums that the expert servers return become the output of the block.

Servers have already applied the gate weights and summed over their own experts, so each returns one row per token
row it received, and combining is adding. Sums are kept in fp32 whatever the wire dtype is.

Shapes: T tokens, D model dim, R rows of one partial.
"""

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float32]
FEW_ROWS = 64  # scattered rows from which torch's one pass beats numpy's gather, add and scatter


def combine(y_TD: FloatArray, partial_RD: FloatArray, row_R: npt.NDArray[np.int32]) -> None:
    """Add one server's partial sums to the routed output, in place.

    Args:
        y_TD: sum so far.
        partial_RD: one row per entry of row_R.
        row_R: rows of y_TD, ascending, each at most once.
    """
    num_rows = len(row_R)
    if num_rows == 0:
        return
    first = int(row_R[0])
    if int(row_R[-1]) - first + 1 == num_rows:  # ascending and unique: one block of rows, most often all of them
        y_TD[first : first + num_rows] += partial_RD
    elif num_rows < FEW_ROWS:
        y_TD[row_R] += partial_RD
    else:
        index_R = torch.from_numpy(row_R.astype(np.int64))
        torch.from_numpy(y_TD).index_add_(
            0, index_R, torch.frombuffer(partial_RD, dtype=torch.float32).view(partial_RD.shape)
        )


class RoutedSum:
    """The routed output of a batch, built up from partial sums in any order.

    The first partial that covers every row is taken as it is, in the memory of its message, which saves a small batch
    an allocation, a fill and an addition.
    """

    def __init__(self, num_tokens: int, dim: int) -> None:
        self._shape = (num_tokens, dim)
        self._y_TD: FloatArray | None = None
        self._owned = False

    def add(self, partial_RD: FloatArray, row_R: npt.NDArray[np.int32]) -> None:
        """Add a partial; see `combine`."""
        whole = len(row_R) == self._shape[0]
        if self._y_TD is None and whole:
            self._y_TD = partial_RD
        elif self._y_TD is not None and whole and not self._owned:
            self._y_TD, self._owned = self._y_TD + partial_RD, True
        else:
            if self._y_TD is None:
                self._y_TD = np.zeros(self._shape, dtype=np.float32)
            elif not self._owned:
                self._y_TD = self._y_TD.copy()
            self._owned = True
            combine(self._y_TD, partial_RD, row_R)

    def rows(self, first: int, end: int) -> FloatArray:
        """Rows first..end-1 of the sum so far. Read-only."""
        if self._y_TD is None:
            return np.zeros((end - first, self._shape[1]), dtype=np.float32)
        return self._y_TD[first:end]
