"""Weight matrices that stay quantised in memory: packing on load, and products with them.

Three formats, all with scales in bf16, whatever the GEMMs compute in:

    int8  one scale per output row, symmetric: w = scale * q, q in -127..127
    fp8   one scale per output row: w = scale * e4m3(q)
    int4  a scale and a zero point per row and group of columns: w = scale * (q - 8) + zero, q in 0..15

On a CPU a few bf16 rows go to torch's weight-only kernels, which read the packed bytes. Everything else unpacks blocks
of rows that stay in cache, and multiplies with each while it is there; docs/adr/0009 has the measurements. A GPU takes
the second way with larger blocks.

Shapes: R token rows, O output features, N input features, G groups of input features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from protos.errors import CorruptWeights, UnsupportedModel
from protos.pages import paged_tensors

WeightDtype = Literal["int8", "int4", "fp8"]

GROUP_SIZE = 64  # columns that share an int4 scale and zero point
_TILE = 64  # int4: rows packed together; byte j of a column of the tile has rows j (low nibble) and j + 32 (high)
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_PACK_ELEMENTS = 1 << 18  # of the source handled at a time while packing
_KERNEL_ROWS = {"int8": 24, "int4": 96, "fp8": 0}  # up to so many rows torch's packed kernels win
_BF16_ROWS = 24  # beyond so many rows a bf16 GEMM is worth rounding a block to bf16, where there is AMX


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedMatrix:
    """A quantised weight of shape [O, N] that acts in `linear` as a tensor of `dtype` does.

    `codes` is [O, N] for int8 and fp8. For int4 it is [O / 64, N, 32], two rows in a byte, and `scales` is [G, O, 2] of
    scale and zero point; O is padded to 64 rows there, and N to whole groups. That is the order in which torch's int4
    kernel reads them on a CPU with AVX512.
    """

    weight_dtype: WeightDtype
    shape: tuple[int, int]
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def padded_shape(self) -> tuple[int, int]:
        return (self.shape[0] if self.scales.ndim == 1 else self.scales.shape[1]), self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that stay in memory."""
        return self.codes.nbytes + self.scales.nbytes


Matrix = Tensor | PackedMatrix


