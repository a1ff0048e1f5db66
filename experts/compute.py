"""Grouped expert compute: sort the routed pairs by expert, one pair of GEMMs per expert, weighted partial sums.

The layout follows MegaBlocks' grouped GEMM (arXiv:2211.15841): rows of one expert are contiguous and nothing is
padded or dropped. On a CPU a loop over the experts' segments is that grouped GEMM.

Shapes: D model dim, F expert hidden dim, R token rows, P routed (row, expert) pairs.
"""

import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from experts.weights import ExpertCopy

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


@torch.no_grad()
def partial_sums(
    x_RD: Tensor,
    pair_row_P: Int32Array,
    pair_expert_P: Int32Array,
    pair_weight_P: Float32Array,
    copies: Mapping[int, ExpertCopy],
) -> Tensor:
    """Sum over each row's pairs of weight * expert(x), in fp32.

    Args:
        x_RD: hidden states, any float dtype; computed in the dtype and on the device of the copies.
        pair_row_P: row of each pair, 0..R-1.
        pair_expert_P: expert of each pair, every one a key of `copies`.
        pair_weight_P: gate weight of each pair.
        copies: the experts' weights.

    Returns:
        partial_RD on the CPU, float32. Rows without a pair are zero.
    """
    first = next(iter(copies.values())).w13_2FD
    x_RD = x_RD.to(first.device, first.dtype)
    num_rows = x_RD.shape[0]
    if num_rows == 1:
        partial_RD = _one_row(x_RD, pair_expert_P, pair_weight_P, copies)
    else:
        partial_RD = torch.zeros(num_rows, x_RD.shape[1], dtype=torch.float32, device=x_RD.device)
        order_P = np.argsort(pair_expert_P, kind="stable")
        experts, starts = np.unique(pair_expert_P[order_P], return_index=True)
        row_P = torch.from_numpy(pair_row_P[order_P].astype(np.int64)).to(x_RD.device)
        weight_P1 = torch.from_numpy(pair_weight_P[order_P]).unsqueeze(1).to(x_RD.device)
        bounds = [*starts.tolist(), len(order_P)]
        for i, expert in enumerate(experts.tolist()):
            segment = slice(bounds[i], bounds[i + 1])
            row_n = row_P[segment]
            y_nD = _swiglu(x_RD.index_select(0, row_n), copies[expert])
            copies[expert].tokens += bounds[i + 1] - bounds[i]
            partial_RD.index_add_(0, row_n, y_nD.float().mul_(weight_P1[segment]))
    return partial_RD.cpu()


def _one_row(
    x_1D: Tensor, pair_expert_P: Int32Array, pair_weight_P: Float32Array, copies: Mapping[int, ExpertCopy]
) -> Tensor:
    """A single token: no sorting, gathering or scattering."""
    total_1D: Tensor | None = None
    for expert, weight in zip(pair_expert_P.tolist(), pair_weight_P.tolist(), strict=True):
        y_1D = _swiglu(x_1D, copies[expert]).float().mul_(weight)
        copies[expert].tokens += 1
        total_1D = y_1D if total_1D is None else total_1D.add_(y_1D)
    assert total_1D is not None, "a request has at least one pair"
    return total_1D


def _swiglu(x_nD: Tensor, copy: ExpertCopy) -> Tensor:
    gate_nF, up_nF = F.linear(x_nD, copy.w13_2FD).chunk(2, dim=-1)
    return F.linear(F.silu(gate_nF).mul_(up_nF), copy.w2_DF)


def choose_compute_dtype(
    wanted: str, checkpoint_dtype: torch.dtype, *, device: torch.device, dim: int, hidden_dim: int, rows: int = 64
) -> torch.dtype:
    """The dtype of the expert GEMMs.

    `auto` keeps fp32 checkpoints in fp32. For 16-bit checkpoints on a CPU it times one expert in both dtypes on
    `rows` rows and takes the faster: without AMX or AVX512-BF16, bf16 GEMMs are 3-4 times slower than fp32.

    Args:
        wanted: "auto", "float32" or "bfloat16".
        checkpoint_dtype: of the expert tensors.
    """
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    if checkpoint_dtype == torch.float32:
        return torch.float32
    if device.type != "cpu":
        return checkpoint_dtype
    return min((torch.bfloat16, torch.float32), key=lambda dtype: _time_expert(dtype, dim, hidden_dim, rows))


def _time_expert(dtype: torch.dtype, dim: int, hidden_dim: int, rows: int) -> float:
    copy = ExpertCopy(
        w13_2FD=torch.zeros(2 * hidden_dim, dim, dtype=dtype), w2_DF=torch.zeros(dim, hidden_dim, dtype=dtype)
    )
    x_RD = torch.zeros(rows, dim, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        with torch.no_grad():
            _swiglu(x_RD, copy)
        times.append(time.perf_counter() - start)
    return min(times)
