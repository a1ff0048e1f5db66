"""Combine: the partial sums that the expert servers return become the output of the block.

Servers have already applied the gate weights and summed over their own experts, so each returns one row per token
row it received, and combining is adding. Sums are kept in fp32 whatever the wire dtype is.

Shapes: T tokens, D model dim, R rows of one partial.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def combine(y_TD: Tensor, partial_RD: Tensor, row_R: npt.NDArray[np.int32]) -> None:
    """Add one server's partial sums to the routed output, in place.

    Args:
        y_TD: fp32 sum so far.
        partial_RD: one row per entry of row_R, any float dtype.
        row_R: rows of y_TD, ascending, each at most once.
    """
    num_rows = len(row_R)
    if num_rows == 0:
        return
    first = int(row_R[0])
    if int(row_R[-1]) - first + 1 == num_rows:  # ascending and unique: one block of rows, most often all of them
        y_TD[first : first + num_rows].add_(partial_RD)
        return
    y_TD.index_add_(0, torch.from_numpy(row_R.astype(np.int64)), partial_RD.float())


def finish(y_TD: Tensor, shared_TD: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """The block's output: routed sum plus shared expert, added in fp32, rounded once to the request's dtype.

    Args:
        y_TD: fp32 sum of all partials; may be overwritten.
        shared_TD: output of the shared expert, None where the model has none.
        dtype: of the hidden states the request sent.
    """
    if shared_TD is not None:
        y_TD += shared_TD
    return y_TD.to(dtype)
