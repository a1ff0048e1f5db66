"""A copy as the tensors it consists of: their names, dtypes and shapes, and their bytes as they lie in memory.

What travels between servers is described in these terms, and compared with what the receiver expects.
"""

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from experts.packed import Matrix, PackedMatrix, WeightDtype, empty_packed
from experts.weights import ExpertCopy
from protos.model import ModelSpec
from protos.pages import paged_tensors

Form = tuple[tuple[str, str, tuple[int, ...]], ...]  # (name, torch's dtype name, shape) of each tensor, in order


def named_tensors(copy: ExpertCopy) -> dict[str, Tensor]:
    """The tensors of a copy by name, in the order in which they travel."""
    found: dict[str, Tensor] = {}
    for name, matrix in (("up", copy.up), ("down", copy.down)):
        if isinstance(matrix, PackedMatrix):
            found |= {f"{name}.codes": matrix.codes, f"{name}.scales": matrix.scales}
        else:
            found[name] = matrix
    biases = {"up_bias": copy.up_bias, "down_bias": copy.down_bias}
    return found | {name: bias for name, bias in biases.items() if bias is not None}


def form_of(copy: ExpertCopy) -> Form:
    """What the copy consists of."""
    return tuple((name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in named_tensors(copy).items())


def empty_copy(spec: ModelSpec, layer: str, dtype: torch.dtype, weight_dtype: WeightDtype | None) -> ExpertCopy:
    """A copy of the form that `load_expert` gives, on the CPU, its memory not filled yet.

    Args:
        dtype: of the activations, and of the weights unless they are packed.
        weight_dtype: how the matrices are packed; None: plain.
    """
    form = spec.blocks[layer].form
    rows = spec.hidden_dim * (2 if form.gated else 1)
    up, down = (rows, spec.expert_dim), (spec.expert_dim, spec.hidden_dim)
    biases: list[tuple[int, ...]] = [(rows,), (spec.expert_dim,)] if form.biases else []
    plain: list[tuple[int, ...]] = [up, down] if weight_dtype is None else []
    tensors = iter(paged_tensors(*((shape, dtype) for shape in (*plain, *biases))) if plain or biases else ())

    def matrix(shape: tuple[int, int]) -> Matrix:
        if weight_dtype is None:
            return next(tensors)
        return empty_packed(shape, weight_dtype, dtype=dtype, device=torch.device("cpu"))

    return ExpertCopy(
        up=matrix(up), down=matrix(down), form=form, up_bias=next(tensors, None), down_bias=next(tensors, None)
    )


def moved(copy: ExpertCopy, device: torch.device) -> ExpertCopy:
    """The copy on another device; itself if it is there."""
    if copy.device.type == device.type == "cpu":
        return copy

    def matrix(weight: Matrix) -> Matrix:
        if isinstance(weight, Tensor):
            return weight.to(device)
        return PackedMatrix(
            weight_dtype=weight.weight_dtype,
            shape=weight.shape,
            dtype=weight.dtype,
            codes=weight.codes.to(device),
            scales=weight.scales.to(device),
        )

    return ExpertCopy(
        up=matrix(copy.up),
        down=matrix(copy.down),
        form=copy.form,
        up_bias=None if copy.up_bias is None else copy.up_bias.to(device),
        down_bias=None if copy.down_bias is None else copy.down_bias.to(device),
        checksum=copy.checksum,
    )


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, as a view."""
    return tensor.view(-1).view(torch.uint8)


def pieces(copy: ExpertCopy, max_bytes: int) -> Iterator[memoryview]:
    """The bytes of a copy in order, in pieces of one tensor each; those of a GPU's memory come one piece at a time."""
    for tensor in named_tensors(copy).values():
        flat_B = raw(tensor)
        for begin in range(0, len(flat_B), max_bytes):
            yield flat_B[begin : begin + max_bytes].cpu().numpy().data


def checksum(copy: ExpertCopy) -> int:
    """CRC-32 of all bytes of a copy, computed once: weights never change. 1.9 GB/s, other threads run meanwhile."""
    if copy.checksum is None:
        crc = 0
        for piece in pieces(copy, 1 << 20):
            crc = zlib.crc32(piece, crc)
        copy.checksum = crc
    return copy.checksum


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