def packed_bytes(rows: int, columns: int, weight_dtype: WeightDtype, *, group_size: int = GROUP_SIZE) -> int:
    """What `pack` keeps of a [rows, columns] matrix, in bytes."""
    if weight_dtype != "int4":
        return rows * columns + 2 * rows
    padded_rows, groups = -(-rows // _TILE) * _TILE, -(-columns // group_size)
    return padded_rows * groups * (group_size // 2 + 4)


def pack(
    weight_ON: Tensor, weight_dtype: WeightDtype, *, dtype: torch.dtype, group_size: int = GROUP_SIZE
) -> PackedMatrix:
    """Quantise a weight where it lies. Beside source and result only blocks of a few MB are allocated.

    Every element of the result is within half a quantisation step of its source.

    Args:
        weight_ON: of any float dtype.
        dtype: of the activations that will be multiplied with it: float32 or bfloat16.
        group_size: columns to an int4 scale: 32, 64, 128 or 256 (those torch's kernel knows).

    Raises:
        UnsupportedModel: `dtype` is neither float32 nor bfloat16.
        CorruptWeights: an element is not finite, or the range of a group is not.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise UnsupportedModel(f"weight_dtype {weight_dtype} computes in float32 or bfloat16, not in {name}")
    rows, columns = weight_ON.shape
    packed = empty_packed((rows, columns), weight_dtype, dtype=dtype, device=weight_ON.device, group_size=group_size)
    codes, scales = packed.codes, packed.scales
    step = _block_rows(columns, _PACK_ELEMENTS)
    (buffer_ON,) = paged_tensors(((min(step, rows), columns), torch.float32), device=weight_ON.device)
    for start in range(0, rows, step):
        block_ON = buffer_ON[: min(step, rows - start)].copy_(weight_ON[start : start + step])
        if weight_dtype == "int4":
            tiles = slice(start // _TILE, (start + step) // _TILE)
            _pack_groups(block_ON, codes[tiles], scales[:, start : start + step], group_size)
        else:
            _pack_rows(block_ON, codes[start : start + step], scales[start : start + step])
    # bf16 keeps inf and NaN, so the scales tell whether every element was finite.
    if not bool(torch.isfinite(scales).all()):
        raise CorruptWeights(f"a [{rows}, {columns}] weight has elements that are not finite, or beyond {weight_dtype}")
    return packed


def empty_packed(
    shape: tuple[int, int],
    weight_dtype: WeightDtype,
    *,
    dtype: torch.dtype,
    device: torch.device,
    group_size: int = GROUP_SIZE,
) -> PackedMatrix:
    """What `pack` makes of a weight of this shape, with memory for codes and scales that is not filled yet."""
    rows, columns = shape
    if weight_dtype == "int4":
        padded_rows, groups = -(-rows // _TILE) * _TILE, -(-columns // group_size)
        shapes: tuple[tuple[int, ...], ...] = (
            (padded_rows // _TILE, groups * group_size, _TILE // 2),
            (groups, padded_rows, 2),
        )
        code_dtype = torch.uint8
    else:
        shapes = ((rows, columns), (rows,))
        code_dtype = torch.int8 if weight_dtype == "int8" else torch.float8_e4m3fn
    (codes,) = paged_tensors((shapes[0], code_dtype), device=device)
    scales = torch.empty(shapes[1], dtype=torch.bfloat16, device=device)
    return PackedMatrix(weight_dtype=weight_dtype, shape=shape, dtype=dtype, codes=codes, scales=scales)


def dequantise(weight: Matrix) -> Tensor:
    """The whole matrix [O, N], unpacked to its compute dtype; a tensor is returned as it is."""
    if isinstance(weight, Tensor):
        return weight
    rows, columns = weight.shape
    weight_ON = torch.empty(rows, columns, dtype=weight.dtype, device=weight.device)
    row_scale_O = _row_scale(weight)
    for start, end, block_ON in _unpack(weight, torch.float32, _block_elements(weight, rows)):
        if row_scale_O is not None:
            block_ON.mul_(row_scale_O[start:end, None])
        weight_ON[start:end] = block_ON[: rows - start, :columns]
    return weight_ON


def linear(x_RN: Tensor, weight: Matrix, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` for weights that may be packed; no gradients.

    Packed weights give `F.linear(x_RN, dequantise(weight), bias_O)` up to rounding: activations are never quantised.

    Args:
        x_RN: in the dtype and on the device of the weight.

    Returns:
        y_RO in the dtype of `x_RN`.
    """
    if isinstance(weight, Tensor):
        return F.linear(x_RN, weight, bias_O)
    assert x_RN.dtype is weight.dtype, f"activations are {x_RN.dtype}, the weight computes in {weight.dtype}"
    out_features, in_features = weight.shape
    if padding := weight.padded_shape[1] - in_features:
        x_RN = F.pad(x_RN, (0, padding))
    y_RO = _kernel(x_RN, weight) if _has_kernel(x_RN, weight) else _unpacked_gemm(x_RN, weight)
    y_RO = y_RO[:, :out_features].contiguous()
    return y_RO if bias_O is None else y_RO + bias_O


def _pack_rows(block_ON: Tensor, codes_ON: Tensor, scales_O: Tensor) -> None:
    largest = _LARGEST["int8" if codes_ON.dtype is torch.int8 else "fp8"]
    low_O, high_O = torch.aminmax(block_ON, dim=1)
    scales_O.copy_(_scale(torch.maximum(-low_O, high_O) / largest))
    block_ON.div_(scales_O.float()[:, None]).clamp_(-largest, largest)
    codes_ON.copy_(block_ON.round_() if codes_ON.dtype is torch.int8 else block_ON)


def _pack_groups(block_ON: Tensor, codes: Tensor, scales_GO2: Tensor, group_size: int) -> None:
    groups, padded_rows, _ = scales_GO2.shape
    rows, columns = block_ON.shape
    block_ON = F.pad(block_ON, (0, groups * group_size - columns, 0, padded_rows - rows))
    block_OGg = block_ON.view(padded_rows, groups, group_size)
    # Zero lies in every group's range. So the zero point is at most 8 steps, and its rounding to bf16 1/64 of one.
    low_OG, high_OG = block_OGg.amin(dim=2).clamp_(max=0), block_OGg.amax(dim=2).clamp_(min=0)
    scale_OG = _scale((high_OG - low_OG) / 15).float()
    zero_OG = (low_OG + 8 * scale_OG).to(torch.bfloat16)
    scales_GO2.copy_(torch.stack((scale_OG, zero_OG.float()), dim=2).transpose(0, 1))
    block_OGg.sub_(zero_OG.float()[:, :, None]).div_(scale_OG[:, :, None]).add_(8).round_().clamp_(0, 15)
    codes.copy_(_tiles(block_ON.to(torch.uint8)))


def _tiles(nibbles_ON: Tensor) -> Tensor:
    """[O, N] of 0..15 in the order of `PackedMatrix.codes`."""
    nibbles = nibbles_ON.view(-1, 2, _TILE // 2, nibbles_ON.shape[1])
    return (nibbles[:, 0] | nibbles[:, 1] << 4).transpose(1, 2)


def _scale(exact: Tensor) -> Tensor:
    """A bf16 scale not below the exact one, so that the largest element stays in range; never zero."""
    return (exact * (1 + 2**-8)).clamp_(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)


def _has_kernel(x_RN: Tensor, weight: PackedMatrix) -> bool:
    """Whether torch's packed kernel is the faster way, and a safe one.

    The kernels are vectorised for bf16 alone: with fp32 activations they are 3 to 100 times slower. The int8 kernel
    runs out of bounds when 16 does not divide N.
    """
    if weight.device.type != "cpu" or x_RN.dtype is not torch.bfloat16:
        return False
    if not 0 < len(x_RN) <= _KERNEL_ROWS[weight.weight_dtype]:
        return False
    return weight.codes.shape[1] % 16 == 0 if weight.weight_dtype == "int8" else _kernel_reads_tiles()


def _kernel(x_RN: Tensor, weight: PackedMatrix) -> Tensor:
    x_RN = x_RN.contiguous()
    y_RO: Tensor
    if weight.weight_dtype == "int8":
        y_RO = torch.ops.aten._weight_int8pack_mm(x_RN, weight.codes, weight.scales)
    else:
        group_size = weight.codes.shape[1] // len(weight.scales)
        codes = weight.codes.view(weight.padded_shape[0], -1)
        y_RO = torch.ops.aten._weight_int4pack_mm_for_cpu(x_RN, codes, group_size, weight.scales)
    return y_RO


@cache
def _kernel_reads_tiles() -> bool:
    """Whether torch's int4 kernel reads our order of nibbles: its own is private and depends on the CPU, so we look."""
    nibbles = torch.arange(_TILE * 32, dtype=torch.int32).mul_(7).remainder_(16).view(_TILE, 32)
    theirs: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    return torch.equal(theirs.flatten(), _tiles(nibbles.to(torch.uint8)).flatten())


def _unpacked_gemm(x_RN: Tensor, weight: PackedMatrix) -> Tensor:
    """Unpacks a block of rows, multiplies with it, and takes the next."""
    gemm_dtype = x_RN.dtype
    if weight.device.type == "cpu" and not (len(x_RN) > _BF16_ROWS and _has_amx()):
        gemm_dtype = torch.float32
    x_RN = x_RN.to(gemm_dtype)
    y_RO = torch.empty(len(x_RN), weight.padded_shape[0], dtype=gemm_dtype, device=x_RN.device)
    for start, end, block_ON in _unpack(weight, gemm_dtype, _block_elements(weight, len(x_RN))):
        torch.mm(x_RN, block_ON.t(), out=y_RO[:, start:end])
    if (row_scale_O := _row_scale(weight)) is not None:
        # After the GEMM: int8 and e4m3 codes are exact in bf16, scaled weights would be rounded.
        y_RO.mul_(row_scale_O.to(gemm_dtype))
    return y_RO.to(weight.dtype)


@cache
def _has_amx() -> bool:
    """Without it a bf16 GEMM is no faster than the fp32 one: 1.5 times slower with AVX512-BF16, 4 times with AVX512."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _unpack(weight: PackedMatrix, dtype: torch.dtype, block_elements: int) -> Iterator[tuple[int, int, Tensor]]:
    """Row blocks (start, end, weight[start:end]) with their padding, not yet times `_row_scale`. One buffer for all."""
    rows, columns = weight.padded_shape
    step = min(_block_rows(columns, block_elements), rows)
    buffer_dtype = dtype if weight.weight_dtype == "int8" else torch.float32
    buffer = torch.empty(step * columns, dtype=buffer_dtype, device=weight.device)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        block = buffer[: (end - start) * columns]
        if weight.weight_dtype == "int4":
            block_ON = _unpack_groups(weight, start, end, block.view(columns, end - start))
        else:
            codes_ON = weight.codes[start:end]
            block_ON = block.view(codes_ON.shape)
            block_ON.copy_(codes_ON if weight.weight_dtype == "int8" else _halves(codes_ON))
        yield start, end, block_ON.to(dtype)


def _unpack_groups(weight: PackedMatrix, start: int, end: int, block_NO: Tensor) -> Tensor:
    groups = weight.scales.shape[0]
    codes = weight.codes[start // _TILE : end // _TILE].transpose(0, 1)
    halves = block_NO.view(block_NO.shape[0], -1, 2, _TILE // 2)
    halves[:, :, 0].copy_(codes & 15)
    halves[:, :, 1].copy_(codes >> 4)
    scale_GO, zero_GO = weight.scales[:, start:end].float().unbind(dim=2)
    offset_GO = zero_GO - 8 * scale_GO
    block_GgO = block_NO.view(groups, -1, end - start)
    torch.addcmul(offset_GO[:, None], block_GgO, scale_GO.contiguous()[:, None], out=block_GgO)
    return block_NO.t()


def _halves(codes: Tensor) -> Tensor:
    """e4m3 values times 2**-8 in fp16, subnormals too: the same bits behind a wider exponent.

    torch's own conversion goes element by element on a CPU and makes a product six times as long.
    """
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)
    return bits.view(torch.float16)


def _row_scale(weight: PackedMatrix) -> Tensor | None:
    """What a row of `_unpack` is still to be multiplied with."""
    if weight.weight_dtype == "int4":
        return None
    return weight.scales.float() * (1 if weight.weight_dtype == "int8" else 2**8)


def _block_rows(columns: int, elements: int) -> int:
    """Whole tiles of about so many elements, at least one."""
    return max(_TILE, elements // columns // _TILE * _TILE)


def _block_elements(weight: PackedMatrix, rows: int) -> int:
    """Few rows read a block once: it should be in the L2 cache. A GEMM of many rows has its own blocking."""
    if weight.device.type != "cpu":
        return 1 << 24
    return 1 << 17 if rows <= 16 else 1 << 21
