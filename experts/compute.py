"""Grouped expert compute: sort the routed pairs by expert, one pair of GEMMs per expert, weighted partial sums.

The layout follows MegaBlocks' grouped GEMM (arXiv:2211.15841): rows of one expert are contiguous and nothing is
padded or dropped. On a CPU a loop over the experts' segments is that grouped GEMM.

Shapes: D width of the rows (the model dim, or less between latent projections), F expert hidden dim, I = 2F rows of
gate over up (F without a gate), R token rows, n rows of one expert, P routed (row, expert) pairs.
"""

import time
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts.forms import run_expert
from experts.weights import ExpertCopy
from protos.model import ExpertForm

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


@torch.no_grad()
def partial_sums(
    x_RD: Tensor,
    pair_row_P: Int32Array,
    pair_expert_P: Int32Array,
    pair_weight_P: Float32Array,
    copies: Mapping[int, ExpertCopy],
) -> Float32Array:
    """Sum over each row's pairs of weight * expert(x), in fp32.

    Args:
        x_RD: hidden states, any float dtype; computed in the dtype and on the device of the copies.
        pair_row_P: row of each pair, 0..R-1.
        pair_expert_P: expert of each pair, every one a key of `copies`.
        pair_weight_P: gate weight of each pair.
        copies: the experts' weights.

    Returns:
        partial_RD. Rows without a pair are zero.
    """
    first = next(iter(copies.values()))
    if x_RD.dtype is not first.dtype or first.device.type != "cpu":
        x_RD = x_RD.to(first.device, first.dtype)
    if x_RD.shape[0] == 1 and not first.form.weighs_input:
        return _one_row(x_RD, pair_expert_P, pair_weight_P, copies)
    partial_RD = torch.zeros(x_RD.shape, dtype=torch.float32, device=x_RD.device)
    order_P = np.argsort(pair_expert_P, kind="stable")
    experts, starts = np.unique(pair_expert_P[order_P], return_index=True)
    row_P = torch.from_numpy(pair_row_P[order_P].astype(np.int64)).to(x_RD.device)
    weight_P1 = torch.from_numpy(pair_weight_P[order_P]).unsqueeze(1).to(x_RD.device)
    for expert, (start, end) in zip(experts.tolist(), pairwise([*starts.tolist(), len(order_P)]), strict=True):
        copy, row_n, weight_n1 = copies[expert], row_P[start:end], weight_P1[start:end]
        copy.tokens += end - start
        x_nD = x_RD.index_select(0, row_n)
        if copy.form.weighs_input:
            y_nD = run_expert(x_nD * weight_n1.to(x_nD.dtype), copy).float()
        else:
            y_nD = run_expert(x_nD, copy).float().mul_(weight_n1)
        partial_RD.index_add_(0, row_n, y_nD)
    summed_RD: Float32Array = partial_RD.cpu().numpy()
    return summed_RD


def _one_row(
    x_1D: Tensor, pair_expert_P: Int32Array, pair_weight_P: Float32Array, copies: Mapping[int, ExpertCopy]
) -> Float32Array:
    """A single token, where latency counts: no sorting, gathering or scattering, and the sum in numpy."""
    total_1D: Float32Array | None = None
    for expert, weight_1 in zip(pair_expert_P.tolist(), pair_weight_P, strict=True):
        y_1D = run_expert(x_1D, copies[expert])
        copies[expert].tokens += 1
        y: Float32Array = (y_1D if y_1D.dtype is torch.float32 else y_1D.float()).cpu().numpy() * weight_1
        total_1D = y if total_1D is None else total_1D + y
    assert total_1D is not None, "a request has at least one pair"
    return total_1D


def choose_compute_dtype(
    wanted: str,
    checkpoint_dtype: torch.dtype,
    *,
    device: torch.device,
    dim: int,
    hidden_dim: int,
    packed: bool = False,
    rows: int = 64,
) -> torch.dtype:
    """The dtype of the expert GEMMs.

    `auto` keeps fp32 checkpoints in fp32. For 16-bit checkpoints on a CPU it times one expert in both dtypes on
    `rows` rows and takes the faster: without AMX or AVX512-BF16, bf16 GEMMs are much slower than fp32 ones. Packed
    weights are computed in bf16: only for that do packed kernels win (docs/adr/0009), and packing costs more accuracy.

    Args:
        wanted: "auto", "float32" or "bfloat16".
        checkpoint_dtype: of the expert tensors.
        packed: whether the weights stay quantised in memory.
    """
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    if packed:
        return torch.bfloat16
    if checkpoint_dtype == torch.float32:
        return torch.float32
    if device.type != "cpu":
        return checkpoint_dtype
    return min((torch.bfloat16, torch.float32), key=lambda dtype: _time_expert(dtype, dim, hidden_dim, rows))


def _time_expert(dtype: torch.dtype, dim: int, hidden_dim: int, rows: int) -> float:
    copy = ExpertCopy(
        up=torch.zeros(2 * hidden_dim, dim, dtype=dtype),
        down=torch.zeros(dim, hidden_dim, dtype=dtype),
        form=ExpertForm(),
    )
    x_RD = torch.zeros(rows, dim, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        with torch.no_grad():
            run_expert(x_RD, copy)
        times.append(time.perf_counter() - start)
    return min(times)
