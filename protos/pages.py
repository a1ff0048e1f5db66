"""Memory for weights: pages of their own, beside malloc's heap.

Loading alternates between buffers of megabytes that go and weights that stay. On the heap each weight would pin the
hole that a buffer leaves, and servers keep malloc from returning memory (`protos/loops.py`): they would hold up to five
times their weights. Pages are also the system's again the moment the last tensor in them is freed.
"""

import math
import mmap

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes: a cache line, and what torch gives its own tensors


def paged_tensors(*wanted: tuple[tuple[int, ...], torch.dtype], device: torch.device | None = None) -> list[Tensor]:
    """Uninitialised tensors of these (shape, dtype), in one mapping: a process may have some 65,000.

    Where `device` is a GPU, which has no such heap, they are ordinary ones.
    """
    if device is not None and device.type != "cpu":
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in wanted]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in wanted]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    num_bytes = starts[-2] + sizes[-1]
    pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    bytes_B = torch.frombuffer(pages, dtype=torch.uint8)
    return [
        bytes_B[start : start + size].view(dtype).view(shape)
        for (shape, dtype), start, size in zip(wanted, starts, sizes, strict=False)
    ]
