"""Small integers with a scale, and mostly a zero point, for each group of a row: GPTQ, AWQ, compressed-tensors.

A weight is (code - zero point) x scale. The formats differ in how codes lie in 32-bit words, in where the zero points
are, and in orientation: GPTQ and AWQ store the transpose [in, out].

Sources: GPTQ arXiv:2210.17323 and AutoGPTQ's QuantLinear (v1), GPTQModel (v2); AWQ arXiv:2306.00978 and AutoAWQ's
WQLinear_GEMM; compressed-tensors' pack_to_int32. Shapes: R rows (out), C columns (in), G groups of a row.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

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
    subtract_blocks,
)

_AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the code of each of its eight rows is


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grouped(WeightFormat):
    """bits of a code; group_size: columns that share a scale, 0 for all of a row."""

    bits: int
    group_size: int

    def _num_groups(self, columns: int) -> int:
        return math.ceil(columns / self.group_size) if self.group_size else 1

    def _num_words(self, num_codes: int) -> int:
        return math.ceil(num_codes * self.bits / 32)

    @property
    def _groups(self) -> str:
        return f"one scale for {self.group_size or 'all'} columns"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(_Grouped):
    """GPTQ: codes packed along the columns, a column's group in g_idx.

    zeros: what qzeros hold. "plain": the zero point (v2). "less one": the zero point - 1 (v1). "borrowed": v1 as
        GPTQModel writes it, subtracting 1 from each code of a word in one subtraction, so that a zero point of 0
        borrows from its neighbour and only the same addition restores both.
    symmetric: every zero point is half the codes' range. Whichever of the two conventions qzeros follow is then
        plain from their value: files are about that "checkpoint_format" misnames.
    act_order: groups are not consecutive columns, so that g_idx must be there. Where it is, it decides in any case.

    AutoGPTQ gave every layer a bias, of zeros where the model has none. A piece of that name must be zero.
    """

    symmetric: bool
    zeros: Literal["plain", "less one", "borrowed"]
    act_order: bool

    @property
    def words(self) -> str:
        return f"GPTQ int{self.bits}, {self._groups}{', in activation order' if self.act_order else ''}"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (
            Piece(name="qweight", linear=(".qweight",)),
            Piece(name="qzeros", linear=(".qzeros",)),
            Piece(name="scales", linear=(".scales",)),
            Piece(name="g_idx", linear=(".g_idx",), use="required" if self.act_order else "optional"),
            Piece(name="bias", linear=(".bias",), use="optional"),
        )

    def expected(self, rows: int, columns: int) -> Mapping[str, Expected]:
        num_groups = self._num_groups(columns)
        return {
            "qweight": Expected(("I32",), ((self._num_words(columns), rows),)),
            "qzeros": Expected(("I32",), ((num_groups, self._num_words(rows)),)),
            "scales": Expected(PLAIN_FLOATS, ((num_groups, rows),)),
            "g_idx": Expected(("I32", "I64"), ((columns,),)),
            "bias": Expected(PLAIN_FLOATS, ((rows,),)),
        }

    def decode(self, pieces: Mapping[str, Tensor], rows: int, columns: int, *, name: str) -> Tensor:
        if (bias_R := pieces.get("bias")) is not None and bias_R.any():
            raise CorruptWeights(f"{name}: its bias is not zero, but config.json describes a model without biases")
        packed_RW = pieces["qweight"].T.contiguous()
        return _dequantise(
            lambda chunk: _codes(packed_RW[chunk], self.bits)[:, :columns],
            zero_RG=self._zero_points(pieces["qzeros"], rows, name=name).T.float(),
            scale_RG=finite_float32(pieces["scales"].T, name=name),
            group=self._group_of_columns(pieces.get("g_idx"), columns, name=name),
            rows=rows,
            columns=columns,
            name=name,
        )

    def _zero_points(self, qzeros: Tensor, rows: int, *, name: str) -> Tensor:
        stored_GR = _codes(qzeros, self.bits)[:, :rows]
        middle = 1 << self.bits - 1
        if self.symmetric:
            if not any((stored_GR == one).all() for one in (middle - 1, middle)):
                raise CorruptWeights(
                    f"{name}: quantization_config.sym is true, but not every zero point in qzeros is {middle} "
                    f"(stored as {middle - 1} or {middle})"
                )
            return torch.full_like(stored_GR, middle)
        if self.zeros == "plain":
            return stored_GR
        if self.zeros == "less one" and (stored_GR == (1 << self.bits) - 1).any():
            raise CorruptWeights(
                f"{name}: qzeros holds {(1 << self.bits) - 1}, a zero point that checkpoint_format gptq cannot express "
                "and tools read differently (supported: the same checkpoint as gptq_v2)"
            )
        return _codes(qzeros + (0x11111111 if self.bits == 4 else 0x01010101), self.bits)[:, :rows]

    def _group_of_columns(self, g_idx: Tensor | None, columns: int, *, name: str) -> Tensor | int:
        width = self.group_size or columns
        if g_idx is None:
            return width
        num_groups = self._num_groups(columns)
        if not 0 <= g_idx.min().item() <= g_idx.max().item() < num_groups:
            raise CorruptWeights(f"{name}: g_idx names a group outside 0..{num_groups - 1}")
        return width if torch.equal(g_idx.long(), torch.arange(columns) // width) else g_idx.long()


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq(_Grouped):
    """AWQ in AutoAWQ's "gemm" layout: codes packed along the rows, eight in a word in the order 0 2 4 6 1 3 5 7."""

    @property
    def words(self) -> str:
        return f"AWQ int{self.bits}, {self._groups}"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (
            Piece(name="qweight", linear=(".qweight",)),
            Piece(name="qzeros", linear=(".qzeros",)),
            Piece(name="scales", linear=(".scales",)),
        )

    def expected(self, rows: int, columns: int) -> Mapping[str, Expected]:
        num_groups = self._num_groups(columns)
        words = rows // 8
        return {
            "qweight": Expected(("I32",), ((columns, words),) if rows % 8 == 0 else ()),
            "qzeros": Expected(("I32",), ((num_groups, words),) if rows % 8 == 0 else ()),
            "scales": Expected(PLAIN_FLOATS, ((num_groups, rows),)),
        }

    def decode(self, pieces: Mapping[str, Tensor], rows: int, columns: int, *, name: str) -> Tensor:
        packed_WC = pieces["qweight"].T.contiguous()
        shift = torch.tensor(_AWQ_NIBBLE, dtype=torch.int32)[None, :, None] * 4

        def unpack(words_WN: Tensor) -> Tensor:
            return ((words_WN[:, None] >> shift) & 15).flatten(0, 1)

        return _dequantise(
            lambda chunk: unpack(packed_WC[chunk.start // 8 : chunk.stop // 8]),
            zero_RG=unpack(pieces["qzeros"].T).float(),
            scale_RG=finite_float32(pieces["scales"].T, name=name),
            group=self.group_size or columns,
            rows=rows,
            columns=columns,
            name=name,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedIntegers(_Grouped):
    """compressed-tensors "pack-quantized": codes packed along the columns; zero points, if any, along the rows."""

    symmetric: bool

    @property
    def words(self) -> str:
        return f"packed int{self.bits}, {self._groups}"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        zero_point = Piece(name="zero_point", linear=(".weight_zero_point",))
        return (
            Piece(name="packed", linear=(".weight_packed",)),
            Piece(name="scale", linear=(".weight_scale",)),
            *(() if self.symmetric else (zero_point,)),
            Piece(name="shape", linear=(".weight_shape",), use="optional"),
            Piece(name="activation scale", linear=(".input_scale",), use="unused"),
            Piece(name="activation zero point", linear=(".input_zero_point",), use="unused"),
        )

    def expected(self, rows: int, columns: int) -> Mapping[str, Expected]:
        num_groups = self._num_groups(columns)
        expected = {
            "packed": Expected(("I32",), ((rows, self._num_words(columns)),)),
            "scale": Expected(PLAIN_FLOATS, ((rows, num_groups), *(() if self.group_size else ((rows,),)))),
            "shape": Expected(("I64", "I32"), ((2,),)),
        }
        if not self.symmetric:
            expected["zero_point"] = Expected(("I32",), ((self._num_words(rows), num_groups),))
        return expected

    def decode(self, pieces: Mapping[str, Tensor], rows: int, columns: int, *, name: str) -> Tensor:
        if (shape := pieces.get("shape")) is not None and shape.tolist() != [rows, columns]:
            raise CorruptWeights(f"{name}: weight_shape is {shape.tolist()}, expected {[rows, columns]}")
        num_groups = self._num_groups(columns)
        if self.symmetric:  # codes are stored from 0, zero points in the middle
            zero_RG = torch.full((rows, num_groups), float(1 << self.bits - 1))
        else:
            zero_RG = _codes(pieces["zero_point"].T, self.bits)[:, :rows].T.float()
        packed_RW = pieces["packed"]
        return _dequantise(
            lambda chunk: _codes(packed_RW[chunk], self.bits)[:, :columns],
            zero_RG=zero_RG,
            scale_RG=finite_float32(pieces["scale"], name=name).reshape(rows, num_groups),
            group=self.group_size or columns,
            rows=rows,
            columns=columns,
            name=name,
        )


def _codes(words_NW: Tensor, bits: int) -> Tensor:
    """Codes 0..2^bits - 1 [N, W * 32 / bits] of int32 words, lowest bits first (safetensors are little-endian)."""
    code_NB = words_NW.contiguous().view(torch.uint8)
    if bits == 8:
        return code_NB
    pair = code_NB.to(torch.int16)
    return pair.bitwise_left_shift(4).bitwise_or_(pair).bitwise_and_(0x0F0F).view(torch.uint8)


def _dequantise(
    codes: Callable[[slice], Tensor],
    *,
    zero_RG: Tensor,
    scale_RG: Tensor,
    group: Tensor | int,
    rows: int,
    columns: int,
    name: str,
) -> Tensor:
    """(codes(rows) - zero) x scale, float32; group: the group of each column [C], or how many columns one has."""
    out_RC = paged_tensors(((rows, columns), torch.float32))[0]
    for chunk in row_chunks(rows, columns, multiple=8):
        out = out_RC[chunk].copy_(codes(chunk))
        if isinstance(group, int):
            subtract_blocks(out, zero_RG[chunk], group)
            multiply_blocks(out, scale_RG[chunk], group)
        else:
            out.sub_(zero_RG[chunk].index_select(1, group)).mul_(scale_RG[chunk].index_select(1, group))
    if scale_RG.abs().amax().item() * 255 > torch.finfo(torch.float32).max:
        raise CorruptWeights(f"{name}: weights times scales exceed float32")
    return out_RC
