"""Small floats with a scale for each block: FP8 (E4M3), and FP4 (E2M1) as DeepSeek-V4 and gpt-oss store it.

A weight is its own value times the scale of its block, both exact in float32, rounded once. Blocks start at the
matrix's first element, and the last one of a row or column may be cut off: the grid of scales is the ceiling of the
division. (transformers' dequantisation derives the block from the grid instead, which is wrong for other sizes.)

torch converts these dtypes one element at a time. Moving their bits into a float16 with the same mantissa, then
multiplying by the difference of the exponents' biases, gives the same numbers six times faster.

Sources: FP8 formats arXiv:2209.05433; block scales of DeepSeek-V3 arXiv:2412.19437, section 3.3; E2M1 and E8M0: OCP
Microscaling Formats v1.0. Shapes: R rows, C columns.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from protos.errors import CorruptWeights
from protos.pages import paged_tensors
from protos.quantised import (
    PLAIN_FLOATS,
    Expected,
    Piece,
    WeightFormat,
    finite_float32,
    multiply_blocks,
    row_chunks,
)

# DeepSeek names scales after the quantiser's view (the inverse of what it multiplied by); all of them multiply here.
_SCALE = Piece(
    name="scale",
    linear=(".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight"),
    stacked=("_scale_inv", "_scale", "_weight_scale"),
)
_ACTIVATION_SCALE = Piece(
    name="activation scale",
    linear=(".activation_scale", ".input_scale", ".qscale_act"),
    stacked=("_activation_scale", "_input_scale"),
    use="unused",
)
_WEIGHT = Piece(name="weight", linear=(".weight",), stacked=("",))
_SCALE_DTYPES = (*PLAIN_FLOATS, "F8_E8M0", "U8")
_FP8_MAX = 448.0
_FP4_MAX = 6.0
_FP4_GROUP = 32  # weights of a row that share a scale, by definition of the MX formats


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Blocks(WeightFormat):
    """FP8 E4M3 with one scale for each block of [rows, columns]; 0 stands for the whole row or column."""

    block: tuple[int, int]

    @property
    def words(self) -> str:
        if self.block == (0, 0):
            return "FP8, one scale"
        rows, columns = (size or "all" for size in self.block)
        return f"FP8, one scale for {rows} x {columns} weights"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (_WEIGHT, _SCALE, _ACTIVATION_SCALE)

    def expected(self, rows: int, columns: int) -> Mapping[str, Expected]:
        grid = self._grid(rows, columns)
        shapes: list[tuple[int, ...]] = [grid]
        if self.block[1] == 0:
            shapes.append(grid[:1])
        if self.block == (0, 0):
            shapes.append(())
        return {
            "weight": Expected(("F8_E4M3",), ((rows, columns),)),
            "scale": Expected(_SCALE_DTYPES, tuple(shapes)),
        }

    def decode(self, pieces: Mapping[str, Tensor], rows: int, columns: int, *, name: str) -> Tensor:
        scale = finite_float32(pieces["scale"], name=name).reshape(self._grid(rows, columns))
        code_RC = pieces["weight"].view(torch.int8)

        def values(chunk: slice) -> Tensor:
            # seeeemmm, its sign extended, to s0eeeemmm0000000
            half = code_RC[chunk].to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
            # 0x7F and 0xFF, which come out as the next number after the largest
            if max(abs(bound.item()) for bound in torch.aminmax(half)) * 2**8 > _FP8_MAX:
                raise CorruptWeights(f"{name}: the FP8 weights hold NaN")
            return half

        block = (self.block[0] or rows, self.block[1] or columns)
        return _scaled(values, 2.0**8, _FP8_MAX, scale, block, rows, columns, name=name)

    def _grid(self, rows: int, columns: int) -> tuple[int, int]:
        return (
            math.ceil(rows / self.block[0]) if self.block[0] else 1,
            math.ceil(columns / self.block[1]) if self.block[1] else 1,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp4Blocks(WeightFormat):
    """DeepSeek-V4's experts: two E2M1 in a byte, the earlier one in the low half, one scale for 32 of a row."""

    @property
    def words(self) -> str:
        return f"FP4, one scale for 1 x {_FP4_GROUP} weights"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (_WEIGHT, _SCALE, _ACTIVATION_SCALE)

    def expected(self, rows: int, columns: int) -> Mapping[str, Expected]:
        whole = columns % _FP4_GROUP == 0
        return {
            "weight": Expected(("I8",), ((rows, columns // 2),) if whole else ()),
            "scale": Expected(_SCALE_DTYPES, ((rows, columns // _FP4_GROUP),) if whole else ()),
        }

    def decode(self, pieces: Mapping[str, Tensor], rows: int, columns: int, *, name: str) -> Tensor:
        return _decode_fp4(pieces["weight"].view(torch.uint8), pieces["scale"], rows, columns, name=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4(WeightFormat):
    """gpt-oss: as `Fp4Blocks`, with the bytes of a block as a dimension of their own. Experts only, and stacked.

    transformers holds the transpose of what `decode` gives ([in, out]); the values are the same.
    """

    @property
    def words(self) -> str:
        return f"MXFP4, one scale for 1 x {_FP4_GROUP} weights"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (
            Piece(name="blocks", linear=(), stacked=("_blocks",)),
            Piece(name="scales", linear=(), stacked=("_scales",)),
        )

    def expected(self, rows: int, columns: int) -> Mapping[str, Expected]:
        num_groups = columns // _FP4_GROUP
        whole = columns % _FP4_GROUP == 0
        return {
            "blocks": Expected(("U8",), ((rows, num_groups, _FP4_GROUP // 2),) if whole else ()),
            "scales": Expected(("U8", "F8_E8M0"), ((rows, num_groups),) if whole else ()),
        }

    def decode(self, pieces: Mapping[str, Tensor], rows: int, columns: int, *, name: str) -> Tensor:
        return _decode_fp4(pieces["blocks"].reshape(rows, columns // 2), pieces["scales"], rows, columns, name=name)


def _decode_fp4(packed: Tensor, scale: Tensor, rows: int, columns: int, *, name: str) -> Tensor:
    def values(chunk: slice) -> Tensor:
        # Two nibbles seem of a byte to two halves s000eem000000000 of a word, the low nibble to the low half: the
        # product has the byte at bits 9 and 21, so that em.. comes to bits 9-11 and 25-27, and three bits further s.
        word = packed[chunk].to(torch.int32).mul_(1 << 9 | 1 << 21)
        sign = word.bitwise_left_shift(3).bitwise_and_(-0x7FFF8000)  # 0x80008000 as a signed number
        return word.bitwise_and_(0x0E000E00).bitwise_or_(sign).view(torch.float16)

    scale_RG = finite_float32(scale, name=name)
    return _scaled(values, 2.0**14, _FP4_MAX, scale_RG, (1, _FP4_GROUP), rows, columns, name=name)


def _scaled(
    values: Callable[[slice], Tensor],
    factor: float,
    largest: float,
    scale: Tensor,
    block: tuple[int, int],
    rows: int,
    columns: int,
    *,
    name: str,
) -> Tensor:
    """values(rows) x factor x the scale of each block, float32; |values x factor| <= largest."""
    out_RC = paged_tensors(((rows, columns), torch.float32))[0]
    # float32 holds 448 x any float16 scale; only scales near its own limit need a look at every product
    may_overflow = scale.abs().amax().item() * largest > torch.finfo(torch.float32).max
    for chunk in row_chunks(rows, columns):
        out = out_RC[chunk].copy_(values(chunk)).mul_(factor)
        block_of_row = torch.arange(chunk.start, chunk.stop).div_(block[0], rounding_mode="floor")
        multiply_blocks(out, scale[block_of_row], block[1])
        if may_overflow and not out.isfinite().all():
            raise CorruptWeights(f"{name}: weights times scales exceed float32")
    return out_RC
